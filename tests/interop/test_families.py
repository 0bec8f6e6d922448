"""Published models of every family against the libraries that define them: logits, at once and with a cache; weights
there and back, bit for bit."""

from pathlib import Path

import jax
import numpy as np
import pytest

from hybridlm.config import Model
from hybridlm.config_io import from_dict, to_dict
from hybridlm.interop.canonical import differences
from hybridlm.interop.families import ARCHITECTURES
from hybridlm.interop.fields import Fields
from hybridlm.interop.runs import find_architecture, read_model
from hybridlm.interop.safetensors import Tensors
from hybridlm.interop.weights import by_layer, written
from tests.interop.published import FAMILIES, FLA, TOLERANCE, Published, largest_errors, load, publish

pytest.importorskip("torch")
pytest.importorskip("transformers")
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
    arrays = by_layer(jax.device_get(params), config.model)
    back = dict(zip((n for r in rules for n in r.theirs), written(rules, arrays, tensors.read), strict=True))
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


@pytest.mark.parametrize("family", FLA)
def test_fla_layers_are_read_by_name(family: str, tmp_path: Path) -> None:
    """Where config.json names no architecture, its model_type does."""
    publish(family, tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace('"architectures"', '"unread"'), encoding="utf-8")
    assert read_model(tmp_path)[0].name == f"{family}ForCausalLM"
