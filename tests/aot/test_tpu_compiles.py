"""The training step compiles for a TPU slice that is not there, with the TPU's own kernels in it."""

from typing import Any

import pytest

from hybridlm import config
from hybridlm.plan.collectives import Collective, collectives
from hybridlm.plan.compile import CompiledStep, compile_step
from hybridlm.plan.topology import prepare_process, topology

pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")

BATCH, LENGTH = 8, 512
ffn = config.GeGLU(hidden=256)
MODEL = config.Model(
    vocab_size=512,
    width=128,
    num_layers=3,
    pattern=(
        config.Block(mixer=config.RGLRU(width=256, num_heads=2), ffn=ffn),
        config.Block(
            mixer=config.Attention(num_heads=2, num_kv_heads=1, head_dim=64, window=256, rope_fraction=0.5), ffn=ffn
        ),
    ),
    remat="block_outputs",
)


def compiled(mesh: config.Mesh, **train: Any) -> CompiledStep:
    run = config.Config(
        model=MODEL,
        data=config.Data(seq_len=LENGTH),
        train=config.Train(batch_size=BATCH, **train),
        sharding=config.Sharding(mesh=mesh),
    )
    four_chips = topology("v5e:2x2")
    prepare_process(four_chips)
    return compile_step(run, four_chips)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [config.Mesh(data=1, fsdp=4), config.Mesh(data=2, tensor=2), config.Mesh(data=1, context=4)],
    ids=["fsdp", "tensor", "context"],
)
def test_train_step_of_a_griffin_compiles(mesh: config.Mesh) -> None:
    step = compiled(mesh)
    text = step.dump.hlo
    assert "tpu_custom_call" in text
    for kernel in ("splash", "rg_lru", "rg_lru_adjoint", "short_conv", "short_conv_adjoint"):
        assert kernel in text
    assert "bf16[" in text  # activations, by the platform of the mesh and not of this process
    # Every buffer fits: no [LENGTH, LENGTH] of scores per head and layer, parameters a share per device.
    assert step.dump.compiled is not None
    assert step.dump.compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("gradient_dtype", "dtype"), [("auto", "bf16"), ("float32", "f32")])
def test_gradients_travel_in_the_dtype_that_is_asked_for(gradient_dtype: str, dtype: str) -> None:
    step = compiled(config.Mesh(data=4), gradient_dtype=gradient_dtype)
    # XLA adds up all weights' gradients of a dtype together; those of norms are float32 anyway.
    largest = max(sums(step), key=lambda each: each.bytes * each.runs)
    assert largest.dtype == dtype, sums(step)


def sums(step: CompiledStep) -> list[Collective]:
    return [each for each in collectives(step.program, step.mesh) if each.kind in ("all-reduce", "reduce-scatter")]
