"""Usage of experts against the choices that routers were seen to make."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import load_corpus
from hybridlm.data.pipeline import evaluation_batches
from hybridlm.evaluation.experts import of_layer, table, usage_of_run
from hybridlm.ffns.moe.routers.topk import TopK
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.run import load


def seen_choices(run: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> Counter:
    """Tokens by (layer, expert): every router tells what it chose, in forward passes on one device."""
    seen: Counter = Counter()
    route = TopK.__call__

    def record(layer: Any, experts: Any, real: Any) -> None:
        for chosen in np.asarray(experts)[np.asarray(real)]:
            seen.update((int(layer), int(e)) for e in chosen)

    def telling(self: Any, tokens: Any, carry: Any, given: Any) -> Any:
        routing, aux, carry = route(self, tokens, carry, given)
        jax.debug.callback(record, given.layer, routing.experts, tokens.real)
        return routing, aux, carry

    with monkeypatch.context() as patch:
        patch.setattr(TopK, "__call__", telling)
        model, _, _ = load(run)
        batches = evaluation_batches(load_corpus(cfg.data).validation, batch_size=8, sharding=None, limit=limit)
        features = jax.jit(lambda params, tokens, segments: model.bind(params).features(tokens, segments)[0])
        for batch in batches:
            features(model.params, batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))
        jax.effects_barrier()
    return seen


@pytest.mark.parametrize("limit", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_shares_are_those_of_the_choices(
    moe_run: Path,
    moe_config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int | None,
) -> None:
    report = usage_of_run(moe_config, moe_run, data_spec=None, batches=limit)
    seen = seen_choices(moe_run, moe_config, monkeypatch, limit)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 3, 5]
    for layer in report["layers"]:
        x = 4 if layer["layer"] == 0 else 6
        counts = [seen[layer["layer"], e] for e in range(x)]
        assert layer["choices"] == sum(counts)
        np.testing.assert_allclose(layer["share"], np.asarray(counts) / sum(counts))
    text = load_corpus(moe_config.data).validation
    if limit is None:
        tokens = sum(int(np.sum(text[i]["segment_ids"] != 0)) for i in range(len(text)))
        assert [layer["choices"] for layer in report["layers"]] == [tokens, 2 * tokens, 2 * tokens, 2 * tokens]
    assert table(report) in capsys.readouterr().out
    assert report["step"] == 0


def test_the_numbers_of_a_layer() -> None:
    numbers = of_layer(np.array([6, 0, 2]))
    assert numbers["share"] == [0.75, 0.0, 0.25]
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(3)
    assert numbers["entropy"] == pytest.approx(entropy)
    assert numbers["max_load"] == pytest.approx(6 / (8 / 3))
    assert of_layer(np.array([5, 5]))["entropy"] == pytest.approx(1.0)


def test_a_line_names_the_hottest_five_and_the_coldest() -> None:
    counts = np.array([1, 20, 5, 9, 2, 30, 33])
    line = table({"step": 3, "layers": [{"layer": 4} | of_layer(counts)]}).splitlines()[1]
    assert line.startswith("layer 4   hottest 6: 33.0%  5: 30.0%  1: 20.0%  3: 9.0%  2: 5.0%   coldest 0: 1.0%   ")
    assert line.endswith("max/mean 2.31")


def test_ordinary_passes_count_nothing(moe_config: Config) -> None:
    init, bind = build(moe_config.model, moe_config.kernels)
    tokens = jnp.zeros((1, 4), jnp.int32)
    segments = Segments(tokens + 1, jnp.arange(4)[None])
    aux = jax.eval_shape(lambda: bind(init(jax.random.key(0))).features(tokens, segments)[2])
    assert all(x.shape == (4,) for name, x in aux.items() if name.startswith("moe_max"))
    assert "moe_choices" not in aux


def test_a_model_without_experts(trained_run: Path, tiny_config: Config) -> None:
    with pytest.raises(ConfigError, match="no layer of this run has experts"):
        usage_of_run(tiny_config, trained_run, data_spec=None, batches=None)


@pytest.mark.slow
def test_one_device_counts_what_eight_do(moe_run: Path, moe_config: Config) -> None:
    """Along `expert` too: each device counts its own tokens, and the counts are added up."""
    mesh = config.Mesh(data=4, expert=2)
    eight = usage_of_run(moe_config, moe_run, data_spec=None, batches=2)
    split = replace(moe_config, sharding=config.Sharding(mesh=mesh))
    assert usage_of_run(split, moe_run, data_spec=None, batches=2) == eight
