"""Wrong input: exit code 2, one line that names the field and the way out, and no JAX where it is not needed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Invoke = Callable[..., Any]


@pytest.fixture
def config_file(trained_run: Path) -> Path:
    return trained_run / "config.json"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ("COMMAND", "hybridlm --help")),
        ("trian griffin_tiny", ("trian", "'train'")),
        ("train", ("train: ", "required: config")),
        ("train griffin_tinny", ("griffin_tinny: no such recipe", "did you mean griffin_tiny?")),
        ("train nowhere/recipe.py", ("nowhere/recipe.py: no such file",)),
        ("train griffin_tiny --otu runs/x", ("--otu: no such option; did you mean --out?",)),
        ("train griffin_tiny --model.widht=64", ("model.widht: no such field; did you mean width?",)),
        (
            "train griffin_tiny --model.pattern.2.mixer.windw=64",
            ("model.pattern.2.mixer.windw: no such field; did you mean window?",),
        ),
        ("train --train.setps 5 griffin_tiny", ("train.setps: no such field; did you mean steps?",)),
        ("train griffin_tiny --train.steps", ("--train.steps: needs a value",)),
        ("train griffin_tiny --train.steps=ten", ("train.steps=ten: expected a whole number",)),
        ("train griffin_tiny --model.width=-8", ("model.width=-8: must be at least 1",)),
        ("train griffin_tiny --model.width -8", ("model.width=-8: must be at least 1",)),
        ("train griffin_tiny --data.source=text", ("data.path: is required by source=text; give a file",)),
        ("train griffin_tiny --sharding.mesh.data=0", ("sharding.mesh.data=0: must be at least 1, or -1",)),
        ("eval nowhere", ("nowhere: no such run directory; `hybridlm train CONFIG --out nowhere` makes one",)),
        ("generate nowhere --prompt x", ("nowhere: no such run directory",)),
        ("generate nowhere", ("generate: ", "required: --prompt")),
        ("generate nowhere --prompt x --temperature hot", ("--temperature", "'hot'")),
        ("list recipes", ("list: ", "'recipes'", "'configs'")),
        ("show griffin_tiny --train.stepz=5", ("train.stepz: no such field; did you mean steps?",)),
    ],
)
def test_wrong_words_are_one_line(invoke: Invoke, words: str, parts: tuple[str, ...]) -> None:
    invoke(*words.split()).assert_refused(*parts)


@pytest.mark.parametrize(
    "words",
    [
        "train griffin_tinny",
        "train griffin_tiny --model.widht=64",
        "train griffin_tiny --model.width=-8",
        "eval nowhere",
    ],
)
def test_a_mistake_is_told_before_jax_is_loaded(words: str, process_environment: dict[str, str]) -> None:
    program = "import sys; from hybridlm import cli\ntry: cli.main()\nfinally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", program, *words.split()]
    process = subprocess.run(command, env=process_environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stdout == "False\n"
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("--sharding.mesh.data=3",),
            ("sharding.mesh: data=3 needs 3 devices, which must equal the 8 there are",),
        ),
        (("--sharding.mesh.fsdp=3",), ("sharding.mesh: ", "must divide the 8", "set one axis to -1")),
        (("--train.batch_size=12",), ("train.batch_size=12: ", "must divide by slices x data x fsdp x expert = 8")),
        (
            ("--sharding.mesh.tensor=8",),
            (
                "sharding.mesh: ",
                "tensor = 8 must divide every 'lru' axis of the model, and one has size 2",
            ),
        ),
        (("--train.seed=4294967296",), ("train.seed=4294967296: must be at most 4294967295",)),
        (("--data.seq_len=100000",), ("data.seq_len=100000: the training text has only",)),
        (("--data.path=nowhere.txt",), ("data.path='nowhere.txt': No such file",)),
        (("--data.tokenizer=nowhere.json",), ("data.tokenizer", "nowhere.json")),
        (("--model.vocab_size=100",), ("model.vocab_size=100: ", "has 257 tokens")),
        (("--optimizer.schedule.warmup_steps=13",), ("optimizer.schedule", "train.steps=12")),
        (
            ('--sharding.xla-options=["xla_no_such_option=1"]',),
            ("sharding.xla_options: INVALID_ARGUMENT: No such compile option: 'xla_no_such_option'",),
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    invoke: Invoke, config_file: Path, tmp_path: Path, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    invoke("train", config_file, "--out", tmp_path / "run", *words).assert_refused(*parts)


def test_an_empty_corpus_is_refused(invoke: Invoke, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for name, reason in (("empty", "no text files"), ("empty.txt", "holds no text")):
        result = invoke("train", config_file, "--out", tmp_path / "run", f"--data.path={tmp_path / name}")
        result.assert_refused("data.path=", reason)


def test_text_that_is_not_utf_8_is_refused_where_the_tokenizer_needs_characters(
    invoke: Invoke, config_file: Path, tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "latin.txt").write_bytes("abcdé ".encode("latin-1") * 100)
    words = (f"--data.path={tmp_path / 'latin.txt'}", f"--data.tokenizer={tmp_path / 'tokenizer.json'}")
    result = invoke("train", config_file, "--out", tmp_path / "run", *words)
    result.assert_refused("data.path=", "is not UTF-8 at byte 4; correct it, or use data.tokenizer=byte")


def test_a_directory_that_cannot_be_written_is_refused(invoke: Invoke, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("train", config_file, "--out", tmp_path / "file" / "run")
    result.assert_refused(str(tmp_path / "file" / "run"), "cannot be written to", "choose another --out")


def test_a_run_of_another_config_and_fresh_are_refused(invoke: Invoke, config_file: Path, trained_run: Path) -> None:
    result = invoke("train", config_file, "--out", trained_run, "--model.width=32")
    result.assert_refused("model.width: 16 -> 32", "choose another --out")
    invoke("train", config_file, "--out", trained_run, "--fresh").assert_refused("--fresh refuses")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--context", "1"), ("--context=1: must be at least 2",)),
        (("--pairs", "4"), ("--pairs: is for runs on a task of `hybridlm list tasks`",)),
        (("--json", "nowhere/report.json"), ("--json nowhere/report.json: no directory nowhere",)),
        (("--json", "."), ("--json .: is a directory; name a file in it",)),
        (("--data", "nowhere.txt"), ("data.path='nowhere.txt': No such file",)),
        (("--model.width=32",), ("has params.embedding of shape (264, 16), not (264, 32)", "leave the run's model.*")),
    ],
)
def test_wrong_words_of_eval(invoke: Invoke, trained_run: Path, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    invoke("eval", trained_run, *words).assert_refused(*parts)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--temperature", "-1"), "--temperature=-1.0: must be at least 0"),
        (("--temperature", "nan"), "--temperature=nan: must be"),
        (("--top-k", "0"), "--top-k=0: must be at least 1"),
        (("--top-p", "1.5"), "--top-p=1.5: must be above 0 and at most 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens=0: must be at least 1"),
        (("--seed", "-1"), "--seed=-1: must be at least 0"),
        (("--model.width=32",), "model.width=32: `hybridlm generate` takes the run's own config"),
        (("--top-q", "1"), "--top-q: no such option; did you mean --top-"),
    ],
)
def test_wrong_words_of_generate(invoke: Invoke, trained_run: Path, words: tuple[str, ...], part: str) -> None:
    invoke("generate", trained_run, "--prompt", "a", *words).assert_refused(part)


def test_a_prompt_that_is_not_utf_8_is_refused(invoke: Invoke, trained_run: Path) -> None:
    invoke("generate", trained_run, "--prompt", os.fsdecode(b"a\xff")).assert_refused("--prompt: is not UTF-8")


def test_a_run_without_checkpoints_is_refused(invoke: Invoke, trained_run: Path, tmp_path: Path) -> None:
    shutil.copy(trained_run / "config.json", tmp_path / "config.json")
    for words in (("eval", tmp_path), ("generate", tmp_path, "--prompt", "a")):
        invoke(*words).assert_refused("holds no complete checkpoint; train first")
    invoke("eval", trained_run / "checkpoints").assert_refused("holds no config.json, so it is no run directory")


def test_a_damaged_config_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": ')
    invoke("eval", tmp_path).assert_refused("config.json:1: is not JSON")


def test_generate_prints_the_prompt_and_what_follows(invoke: Invoke, trained_run: Path) -> None:
    words = ("generate", trained_run, "--prompt", "the cat é", "--max-new-tokens", 5, "--top-k", 5, "--seed", 1)
    code, out, err = invoke(*words)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"the cat é.{0,5}\n", out, re.DOTALL)
    assert invoke(*words) == (code, out, err)


def test_show_and_list(invoke: Invoke) -> None:
    code, out, _ = invoke("show", "griffin_tiny", "--train.steps=7")
    assert code == 0
    assert "train.steps=7\n" in out
    code, out, _ = invoke("show", "griffin_tiny", "--json", "--train.steps", "7")
    assert json.loads(out)["train"]["steps"] == 7
    listed = {
        "configs": "griffin_tiny",
        "mixers": "RGLRU",
        "ffns": "SwiGLU",
        "routers": "PreGated",
        "gates": "GRKANGate",
        "optimizers": "AdamW",
        "tasks": "mqar",
    }
    for what, name in listed.items():
        code, out, _ = invoke("list", what)
        assert code == 0
        assert re.search(rf"^{name} +\S.*\.$", out, re.MULTILINE)


def test_a_reader_that_leaves_is_no_error_of_ours(process_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridlm.cli", "show", "griffin_tiny"],
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_a_module_of_ones_own_is_imported_from_the_working_directory(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_block_for_the_command_line.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    code, out, _ = invoke("list", "--import", "my_block_for_the_command_line")
    assert code == 0
    assert out.startswith("imported\n")
    invoke("list", "--import", "nowhere_at_all").assert_refused("--import nowhere_at_all: No module named")
