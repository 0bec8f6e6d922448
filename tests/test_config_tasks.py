"""Configs of synthetic tasks: what fits, what the command line may set, and what is told of what does not fit."""

from dataclasses import replace
from typing import Any

import pytest

from hybridlm import config_io
from hybridlm.config import MQAR, S5, Config, Data, Parity, Part
from hybridlm.config_check import ConfigError
from hybridlm.config_tasks import TASKS, task_rows


@pytest.mark.parametrize("name", TASKS)
def test_a_source_brings_the_defaults_of_its_task(name: str, tiny_config: Config) -> None:
    data = Data(source=name, seq_len=64)
    assert data.task == TASKS[name]()
    config = replace(tiny_config, data=data)
    assert config_io.from_dict(Config, config_io.to_dict(config)) == config


def test_the_command_line_names_a_task_and_sets_its_fields(tiny_config: Config) -> None:
    recalls = config_io.override(tiny_config, ["data.path=none", "data.task.num-pairs=3", "--data.source=mqar"])
    assert recalls.data.task == MQAR(num_pairs=3)
    more = config_io.override(recalls, ["data.task.min_pairs=2"])
    assert more.data.task == MQAR(num_pairs=3, min_pairs=2)
    parity = config_io.override(more, ["data.source=parity", "data.task.answers=last"])
    assert parity.data.task == Parity(answers="last")
    assert config_io.override(parity, ["data.source=python-stdlib"]).data.task is None


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("data.source=partiy",), "did you mean parity?"),
        (("data.source=mqar", "data.task.num_pair=3"), "data.task.num_pair: no such field; did you mean num_pairs?"),
        (
            ("data.source=mqar", "data.task.num_pairs=9"),
            "data.seq_len=32: must be at least 36, which mqar needs for 36",
        ),
        (
            ("data.source=mqar", "data.task.vocab_size=9"),
            "data.task.vocab_size=9: half of it, but for the filler, must",
        ),
        (("data.source=mqar", "data.task.min_pairs=5"), "data.task.min_pairs=5: must be at most num_pairs=4"),
        (
            ("data.source=addition", "data.seq_len=4"),
            "data.seq_len=4: must be at least 5, which addition needs for 1 d",
        ),
        (("data.source=s5", "model.vocab_size=64"), "model.vocab_size=64: data.source=s5 has 120 ids; raise it"),
        (("data.source=s5", 'eval.sample_prompts=["a"]'), "eval.sample_prompts: are text, and data.source=s5 has none"),
        (("data.source=s5", "data.path=x"), "data.path: is not read where source=s5 is a task; leave it out"),
    ],
)
def test_what_does_not_fit_is_named(tiny_config: Config, assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_io.override(tiny_config, ["data.path=none", *assignments])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "s5", "task": Parity()}, "task: is a Parity; source=s5 needs a S5"),
        ({"task": S5()}, "task: is a S5, and source=python-stdlib has none"),
        ({"source": "s5", "mixture": (Part(name="a", path="a"),)}, "mixture: is not read where source=s5 is a task"),
    ],
)
def test_source_and_task_agree(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Data(**fields)
    assert str(caught.value).startswith(message)


def test_every_task_says_what_it_is() -> None:
    rows = task_rows()
    assert [name for name, _ in rows] == list(TASKS)
    assert all(summary.endswith(".") for _, summary in rows)
