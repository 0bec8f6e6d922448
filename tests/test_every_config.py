"""Every recipe of configs/ loads, survives JSON, and is described where a reader looks for it."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax
import pytest

from hybridlm.config import Config, Mesh
from hybridlm.config_io import dump_json, from_dict, list_recipes, load_config, load_json, recipes_directory, to_dict
from hybridlm.model import build
from hybridlm.sharding import make_mesh

RECIPES = {name: (line, config) for name, line, config in list_recipes()}
FAMILIES = [
    ("griffin_tiny", "hawk_tiny", "transformer_tiny"),
    ("griffin_1b", "transformer_1b"),
    ("shakespeare_char", "shakespeare_char_hawk", "shakespeare_char_transformer"),
]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    dump_json(config, tmp_path / "config.json")
    assert load_json(tmp_path / "config.json") == config
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_says_what_it_is_and_how_to_run_it(name: str) -> None:
    source = (recipes_directory() / f"{name}.py").read_text(encoding="utf-8")
    assert RECIPES[name][0].endswith((".", ":"))
    assert f"\n    hybridlm train {name} " in source
    assert "\nconfig = " in source


@pytest.mark.parametrize("name", RECIPES)
def test_index_has_a_row_with_the_command(name: str) -> None:
    assert f"`hybridlm train {name}" in index_row(name)


@pytest.mark.parametrize("name", RECIPES)
def test_index_gives_the_number_of_parameters(name: str) -> None:
    number, unit = index_row(name).split("|")[2].split()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(load_config(name))))
    exact = Decimal(count) / {"M": 10**6, "B": 10**9}[unit]
    assert exact.quantize(Decimal(number)) == Decimal(number)


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_parameters_divide_by_a_mesh_of_eight_devices(name: str, shape: tuple[int, int, int]) -> None:
    config = load_config(name)
    data, fsdp, tensor = shape
    with jax.set_mesh(make_mesh(Mesh(data=data, fsdp=fsdp, tensor=tensor))):
        params = abstract_params(config)
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    part = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
    # Norms and what runs along one of two axes are copied; nothing that counts is.
    assert part < 1.3 * whole / (fsdp * tensor)


def index_row(name: str) -> str:
    index = (recipes_directory() / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in index.splitlines() if f"[{name}]" in line]
    return row


def abstract_params(config: Config) -> Any:
    init, _ = build(config.model, config.kernels)
    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_a_control_differs_in_its_pattern_alone(family: tuple[str, ...]) -> None:
    base, *controls = (to_dict(load_config(name)) for name in family)
    for control in controls:
        assert control["model"].pop("pattern") != base["model"]["pattern"]
        assert control["model"] == {k: v for k, v in base["model"].items() if k != "pattern"}
        assert {**control, "model": None} == {**base, "model": None}


@pytest.mark.parametrize(
    ("name", "width", "rnn_width", "num_layers", "num_heads", "window"),
    [
        # De et al., 2024, arXiv:2402.19427, table 2; RecurrentGemma from its published checkpoint.
        ("griffin_1b", 2048, 2560, 24, 16, 1024),
        ("griffin_3b", 3072, 4096, 24, 24, 1024),
        ("griffin_7b", 4096, 5632, 32, 32, 1024),
        ("recurrentgemma_2b", 2560, 2560, 26, 10, 2048),
    ],
)
def test_published_shapes(name: str, width: int, rnn_width: int, num_layers: int, num_heads: int, window: int) -> None:
    model = to_dict(load_config(name))["model"]
    recurrent, again, local = model["pattern"]
    assert (model["width"], model["num_layers"]) == (width, num_layers)
    assert recurrent == again
    assert (recurrent["mixer"]["type"], recurrent["mixer"]["width"]) == ("RGLRU", rnn_width)
    attention = local["mixer"]
    assert (attention["num_heads"], attention["num_kv_heads"], attention["window"]) == (num_heads, 1, window)
    assert attention["num_heads"] * attention["head_dim"] == width
    assert attention["rope_fraction"] == 0.5
    assert {block["ffn"]["hidden"] for block in model["pattern"]} == {3 * width}
    assert {block["ffn"]["type"] for block in model["pattern"]} == {"GeGLU"}
