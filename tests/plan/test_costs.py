"""FLOPs and traffic of compiled programs whose counts are known."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hybridlm_kernels.bench.hlo import Program

from hybridlm.plan.costs import Cost, Window, costs, kernels_without_flops, scope_of
from hybridlm.plan.dump import compile_and_dump

N, M, K, L = 5, 37, 24, 40  # layers, rows, width, inner width
PRODUCT = 2 * M * K * L
F32 = jnp.float32


def program_of(f: Any, *shapes: tuple[int, ...]) -> Program:
    operands = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    return Program(compile_and_dump(jax.jit(f).lower(*operands)).hlo)


def flops(program: Program) -> dict[str, float]:
    return {scope: cost.flops for scope, cost in costs(program).items() if cost.flops}


def layer(x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
    with jax.named_scope("mixer/RGLRU"):
        x = jnp.tanh(x @ weights[0])
    with jax.named_scope("ffn/GeGLU"):
        return jnp.tanh(x @ weights[1])


def loss(u: jax.Array, v: jax.Array, x: jax.Array, layer: Any) -> jax.Array:
    y, _ = jax.lax.scan(lambda x, weights: (layer(x, weights), None), x, (u, v))
    with jax.named_scope("head"):
        return jnp.sum(jnp.square(y))


def step(u: jax.Array, v: jax.Array, x: jax.Array, layer: Any) -> Any:
    grads = jax.grad(loss, argnums=(0, 1))(u, v, x, layer)
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda p, g: p - 0.1 * g, (u, v), grads)


SHAPES = ((N, K, L), (N, L, K), (M, K))


def test_products_in_a_loop_count_as_often_as_it_runs() -> None:
    def forward(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, weights: (x @ weights[0] @ weights[1], None), x, (u, v))[0]

    assert sum(flops(program_of(forward, *SHAPES)).values()) == N * 2 * PRODUCT


def test_a_gradient_has_two_products_more_for_each_and_counts_by_scope() -> None:
    program = program_of(lambda u, v, x: step(u, v, x, layer), *SHAPES)
    assert flops(program) == {"mixer/RGLRU": 3 * N * PRODUCT, "ffn/GeGLU": 3 * N * PRODUCT}


def test_rematerialisation_does_the_forward_products_twice() -> None:
    program = program_of(lambda u, v, x: step(u, v, x, jax.checkpoint(layer)), *SHAPES)
    assert flops(program) == {"mixer/RGLRU": 4 * N * PRODUCT, "ffn/GeGLU": 4 * N * PRODUCT}


def test_batched_products_count_each_of_the_batch() -> None:
    program = program_of(lambda a, b: jnp.einsum("hij,hjk->hik", a, b), (3, 7, 11), (3, 11, 5))
    assert flops(program) == {"other": 2 * 3 * 7 * 11 * 5}


def test_a_causal_convolution_counts_no_products_with_its_padding() -> None:
    b, t, d, taps = 2, 13, 6, 4

    met = sum(1 for at in range(t) for tap in range(taps) if at - tap >= 0)
    text = f"""
