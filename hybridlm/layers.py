"""Small parts that mixers, FFNs and the model share.

Letters: b batch, t time, d model width, h heads, k key dim, v vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels.target import target_of
from jaxtyping import Array, Bool, Float, Int, Shaped

from hybridlm import config
from hybridlm.sharding import (
    axis_size,
    fold_time,
    folded_shape,
    is_time_cut,
    mesh_axes,
    out_sharding,
    param,
    per_device,
    position,
    unfold_time,
)


def fan_in_normal(scale: float, in_axis: int | tuple[int, ...] = 0) -> jax.nn.initializers.Initializer:
    """Normal with variance scale / fan-in; every axis outside `in_axis` but the last is a batch of matrices."""
    axes = (in_axis,) if isinstance(in_axis, int) else in_axis
    return jax.nn.initializers.variance_scaling(
        scale, "fan_in", "normal", in_axis=axes, out_axis=-1, batch_axis=tuple(range(min(axes)))
    )


def merge_tokens(x: Shaped[Array, "b t *rest"]) -> Shaped[Array, "bt *rest"]:
    """[b, t, ...] -> [b t, ...], the shape in which projections and what is elementwise between them are computed.

    XLA on CPU flattens the operands of a matmul anyway, and elementwise work fused with that reshape does not
    vectorise: the gradient of a gated MLP took 42 ms in three dimensions and 15 in two (4,096 tokens, width 128).
    """
    x = fold_time(x)
    return x.reshape(-1, *x.shape[2:])


def split_tokens(x: Shaped[Array, "bt *rest"], like: Shaped[Array, "b t *_"]) -> Shaped[Array, "b t *rest"]:
    """The inverse of `merge_tokens`, with the batch and time of `like`."""
    if is_time_cut(like):
        return unfold_time(x.reshape(*folded_shape(*like.shape[:2]), *x.shape[1:]))
    return x.reshape(*like.shape[:2], *x.shape[1:])


gradient_dtype = jax.make_user_context(None)
"""The dtype in which devices add up what each has of a weight's gradient; None is that of the activations."""


def contract(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."], *axes: str | None, dtype: Any = None
) -> Float[Array, "..."]:
    """einsum(equation, x, W) for a float32 parameter W, computed in x's dtype and summed in `dtype`, x's by default.

    `axes` are the logical axes of the result. The gradient of W is added up over devices in `gradient_dtype`.
    """
    dtype, out = dtype or x.dtype, out_sharding(*axes)
    if gradient_dtype.value in (None, x.dtype.name):
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=dtype, out_sharding=out)
    y: Any = _contract(equation, jnp.dtype(dtype).name, gradient_dtype.value, out, x, w)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _contract(equation: str, dtype: str, summed_in: str, out: Any, x: Array, w: Array) -> Array:
    return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=jnp.dtype(dtype), out_sharding=out)


def _contract_forward(equation: str, dtype: str, summed_in: str, out: Any, x: Array, w: Array) -> Any:
    return _contract(equation, dtype, summed_in, out, x, w), (x, w)


