"""What a run takes of another's parameters."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from hybridlm.config import Attention, Beside, Block, Config, Finetune, GeGLU, MemoryPlus, Model
from hybridlm.config_check import ConfigError
from hybridlm.finetune.beginning import beginning
from hybridlm.finetune.paths import by_path
from hybridlm.model import Params, build

FFN = GeGLU(hidden=8)
ATTENTION = Block(mixer=Attention(num_heads=2, num_kv_heads=1), ffn=FFN)
SOURCE = Model(vocab_size=20, width=8, num_layers=4, pattern=(ATTENTION,), tied_embedding=False)


def shapes(model: Model, config: Config) -> Params:
    return jax.eval_shape(build(model, config.kernels)[0], jax.random.key(0))


def drawn(model: Model, config: Config, rng: np.random.Generator) -> Params:
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes(model, config))


def test_layers_are_matched_by_number_however_the_stack_is_split(tiny_config: Config, rng: np.random.Generator) -> None:
    params = drawn(SOURCE, tiny_config, rng)
    model = replace(SOURCE, prologue=(ATTENTION,), pattern=(ATTENTION, ATTENTION))
    made, fresh, _ = beginning(shapes(model, tiny_config), model, params, SOURCE, Finetune(), 0)
    old, new = (by_path(tree) for tree in (params, made))
    name = "mixer.w_q"
    assert fresh == ()
    assert np.array_equal(new[f"stack.prologue.0.{name}"], old[f"stack.repeats.0.{name}"][0])
    assert np.array_equal(new[f"stack.repeats.0.{name}"][0], old[f"stack.repeats.0.{name}"][1])
    assert np.array_equal(new[f"stack.repeats.1.{name}"][0], old[f"stack.repeats.0.{name}"][2])
    assert np.array_equal(new[f"stack.tail.0.{name}"], old[f"stack.repeats.0.{name}"][3])


def test_new_words_are_near_the_mean_of_the_others(tiny_config: Config, rng: np.random.Generator) -> None:
    params = drawn(SOURCE, tiny_config, rng)
    model = replace(SOURCE, vocab_size=26)
    made, _, num_new = beginning(shapes(model, tiny_config), model, params, SOURCE, Finetune(), 0)
    assert num_new == 6
    assert np.array_equal(made["embedding"][:20], params["embedding"])
    assert np.array_equal(made["w_head"][:, :20], params["w_head"])
    for new, old in ((made["embedding"][20:], params["embedding"]), (made["w_head"][:, 20:].T, params["w_head"].T)):
        away = new - old.astype(np.float64).mean(axis=0)
        assert new.shape == (6, 8)
        assert 0.005 < away.std() / old.std() < 0.02


def test_a_memory_layer_begins_anew_where_it_may(tiny_config: Config, rng: np.random.Generator) -> None:
    """Beside an FFN, which has another name then and would be drawn too: that has to be allowed as well."""
    memory = Beside(ffn=FFN, memory=MemoryPlus(num_rows=16, top_k=2, num_heads=1))
    model = replace(SOURCE, epilogue=(replace(ATTENTION, ffn=memory),))
    params, abstract = drawn(SOURCE, tiny_config, rng), shapes(model, tiny_config)
    with pytest.raises(ConfigError, match=r"finetune.fresh: the run to begin with has no .*memory"):
        beginning(abstract, model, params, SOURCE, Finetune(), 0)
    made, fresh, _ = beginning(abstract, model, params, SOURCE, Finetune(fresh=("*.memory.*", "shared.*")), 0)
    assert fresh
    assert all("memory" in path or path.startswith("shared.") for path in fresh)
    mlp = by_path(made)["stack.epilogue.0.ffn.ffn.up.w"]
    assert np.array_equal(mlp, by_path(params)["stack.repeats.0.ffn.up.w"][3])


def test_a_field_that_differs_is_named_unless_it_may(tiny_config: Config, rng: np.random.Generator) -> None:
    params = drawn(SOURCE, tiny_config, rng)
    model = replace(SOURCE, pattern=(replace(ATTENTION, mixer=replace(ATTENTION.mixer, window=4)),), norm_eps=1e-5)
    with pytest.raises(ConfigError, match=r"model.norm_eps: 1e-06 -> 1e-05 is another model .* 1 more fields differ"):
        beginning(shapes(model, tiny_config), model, params, SOURCE, Finetune(), 0)
    allowed = Finetune(differs=("model.norm_eps", "model.pattern.*.window"))
    made, fresh, _ = beginning(shapes(model, tiny_config), model, params, SOURCE, allowed, 0)
    assert fresh == ()
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(params), strict=True))
