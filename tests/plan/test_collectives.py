"""Collectives of compiled programs: those that a program asks for, and XLA's ways of writing them."""

from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.bench.hlo import Program
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm.plan.collectives import Collective, collectives
from hybridlm.plan.dump import compile_and_dump
from tests.absent import absent_tpus

AXES = ("data", "fsdp", "tensor")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(AXES, size)]
LENGTH, ROWS, WIDTH = 3, 16, 5
BYTES = ROWS * WIDTH * 4


def cube(shape: tuple[int, ...] = (2, 2, 2), axes: tuple[str, ...] = AXES) -> Any:
    """A mesh in which only the places of devices and their ids matter."""
    devices = [SimpleNamespace(id=n, slice_index=0) for n in range(int(np.prod(shape)))]
    return SimpleNamespace(devices=np.array(devices).reshape(shape), axis_names=axes, size=len(devices))


def found_in(text: str, mesh: Any = None) -> list[Collective]:
    return collectives(Program(text), mesh or cube())


@pytest.mark.parametrize("axes", SUBSETS, ids="+".join)
def test_what_a_loop_asks_for_is_found_with_its_axes_bytes_and_runs(axes: tuple[str, ...]) -> None:
    mesh = jax.make_mesh((2, 2, 2), AXES)
    devices = 2 ** len(axes)

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        with jax.named_scope("mixer"), jax.named_scope("RGLRU"):
            x = jax.lax.psum(x, axes) * 0.5
            x = jnp.sin(jax.lax.all_to_all(x, axes, 0, 0, tiled=True))
            x = jax.lax.ppermute(x, axes, [(n, (n + 1) % devices) for n in range(devices)])
        with jax.named_scope("ffn/GeGLU"):
            gathered = jnp.cos(jax.lax.all_gather(x, axes, tiled=True))
            return jax.lax.psum_scatter(gathered, axes, tiled=True), None

    step = jax.shard_map(
        lambda x: jax.lax.scan(body, x, None, length=LENGTH)[0],
        mesh=mesh,
        in_specs=P(AXES),
        out_specs=P(AXES),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(AXES)))
    found = found_in(str(jax.jit(step).lower(x).compile().as_text()), mesh)
    assert {(c.kind, c.axes, c.dtype, c.bytes, c.runs, c.scope) for c in found} == {
        ("all-reduce", axes, "f32", BYTES, LENGTH, "mixer/RGLRU"),
        ("all-to-all", axes, "f32", BYTES, LENGTH, "mixer/RGLRU"),
        ("collective-permute", axes, "f32", BYTES, LENGTH, "mixer/RGLRU"),
        ("all-gather", axes, "f32", BYTES * devices, LENGTH, "ffn/GeGLU"),
        ("reduce-scatter", axes, "f32", BYTES * devices, LENGTH, "ffn/GeGLU"),
    }
    assert len(found) == 5
    first_line = body.__code__.co_firstlineno
    lines = [c.source.removeprefix("test_collectives.py:") for c in found]
    assert sorted(int(line) - first_line for line in lines) == [2, 3, 4, 6, 7]


