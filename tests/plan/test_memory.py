"""What is in the memory of a compiled step: programs whose buffers are known by hand, and excerpts of compilers' texts.

Letters: b batch, d model width, f FFN width, n layers.
"""

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.bench.hlo import Program
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm.plan.dump import Dump, allocations, compile_and_dump, schedule
from hybridlm.plan.memory import Memory, buffers_at_peak, memory, overflow, read_refusal
from tests.absent import absent_tpus

N, B, D, F = 6, 64, 48, 96  # B is the batch of one device
DEVICES = 8


class State(NamedTuple):
    """As a training step's, as far as memory is concerned."""

    params: Any
    momentum: Any


def layer(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ w["u"]) @ w["v"])


def make_step(layer: Callable[..., jax.Array]) -> Callable[..., State]:
    def loss(params: Any, batch: Any) -> jax.Array:
        y, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), batch["x"], params)
        return jnp.sum(jnp.square(y))

    def step(state: State, batch: Any) -> State:
        grads = jax.grad(loss)(state.params, batch)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, grads)
        return State(jax.tree.map(lambda p, m: p - 0.1 * m, state.params, momentum), momentum)

    return step


def arguments(mesh: jax.sharding.Mesh, num_layers: int = N, rows: int = B, d: int = D, f: int = F) -> tuple[State, Any]:
    def float32(spec: PartitionSpec, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    params = {
        "u": float32(PartitionSpec(None, "data"), num_layers, d, f),
        "v": float32(PartitionSpec(), num_layers, f, d),
    }
    return State(params, params), {"x": float32(PartitionSpec("data"), rows * mesh.size, d)}


@cache
def compiled(remat: bool) -> tuple[Dump, Program, State, Any]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    state, batch = arguments(mesh)
    dump = compile_and_dump(
        jax.jit(make_step(jax.checkpoint(layer) if remat else layer), donate_argnums=0).lower(state, batch)
    )
    return dump, Program(dump.hlo), state, batch


def test_arguments_are_counted_as_one_device_holds_them() -> None:
    found = memory(*compiled(remat=True))
    assert found.parameters == found.optimizer == N * (D * F // DEVICES + F * D) * 4
    assert found.batch == B * D * 4


@pytest.mark.parametrize("remat", [False, True])
def test_the_kinds_add_up_to_what_the_compiler_says_it_needs(remat: bool) -> None:
    dump, program, state, batch = compiled(remat)
    found = memory(dump, program, state, batch)
    assert dump.compiled is not None
    said = dump.compiled.memory_analysis()
    assert said is not None
    made = said.output_size_in_bytes - said.alias_size_in_bytes + said.temp_size_in_bytes
    kinds = (found.parameters, found.optimizer, found.batch, found.activations, found.temporaries, found.code)
    assert sum(kinds) == found.total
    assert found.total == pytest.approx(said.argument_size_in_bytes + made, abs=4096)  # constants are not in the latter
    assert min(kinds) >= 0


def test_with_rematerialisation_the_inputs_of_all_layers_are_the_activations() -> None:
    assert memory(*compiled(remat=True)).activations == N * B * D * 4


def test_without_it_what_the_backward_pass_reads_of_every_layer_is() -> None:
    # Of a layer its input, both tanh' and the inner tanh; where XLA keeps the outer one for the next layer, that too.
    least = N * B * (2 * D + 2 * F) * 4
    assert memory(*compiled(remat=False)).activations in (least, least + N * B * D * 4)


def test_activations_of_two_products_are_the_two_arrays_that_their_gradients_read() -> None:
    def step(params: Any, x: jax.Array) -> Any:
        grads = jax.grad(lambda p: jnp.sum(jnp.square(jnp.tanh(x @ p["u"]) @ p["v"])))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = {"u": jax.ShapeDtypeStruct((D, F), jnp.float32), "v": jax.ShapeDtypeStruct((F, D), jnp.float32)}
    x = jax.ShapeDtypeStruct((B, D), jnp.float32)
    dump = compile_and_dump(jax.jit(step).lower(params, x))
    kept = [one for one in buffers_at_peak(dump, Program(dump.hlo), params, x) if one.kind == "activation"]
    assert [one.shape for one in kept] == [f"f32[{B},{F}]", f"f32[{B},{D}]"]


def test_buffers_tell_their_source_lines() -> None:
    stacks = [buffer for buffer in buffers_at_peak(*compiled(remat=True)) if buffer.kind == "activation"]
    lines, first = inspect.getsourcelines(make_step)
    scan = first + next(n for n, line in enumerate(lines) if "lax.scan" in line)
    assert [(buffer.shape, buffer.source.rpartition("/")[2]) for buffer in stacks] == [
        (f"f32[{N},{B},{D}]", f"test_memory.py:{scan}")
    ]


def test_the_largest_buffers_come_first_and_arguments_have_their_kind() -> None:
    found = memory(*compiled(remat=True))
    sizes = [buffer.bytes for buffer in found.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 10
    kinds = {buffer.op_name: buffer.kind for buffer in buffers_at_peak(*compiled(remat=True))}
    assert kinds["state.params['v']"] == "parameter"
    assert kinds["state.momentum['u']"] == "optimizer"
    assert kinds["batch['x']"] == "batch"


def instructions(hlo: str) -> list[str]:
    """Without the tables of source lines, which are those of whichever caller's compilation is in JAX's cache."""
    lines = (line.split(", metadata=")[0] for line in hlo.splitlines() if line.startswith("  "))
    return sorted(re.sub(r"^\s*(ROOT )?%[\w.\-]+ = ", "", line) for line in lines)


def test_a_dump_changes_nothing_in_the_program_and_leaves_the_cache_as_it_was() -> None:
    before = jax.config.values["jax_enable_compilation_cache"]
    lowered = jax.jit(layer).lower(jnp.ones((3, D)), {"u": jnp.ones((D, F)), "v": jnp.ones((F, D))})
    dumps = [compile_and_dump(lowered) for _ in range(2)]
    assert dumps[0].hlo and dumps[0].hlo == dumps[1].hlo  # the second does not come out of a cache
    undumped = lowered.compile().as_text()
    assert undumped is not None
    assert instructions(undumped) == instructions(dumps[0].hlo)
    assert jax.config.values["jax_enable_compilation_cache"] == before


# Two arrays share the addresses from 0; the third is the stack that a forward loop fills for the backward pass.
HLO = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/model.py"
2 "/somewhere/lib.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=4 end_column=45}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=4 end_column=45}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (s: f32[4,128]) -> f32[4,128] {
  %s = f32[4,128]{1,0:T(4,128)} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %a = f32[8,128]{1,0:T(8,128)} sine(%s), metadata={op_name="jit(step)/jvp()/sin" stack_frame_id=1}
  %kept = f32[16,128]{1,0:T(8,128)} cosine(%a), metadata={op_name="jit(step)/jvp()/cos" stack_frame_id=2}
  %b = f32[8,128]{1,0:T(8,128)} negate(%kept), metadata={op_name="jit(step)/transpose(jvp())/neg" stack_frame_id=1}
  %c = f32[4,128]{1,0:T(4,128)} multiply(%kept, %b), metadata={op_name="jit(step)/transpose(jvp())/mul"}
  ROOT %new = f32[4,128]{1,0:T(4,128)} subtract(%s, %c), metadata={op_name="jit(step)/sub"}
}
"""
BUFFERS = """BufferAssignment:
allocation 0: size 2048, page 0, parameter 0, shape |f32[4,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 s @0> (size=2048,offset=0): f32[4,128]{1,0:T(4,128)}
 value: <6 new @0> (size=2048,offset=0): f32[4,128]{1,0:T(4,128)}
allocation 1: size 512, page 0, thread-local:
 value: <9 inner @0> (size=512,offset=0): f32[]{:T(128)}
allocation 2: size 13000, page 0, preallocated-temp:
 value: <2 a @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <3 kept @0> (size=8192,offset=4096): f32[16,128]{1,0:T(8,128)}
 value: <4 b @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <5 c @0> (size=512,offset=12288): f32[4,128]{1,0:T(4,128)}
allocation 3: size 65536, color 1, page 0, preallocated-temp:
 value: <7 near @1> (size=65536,offset=0): f32[128,128]{1,0:T(8,128)S(1)}
"""
LIVE_RANGES = """HloLiveRange (max 6):
  InstructionSequence:
    0:s
    1:a
    2:kept
    3:b
    4:c
    5:new
  BufferLiveRange:
    s{}:0-6
    a{}:1-2
    kept{}:2-4
    b{}:3-4
    c{}:4-5
    new{}:5-6
    near{}:1-5
  Live ranges at 4 (peak):
    kept{}: 8192 bytes (cumulative: 8192 bytes)
"""
REFUSAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (112.12G) exceeds available HBM (15.75G). HLO module: jit_step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)
GIB = 2**30
VMEM = 128 * 2**20


def excerpt(refusal: str = "") -> tuple[Dump, Program, State, Any]:
    state = State({"w": jax.ShapeDtypeStruct((4, 128), jnp.float32)}, {})
    return Dump(None, HLO, BUFFERS, LIVE_RANGES, refusal), Program(HLO), state, {}


def test_a_tpus_texts_are_read_without_its_on_chip_memory() -> None:
    dump, *_ = excerpt()
    assert schedule(dump) == ["s", "a", "kept", "b", "c", "new"]
    assert [(allocation.bytes, allocation.parameter) for allocation in allocations(dump)] == [(2048, 0), (13000, None)]


def test_the_peak_of_a_tpus_texts() -> None:
    found = memory(*excerpt())
    # At place 4 of the schedule: `kept`, which the forward pass wrote, and `b` and `c`, which the backward pass did.
    assert [(buffer.bytes, buffer.kind, buffer.source) for buffer in found.largest] == [
        (8192, "activation", "/somewhere/lib.py:99"),
        (4096, "temporary", "/somewhere/model.py:7"),
        (2048, "parameter", ""),
        (512, "temporary", ""),
    ]
    assert found == Memory(
        parameters=2048,
        optimizer=0,
        batch=0,
        activations=8192,
        temporaries=13000 - 8192,
        code=0,
        total=2048 + 13000,
        largest=found.largest,
    )


def test_a_refusal_says_how_much_is_needed_and_what_is_largest() -> None:
    found = overflow(*excerpt(REFUSAL))
    assert (found.needed, found.available) == (round(112.12 * GIB), round(15.75 * GIB))
    assert [buffer.bytes for buffer in found.largest] == [8192, 4096, 2048, 512]


def test_a_refusal_without_its_error_code_is_read() -> None:
    text = REFUSAL.replace("E1000: CompileTimeHbmOom: ", "")
    assert read_refusal(text) == (round(112.12 * GIB), round(15.75 * GIB))


def test_a_refusal_without_numbers_is_shown_as_it_is() -> None:
    with pytest.raises(ValueError, match="does not say how much it needs: RESOURCE_EXHAUSTED: no luck"):
        read_refusal("RESOURCE_EXHAUSTED: no luck")


def test_other_errors_of_the_compiler_are_not_taken_for_refusals() -> None:
    lowered = jax.jit(jnp.sin).lower(1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compile_and_dump(lowered, {"no_such_option": True})


@pytest.fixture(scope="module")
def v5e() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(absent_tpus("v5e:2x2")), ("data",))


def lower_for(mesh: jax.sharding.Mesh, **sizes: int) -> tuple[jax.stages.Lowered, State, Any]:
    state, batch = arguments(mesh, **sizes)
    with jax.set_mesh(mesh):
        return jax.jit(make_step(jax.checkpoint(layer)), donate_argnums=0).lower(state, batch), state, batch


@pytest.mark.slow
def test_a_tpus_step_has_the_stack_that_its_scan_leaves(v5e: jax.sharding.Mesh) -> None:
    n, rows, d = 24, 16384, 512
    lowered, state, batch = lower_for(v5e, num_layers=n, rows=rows, d=d, f=1024)
    dump = compile_and_dump(lowered)
    found = memory(dump, Program(dump.hlo), state, batch)
    assert dump.compiled is not None
    said = dump.compiled.memory_analysis()
    assert said is not None
    made = said.output_size_in_bytes - said.alias_size_in_bytes + said.temp_size_in_bytes
    # Some versions of libtpu count VMEM among the temporaries.
    assert -(2**20) < said.argument_size_in_bytes + made + found.code - found.total < VMEM
    assert found.code == said.generated_code_size_in_bytes > 0
    stack, *_ = (buffer for buffer in found.largest if buffer.kind == "activation")
    assert stack == found.largest[0]
    assert stack.bytes == n * rows * d * 2  # as bfloat16: only products read it
    assert found.activations - stack.bytes in (0, rows * d * 4)  # that the last layer's output lies in HBM is a choice


@pytest.mark.slow
def test_a_step_too_large_for_a_tpu_tells_its_largest_buffers(v5e: jax.sharding.Mesh) -> None:
    n, rows, d = 64, 2**18, 512
    lowered, state, batch = lower_for(v5e, num_layers=n, rows=rows, d=d, f=1024)
    dump = compile_and_dump(lowered)
    assert dump.compiled is None
    found = overflow(dump, Program(dump.hlo), state, batch)
    assert found.needed > found.available == round(15.75 * GIB)
    assert found.largest[0].bytes >= n * rows * d * 2
    assert found.largest[0].kind == "activation"
    assert memory(dump, Program(dump.hlo), state, batch).total == pytest.approx(found.needed, rel=0.01)
