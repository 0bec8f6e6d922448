"""Configs survive JSON; overrides and recipes fail with one line that says what would be right."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridlm.config import AdamW, Block, Config, GeGLU, Mixer, WarmupStableDecay
from hybridlm.config_check import ConfigError
from hybridlm.config_io import (
    diff,
    dump_json,
    from_dict,
    leaves,
    list_recipes,
    load_config,
    load_json,
    override,
    to_dict,
)


@pytest.fixture
def griffin() -> Config:
    return load_config("griffin_tiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roll(Mixer):
    """A user's mixer, defined outside the package."""

    offsets: tuple[int, ...] = (1,)
    gain: float | None = None


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_json_round_trip_is_equal(griffin: Config, tmp_path: Path) -> None:
    user = dataclasses.replace(
        griffin,
        model=dataclasses.replace(griffin.model, pattern=(Block(mixer=Roll(offsets=(1, 5), gain=2.5), ffn=None),)),
        optimizer=AdamW(schedule=WarmupStableDecay(decay_steps=7)),
    )
    dump_json(user, tmp_path / "config.json")
    assert load_json(tmp_path / "config.json") == user
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_every_node_of_the_json_names_its_class(griffin: Config) -> None:
    data = to_dict(griffin)
    assert data["type"] == "Config"
    assert [block["mixer"]["type"] for block in data["model"]["pattern"]] == ["RGLRU", "RGLRU", "Attention"]
    assert data["optimizer"]["schedule"]["type"] == "Cosine"


def test_an_absent_field_takes_its_default(griffin: Config) -> None:
    data = to_dict(griffin)
    del data["train"], data["optimizer"]["clip_norm"]
    restored = from_dict(Config, data)
    assert restored.train == Config(model=griffin.model).train
    assert restored.optimizer == griffin.optimizer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["model"].update(num_layer=3), "model.num_layer: no such field; did you mean num_layers?"),
        (lambda c: c["train"].update(zzz=3), "train.zzz: no such field"),
        (
            lambda c: c["model"]["pattern"][2]["mixer"].update(windw=3),
            "model.pattern.2.mixer.windw: no such field; did you mean window?",
        ),
        (
            lambda c: c["model"]["pattern"][0]["mixer"].update(type="RGRLU"),
            "model.pattern.0.mixer.type='RGRLU': no such Mixer; did you mean RGLRU?",
        ),
        (
            lambda c: c["model"]["pattern"][0]["ffn"].update(type="RGLRU"),
            "model.pattern.0.ffn.type='RGLRU': no such FFN; did you mean ReGLU?",
        ),
        (lambda c: c["model"]["pattern"][0]["mixer"].pop("type"), "model.pattern.0.mixer.type: is required; one of "),
        (lambda c: c["model"].pop("width"), "model.width: is required by Model"),
        (lambda c: c.pop("model"), "model: is required by Config"),
        (lambda c: c.update(model=3), "model=3: expected an object with the fields of a Model"),
        (lambda c: c["model"].update(width="3"), "model.width='3': expected int, got str"),
        (lambda c: c["model"].update(pattern={}), "model.pattern={}: expected tuple, got dict"),
        (
            lambda c: c["model"]["pattern"][2]["mixer"].update(window=-3),
            "model.pattern.2.mixer.window=-3: must be at least 1",
        ),
        (lambda c: c["sharding"]["mesh"].update(fsdp=-1), "sharding.mesh: only one axis may be -1"),
    ],
)
def test_spoilt_json_names_file_field_and_remedy(
    griffin: Config, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = to_dict(griffin)
    spoil(data)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert one_line(caught).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{\n3", ":2: is not JSON"), (b"\xff", ": is not UTF-8 text"), (None, ": cannot be read: No such file")],
)
def test_unreadable_json_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert one_line(caught).startswith(f"{path}{message}")


def test_failed_dump_keeps_the_old_file(griffin: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump_json(griffin, tmp_path / "config.json")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        dump_json(override(griffin, ["train.seed=5"]), tmp_path / "config.json")
    assert load_json(tmp_path / "config.json") == griffin


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("train.steps=1_000", "train.steps", 1000),
        ("train.steps=2e6", "train.steps", 2_000_000),
        ("optimizer.peak-lr=3e-4", "optimizer.peak_lr", 3e-4),
        ("--optimizer.peak-lr=1", "optimizer.peak_lr", 1.0),
        ("model.pattern.2.mixer.window=512", "model.pattern.2.mixer.window", 512),
        ("model.pattern.2.mixer.window=none", "model.pattern.2.mixer.window", None),
        ("model.tied_embedding=False", "model.tied_embedding", False),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("model.logit-soft-cap=30", "model.logit_soft_cap", 30.0),
        ("data.path=a=b-c", "data.path", "a=b-c"),
        ("sharding.mesh.data=-1", "sharding.mesh.data", -1),
    ],
)
def test_override_changes_one_leaf(griffin: Config, assignment: str, path: str, value: object) -> None:
    before, after = dict(leaves(griffin)), dict(leaves(override(griffin, [assignment])))
    assert after.pop(path) == value
    before.pop(path)
    assert after == before


