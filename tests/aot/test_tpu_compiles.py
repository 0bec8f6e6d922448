"""The training step compiles for a TPU slice that is not there, with the TPU's own kernels in it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from hybridlm import config
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.sharding import make_mesh, spec
from hybridlm.train.step import init_state, make_train_step

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


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four TPU v5e chips, known to the compiler alone."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 1, 2)], ids=str)
def test_train_step_of_a_griffin_compiles(shape: tuple[int, int, int], devices: Any) -> None:
    data, fsdp, tensor = shape
    optimizer, schedule = make_optimizer(config.AdamW(), steps=1000)
    mesh = make_mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor), devices)
    with jax.set_mesh(mesh):
        init, bind = build(MODEL, config.Kernels())
        state = jax.eval_shape(partial(init_state, init, optimizer, 0))
        rows = NamedSharding(mesh, spec("batch", None))
        names = ("tokens", "targets", "segment_ids", "positions", "target_bytes")
        batch = {name: jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=rows) for name in names}
        batch["loss_weight"] = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32, sharding=rows)
        compiled = make_train_step(bind, optimizer, schedule, config.Train()).lower(state, batch).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    for kernel in ("splash", "rg_lru", "rg_lru_adjoint", "short_conv", "short_conv_adjoint"):
        assert kernel in text
    assert "bf16[" in text  # activations, by the platform of the mesh and not of this process
    # Every buffer fits: no [LENGTH, LENGTH] of scores per head and layer, parameters a share per device.
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20
