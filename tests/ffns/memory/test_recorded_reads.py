"""What layers record of their reads, with the gradients of the answers, makes the dense gradients of their tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.ffns import FFNS
from hybridlm.ffns.base import RECORDED, Pass
from hybridlm.mixers.base import Context, Segments

B, T, D = 3, 5, 12
CASES = (
    config.ProductKeyMemory(num_rows=49, top_k=3, num_heads=2, key_dim=6, query_norm="layer"),
    config.MemoryPlus(num_rows=36, top_k=4, num_heads=2, value_dim=10),
    config.PEER(num_rows=64, top_k=4, num_heads=2, key_dim=6, query_norm="none"),
    config.UltraMem(num_rows=16, top_k=5, key_dim=6, value_dim=8),
)


@pytest.mark.parametrize("cfg", CASES, ids=lambda cfg: type(cfg).__name__)
def test_recorded_reads_make_the_gradients_of_tables(cfg: config.Memory, rng: np.random.Generator) -> None:
    module = FFNS.module_of(cfg)
    context = Context(D, 1, 1e-6, jnp.dtype(jnp.float32), config.Kernels(), (cfg,))
    rngs = nnx.Rngs(params=jax.random.key(0))
    layer = nnx.split(module(cfg, context, rngs))
    shared = {name: nnx.split(table) for name, table in module.shared(cfg, context, rngs).items()}
    x, cotangent = (jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(np.arange(T) < np.array([[5], [3], [0]]), jnp.int32)

    def objective(tables: Any, taps: Any, x: jax.Array) -> Any:
        merged = {name: nnx.merge(graphdef, tables[name]) for name, (graphdef, _) in shared.items()}
        y, aux, _ = nnx.merge(*layer)(x, Segments(ids, ids), {}, Pass(ids, shared=merged, taps=taps))
        return jnp.sum(y * cotangent), {name: value for name, value in aux.items() if name.startswith(RECORDED)}

    tables = {name: nnx.to_pure_dict(state) for name, (_, state) in shared.items()}
    taps = module.taps(cfg, context, B, T)
    differentiate = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    (dense, _, d_x), nothing = differentiate(tables, None, x)
    (undone, answers, d_x_tapped), recorded = differentiate(tables, taps, x)
    assert nothing == {}
    np.testing.assert_allclose(d_x_tapped, d_x, rtol=1e-4, atol=1e-6)
    for name in tables:
        read = {what: recorded.get(f"{RECORDED}{name}/{what}", answers[name]) for what in ("weights", "vectors")}
        indices = np.asarray(recorded[f"{RECORDED}{name}/indices"])
        vectors, weights = np.asarray(read["vectors"]), np.asarray(read["weights"])
        got = np.asarray(dense[name]["table"]).reshape(-1, vectors.shape[-1])
        want = np.zeros(got.shape)
        for *token, place in np.argwhere(indices >= 0):
            want[indices[*token, place]] += weights[*token, place] * vectors[tuple(token)]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        assert np.linalg.norm(want) > 0
        assert np.all(np.asarray(undone[name]["table"]) == 0.0)
        assert np.all(indices[np.asarray(ids) == 0] == -1)
