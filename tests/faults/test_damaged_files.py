"""Files that are not what was written: checkpoints are passed over, text and shards are refused by name."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridlm import cli
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.train.integrity import damaged_files, read_sidecars, write_sidecar
from hybridlm.train.loop import train
from tests.faults.devices import on_two_devices
from tests.faults.history import assert_same, history
from tests.faults.sites import flip_bit, largest_file, saved, truncate

pytestmark = pytest.mark.usefixtures("two_devices")


def damage_by_a_bit(path: Path, rng: np.random.Generator) -> None:
    flip_bit(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))


def damage_by_half(path: Path, rng: np.random.Generator) -> None:
    truncate(path)


DAMAGES = {"bit": damage_by_a_bit, "truncated": damage_by_half}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    damage: str, died: Path, done: Path, config: Config, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    file = largest_file(died / "checkpoints" / "16" / "state")
    DAMAGES[damage](file, rng)
    assert train(config, died) == 0
    out = capsys.readouterr().out
    assert f"{died}/checkpoints/16 is damaged: state/" in out and file.name in out
    assert "resumed from step 12" in out
    assert_same(history(died), history(done))
    assert saved(died) == saved(done) and (died / "checkpoints" / "corrupt.16").is_dir()


def test_checksums_that_another_process_is_writing_are_no_part_of_a_checkpoint(died: Path) -> None:
    """They get their name just now: a process that had taken note of the other would find the checkpoint damaged."""
    checkpoint = died / "checkpoints" / "16"
    being_written = checkpoint / "._integrity.1-of-2.json.partial"
    being_written.write_text("{")
    write_sidecar(checkpoint, 0, 2)
    being_written.rename(checkpoint / "elsewhere")
    noted, _ = read_sidecars(checkpoint)
    assert noted and list(damaged_files(checkpoint, noted)) == []


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(
    died: Path, config: Config, rng: np.random.Generator
) -> None:
    before = (died / "metrics.jsonl").read_bytes()
    for step in saved(died):
        damage_by_a_bit(largest_file(died / "checkpoints" / str(step) / "state"), rng)
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        train(config, died)
    assert (died / "metrics.jsonl").read_bytes() == before
    assert saved(died) == [4, 8, 12, 16]


def test_a_source_that_grew_is_refused_and_restored_goes_on(
    died: Path, done: Path, config: Config, text: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in died.rglob("*") if path.is_file() and path.name != "run.lock"}
    grown = tmp_path / "grown"
    shutil.copytree(text, grown)
    (grown / "new.txt").write_text("a new bird sang. " * 9)
    with pytest.raises(ConfigError, match="was trained on other text"):
        train(replace(config, data=replace(config.data, path=str(grown))), died)
    left = {path: path.read_bytes() for path in before if path.name not in ("environment.json", "goodput.json")}
    assert left == {path: before[path] for path in left}

    (grown / "new.txt").unlink()
    assert train(replace(config, data=replace(config.data, path=str(grown))), died) == 0
    assert_same(history(died), history(done))


@pytest.fixture(scope="module")
def subwords(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of this text that reads characters, not bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=64, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.train([str(path) for path in text.iterdir()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    inner.save(str(path))
    return path


def test_invalid_utf8_is_learnt_as_it_is_by_bytes_and_refused_by_name_else(
    config: Config, text: Path, subwords: Path, tmp_path: Path
) -> None:
    spoiled = tmp_path / "text"
    shutil.copytree(text, spoiled)
    (spoiled / "3.txt").write_bytes((spoiled / "3.txt").read_bytes() + b"caf\xe9 \xff\xfe\x00")
    config = replace(config, data=replace(config.data, path=str(spoiled)))
    assert train(config, tmp_path / "bytes") == 0
    offset = (text / "3.txt").stat().st_size + 3
    with pytest.raises(ConfigError, match=f"3.txt is not UTF-8 at byte {offset};"):
        train(replace(config, data=replace(config.data, tokenizer=str(subwords))), tmp_path / "characters")
    assert not list((tmp_path / "characters" / "checkpoints").iterdir())


def prepare(text: Path, directory: Path, *words: str) -> None:
    """Shards of the text, or what of them was lost."""
    options = ["--shard-size=0.001", "--record-tokens=64", "--validation-fraction=0.2", "--workers=1", *words]
    assert cli.run(["prepare", str(text), "--out", str(directory), *options]) == 0


@pytest.fixture(scope="module")
def shards(text: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of prepared text, and `run` in it, a run on that text that nothing happened to."""
    directory = tmp_path_factory.mktemp("shards")
    prepare(text, directory / "data")
    with on_two_devices():
        assert train(on_shards(config, directory / "data"), directory / "run") == 0
    return directory


def on_shards(config: Config, directory: Path) -> Config:
    return replace(config, data=replace(config.data, source="prepared", path=str(directory)))


def last_written_byte(path: Path) -> int:
    """Of the records: behind them, up to the footer, the file is zeros."""
    content = np.frombuffer(path.read_bytes(), np.uint8)[: path.stat().st_size // 2]
    return int(np.flatnonzero(content)[-1])


@pytest.mark.parametrize("damage", ["truncated", "corrupted"])
def test_a_damaged_shard_is_named_and_made_again_the_run_goes_on(
    damage: str, shards: Path, text: Path, config: Config, tmp_path: Path
) -> None:
    directory = tmp_path / "data"
    shutil.copytree(shards / "data", directory)
    config = on_shards(config, directory)
    shard = min(directory.glob("train*"))
    whole = shard.read_bytes()
    if damage == "truncated":
        truncate(shard)
    else:
        flip_bit(shard, last_written_byte(shard) - 100)
    with pytest.raises(ConfigError if damage == "truncated" else OSError, match=shard.name):
        train(config, tmp_path / "run")

    prepare(text, directory, *(["--verify"] if damage == "corrupted" else []))
    assert shard.read_bytes() == whole
    assert train(config, tmp_path / "run") == 0
    assert_same(history(tmp_path / "run"), history(shards / "run"))