ENTRY %main (x: f32[{b},{t},{d}], w: f32[{taps},1,{d}]) -> f32[{b},{t},{d}] {{
  %x = f32[{b},{t},{d}]{{2,1,0}} parameter(0)
  %w = f32[{taps},1,{d}]{{2,1,0}} parameter(1)
  ROOT %c = f32[{b},{t},{d}]{{2,1,0}} convolution(%x, %w), window={{size={taps} pad={taps - 1}_0}}, \
dim_labels=b0f_0io->b0f, feature_group_count={d}
}}
"""
    assert flops(Program(text)) == {"other": 2 * b * d * met}


CUBLAS = """
ENTRY %main (a: bf16[7,33], b: bf16[5,33]) -> bf16[7,5] {
  %a = bf16[7,33]{1,0} parameter(0)
  %b = bf16[5,33]{1,0} parameter(1)
  ROOT %c = (bf16[7,5]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(step)/jvp(head)/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
}
"""


def test_a_product_that_a_gpu_gives_to_its_library_counts() -> None:
    program = Program(CUBLAS)
    assert flops(program) == {"head": 2 * 7 * 5 * 33}
    assert kernels_without_flops(program) == ()


@pytest.mark.parametrize("stride", [1, 2, 3, 15])
@pytest.mark.parametrize("padding", [0, 2, 7])
@pytest.mark.parametrize("dilations", [(1, 1), (2, 1), (16, 1), (6, 4), (1, 3)])
def test_products_of_a_window_are_those_that_a_loop_counts(
    stride: int, padding: int, dilations: tuple[int, int]
) -> None:
    of_left, of_kernel = dilations
    for left, kernel, result in [(16, 16, 16), (5, 3, 11), (1, 4, 3), (7, 1, 7)]:
        met = [o * stride + k * of_kernel - padding for o in range(result) for k in range(kernel)]
        expected = sum(1 for at in met if at % of_left == 0 and 0 <= at // of_left < left)
        assert Window(stride, padding, of_left, of_kernel).products(left, kernel, result) == expected


TPU = """
%fused (p0: bf16[16,16,512], p1: bf16[16,16,512]) -> f32[16,16,16] {
  %p0 = bf16[16,16,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[16,16,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %products = f32[16,16,16]{2,1,0:T(8,128)} convolution(%p0, %p1), window={size=16 stride=15 lhs_dilate=16}, \
dim_labels=0bf_0oi->0bf, metadata={op_name="jit(step)/jvp(mixer)/Attention/dot_general" stack_frame_id=8}
}

%move (p: bf16[64,512]) -> bf16[16,512] {
  %p = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %part = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} slice(%p), slice={[0:16], [0:512]}
}

ENTRY %main (q: bf16[16,16,512], w: bf16[64,512]) -> f32[16,16,16] {
  %q = bf16[16,16,512]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="batch[\\'tokens\\']"}
  %w = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="state.params[\\'w\\']"}
  %q.2 = bf16[16,16,512]{2,1,0:T(8,128)(2,1)} copy(%q)
  %start = ((bf16[64,512]{1,0:T(8,128)(2,1)}), bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) async-start(%w), \
calls=%move
  %done = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} async-done(%start)
  %place = bf16[16,512]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %known = bf16[16,512]{1,0:T(8,128)(2,1)} custom-call(%done, %place), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/ffn/MoE/matmul"}, backend_config={"custom_call_config":{"body":"TUzvUg","cost_estimate":\
{"bytes_accessed":"77","flops":"12345","transcendentals":"0"},"needs_layout_passes":true}}
  %unknown = bf16[16,512]{1,0:T(8,128)(2,1)} custom-call(%known), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/mixer/RGLRU/scan"}, backend_config={"custom_call_config":{"body":"TUzvUg"}}
  ROOT %f = f32[16,16,16]{2,1,0:T(8,128)} fusion(%q, %q.2), kind=kOutput, calls=%fused
}
"""
ROWS, BLOCK = 16 * 512 * 2, 16 * 16 * 512 * 2


def test_a_batched_product_that_a_tpu_writes_as_a_convolution_counts_its_real_products() -> None:
    assert costs(Program(TPU))["mixer/Attention"].flops == 2 * 16 * 16 * 512 * 16


def test_a_kernel_counts_what_its_estimate_says_and_is_named_without_one() -> None:
    program = Program(TPU)
    assert costs(program)["ffn/MoE"].flops == 12345
    assert costs(program)["mixer/RGLRU"] == Cost(0, 2 * ROWS)
    assert kernels_without_flops(program) == ("jit(step)/mixer/RGLRU/scan",)


def test_traffic_belongs_to_the_scope_that_it_serves() -> None:
    found = costs(Program(TPU))
    # The copy without a name is its reader's: read and written, then read with the other operand; the result written.
    assert found["mixer/Attention"].hbm_bytes == 4 * BLOCK + 16 * 16 * 16 * 4
    # Of the slice into VMEM the part that is cut out; the kernel reads its place, which is in HBM, and writes.
    assert found["ffn/MoE"].hbm_bytes == ROWS + 2 * ROWS
    assert "other" not in {scope for scope, cost in found.items() if cost.hbm_bytes}


OVERLAPPED = """
%carried_on (p0: bf16[8,512], p1: bf16[32,512], p2: u32[], p3: f32[64,512]) -> (f32[64,512], bf16[8,512]) {
  %p0 = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.1 = bf16[32,512]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=3, dimensions={0}, \
backend_config={"async_collective_fusion_config":{}}
  %p2 = u32[]{:S(2)} parameter(2)
  %p3 = f32[64,512]{1,0:T(8,128)} parameter(3)
  %doubled = f32[64,512]{1,0:T(8,128)} add(%p3, %p3), metadata={op_name="jit(step)/ffn/GeGLU/add"}
  ROOT %t = (f32[64,512]{1,0:T(8,128)}, bf16[8,512]{1,0:T(8,128)(2,1)}, bf16[32,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
tuple(%doubled, %p0, %all-gather.1, %p2)
}

ENTRY %main (a: bf16[8,512], b: bf16[32,512], c: u32[], d: f32[64,512]) -> f32[64,512] {
  %a = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(1)
  %c = u32[]{:S(2)} parameter(2)
  %d = f32[64,512]{1,0:T(8,128)} parameter(3)
  %both = (f32[64,512]{1,0:T(8,128)}, bf16[8,512]{1,0:T(8,128)(2,1)}, bf16[32,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%a, %b, %c, %d), kind=kOutput, calls=%carried_on
  ROOT %out = f32[64,512]{1,0:T(8,128)} get-tuple-element(%both), index=0
}
"""


def test_a_collective_that_a_fusion_only_carries_on_is_no_traffic_of_the_fusion() -> None:
    assert costs(Program(OVERLAPPED)) == {"ffn/GeGLU": Cost(0, 2 * 64 * 512 * 4)}


def test_elementwise_arithmetic_is_traffic_alone() -> None:
    (cost,) = costs(program_of(lambda x: jnp.tanh(2 * x) + 1, (M, K))).values()
    assert cost == Cost(0, 2 * M * K * 4)


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/jvp()/while/body/closed_call/mixer/RGLRU/dot_general", "mixer/RGLRU"),
        ("jit(step)/transpose(jvp(mixer))/Mamba2/dot_general", "mixer/Mamba2"),
        ("jit(step)/transpose(jvp(mixer/Mamba2))/dot_general", "mixer/Mamba2"),
        ("jit(step)/transpose(jvp())/checkpoint/rematted_computation/ffn/GeGLU/mul", "ffn/GeGLU"),
        ("jit(step)/jvp(head)/while/body/closed_call/btd,vd->btv/dot_general", "head"),
        ("jit(step)/transpose(jvp(embedding))/scatter-add", "embedding"),
        ("jit(step)/optimizer/sub;jit(step)/mul", "optimizer"),
        ("jit(step)/jvp()/while/body/jit(head)/add", None),
        ("state.params['head']['w']", None),
        ("state.params['embedding']", None),
        ("", None),
    ],
)
def test_a_scope_is_found_inside_transformations(op_name: str, scope: str | None) -> None:
    assert scope_of(op_name) == scope


ELEMENTS = """\
HloModule m

%inner (p: f32[1024]) -> f32[8] {
  %p = f32[1024]{0} parameter(0)
  ROOT %s = f32[8]{0} slice(%p), slice={[0:8]}
}

%outer (q: f32[1024]) -> f32[8] {
  %q = f32[1024]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%q), kind=kLoop, calls=%inner
}

%pair (r: f32[16]) -> (f32[4], f32[1024]) {
  %r = f32[16]{0} parameter(0)
  %a = f32[4]{0} slice(%r), slice={[0:4]}
  %b = f32[1024]{0} broadcast(%r), dimensions={0}
  ROOT %t = (f32[4]{0}, /*index=1*/f32[1024]{0}) tuple(%a, %b)
}

ENTRY %main (x: f32[16]) -> f32[8] {
  %x = f32[16]{0} parameter(0)
  %two = (f32[4]{0}, /*index=1*/f32[1024]{0}) fusion(%x), kind=kLoop, calls=%pair
  %n = f32[4]{0} negate(%two#0)
  ROOT %y = f32[8]{0} fusion(%two#1), kind=kLoop, calls=%outer
}
"""


def test_an_element_of_a_tuple_and_a_slice_within_a_fusion_are_parts() -> None:
    moved = {operation.name: operation.hbm_bytes for operation in Program(ELEMENTS).operations()}
    assert moved == {"two": 4 * (16 + 4 + 1024), "n": 4 * (4 + 4), "y": 4 * (8 + 8)}