def test_nested_loops_multiply_and_collectives_among_one_device_do_not_count() -> None:
    mesh = jax.make_mesh((8, 1), ("data", "tensor"))

    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(jax.lax.psum(x, "data")), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.psum(jax.lax.scan(inner, x, None, length=5)[0], "tensor"), None

    step = jax.shard_map(
        lambda x: jax.lax.scan(outer, x, None, length=7)[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    (only,) = found_in(str(jax.jit(step).lower(x).compile().as_text()), mesh)
    assert (only.kind, only.axes, only.runs, only.asynchronous) == ("all-reduce", ("data",), 35, False)


def all_reduce(groups: str) -> str:
    return f"""\
HloModule jit_step, num_partitions=24

ENTRY %main (x: bf16[7,3]) -> bf16[7,3] {{
  %x = bf16[7,3]{{1,0}} parameter(0)
  ROOT %sum = bf16[7,3]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true,\
 to_apply=%add
}}
"""


@pytest.mark.parametrize("axes", [subset for size in (1, 2, 3) for subset in combinations("abc", size)], ids="".join)
def test_axes_are_found_from_every_notation_of_their_groups(axes: tuple[str, ...]) -> None:
    shape = dict(a=2, b=3, c=4)
    mesh = cube((2, 3, 4), ("a", "b", "c"))
    others = [axis for axis in shape if axis not in axes]
    groups: dict[tuple[int, ...], list[int]] = {}
    for n in range(24):
        place = dict(a=n // 12, b=n // 4 % 3, c=n % 4)
        groups.setdefault(tuple(place[axis] for axis in others), []).append(n)
    size = len(next(iter(groups.values())))
    order = ",".join(str("abc".index(axis)) for axis in (*others, *axes))
    notations = (
        "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups.values()) + "}",
        f"[{len(groups)},{size}]<=[2,3,4]T({order})",
        "mesh['x'=2,'y'=3,'z'=4] {" + ",".join(f"'{'xyz'['abc'.index(axis)]}'" for axis in axes) + "}",
    )
    for notation in notations:
        (only,) = found_in(all_reduce(notation), mesh)
        assert (only.axes, only.bytes) == (axes, 42)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{}", ("a", "b", "c")),
        ("[6,4]<=[24]", ("c",)),
        ("mesh['all'=24] {'all':(2)3}", ("b",)),
        ("mesh['x'=4,'y'=6], device_ids=([6,4]T(1,0)) {'x'}", ("c",)),
        ("mesh['x'=2,'y'=12] {'x','y':(1)3}", ("a", "b")),
        ("@mesh<x=2,y=12> {x}", ("a",)),
    ],
)
def test_meshes_of_the_compilers_own_are_understood(groups: str, axes: tuple[str, ...]) -> None:
    (only,) = found_in(all_reduce(groups), cube((2, 3, 4), ("a", "b", "c")))
    assert only.axes == axes


# A gather that TPU starts in one fusion, continues beside a product, and ends in a third; and a sum of which each
# device keeps a part. Two turns of the loop have been taken out of it.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%start.body (p: bf16[4,6]) -> (bf16[4,6], bf16[8,6], u32[]) {
  %p = bf16[4,6]{1,0} parameter(0)
  %gather.1 = bf16[8,6]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0},\
 backend_config={"async_collective_fusion_config":{"flag_end":"-1","flag_start":"-1"}}
  ROOT %custom.1 = (bf16[4,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) custom-call(%gather.1),\
 custom_call_target="AsyncCollectiveStart"
}

%piece.body (p: bf16[4,6], q: bf16[8,6], r: u32[], x: bf16[9,4]) -> (bf16[9,6], bf16[8,6], u32[]) {
  %p.1 = bf16[4,6]{1,0} parameter(0)
  %q.1 = bf16[8,6]{1,0} parameter(1)
  %r.1 = u32[]{:S(2)} parameter(2)
  %x.1 = bf16[9,4]{1,0} parameter(3)
  %product = bf16[9,6]{1,0} convolution(%x.1, %p.1), dim_labels=bf_io->bf,\
 metadata={op_name="jit(step)/ffn/GeGLU/dot_general"}
  %gather.2 = bf16[8,6]{1,0} all-gather(%p.1), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0},\
 backend_config={"async_collective_fusion_config":{"flag_end":"8","flag_start":"2"}}
  ROOT %tuple.1 = (bf16[9,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) tuple(%product, %gather.2, %r.1)
}

