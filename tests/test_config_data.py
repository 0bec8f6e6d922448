"""Mixtures and their stages in configs: what is refused, and how it is told."""

from dataclasses import replace
from typing import Any

import pytest

from hybridlm import config_io
from hybridlm.config import Config, Data, Part, Stage
from hybridlm.config_check import ConfigError

WEB, CODE = Part(name="web", path="web"), Part(name="code", source="prepared", path="code", weight=0.5)
LATER = Stage(first_step=10, weights=("web=1", "code=3"))


def stage(*weights: str, first_step: int = 10) -> Stage:
    return Stage(first_step=first_step, weights=weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": (WEB, WEB)}, "mixture.1.name='web': another part has this name"),
        ({"mixture": (replace(WEB, weight=0),)}, "mixture: all weights are 0; give one part a weight"),
        ({"path": "web"}, "path='web': is not read where data.mixture names the sources; leave it out"),
        (
            {"stages": (stage("web=1", "cod=1"),)},
            "stages.0.weights: cod is no part of the mixture; did you mean code?",
        ),
        (
            {"stages": (stage("web=1"),)},
            "stages.0.weights: lacks code; give every part a weight, or 0 for none",
        ),
        (
            {"stages": (LATER, stage("web=0", "code=0.0", first_step=20))},
            "stages.1.weights: all are 0; give one part a weight",
        ),
        (
            {"stages": (LATER, LATER)},
            "stages.1.first_step=10: must be above 10, that of the stage before",
        ),
        (
            {"mixture": (), "stages": (LATER,)},
            "stages: weigh the parts of a mixture, and there is no data.mixture",
        ),
    ],
)
def test_a_mixture_that_makes_no_sense_is_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Data(**{"mixture": (WEB, CODE)} | fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("web",), "weights.0='web': must be name=weight with a weight of at least 0"),
        (("web=1", "code=-1"), "weights.1='code=-1': must be name=weight with a weight of at least 0"),
        (("web=nan",), "weights.0='web=nan': must be name=weight with a weight of at least 0"),
        (("web=inf",), "weights.0='web=inf': must be name=weight with a weight of at least 0"),
        (("web=1", "web=2"), "weights.1='web=2': web has a weight already"),
    ],
)
def test_weights_of_a_stage_that_are_none_are_named(weights: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Stage(first_step=1, weights=weights)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a b"}, "name='a b': must be of letters, digits, _, - and ."),
        ({"path": None}, "path: is required by source=text; give a file or a directory"),
        ({"weight": -1.0}, "weight=-1.0: must be at least 0"),
        ({"source": "parquet"}, "source='parquet': must be one of python-stdlib, text, jsonl, chat, prepared"),
    ],
)
def test_a_part_is_checked_by_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Part(**{"name": "web", "path": "web"} | fields)
    assert str(caught.value) == message


def test_a_mixture_survives_json_and_takes_overrides(tiny_config: Config) -> None:
    data = Data(mixture=(WEB, CODE), stages=(LATER,), packing="first-fit", workers=2)
    config = replace(tiny_config, data=data)
    assert config_io.from_dict(Config, config_io.to_dict(config)) == config
    changed = config_io.override(config, ["data.mixture.1.weight=4", 'data.stages.0.weights=["web=2", "code=1"]'])
    assert changed.data.mixture[1].weight == 4
    assert changed.data.stages[0].by_name() == {"web": 2.0, "code": 1.0}
    with pytest.raises(ConfigError, match=r"^data\.stages\.0\.weights: lacks code"):
        config_io.override(config, ['data.stages.0.weights=["web=2"]'])
