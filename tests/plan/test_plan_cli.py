"""`hybridlm plan` on the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.plan.topology import Topology

SMALL = ("griffin_tiny", "--data.seq-len=64", "--model.num-layers=1", "--train.batch-size=8")
Invoke = Callable[..., Any]


def test_a_step_that_fits_is_told_in_text_and_json_and_exits_0(invoke: Invoke, tmp_path: Path) -> None:
    found = invoke(
        "plan", *SMALL, "--topology", "cpu:4", "--json", tmp_path / "plan.json", "--save", tmp_path / "step.bin"
    )
    assert found.code == 0, found.err
    assert "griffin_tiny on cpu:4 fits: " in found.out and "saved the executable to" in found.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["num_devices"] == 4 and plan["batch_size"] == 8
    assert config_io.from_dict(Config, plan["config"]).model.num_layers == 1
    assert (tmp_path / "step.bin").stat().st_size > 10_000


def test_a_step_that_does_not_fit_exits_3_and_names_what_would(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []

    monkeypatch.setattr(Topology, "memory", property(lambda _: 10**12 if needed else 1000))
    monkeypatch.setattr("hybridlm.plan.advice._is_possible", lambda *_: bool(needed.append(1)) or True)
    words = ("plan", *SMALL, "--model.remat=block_outputs", "--topology", "cpu:2")
    found = invoke(*words, "--json", tmp_path / "plan.json")
    assert found.code == 3
    assert "does not fit" in found.out
    assert "the smallest change that was found: --model.remat=full; with it the step fits" in found.out
    assert found.err.startswith("with --model.remat=full it fits")
    assert json.loads((tmp_path / "plan.json").read_text())["smallest_change"]["flags"] == "--model.remat=full"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--topology", "v5q:2x2"), ("--topology=v5q:2x2: no such device", "did you mean v5p?")),
        (("--topology", "v5e:3x3"), ("--topology=v5e:3x3: no slice has that shape; try v5e:2x4 or v5e:4x4",)),
        (("--topology", "h200:16"), ("no node has that shape; try h200:8",)),
        (("--topology", "cpu:64"), ("--topology=cpu:64: there are 8 CPU devices",)),
        (("--topology", "cpu:4", "--sharding.mesh.data=3"), ("data=3 needs 3 devices, which must equal the 4",)),
        (
            ("--topology", "cpu:4", "--sharding.mesh.data=1", "--sharding.mesh.context=4", "--data.seq-len=62"),
            ("data.seq_len=62: must divide by sharding.mesh.context = 4 devices",),
        ),
        (
            ("--topology", "cpu:4", "--sharding.mesh.tensor=4", "--model.pattern.2.mixer.num-heads=3"),
            ("sharding.mesh: tensor = 4 must divide every 'heads' axis", "one has size 3"),
        ),
        (("--topology", "cpu:4", "--json", "nowhere/plan.json"), ("--json nowhere/plan.json: no directory nowhere",)),
        (("--topology", "cpu:4", "--save", "nowhere/step"), ("--save nowhere/step: no directory nowhere",)),
        (
            (*SMALL[1:], "--topology", "cpu:2", '--sharding.xla-options=["xla_no_such_option=1"]'),
            ("sharding.xla_options: INVALID_ARGUMENT: No such compile option: 'xla_no_such_option'",),
        ),
        (
            (*SMALL[1:], "--topology", "cpu:2", '--sharding.xla-options=["xla_cpu_enable_fast_math=perhaps"]'),
            ("sharding.xla_options: INVALID_ARGUMENT: ", "xla_cpu_enable_fast_math", "'perhaps'"),
        ),
        (("--topology", "cpu:4", "--search"), ("--search: the rates of cpu are not known",)),
        (("--topology", "cpu:4", "--search", "--save", "step"), ("--save: saves one executable",)),
        (("--topology", "cpu:4", "--compiles", "0"), ("--compiles=0: must be at least 1",)),
        ((), ("the following arguments are required: --topology",)),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    invoke: Invoke, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    jax.devices()  # from then on JAX pretends to have no other number of them
    found = invoke("plan", "griffin_tiny", *words)
    found.assert_refused(*parts)
    assert found.out == ""


def test_control_c_stops_a_compilation_at_once(process_environment: dict[str, str], tmp_path: Path) -> None:
    """Of a process that waits in a compiler which does not listen."""
    program = (
        "import time, hybridlm.cli, hybridlm.plan.command as c\n"
        "from hybridlm.plan.compile import interruptible\n"
        "def wait(*_):\n    print('compiling', flush=True)\n    interruptible(lambda: time.sleep(100))\n"
        "c.compile_step = wait\n"
        "hybridlm.cli.main(['plan', 'griffin_tiny', '--topology', 'cpu:2'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "compiling\n"
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "hybridlm: interrupted, not saved\n")
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_advice_and_search_compile_for_absent_tpus(invoke: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    large = ("--data.seq-len=2048", "--model.num-layers=2", "--train.batch-size=2560", "--model.remat=none")
    found = invoke("plan", "griffin_tiny", *large, "--topology", "v5e:2x2")
    assert found.code == 3
    assert "the smallest change that was found: --model.remat=block_outputs" in found.out
    found = invoke(
        "plan", *SMALL, "--topology", "v5e:2x2", "--search", "--compiles", "2", "--json", tmp_path / "s.json"
    )
    assert found.code == 0
    ranked = json.loads((tmp_path / "s.json").read_text())["ranked"]
    rates = [each["report"]["tokens_per_second"] for each in ranked]
    assert len(rates) == 2 and rates == sorted(rates, reverse=True)