def _contract_backward(
    equation: str, dtype: str, summed_in: str, out: Any, operands: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = operands
    of_x, of_w, of_y = equation.replace("->", ",").split(",")
    at_x, at_w = (None if out is None else jax.typeof(a).sharding.spec for a in operands)
    narrow = w.astype(x.dtype)
    dx = jnp.einsum(f"{of_y},{of_w}->{of_x}", dy, narrow, preferred_element_type=x.dtype, out_sharding=at_x)
    sums = jnp.dtype(summed_in)
    if target_of().platform == "cpu":
        x, dy = x.astype(sums), dy.astype(sums)  # XLA on CPU has no float32 sums of some products of bfloat16
    dw = jnp.einsum(f"{of_x},{of_y}->{of_w}", x, dy, preferred_element_type=sums, out_sharding=at_w)
    return dx, dw.astype(w.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


def gather_weight(w: Float[Array, "..."], axis: int, logical: str, dtype: str) -> Float[Array, "..."]:
    """Inside `per_device`: all of a weight along `axis`, which is spread as `logical`; cast before it travels.

    Its gradient travels in `gradient_dtype`.
    """
    whole: Any = _gather_weight(w, axis, logical, dtype)
    return whole


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_weight(w: Array, axis: int, logical: str, dtype: str) -> Array:
    w, axes = w.astype(dtype), mesh_axes(logical)
    return jax.lax.all_gather(w, axes, axis=axis, tiled=True) if axes else w


def _gather_weight_forward(w: Array, axis: int, logical: str, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    empty = jnp.zeros((0,))  # of the dtypes that the gradient comes and travels in
    kept = empty.astype(w.dtype), empty.astype(gradient_dtype.value or dtype)
    return _gather_weight(w, axis, logical, dtype), kept


def _gather_weight_backward(
    axis: int, logical: str, dtype: str, kept: tuple[Array, Array], dw: Array
) -> tuple[Float[Array, "..."]]:
    of_w, of_sums = kept
    return (scatter_gradient(dw.astype(of_sums.dtype), axis, logical).astype(of_w.dtype),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


def scatter_gradient(dw: Float[Array, "..."], axis: int, logical: str) -> Float[Array, "..."]:
    """Inside `per_device`: the sum over the devices that a weight is spread over, each with its part along `axis`."""
    axes = mesh_axes(logical)
    return jax.lax.psum_scatter(dw, axes, scatter_dimension=axis, tiled=True) if axes else dw


def add_up_gradient(dw: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """Inside `per_device`: the sum over all devices of the batch, each with its rows of a weight spread as `embed`.

    It travels in `dtype`; where nothing travels, it stays as it is.
    """
    axes, rows = mesh_axes("batch"), mesh_axes("embed")
    if not axes:
        return dw
    dw = scatter_gradient(dw.astype(dtype), 0, "embed")
    copies = tuple(axis for axis in axes if axis not in rows)
    return jax.lax.psum(dw, copies) if copies else dw


def look_up(table: Float[Array, "v d"], tokens: Int[Array, "b t"], dtype: Any) -> Float[Array, "b t d"]:
    """table[tokens] in `dtype`, of a float32 parameter whose axes are ("vocab", None).

    Each device gathers its part of the vocabulary, and tokens stay where they are. In the backward pass it adds up the
    gradient of that part over its tokens in float32; the sum over devices is in `gradient_dtype`.
    """
    dtype = jnp.dtype(dtype).name
    x: Any = _look_up(table.shape[0], dtype, gradient_dtype.value or dtype, table, tokens)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _look_up(num_words: int, dtype: str, summed_in: str, table: Array, tokens: Array) -> Array:
    def of_device(table: Array, tokens: Array) -> Array:
        # Cast before it travels; where it does not, only what is looked up.
        whole = gather_weight(table, 0, "embed", dtype if mesh_axes("embed") else table.dtype.name)
        rows, here = _rows_of_device(tokens, num_words)
        x, parts = whole.at[rows].get().astype(dtype), mesh_axes("logits")
        return jax.lax.psum(jnp.where(here[..., None], x, 0), parts) if parts else x

    return per_device(of_device, (("vocab", None), ("batch", None)), ("batch", None, None))(table, tokens)


def _look_up_forward(num_words: int, dtype: str, summed_in: str, table: Array, tokens: Array) -> tuple[Array, Array]:
    return _look_up(num_words, dtype, summed_in, table, tokens), tokens


def _look_up_backward(num_words: int, dtype: str, summed_in: str, tokens: Array, dx: Array) -> tuple[Array, None]:
    def of_device(tokens: Array, dx: Array) -> Array:
        rows, here = _rows_of_device(tokens, num_words)
        zeros = jnp.zeros((num_words // axis_size("logits"), dx.shape[-1]), jnp.float32)
        # What lies behind the last row is dropped.
        dtable = zeros.at[jnp.where(here, rows, len(zeros))].add(dx.astype(jnp.float32))
        return add_up_gradient(dtable, summed_in).astype(jnp.float32)

    return per_device(of_device, (("batch", None), ("batch", None, None)), ("vocab", None))(tokens, dx), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _rows_of_device(tokens: Int[Array, "b t"], num_words: int) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Inside `per_device`: rows in what a device gathers of the vocabulary, and whether the tokens' are among them.

    The devices of `logits` have blocks in turn, one for each of those of `embed`.
    """
    devices = axis_size("logits")
    size = num_words // (axis_size("embed") * devices)
    block, row = jnp.divmod(tokens, size)
    return block // devices * size + row, block % devices == position("logits")


class Linear(nnx.Module):
    """y = x W (+ b) in x's dtype."""

    def __init__(self, rngs: nnx.Rngs, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool, scale: float = 1.0):
        self.w = param(rngs, (d_in, d_out), axes, fan_in_normal(scale))
        # The residual stream is not sharded over its width, whatever the weight is.
        self.out_axis = None if axes[1] == "embed" else axes[1]
        self.b = param(rngs, (d_out,), (self.out_axis,), nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "bt i"]) -> Float[Array, "bt o"]:
        y = contract("ni,io->no", x, self.w[...], "batch", self.out_axis)
        return y if self.b is None else y + self.b[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), computed in float32; `scale` starts at 0. Without `offset` x / rms(x) * scale, from 1.

    Both begin as the same function; their gradients are the same, too. Only what a checkpoint holds differs.
    """

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float, *, offset: bool = True):
        self.scale = param(rngs, (width,), (None,), nnx.initializers.zeros if offset else nnx.initializers.ones)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = 1.0 + self.scale[...] if self.offset else self.scale[...]
        return (normed * scale).astype(x.dtype)


def rope(
    x: Float[Array, "b t h k"],
    positions: Int[Array, "b t"],
    *,
    fraction: float,
    theta: float,
    scaling: config.Llama3Rope | None = None,
) -> Float[Array, "b t h k"]:
    """Rotate the first `fraction` of each head by its position (Su et al., 2021, arXiv:2104.09864).

    The rotated part is split in halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); angles are float32.
    """
    rotated = 2 * int(x.shape[-1] * fraction / 2)
    if rotated == 0:
        return x
    frequency = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    if scaling is not None:
        frequency = stretched(frequency, scaling)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # b t 1 k/2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)


def stretched(frequency: Float[Array, " k"], scaling: config.Llama3Rope) -> Float[Array, " k"]:
    """Frequencies, in radians per token, for contexts longer than those of training; see `config.Llama3Rope`."""
    turns = scaling.original_length * frequency / (2 * jnp.pi)  # within the original context
    share = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = jnp.clip(share, 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor
