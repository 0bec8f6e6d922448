"""The Pallas TPU kernels compile for every TPU generation at the shapes of published models, and under a mesh."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import (
    gated_delta_rule,
    grouped_matmul,
    linear_scan,
    memory_lookup,
    memory_scores,
    rg_lru,
    short_conv,
)
from hybridlm_kernels.bench.cases import BOTH, FORWARD, Workload
from hybridlm_kernels.bench.chips import CHIPS
from hybridlm_kernels.bench.static_tpu import Failure, Report, analyze
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybridlm.config import RGLRU
from hybridlm.config_io import load_config
from tests.absent import absent_tpus

pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")

OPS = ("linear_scan", "rg_lru", "short_conv")
# Vector registers spilled and filled per scheduled cycle, as measured with libtpu 0.0.42 and 0.0.52, with some room:
# the maths of these kernels does not fit in 64 registers, and less of it at a time leaves the machine idle.
MOST_SPILLS = {
    "linear_scan": 0.0,
    "linear_scan_adjoint": 0.1,
    "rg_lru": 0.15,
    "rg_lru_adjoint": 0.8,
    "short_conv": 0.15,
    "short_conv_adjoint": 0.65,
    "gated_linear_attention": 0.3,
    "gated_linear_attention_adjoint": 0.8,
    "gated_delta_rule": 0.45,
    "gated_delta_rule_adjoint": 0.8,
    "gated_linear_attention_channels": 1.0,
    "gated_linear_attention_channels_adjoint": 1.7,
    "gated_delta_rule_channels": 1.3,
    "gated_delta_rule_channels_adjoint": 1.7,
    "grouped_matmul": 1.35,
    "grouped_matmul_transposed": 1.3,
    "grouped_matmul_weights": 1.3,
}
HEADED = (
    "gated_linear_attention",
    "gated_delta_rule",
    "gated_linear_attention_per_channel",
    "gated_delta_rule_per_channel",
)
FEW_HEADS = (1, 512, 4, 128, 128)  # b, t, h, k, v: 16 heads in a step take a minute to compile
GROUPED = ((131072, 2048, 1024, 8), (256, 128, 256, 4))  # m rows, k inputs, n outputs, g groups
CONFIGS = ("griffin_1b", "griffin_7b", "recurrentgemma_2b")


def shape(name: str) -> tuple[int, int, int]:
    """One sequence of the recurrence in the config: b, t, d."""
    config = load_config(name)
    width = next(b.mixer.width for b in config.model.pattern if isinstance(b.mixer, RGLRU))
    return 1, config.data.seq_len, width


def kernels(shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[str]) -> list[Workload]:
    """Forward with gradient, which compiles both kernels of each operation."""
    return [Workload(op, "pallas_tpu", BOTH, s, dtype) for op in OPS for s in shapes for dtype in dtypes]


def complaints(result: Report | Failure, limit: int) -> list[str]:
    if isinstance(result, Failure):
        return [f"{result.workload}: {result.reason}"]
    found = [] if len(result.kernels) >= 2 else [f"{result.workload}: {len(result.kernels)} kernels in it"]
    for op in result.kernels:
        if op.spills > MOST_SPILLS[op.name.partition(".")[0]] * op.cycles:
            found.append(f"{result.workload} {op.name}: {op.spills:.0f} spills and fills in {op.cycles:.0f} cycles")
        if op.vmem_bytes >= limit:
            found.append(f"{result.workload} {op.name}: {op.vmem_bytes / 2**20:.1f} MiB of VMEM")
    if result.workload.startswith("linear_scan") and result.chip in ("v5e", "v5p", "v6e") and result.ratio > 1.3:
        found.append(f"{result.workload}: {result.ratio:.2f} times the least time that memory allows")
    return found


def check(chip: str, workloads: list[Workload]) -> None:
    limit = CHIPS[chip].scoped_vmem_bytes
    found = [line for result in analyze(workloads, CHIPS[chip]) for line in complaints(result, limit)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "chip", [chip if chip in ("v5e", "v5p") else pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS]
)
def test_kernels_compile(chip: str) -> None:
    check(chip, kernels([shape("griffin_1b")], ["bfloat16"]))


@pytest.mark.parametrize(
    "chip", [chip if chip == "v5e" else pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS]
)
def test_kernels_with_matrix_states_compile(chip: str) -> None:
    check(chip, [Workload(op, "pallas_tpu", BOTH, FEW_HEADS, "bfloat16") for op in HEADED])


@pytest.mark.parametrize(
    "chip", [chip if chip == "v5e" else pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS]
)
def test_kernels_of_groups_compile(chip: str) -> None:
    check(chip, [Workload("grouped_matmul", "pallas_tpu", BOTH, shape, "bfloat16") for shape in GROUPED])


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_of_groups_compile_at_other_shapes(chip: str) -> None:
    """As many groups as a model has experts, inputs that must be cut, outputs that no block divides; float32."""
    shapes = [
        ((16384, 2048, 1024, 64), "bfloat16"),
        ((4096, 14336, 4096, 8), "bfloat16"),
        ((300, 384, 640, 3), "float32"),
    ]
    check(chip, [Workload("grouped_matmul", "pallas_tpu", BOTH, shape, dtype) for shape, dtype in shapes])


@pytest.mark.slow
@pytest.mark.parametrize("op", ["gated_linear_attention", "gated_delta_rule"])
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 256), (256, 256)], ids=str)
def test_kernels_with_matrix_states_compile_at_other_dims(op: str, dims: tuple[int, int]) -> None:
    [result] = analyze([Workload(op, "pallas_tpu", BOTH, (1, 256, 2, *dims), "bfloat16")], CHIPS["v5e"])
    assert isinstance(result, Report) and len(result.kernels) >= 2, result


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile_at_the_shapes_of_published_models(chip: str) -> None:
    check(chip, kernels([shape(name) for name in CONFIGS], ["bfloat16", "float32"]))


def test_twice_the_time_takes_twice_the_cycles() -> None:
    workloads = [Workload("linear_scan", "pallas_tpu", FORWARD, (1, t, 2560), "float32") for t in (1024, 2048)]
    once, twice = analyze(workloads, CHIPS["v5e"])
    assert isinstance(once, Report) and isinstance(twice, Report)
    assert twice.cycles == pytest.approx(2 * once.cycles, rel=0.1)
    assert twice.hbm_bytes == pytest.approx(3 * 2048 * 2560 * 4, rel=0.01)  # a, x and h, once each


def test_a_program_that_does_not_compile_does_not_stop_the_next() -> None:
    workloads = [Workload("linear_scan", impl, FORWARD, (1, 256, 256), "float32") for impl in ("pallas_gpu", "chunked")]
    refused, compiled = analyze(workloads, CHIPS["v6e"])
    assert isinstance(refused, Failure) and "runs on GPU" in refused.reason
    assert isinstance(compiled, Report) and not compiled.kernels


B, T, D = 4, 1024, 384


def calls(op: str) -> tuple[Any, list[tuple[int, ...]]]:
    """The operation and the shapes of its operands, the first of them x or a."""
    wide = (B, T, D)
    match op:
        case "linear_scan":
            return linear_scan, [wide, wide]
        case "rg_lru":
            return rg_lru, [wide, wide, wide, (D,)]
        case "gated_delta_rule":
            return gated_delta_rule, [(B, T, 4, 128)] * 3 + [(B, T, 4)]
        case _:
            return lambda x, w: short_conv(x, w, activation="silu"), [wide, (4, D)]


def four_chips(shape: tuple[int, ...], names: list[str]) -> jax.sharding.Mesh:
    """A mesh of v5e chips that are not there."""
    devices = np.array(absent_tpus("v5e:2x2"))
    return jax.sharding.Mesh(devices.reshape(shape), names, axis_types=(AxisType.Explicit,) * len(names))


@pytest.mark.parametrize("axes", [("data", None, "tensor"), (None, "context", None)], ids=["shards", "cut sequence"])
@pytest.mark.parametrize("op", [*OPS, pytest.param("gated_delta_rule", marks=pytest.mark.slow)])
def test_sharded_kernels_gather_nothing_with_time_in_it(op: str, axes: tuple[str | None, ...]) -> None:
    names = [name for name in axes if name]
    mesh = four_chips((4,) if len(names) == 1 else (2, 2), names)
    function, shapes = calls(op)

    def operand(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        spec = axes if len(shape) >= 3 else (None,) * (len(shape) - 1) + (axes[2],)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(*operands: jax.Array) -> jax.Array:
        return (function(*operands)[0].astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh):
        operands = [operand(shape) for shape in shapes]
        text = jax.jit(jax.grad(loss, tuple(range(len(shapes))))).lower(*operands).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 2  # forward and adjoint
    gathered = re.findall(r"= (.*?) (?:all-gather|all-gather-start|all-to-all)\(", text)
    for result in gathered:
        assert axes[1] and not re.search(rf"\b({T}|{T // 4})\b", result), result


def test_training_the_delta_rule_needs_few_temporaries() -> None:
    """Forward and gradient at k = v = 128 in bfloat16: states between chunks and operands laid out by heads."""
    mesh = four_chips((4,), ["data"])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    wide = jax.ShapeDtypeStruct((4, 32768, 4, 128), jnp.bfloat16, sharding=rows)
    gate = jax.ShapeDtypeStruct(wide.shape[:3], jnp.float32, sharding=rows)

    def step(q: Any, k: Any, v: Any, beta: Any, log_decay: Any, do: Any) -> Any:
        o, vjp = jax.vjp(lambda *x: gated_delta_rule(*x, impl="pallas_tpu")[0], q, k, v, beta, log_decay)
        return o, vjp(do)

    with jax.set_mesh(mesh):
        memory = jax.jit(step).lower(wide, wide, wide, gate, gate, wide).compile().memory_analysis()
    per_token_and_head = memory.temp_size_in_bytes / (32768 * 4)
    print(f"{per_token_and_head:.0f} bytes per token and head")
    assert per_token_and_head < 7_000


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["as wide as x", "wider than x"])
def test_grouped_matmul_copies_no_operand(dtype: Any) -> None:
    """Forward and gradient of 8 groups on each of four chips: beside results there is room for lists of visits. Wider
    matrices are rounded into the memory of a result."""
    mesh = four_chips((4,), ["expert"])
    part = PartitionSpec("expert")

    def step(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl="pallas_tpu"), x, w)
        return y, *vjp(dy)

    m, k, n, g = GROUPED[0]
    operands = [
        jax.ShapeDtypeStruct((4 * rows, *rest), kind, sharding=NamedSharding(mesh, part))
        for rows, rest, kind in (
            (m, (k,), jnp.bfloat16),
            (g, (k, n), dtype),
            (g, (), jnp.int32),
            (m, (n,), jnp.bfloat16),
        )
    ]
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(step, in_specs=(part,) * 4, out_specs=(part,) * 3)
        compiled = jax.jit(mapped).lower(*operands).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{temporary} bytes of temporaries, where x takes {2 * m * k} and w {2 * g * k * n}")
    assert temporary < 4 * 2**20


@pytest.mark.parametrize(
    ("chip", "tiles", "dtype"),
    [
        ("v5e", 4, jnp.bfloat16),
        *[pytest.param(chip, 4, jnp.bfloat16, marks=pytest.mark.slow) for chip in CHIPS if chip != "v5e"],
        pytest.param("v5e", 1, jnp.float32, marks=pytest.mark.slow),
        pytest.param("v5e", 8, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_memory_lookups_copy_no_table(chip: str, tiles: int, dtype: Any) -> None:
    """Beside operands and results there are lists of pairs and the vectors as tiles, and nothing of the table's size.
    Rows lie in one piece, in the order of their numbers."""
    devices = absent_tpus(CHIPS[chip].topology)
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
    t, k, n = 1024, 64, 2**23 // tiles

    def read(table: Any, indices: Any, weights: Any, x: Any) -> Any:
        return (
            memory_lookup(table, indices, weights, impl="pallas_tpu"),
            memory_scores(table, indices, x, impl="pallas_tpu"),
        )

    def train(table: Any, indices: Any, weights: Any, dy: Any) -> Any:
        return jax.vjp(lambda *x: memory_lookup(x[0], indices, x[1], impl="pallas_tpu"), table, weights)[1](dy)

    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec())
        shapes = [((n, tiles, 128), dtype), ((t, k), jnp.int32), ((t, k), jnp.float32)]
        shapes.append(((t, tiles * 128), jnp.float32))
        operands = [jax.ShapeDtypeStruct(shape, kind, sharding=whole) for shape, kind in shapes]
        for function, kernels in ((read, 2), (train, 1)):
            compiled = jax.jit(function).lower(*operands).compile()
            text = compiled.as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == kernels
            assert re.search(r"\[\d+,\d,128\]\{2,1,0:[^ ]* parameter\(0\)", text)
            temporary = compiled.memory_analysis().temp_size_in_bytes
            print(f"{chip} {tiles} tiles {np.dtype(dtype).name}: {temporary / 2**20:.2f} MiB of temporaries")
            assert temporary < 64 * t * k + 8 * t * tiles * 128
