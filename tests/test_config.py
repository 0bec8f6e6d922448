"""Config dataclasses check types, ranges and cross-field rules when they are made."""

import dataclasses
import math

import pytest

from hybridlm.config import (
    RGLRU,
    AdamW,
    Attention,
    Block,
    Config,
    Data,
    Eval,
    GeGLU,
    Mesh,
    Mixer,
    Model,
    SwiGLU,
    Train,
    WarmupStableDecay,
)
from hybridlm.config_check import ConfigError, field_types, suggestion, violation

RECURRENT = Block(mixer=RGLRU(width=40, num_heads=5), ffn=GeGLU(hidden=24))


def model(**changes: object) -> Model:
    return Model(**{"vocab_size": 11, "width": 12, "num_layers": 3, "pattern": (RECURRENT,), **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (RGLRU, {"width": 0, "num_heads": 1}, "width=0: must be at least 1"),
        (RGLRU, {"width": -40, "num_heads": 1}, "width=-40: must be at least 1"),
        (RGLRU, {"width": 40, "num_heads": 3}, "width=40: must divide by num_heads=3"),
        (RGLRU, {"width": "40", "num_heads": 5}, "width='40': expected int, got str"),
        (RGLRU, {"width": 40.0, "num_heads": 5}, "width=40.0: expected int, got float"),
        (RGLRU, {"width": True, "num_heads": 1}, "width=True: expected int, got bool"),
        (RGLRU, {"width": 4, "num_heads": 1, "init": "papper"}, "init='papper': must be one of paper, recurrentgemma"),
        (Attention, {"num_heads": 4, "num_kv_heads": 3}, "num_heads=4: must divide by num_kv_heads=3"),
        (Attention, {"num_heads": 4, "num_kv_heads": 4, "window": 0}, "window=0: must be at least 1"),
        (Attention, {"num_heads": 4, "num_kv_heads": 4, "rope_fraction": 1.5}, "rope_fraction=1.5: must be at most 1"),
        (
            Block,
            {"mixer": GeGLU(hidden=3), "ffn": None},
            "mixer=GeGLU(hidden=3, bias=False): expected Mixer, got GeGLU",
        ),
        (AdamW, {"peak_lr": 0.0}, "peak_lr=0.0: must be above 0"),
        (AdamW, {"peak_lr": math.nan}, "peak_lr=nan: must be finite"),
        (AdamW, {"peak_lr": math.inf}, "peak_lr=inf: must be finite"),
        (AdamW, {"b1": 1.1}, "b1=1.1: must be at most 1"),
        (AdamW, {"schedule": "cosine"}, "schedule='cosine': expected Schedule, got str"),
        (Data, {"seq_len": 1}, "seq_len=1: must be at least 2"),
        (Data, {"source": "text"}, "path: is required by source=text; give a file or a directory"),
        (Data, {"validation_fraction": 0.0}, "validation_fraction=0.0: must be above 0"),
        (Train, {"batch_size": 7, "num_microbatches": 2}, "batch_size=7: must divide by num_microbatches=2"),
        (Train, {"steps": -1}, "steps=-1: must be at least 1"),
        (Eval, {"batches": 0}, "batches=0: must be at least 1"),
        (Mesh, {"fsdp": 0}, "fsdp=0: must be at least 1, or -1 for the devices that are left"),
        (Mesh, {"fsdp": -2}, "fsdp=-2: must be at least -1"),
        (Mesh, {"data": -1, "tensor": -1}, ": only one axis may be -1, not data and tensor"),
    ],
)
def test_wrong_value_names_field_value_and_rule(cls: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ()}, "pattern: must hold at least one Block"),
        ({"pattern": [RECURRENT]}, "expected tuple, got list"),
        ({"pattern": (RECURRENT, 3)}, "pattern.1=3: expected Block, got int"),
        ({"num_layers": 1, "prologue": (RECURRENT,), "epilogue": (RECURRENT,)}, "num_layers=1: prologue and epilogue"),
        (
            {"pattern": (RECURRENT, Block(mixer=Attention(num_heads=5, num_kv_heads=1), ffn=None))},
            "pattern.1.mixer.num_heads=5: model.width=12 must divide by it, or set head_dim",
        ),
    ],
)
def test_wrong_model_names_the_block(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=r"pattern|num_layers") as caught:
        model(**changes)
    assert message in str(caught.value)


def test_head_dim_frees_the_width() -> None:
    block = Block(mixer=Attention(num_heads=5, num_kv_heads=1, head_dim=8), ffn=None)
    assert model(pattern=(block,)).pattern == (block,)


def test_an_int_serves_as_a_float() -> None:
    assert AdamW(peak_lr=1).peak_lr == 1


def test_nodes_are_frozen_and_hashable() -> None:
    config = Config(model=model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(Config(model=model()))


def test_ffns_of_equal_fields_differ_by_class() -> None:
    assert GeGLU(hidden=3) != SwiGLU(hidden=3)


def test_required_field_has_no_default() -> None:
    with pytest.raises(TypeError, match="decay_steps"):
        WarmupStableDecay()  # pyright: ignore[reportCallIssue]


def test_users_mixer_is_checked_like_ours() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shift(Mixer):
        by: int

    assert model(pattern=(Block(mixer=Shift(by=2), ffn=None),)).pattern[0].mixer == Shift(by=2)
    with pytest.raises(ConfigError, match="by='2': expected int, got str"):
        Shift(by="2")  # pyright: ignore[reportArgumentType]


def test_error_moves_outwards() -> None:
    assert str(ConfigError("window", "=0: must be at least 1").under("mixer").under("model.pattern.2")) == (
        "model.pattern.2.mixer.window=0: must be at least 1"
    )
    assert str(ConfigError("", ": only one axis").under("sharding.mesh")) == "sharding.mesh: only one axis"


def test_optional_reports_the_inner_rule() -> None:
    assert violation(0, field_types(Attention)["window"]) == "=0: must be at least 1"
    assert violation(None, field_types(Attention)["window"]) is None


@pytest.mark.parametrize(
    ("word", "right"), [("windw", "window"), ("RGRLU", "RGLRU"), ("Attenton", "Attention"), ("qqq", None)]
)
def test_suggestion_is_the_nearest_or_nothing(word: str, right: str | None) -> None:
    expected = f"; did you mean {right}?" if right else ""
    assert suggestion(word, ["window", "width", "RGLRU", "ReGLU", "Attention"]) == expected