def test_overrides_are_checked_together(griffin: Config) -> None:
    changed = override(griffin, ["data.source=text", "data.path=book.txt"])
    assert (changed.data.source, changed.data.path) == ("text", "book.txt")
    changed = override(griffin, ["sharding.mesh.fsdp=-1", "sharding.mesh.data=2"])
    assert (changed.sharding.mesh.data, changed.sharding.mesh.fsdp) == (2, -1)


def test_tuple_of_numbers_is_json_or_indexed(griffin: Config) -> None:
    block = Block(mixer=Roll(offsets=(1, 2)), ffn=None)
    config = dataclasses.replace(griffin, model=dataclasses.replace(griffin.model, pattern=(block,)))
    whole = override(config, ["model.pattern.0.mixer.offsets=[3, 4, 5]"])
    assert whole.model.pattern[0].mixer == Roll(offsets=(3, 4, 5))
    assert override(config, ["model.pattern.0.mixer.offsets.1=9"]).model.pattern[0].mixer == Roll(offsets=(1, 9))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.widht=3", "model.widht: no such field; did you mean width?"),
        ("width=3", "width: no such field; did you mean model.width?"),
        ("model.pattern.2.mixer.windw=3", "model.pattern.2.mixer.windw: no such field; did you mean window?"),
        ("model.pattern.7.mixer.window=3", "model.pattern.7: no such element; there are 3, counted from 0"),
        ("model.width.x=3", "model.width.x: no such field, model.width is the value 128"),
        ("model.width=0", "model.width=0: must be at least 1"),
        ("model.width=abc", "model.width=abc: expected a whole number"),
        ("train.steps=1.5", "train.steps=1.5: expected a whole number"),
        ("optimizer.peak_lr=nan", "optimizer.peak_lr=nan: must be finite"),
        ("model.logit_soft_cap=x", "model.logit_soft_cap=x: expected a number or none"),
        ("model.tied_embedding=1", "model.tied_embedding=1: expected true or false"),
        (
            "model.dtype=bfloat61",
            "model.dtype='bfloat61': must be one of auto, float32, bfloat16; did you mean bfloat16?",
        ),
        ("data.source=text", "data.path: is required by source=text"),
        ("optimizer.schedule=X", "optimizer.schedule=X: a command line sets single values; set its fields (optimizer."),
        ("model.pattern=[]", "model.pattern=[]: a command line sets single values; set its fields (model.pattern.0."),
        ("train.steps", "train.steps: expected field.path=value, such as train.steps=100"),
        ("=3", "=3: expected field.path=value"),
    ],
)
def test_wrong_override_names_path_and_remedy(griffin: Config, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(griffin, [assignment])
    assert one_line(caught).startswith(message)


def test_diff_is_one_line_a_field(griffin: Config) -> None:
    changed = override(griffin, ["model.num_layers=12", "data.path=x", "model.pattern.2.mixer.window=7"])
    assert diff(griffin, changed) == [
        "model.num_layers: 6 -> 12",
        "model.pattern.2.mixer.window: 128 -> 7",
        "data.path: none -> x",
    ]
    assert diff(griffin, griffin) == []


def test_diff_of_another_class_or_length(griffin: Config) -> None:
    recurrent, _, local = griffin.model.pattern
    other = dataclasses.replace(
        griffin,
        model=dataclasses.replace(griffin.model, pattern=(local, recurrent), epilogue=(recurrent,)),
        optimizer=AdamW(peak_lr=3e-3, schedule=WarmupStableDecay(decay_steps=7)),
    )
    assert diff(griffin, other) == [
        "model.pattern.0.mixer: RGLRU -> Attention",
        "model.pattern.2: Block -> absent",
        "model.epilogue.0: absent -> Block",
        "optimizer.schedule: Cosine -> WarmupStableDecay",
    ]


RECIPE = "from dataclasses import replace\nfrom hybridlm.config import *\nfrom hybridlm.config_io import load_config\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", ": a recipe must end in config = Config(...); it sets none"),
        ("config = 3", ": a recipe must end in config = Config(...); it is of type int"),
        ("Attention(num_heads=4,\n  num_kv_heads=3)", ":4: num_heads=4: must divide by num_kv_heads=3"),
        ("\nAttention(num_heds=4)", ":5: Attention.num_heds: no such field; did you mean num_heads?"),
        ("Attention(num_heads=4)", ":4: Attention: num_kv_heads is required"),
        (
            "b = load_config('griffin_tiny')\nconfig = replace(b.model, widht=3)",
            ":5: Model.widht: no such field; did you mean width?",
        ),
        ("config = RGRLU(width=3)", ":4: name 'RGRLU' is not defined; did you mean RGLRU?"),
        ("from hybridlm.config import Atention", ":4: cannot import name 'Atention'"),
        ("import hybridllm", ":4: ModuleNotFoundError: No module named 'hybridllm'"),
        ("config = Config(", ":4: syntax error: "),
        ("1 / 0", ":4: ZeroDivisionError: division by zero"),
        ("load_config('griffin_tiney')", ":4: griffin_tiney: no such recipe or file; did you mean griffin_tiny?"),
    ],
)
def test_broken_recipe_names_file_line_and_remedy(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE + source)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert one_line(caught).startswith(f"{path}{message}")