%done.body (p: bf16[8,6], r: u32[]) -> bf16[8,6] {
  %p.2 = bf16[8,6]{1,0} parameter(0)
  %r.2 = u32[]{:S(2)} parameter(1)
  %gather.3 = bf16[8,6]{1,0} all-gather(%p.2), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0},\
 backend_config={"async_collective_fusion_config":{"flag_end":"8","flag_start":"2"}}
  ROOT %custom.2 = bf16[8,6]{1,0} custom-call(%gather.3, %r.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (p: f32[8,6]) -> f32[2,6] {
  %p.3 = f32[8,6]{1,0} parameter(0)
  %sum.1 = f32[8,6]{1,0} all-reduce(%p.3), channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[2,6]{1,0} dynamic-slice(%sum.1, %zero, %zero), dynamic_slice_sizes={2,6}
}

%use.body (p: bf16[8,6]) -> f32[8,6] {
  %p.4 = bf16[8,6]{1,0} parameter(0)
  ROOT %convert = f32[8,6]{1,0} convert(%p.4)
}

%body (state: (s32[], bf16[4,6], bf16[9,4], f32[2,6])) -> (s32[], bf16[4,6], bf16[9,4], f32[2,6]) {
  %state = (s32[], bf16[4,6]{1,0}, bf16[9,4]{1,0}, f32[2,6]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %w = bf16[4,6]{1,0} get-tuple-element(%state), index=1
  %x = bf16[9,4]{1,0} get-tuple-element(%state), index=2
  %start = (bf16[4,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start.body
  %a = bf16[4,6]{1,0} get-tuple-element(%start), index=0
  %b = bf16[8,6]{1,0} get-tuple-element(%start), index=1
  %c = u32[]{:S(2)} get-tuple-element(%start), index=2
  %piece = (bf16[9,6]{1,0}, bf16[8,6]{1,0}, u32[]{:S(2)}) fusion(%a, %b, %c, %x), kind=kOutput, calls=%piece.body,\
 metadata={op_name="jit(step)/ffn/GeGLU/dot_general"}
  %d = bf16[9,6]{1,0} get-tuple-element(%piece), index=0, metadata={op_name="jit(step)/ffn/GeGLU/dot_general"}
  %e = bf16[8,6]{1,0} get-tuple-element(%piece), index=1
  %f = u32[]{:S(2)} get-tuple-element(%piece), index=2
  %done = bf16[8,6]{1,0} fusion(%e, %f), kind=kCustom, calls=%done.body
  %use = f32[8,6]{1,0} fusion(%done), kind=kLoop, calls=%use.body,\
 metadata={op_name="jit(step)/transpose(jvp(mixer))/RGLRU/convert"}
  %scatter = f32[2,6]{1,0} fusion(%use), kind=kCustom, calls=%all-reduce-scatter
  %one = s32[] constant(1)
  %next = s32[] add(%count, %one)
  ROOT %state.1 = (s32[], bf16[4,6]{1,0}, bf16[9,4]{1,0}, f32[2,6]{1,0}) tuple(%next, %w, %x, %scatter)
}

%condition (state: (s32[], bf16[4,6], bf16[9,4], f32[2,6])) -> pred[] {
  %state.2 = (s32[], bf16[4,6]{1,0}, bf16[9,4]{1,0}, f32[2,6]{1,0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%state.2), index=0
  %end = s32[] constant(11)
  ROOT %less = pred[] compare(%count.1, %end), direction=LT
}

ENTRY %main (w: bf16[4,6], x: bf16[9,4], y: f32[2,6]) -> f32[2,6] {
  %w.1 = bf16[4,6]{1,0} parameter(0)
  %x.2 = bf16[9,4]{1,0} parameter(1)
  %y = f32[2,6]{1,0} parameter(2)
  %two = s32[] constant(2)
  %begin = s32[] copy(%two)
  %tuple.2 = (s32[], bf16[4,6]{1,0}, bf16[9,4]{1,0}, f32[2,6]{1,0}) tuple(%begin, %w.1, %x.2, %y)
  %loop = (s32[], bf16[4,6]{1,0}, bf16[9,4]{1,0}, f32[2,6]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = f32[2,6]{1,0} get-tuple-element(%loop), index=3
}
"""


def test_a_collective_in_several_fusions_counts_once_and_belongs_to_what_uses_it() -> None:
    gather, _ = found_in(TPU)
    assert gather == Collective(
        kind="all-gather",
        axes=("tensor",),
        dtype="bf16",
        bytes=8 * 6 * 2,
        runs=9,  # 2 to 10
        asynchronous=True,
        scope="mixer/RGLRU",
        source="",
    )


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter_of_what_makes_it() -> None:
    _, scatter = found_in(TPU)
    assert (scatter.kind, scatter.axes, scatter.bytes, scatter.runs) == (
        "reduce-scatter",
        ("data", "fsdp"),
        8 * 6 * 4,
        9,
    )
    assert (scatter.scope, scatter.asynchronous) == ("mixer/RGLRU", False)


HOSTS = """\
HloModule jit_step, num_partitions=4

ENTRY %main (x: f32[6,2]) -> token[] {{
  %x = f32[6,2]{{1,0}} parameter(0)
  %begin = token[] after-all()
  %send = (f32[6,2]{{1,0}}, u32[], token[]) send(%x, %begin), channel_id=2, is_host_transfer=true,\
 frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %recv = (f32[6,2]{{1,0}}, u32[], token[]) recv(%begin), channel_id=1, is_host_transfer=true,\
 frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  ROOT %done = token[] send-done(%send), channel_id=2, is_host_transfer=true
}}
"""


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "axes", "size"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', "all-reduce", ("slices",), 48),
        ("ALL_GATHER", '"{1,2}x{0:3}"', "all-gather", ("slices",), 96),
        ("ALL_TO_ALL", "{{100000,100001,200000,200001}}", "all-to-all", ("slices", "tensor"), 48),
        ("ONE_TO_ONE", "{{100000->200000},{200003->100003}}", "collective-permute", ("slices",), 48),
    ],
)
def test_transfers_between_slices_are_collectives(
    transfer: str, target: str, kind: str, axes: tuple[str, ...], size: int
) -> None:
    mesh = cube((2, 2, 2), ("slices", "data", "tensor"))
    for n, device in enumerate(mesh.devices.flat):
        device.id, device.slice_index = 100_000 * (1 + n // 4) + n % 4, n // 4
    (only,) = found_in(HOSTS.format(kind=transfer, target=target), mesh)
    assert (only.kind, only.axes, only.bytes, only.asynchronous) == (kind, axes, size, True)


def test_partitions_of_a_program_for_one_slice_are_that_slices_devices() -> None:
    mesh = cube((2, 2, 2, 3), ("slices", "data", "fsdp", "tensor"))
    for n, device in enumerate(mesh.devices.flat):
        device.slice_index = n // 12
    text = all_reduce("{{0,3},{1,4},{2,5},{6,9},{7,10},{8,11}}").replace("=24", "=12")
    (only,) = found_in(text, mesh)
    assert only.axes == ("fsdp",)
    (of_all,) = found_in(all_reduce("{}").replace("=24", "=12"), mesh)
    assert of_all.axes == ("data", "fsdp", "tensor")


GPU = """\
HloModule jit_step, num_partitions=8

%async (p: bf16[8,3], q: f32[8]) -> (bf16[4,3], f32[4]) {
  %p = bf16[8,3]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  ROOT %scatter = (bf16[4,3]{1,0}, f32[4]{0}) reduce-scatter(%p, %q), channel_id=2, replica_groups=[4,2]<=[8],\
 dimensions={0}, to_apply=%add
}

ENTRY %main (x: bf16[8,3], y: f32[8]) -> f32[4] {
  %x = bf16[8,3]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %gather = ((bf16[8,3]{1,0}, f32[8]{0}), (bf16[32,3]{1,0}, f32[32]{0})) all-gather-start(%x, %y),\
 replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0},\
 metadata={op_name="jit(step)/head/dot" source_file="/a/b/lm.py" source_line=12},\
 backend_config={"collective_backend_config":{"is_sync":true}}
  %gather.1 = (bf16[32,3]{1,0}, f32[32]{0}) all-gather-done(%gather), metadata={op_name="jit(step)/head/dot"}
  %scatter.1 = ((bf16[8,3]{1,0}, f32[8]{0}), (bf16[4,3]{1,0}, f32[4]{0})) async-start(%x, %y), calls=%async,\
 metadata={op_name="jit(step)/optimizer/add"}
  %scatter.2 = (bf16[4,3]{1,0}, f32[4]{0}) async-done(%scatter.1)
  ROOT %out = f32[4]{0} get-tuple-element(%scatter.2), index=1
}
"""


# SparseCores of a TPU do a sum: it starts without its operand, gets it, and ends.
SPARSE = """\
HloModule jit_step, num_partitions=8

%called (p: f32[8,6]) -> f32[2,6] {
  %p = f32[8,6]{1,0} parameter(0)
  ROOT %scatter = f32[2,6]{1,0} reduce-scatter(%p), channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}, execution_thread="sparsecore"

%async (p: f32[8,6]) -> f32[2,6] {
  %p.1 = f32[8,6]{1,0} parameter(0)
  ROOT %custom = f32[2,6]{1,0} custom-call(%p.1), custom_call_target="offloaded", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,6]) -> f32[2,6] {
  %x = f32[8,6]{1,0} parameter(0)
  %start = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %sine = f32[8,6]{1,0} sine(%x), metadata={op_name="jit(step)/transpose(jvp(ffn/GeGLU))/sin"}
  %update = ((f32[8,6]{1,0}), f32[2,6]{1,0}, (s32[8]{0})) async-update(%start, %sine)
  ROOT %end = f32[2,6]{1,0} async-done(%update)
}
"""


def test_collectives_that_sparse_cores_do_are_found() -> None:
    (only,) = found_in(SPARSE)
    assert only == Collective("reduce-scatter", ("data", "fsdp"), "f32", 192, 1, True, "ffn/GeGLU", "")


def test_combined_collectives_count_once_with_all_their_bytes() -> None:
    gather, scatter = found_in(GPU)
    assert gather == Collective("all-gather", ("data", "fsdp"), "bf16", 4 * (48 + 32), 1, False, "head", "lm.py:12")
    assert scatter == Collective("reduce-scatter", ("tensor",), "bf16", 48 + 32, 1, True, "optimizer", "")


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
def test_a_tpu_program_has_the_collectives_that_its_sharding_needs(slices: int) -> None:
    """Weights over `fsdp`, batch over the outer axes, so the gradients of each layer are scattered and summed."""
    found = absent_tpus(f"v5e:2x4*{slices}")
    layers, batch, width = 5, 4096, 1024
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.Mesh(np.array(found).reshape(slices, 4, 2), ("slices", "data", "fsdp"), axis_types=kinds)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            with jax.named_scope("ffn/GeGLU"):
                return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

    def spec(shape: tuple[int, ...], *axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))

    w = spec((layers, width, width), None, "fsdp")
    x = spec((batch * slices, width), ("slices", "data", "fsdp"))
    step = jax.jit(lambda w, x: w - 1e-3 * jax.grad(loss)(w, x))
    counted: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in collectives(Program(compile_and_dump(step.lower(w, x)).hlo), mesh):
        counted[c.kind, c.axes] += c.runs * c.bytes
        assert slices > 1 or c.scope == "ffn/GeGLU"  # with several slices libtpu leaves out many names
    weights = layers * width * width * 2
    assert counted["all-gather", ("fsdp",)] == 2 * weights  # forward and backward
    gradients = sum(size for (kind, axes), size in counted.items() if kind == "reduce-scatter" and "fsdp" in axes)
    assert gradients == weights
    between = {kind: size for (kind, axes), size in counted.items() if "slices" in axes}
    assert set(between) == ({"all-reduce"} if slices > 1 else set())
