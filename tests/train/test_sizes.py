"""Counts of parameters by part."""

import jax

from hybridlm.config import Config
from hybridlm.model import build
from hybridlm.train.sizes import parameters_by_part, size


def test_parts_have_the_parameters_of_their_layers(tiny_config: Config) -> None:
    init, _ = build(tiny_config.model, tiny_config.kernels)
    params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    counts = parameters_by_part(tiny_config.model, params)
    assert sum(counts.values()) == size(params)
    width, head_dim = 16, 8
    assert counts["embedding"] == 264 * width
    assert counts["GeGLU"] == 2 * 3 * width * 32
    assert counts["Attention"] == width * head_dim * ((2 + 2 * 1 + 2) + (2 + 2 * 2 + 2))
    assert counts["norm"] == (2 + 2 + 1 + 1) * width
    assert set(counts) == {"embedding", "GeGLU", "Attention", "RGLRU", "norm"}