def test_error_in_the_base_of_a_recipe_names_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(RECIPE + "GeGLU(hidden=0)")
    (tmp_path / "mine.py").write_text(RECIPE + f"config = load_config({str(tmp_path / 'base.py')!r})")
    with pytest.raises(ConfigError, match="hidden=0") as caught:
        load_config(tmp_path / "mine.py")
    assert one_line(caught).startswith(f"{tmp_path / 'base.py'}:4: hidden=0: must be at least 1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("griffin_tiney", "griffin_tiney: no such recipe or file; did you mean griffin_tiny? (hybridlm list configs)"),
        ("qqqq", "qqqq: no such recipe or file (hybridlm list configs)"),
        ("configs/nothing.py", "configs/nothing.py: no such file"),
    ],
)
def test_unknown_recipe_suggests_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert one_line(caught).startswith(message)


def test_a_directory_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory; give a recipe"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_text("model: griffin")
    with pytest.raises(ConfigError, match=r"a recipe is a \.py file"):
        load_config(tmp_path / "c.yaml")


def test_mixer_defined_in_a_recipe_round_trips(tmp_path: Path) -> None:
    source = """
@__import__("dataclasses").dataclass(frozen=True, kw_only=True)
class Delay(Mixer):
    by: "int" = 3

base = load_config("griffin_tiny")
config = replace(base, model=replace(base.model, pattern=(Block(mixer=Delay(), ffn=None),)))
"""
    (tmp_path / "mine.py").write_text(RECIPE + source)
    config = load_config(tmp_path / "mine.py")
    assert load_config(tmp_path / "mine.py") is config
    assert from_dict(Config, to_dict(config)) == config


def test_recipe_edited_on_disk_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for steps in (3, 12345):
        path.write_text(RECIPE + f"config = replace(load_config('griffin_tiny'), train=Train(steps={steps}))")
        time.sleep(0.01)  # a file system's clock ticks
        assert load_config(path).train.steps == steps


def test_a_saved_config_is_a_recipe(griffin: Config, tmp_path: Path) -> None:
    dump_json(griffin, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == griffin


def test_the_list_has_every_recipe_with_its_first_line() -> None:
    recipes = {name: (line, config) for name, line, config in list_recipes()}
    assert recipes["griffin_1b"][0].startswith("Griffin 1.3B: two recurrent blocks")
    assert recipes["griffin_1b"][1] == load_config("griffin_1b")


def test_two_mixers_of_one_name(griffin: Config) -> None:
    frozen = dataclasses.dataclass(frozen=True)
    twins = [frozen(type("Twin", (Mixer,), {"__module__": module}))() for module in ("here", "there")]
    for twin in twins:
        config = dataclasses.replace(
            griffin, model=dataclasses.replace(griffin.model, pattern=(Block(mixer=twin, ffn=None),))
        )
        assert override(config, ["train.seed=1"]).model.pattern[0].mixer is not twin
        assert override(config, ["train.seed=1"]).model == config.model
        with pytest.raises(ConfigError, match="type='Twin': here and there both define one; rename one of them"):
            from_dict(Config, to_dict(config))


def test_leaves_reach_into_tuples(griffin: Config) -> None:
    found = dict(leaves(griffin))
    assert found["model.pattern.2.mixer.window"] == 128
    assert "model.prologue" not in found
    assert all(not isinstance(value, GeGLU | Block) for value in found.values())


def test_a_config_error_needs_no_jax_and_no_two_seconds() -> None:
    script = (
        "import sys\n"
        "from hybridlm.config_io import load_config, list_recipes, override\n"
        "list_recipes()\n"
        "try:\n    override(load_config('griffin_tiny'), ['model.widht=3'])\n"
        "except ValueError as error:\n    print(error)\n"
        "print(sorted({'jax', 'flax', 'numpy', 'grain', 'orbax'} & set(sys.modules)))\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "model.widht: no such field; did you mean width?\n[]\n"
    assert time.perf_counter() - start < 2
