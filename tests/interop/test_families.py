"""Published models of every family against the libraries that define them: logits, at once and with a cache; weights
there and back, bit for bit."""

from pathlib import Path

import jax
import numpy as np
import pytest

from hybridlm.config import Kernels, Model
from hybridlm.config_check import ConfigError
from hybridlm.config_io import from_dict, load_config, to_dict
from hybridlm.interop.canonical import differences
from hybridlm.interop.families import ARCHITECTURES
from hybridlm.interop.fields import Fields
from hybridlm.interop.runs import find_architecture, read_model
from hybridlm.interop.safetensors import Tensors
from hybridlm.interop.weights import shapes_of, written
from hybridlm.model import build
from hybridlm.model.by_layer import by_name
from hybridlm.train import layout
from tests.interop.configs import PUBLISHED
from tests.interop.published import FAMILIES, FLA, TOLERANCE, Published, largest_errors, load, publish

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
CHEAP = ("Llama", "RecurrentGemma")
every_family = pytest.mark.parametrize(
    "family",
    [family if family in CHEAP else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES],
    scope="module",
)


@pytest.fixture(scope="module")
def published(family: str, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(family, tmp_path_factory.mktemp("published") / family)


@every_family
def test_logits_are_those_of_the_published_model(published: Published) -> None:
    at_once, cached, largest = largest_errors(published)
    assert largest > 1.0  # else the tolerance says nothing
    assert at_once < TOLERANCE
    assert cached < TOLERANCE


@every_family
def test_weights_come_back_bit_for_bit(published: Published) -> None:
    config, params = load(published.directory)
    architecture, model = read_model(published.directory)
    tensors = Tensors(published.directory)
    rules = architecture.rules(model, tensors.entries)
    read = by_name(params, config.model).__getitem__
    back = dict(zip((n for r in rules for n in r.theirs), written(rules, read, tensors.read), strict=True))
    assert back.keys() == tensors.entries.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors.read(name), err_msg=name, strict=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_configs_come_back(name: str) -> None:
    """What `to_fields` says of a model, `to_model` reads as that model."""
    required = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 5, "intermediate_size": 96}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    own = {"Mamba2ForCausalLM": {"num_heads": 16, "head_dim": 8}, "HGRN2ForCausalLM": {"num_heads": 4}}.get(name, {})
    model = ARCHITECTURES[name].to_model(Fields(required | attention | own))
    found, fields = find_architecture(model, None, preferred=name)
    assert found.name == name
    assert differences(model, found.to_model(Fields(fields))) == []
    assert from_dict(Model, to_dict(model)) == model


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_of_published_sizes_are_those_of_transformers(name: str) -> None:
    """Names and shapes of whole models, of which no memory is taken."""
    fields = PUBLISHED[name]
    described = transformers.AutoConfig.for_model(**{k: v for k, v in fields.items() if k != "architectures"})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(described).state_dict()
    if fields["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    architecture = ARCHITECTURES[fields["architectures"][0]]
    model = architecture.to_model(Fields(fields))
    init, _ = build(model, Kernels())
    shapes = layout.flat_abstract(jax.eval_shape(lambda: init(jax.random.key(0))), model)
    found = {
        tensor: shape
        for rule in architecture.rules(model, theirs)
        for tensor, shape in zip(rule.theirs, shapes_of(rule, [shapes[n].shape for n in rule.ours]), strict=True)
    }
    assert found == {tensor: tuple(x.shape) for tensor, x in theirs.items()}


def test_the_recipe_of_recurrent_gemma_is_the_published_model() -> None:
    architecture, fields = find_architecture(load_config("recurrentgemma_2b").model, None)
    assert architecture.name == "RecurrentGemmaForCausalLM"
    published = architecture.to_model(Fields(PUBLISHED["recurrentgemma-2b"]))
    assert differences(architecture.to_model(Fields(fields)), published) == []


@pytest.mark.parametrize(
    ("kinds", "problem"),
    [
        (["full_attention"], "layer_types: are 1, and num_hidden_layers=28"),
        (["chunked_attention"] * 28, "layer_types: 'chunked_attention' is not supported; known: full_attention, "),
    ],
)
def test_layers_of_an_unknown_kind_are_refused(kinds: list[str], problem: str) -> None:
    fields = PUBLISHED["qwen3-0.6b"] | {"layer_types": kinds}
    with pytest.raises(ConfigError, match=problem):
        ARCHITECTURES["Qwen3ForCausalLM"].to_model(Fields(fields))


@pytest.mark.parametrize("family", FLA)
def test_fla_layers_are_read_by_name(family: str, tmp_path: Path) -> None:
    """Where config.json names no architecture, its model_type does."""
    publish(family, tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace('"architectures"', '"unread"'), encoding="utf-8")
    assert read_model(tmp_path)[0].name == f"{family}ForCausalLM"
