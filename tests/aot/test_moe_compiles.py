"""One layer of experts over sixteen absent TPU chips: its collectives, and the memory of its temporaries."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.layer import MoE
from hybridlm.mixers.base import Context, Segments
from hybridlm.sharding import make_mesh, spec

D, F, X, K, TOKENS = 512, 256, 32, 4, 2048  # tokens of a chip
ROWS = TOKENS * K
COLLECTIVE = re.compile(
    r"= (?:.+?) (all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute)(?:-done)?\("
)
DISPATCHES = {
    "ragged": (config.Dropless(buffer_factor=1.25), "ragged-all-to-all"),
    "padded": (config.Dropless(buffer_factor=1.25, exchange="padded"), "all-to-all"),
    "capacity": (config.Capacity(factor=1.25, group_size=512), "all-to-all"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISPATCHES)
def test_tokens_travel_twice_each_way_and_weights_not_at_all(name: str, sixteen_chips: Any) -> None:
    dispatch, kind = DISPATCHES[name]
    cfg = config.MoE(num_experts=X, hidden=F, router=config.TopK(k=K), dispatch=dispatch)
    forward, both = (compiled(cfg, sixteen_chips, gradient) for gradient in (False, True))
    metadata = {"ragged": 0, "padded": 1, "capacity": 0}[name]  # how many rows come from each device
    assert counts(forward)[kind] == 2 + metadata
    assert 4 <= counts(both)[kind] <= 4 + metadata
    for program in (forward, both):
        assert counts(program)["reduce-scatter"] == 0
        weights = [line for line in program.as_text().splitlines() if re.search(rf"\[{X},{D},\d+\].* all-gather", line)]
        assert not weights


@pytest.mark.slow
def test_temporaries_are_rows_and_not_one_hot_matrices(sixteen_chips: Any) -> None:
    """Forward and backward keep nine arrays of [rows, width] in bfloat16, the buffer 1.25 times as long, at most."""
    dispatch, _ = DISPATCHES["ragged"]
    cfg = config.MoE(num_experts=X, hidden=F, router=config.TopK(k=K), dispatch=dispatch)
    memory = compiled(cfg, sixteen_chips, True).memory_analysis()
    assert memory.temp_size_in_bytes < 9 * 1.25 * ROWS * D * 2


def compiled(cfg: config.MoE, sixteen_chips: Any, gradient: bool) -> Any:
    context = Context(width=D, num_layers=1, norm_eps=1e-6, dtype=jnp.dtype("bfloat16"), kernels=config.Kernels())
    with jax.set_mesh(make_mesh(config.Mesh(data=1, expert=-1), sixteen_chips)) as _:
        graphdef, state = nnx.split(jax.eval_shape(lambda: MoE(cfg, context, nnx.Rngs(params=jax.random.key(0)))))
        rows = jax.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
        x = jax.ShapeDtypeStruct((2 * len(sixteen_chips), TOKENS // 2, D), jnp.bfloat16, sharding=rows)
        ids = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32, sharding=rows)

        def forward(params: Any, x: Any, ids: Any) -> Any:
            given = Pass(ids, jnp.int32(0), jax.random.key(0))
            return nnx.merge(graphdef, params)(x, Segments(ids, ids), {}, given)[:2]

        def backward(params: Any, x: Any, ids: Any, dy: Any) -> Any:
            (_, aux), vjp = jax.vjp(lambda params, x: forward(params, x, ids), params, x)
            return vjp((dy, jax.tree.map(jnp.ones_like, aux)))

        params = nnx.to_pure_dict(state)
        if gradient:
            return jax.jit(backward).lower(params, x, ids, x).compile()
        return jax.jit(forward).lower(params, x, ids).compile()


def counts(program: Any) -> Counter[str]:
    return Counter(COLLECTIVE.findall(program.as_text()))
