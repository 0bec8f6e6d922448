"""Times the implementations of linear_scan on this machine, forward and forward with gradient.

    python kernels/benchmarks/linear_scan.py --batch 16 --tokens 1024 --channels 256

Prints milliseconds (best of several runs) and the ratio to the chunked tier; `associative` is
jax.lax.associative_scan with automatic differentiation, and `copy` reads a and x and writes one array of their size.
"""

import argparse
import time
from collections.abc import Callable

import jax
from hybridlm_kernels import linear_scan
from jax import Array


def associative(a: Array, x: Array) -> Array:
    """h_t = a_t h_{t-1} + x_t in log2(t) passes."""

    def compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(compose, (a, x), axis=1)[1]


def milliseconds(function: Callable[..., object], *operands: Array, repeats: int) -> float:
    """The best wall time of `repeats` calls after one that compiles."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*operands))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def with_gradient(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], object]:
    def run(a: Array, x: Array, dh: Array) -> object:
        h, vjp = jax.vjp(function, a, x)
        return h, vjp(dh)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    functions = {
        "chunked": lambda a, x: linear_scan(a, x, impl="chunked")[0],
        "reference": lambda a, x: linear_scan(a, x, impl="reference")[0],
        "associative": associative,
        "copy": lambda a, x: a + x,
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}")
    print("tokens  implementation   forward ms  ratio   with gradient ms  ratio")
    for tokens in args.tokens:
        shape = (args.batch, tokens, args.channels)
        keys = jax.random.split(jax.random.key(0), 3)
        a = jax.nn.sigmoid(jax.random.normal(keys[0], shape) + 2).astype(args.dtype)
        x, dh = (jax.random.normal(key, shape).astype(args.dtype) for key in keys[1:])
        base: tuple[float, float] | None = None
        for name, function in functions.items():
            forward = milliseconds(function, a, x, repeats=args.repeats)
            both = milliseconds(with_gradient(function), a, x, dh, repeats=args.repeats)
            base = base or (forward, both)
            print(
                f"{tokens:6d}  {name:15s} {forward:11.2f} {forward / base[0]:6.2f} {both:18.2f} {both / base[1]:6.2f}"
            )


if __name__ == "__main__":
    main()
