"""The GPU kernels compile for an H200 without spilling, at the shapes of griffin_1b, of experts and of memories."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hybridlm_kernels.bench import static_gpu
from hybridlm_kernels.grouped_matmul import pallas_gpu as grouped_matmul
from hybridlm_kernels.linear_scan import pallas_gpu as linear_scan
from hybridlm_kernels.memory_lookup import pallas_gpu as memory_lookup
from hybridlm_kernels.rg_lru import pallas_gpu as rg_lru
from hybridlm_kernels.short_conv import pallas_gpu as short_conv
from jax.sharding import NamedSharding, PartitionSpec

pytestmark = pytest.mark.gpu_aot
T, D, TAPS = 4096, 2560, 4  # griffin_1b's recurrence, two of its sequences long
Struct = jax.ShapeDtypeStruct


@pytest.fixture(scope="module", autouse=True)
def needs_the_cuda_plugin() -> None:
    if reason := static_gpu.missing():
        pytest.skip(reason)


def float32(*shape: int) -> Struct:
    return Struct(shape, jnp.float32)


def linear_scan_kernels(x: Struct, state: Struct, kinds: Struct | None) -> list[tuple[Callable[..., Any], list]]:
    def forward(a: Any, x: Any, h0: Any, kinds: Any) -> Any:
        return linear_scan.forward(a, x, h0, kinds, reverse=False)

    def adjoint(a: Any, h: Any, h0: Any, dh: Any, dh_last: Any, kinds: Any) -> Any:
        return linear_scan.adjoint(a, h, h0, dh, dh_last, kinds, reverse=False, x_dtype=a.dtype)

    return [(forward, [x, x, state, kinds]), (adjoint, [x, x, state, x, state, kinds])]


def rg_lru_kernels(x: Struct, state: Struct, kinds: Struct | None) -> list[tuple[Callable[..., Any], list]]:
    gates = [x, x, x, float32(D)]
    return [(rg_lru.forward, [*gates, state, kinds]), (rg_lru.adjoint, [*gates, x, state, x, state, kinds])]


def short_conv_kernels(x: Struct, state: Struct, kinds: Struct | None) -> list[tuple[Callable[..., Any], list]]:
    def forward(*operands: Any) -> Any:
        return short_conv.forward(*operands, activation="silu")

    def adjoint(*operands: Any) -> Any:
        return short_conv.adjoint(*operands, activation="silu")

    reach = None if kinds is None else Struct(kinds.shape, jnp.int32)
    operands = [x, float32(TAPS, D), float32(D), float32(x.shape[0], TAPS - 1, D), reach]
    return [(forward, operands), (adjoint, [*operands, x])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize("kernels", [linear_scan_kernels, rg_lru_kernels, short_conv_kernels])
def test_kernels_compile_without_spills(kernels: Callable[..., Any], b: int, dtype: str, packed: bool) -> None:
    x, kinds = Struct((b, T, D), jnp.dtype(dtype)), Struct((b, T), jnp.int8) if packed else None
    for function, operands in kernels(x, float32(b, D), kinds):
        for kernel in static_gpu.analyze(function, operands):
            print(kernel)
            assert kernel.spilled_bytes == 0, str(kernel)
            assert kernel.per_multiprocessor >= 2, str(kernel)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("b", [1, 8])
def test_complex_scans_compile_without_spills(b: int, packed: bool) -> None:
    x, state = Struct((b, T, D), jnp.complex64), Struct((b, D), jnp.complex64)
    for function, operands in linear_scan_kernels(x, state, Struct((b, T), jnp.int8) if packed else None):
        for kernel in static_gpu.analyze(function, operands):
            print(kernel)
            assert kernel.spilled_bytes == 0, str(kernel)


@pytest.mark.parametrize(
    ("m", "k", "n", "num_groups", "dtype"),
    [
        (131072, 2048, 1024, 64, "bfloat16"),  # what an expert-parallel layer of 64 experts multiplies
        (64, 2048, 1408, 8, "bfloat16"),  # tokens of one decoding step
        (1000, 320, 192, 5, "float16"),
    ],
)
def test_grouped_products_compile_without_spills(m: int, k: int, n: int, num_groups: int, dtype: str) -> None:
    x, dy, w = (Struct(shape, jnp.dtype(dtype)) for shape in ((m, k), (m, n), (num_groups, k, n)))
    sizes = Struct((num_groups,), jnp.int32)
    for function, operands in (
        (grouped_matmul.forward, [x, w, sizes]),
        (grouped_matmul.transposed, [dy, w, sizes]),
        (functools.partial(grouped_matmul.weights, dtype=jnp.float32), [x, dy, sizes]),
        (functools.partial(grouped_matmul.weights, dtype=x.dtype), [x, dy, sizes]),
    ):
        (kernel,) = static_gpu.analyze(function, operands)
        print(kernel)
        assert kernel.spilled_bytes == 0, str(kernel)
        assert kernel.registers * kernel.threads <= static_gpu.REGISTERS


def test_grouped_products_need_little_memory_beyond_operands_and_results() -> None:
    m, k, n, num_groups = 131072, 2048, 1024, 64
    shapes = {"x": (m, k), "dy": (m, n), "w": (num_groups, k, n)}

    def train(x: Any, w: Any, dy: Any, sizes: Any) -> Any:
        y = grouped_matmul.forward(x, w, sizes)
        return y, grouped_matmul.transposed(dy, w, sizes), grouped_matmul.weights(x, dy, sizes, w.dtype)

    mesh = static_gpu.absent_h200()
    replicated = NamedSharding(mesh, PartitionSpec())
    x, dy, w = (Struct(shapes[name], jnp.bfloat16, sharding=replicated) for name in ("x", "dy", "w"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(train).lower(x, w, dy, Struct((num_groups,), jnp.int32, sharding=replicated)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2**20


@pytest.mark.parametrize(("width", "table_dtype"), [(512, "bfloat16"), (512, "float32"), (768, "bfloat16")])
def test_lookups_compile_without_spills(width: int, table_dtype: str) -> None:
    t, k = 4096, 64
    table, indices = Struct((2**20, width // 128, 128), jnp.dtype(table_dtype)), Struct((t, k), jnp.int32)
    operands = [table, indices, float32(t, k), float32(t, width)]
    for function, arguments in (
        (memory_lookup.lookup, operands[:3]),
        (memory_lookup.scores, [table, indices, operands[3]]),
        (memory_lookup.gradients, operands),
    ):
        (kernel,) = static_gpu.analyze(function, arguments)
        print(kernel)
        assert kernel.spilled_bytes == 0, str(kernel)
        assert kernel.per_multiprocessor >= 6, str(kernel)


def test_a_program_without_kernels_is_an_error() -> None:
    with pytest.raises(static_gpu.StaticGpuError, match="no Mosaic GPU kernel"):
        static_gpu.analyze(lambda x: x + 1, [float32(8)])
