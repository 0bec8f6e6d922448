"""Complex numbers as (real part, imaginary part), for compilers of kernels that have none; (value,) is a real one."""

import jax.numpy as jnp
from jax import Array, lax

Planes = tuple[Array, ...]


def planes_of(array: Array) -> Planes:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def whole(planes: Planes) -> Array:
    return lax.complex(*planes) if len(planes) == 2 else planes[0]


def times(p: Planes, q: Planes, planes: int = 2) -> Planes:
    """The product, its real part alone if `planes` is 1."""
    if len(p) == 1 or len(q) == 1:
        return tuple(u * v for u in p for v in q)[:planes]
    return (p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0])[:planes]


def plus(p: Planes, q: Planes) -> Planes:
    p, q = sorted((p, q), key=len)
    return tuple(u + v for u, v in zip(p, q, strict=False)) + q[len(p) :]


def widen(planes: Planes, number: int) -> Planes:
    """With an imaginary part of zeros if `number` asks for two planes of a real value."""
    return planes + (jnp.zeros_like(planes[0]),) * (number - len(planes))
