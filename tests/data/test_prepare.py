"""`hybridlm prepare`: the shards hold what is tokenised in memory, however they are made and however often stopped."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlm import config
from hybridlm.cli import main
from hybridlm.data.packing import tokenize
from hybridlm.data.prepare import Job, Part, decide_sides, parts_of
from hybridlm.data.prepare_sources import open_source
from hybridlm.data.prepare_workers import run_here
from hybridlm.data.shards import PreparedStream
from hybridlm.data.sources import Document, read_documents, split_documents
from hybridlm.data.tokenizers import load_tokenizer
from tests.corpora import write_tfds

Write = Callable[[dict[str, bytes]], Path]
Invoke = Callable[..., Any]

WORDS = ["cat", "naïve", "日本語", "½", "return x + y", "🙂", "\n    def", " "]


def texts(number: int, *, seed: int = 0, empty: bool = True) -> list[str]:
    """Of uneven lengths, some of them empty."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(WORDS, rng.integers(0 if empty else 1, 60))) for _ in range(number)]


def json_lines(of: Sequence[str]) -> bytes:
    """A blank line here and there."""
    ends = ("\n" * (1 + (i % 5 == 0)) for i in range(len(of)))
    return "".join(json.dumps({"text": text}) + end for text, end in zip(of, ends, strict=True)).encode()


def assert_holds(directory: Path, documents: Sequence[Document], tokenizer: str, fraction: float = 0.02) -> None:
    """Both splits of `directory` are `documents` as they are split and tokenised in memory."""
    sides = split_documents([document for document in documents if document.text], fraction)
    for split, expected in zip(("train", "validation"), sides, strict=True):
        in_memory = tokenize(expected, load_tokenizer(tokenizer))
        stream = PreparedStream(directory, split)
        tokens, num_bytes, starts = stream.read(0, stream.num_targets + 1)
        assert tokens.dtype == in_memory.tokens.dtype
        np.testing.assert_array_equal(tokens, in_memory.tokens)
        np.testing.assert_array_equal(num_bytes, in_memory.num_bytes)
        np.testing.assert_array_equal(starts, in_memory.starts)
        np.testing.assert_array_equal(stream.document_starts(), in_memory.starts)
        total = stream.manifest.totals()[split]
        assert total["documents"] == len(expected)
        assert total["text_bytes"] == sum(len(document.text) for document in expected) == num_bytes.sum()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def text_corpus(write_files: Write) -> Path:
    return write_files({f"{i % 3}/{i}.txt": text.encode() for i, text in enumerate(texts(60))})


@pytest.fixture
def jsonl_corpus(write_files: Write) -> Path:
    return write_files(
        {
            "b.jsonl": json_lines(texts(300)),
            "a.jsonl.gz": gzip.compress(json_lines(texts(40, seed=1))),
            "c.jsonl": json_lines(texts(20, seed=2)).rstrip(),
        }
    )


@pytest.mark.parametrize("tokenizer", ["byte", "bpe_file", "sentencepiece_file"])
def test_text_is_prepared_as_it_is_tokenised_in_memory(
    text_corpus: Path, tmp_path: Path, invoke: Invoke, request: pytest.FixtureRequest, tokenizer: str
) -> None:
    spec = tokenizer if tokenizer == "byte" else str(request.getfixturevalue(tokenizer))
    done = invoke(
        "prepare", text_corpus, "--out", tmp_path / "out", f"--tokenizer={spec}", "--workers=1", "--shard-size=0.002"
    )
    assert done.code == 0
    documents = read_documents(config.Data(source="text", path=str(text_corpus)))
    assert_holds(tmp_path / "out", documents, spec)
    assert len(list((tmp_path / "out").glob("train-*"))) > 3
    assert not (tmp_path / "out/unfinished").exists()


def test_json_lines_cut_anywhere_are_the_same_documents(jsonl_corpus: Path, tmp_path: Path, invoke: Invoke) -> None:
    documents = read_documents(config.Data(source="jsonl", path=str(jsonl_corpus)))
    for size in (0.005, 0.02, 64):
        out = tmp_path / str(size)
        command = ("prepare", jsonl_corpus, "--out", out, f"--shard-size={size}", "--validation-fraction=0.1")
        assert invoke(*command, "--workers=1", "--record-tokens=100").code == 0
        assert_holds(out, documents, "byte", 0.1)


def test_pieces_of_a_file_of_lines_have_its_line_numbers(jsonl_corpus: Path) -> None:
    source = open_source(str(jsonl_corpus / "b.jsonl"), text_key="text", tokenizer="byte")
    whole = list(source.documents(next(source.pieces(10**9))))
    for size in (1, 77, 1000, 5000, 10**6):
        pieces = list(source.pieces(size))
        assert [document for piece in pieces for document in source.documents(piece)] == whole
        assert [piece.begin for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
        assert all(piece.num_bytes < size + 3000 for piece in pieces)


@pytest.mark.parametrize("tokenizer", ["byte", "tokenizer.json"])
def test_the_standard_library_has_the_documents_that_a_run_would_read(tokenizer: str) -> None:
    source = open_source("python-stdlib", text_key="text", tokenizer=tokenizer)
    documents = (document for piece in source.pieces(10**6) for document in source.documents(piece) if document.text)
    assert list(documents) == read_documents(config.Data(tokenizer=tokenizer))


def test_a_single_file_is_cut_at_its_end(write_files: Write, tmp_path: Path, invoke: Invoke) -> None:
    file = write_files({"all.txt": "".join(texts(50)).encode()}) / "all.txt"
    assert invoke("prepare", file, "--out", tmp_path / "out").code == 0
    assert_holds(tmp_path / "out", read_documents(config.Data(source="text", path=str(file))), "byte")


def test_two_documents_give_one_to_each_side(write_files: Write, tmp_path: Path, invoke: Invoke) -> None:
    root = write_files({"a.txt": b"one", "b.txt": b"two", "empty.txt": b""})
    assert invoke("prepare", root, "--out", tmp_path / "out").code == 0
    assert_holds(tmp_path / "out", read_documents(config.Data(source="text", path=str(root))), "byte")


def test_in_a_large_corpus_rank_alone_holds_out(
    jsonl_corpus: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridlm.data.prepare.SMALL_CORPUS", 1000)
    source = open_source(str(jsonl_corpus), text_key="text", tokenizer="byte")
    assert decide_sides(source, list(parts_of(source, 5000)), 0.1).exceptions == {}
    command = ("prepare", jsonl_corpus, "--out", tmp_path / "out", "--validation-fraction=0.1", "--workers=1")
    assert invoke(*command).code == 0
    # At this fraction of so many documents the rule for small corpora changes nothing.
    documents = read_documents(config.Data(source="jsonl", path=str(jsonl_corpus)))
    assert_holds(tmp_path / "out", documents, "byte", 0.1)


def test_nothing_held_out_is_all_for_training(text_corpus: Path, tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("prepare", text_corpus, "--out", tmp_path / "out", "--validation-fraction=0").code == 0
    documents = read_documents(config.Data(source="text", path=str(text_corpus)))
    stream = PreparedStream(tmp_path / "out", "train")
    np.testing.assert_array_equal(
        stream.read(0, stream.num_targets + 1)[0], tokenize(documents, load_tokenizer("byte")).tokens
    )
    assert PreparedStream(tmp_path / "out", "validation").num_targets == 0


def test_any_number_of_workers_writes_the_same_bytes(
    text_corpus: Path, bpe_file: Path, tmp_path: Path, invoke: Invoke
) -> None:
    command = ("prepare", text_corpus, f"--tokenizer={bpe_file}", "--shard-size=0.002")
    for workers in (1, 2):
        assert invoke(*command, "--out", tmp_path / str(workers), f"--workers={workers}").code == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_parquet_is_prepared_by_row_groups(tmp_path: Path, invoke: Invoke) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = texts(700)
    (tmp_path / "corpus").mkdir()
    for name, some, kind in (("a", rows[:600], arrow.string()), ("b", rows[600:], arrow.binary())):
        column = arrow.array([row.encode() for row in some], arrow.binary()).cast(kind)
        table = arrow.table({"n": list(range(len(some))), "body": column})
        parquet.write_table(table, tmp_path / f"corpus/{name}.parquet", row_group_size=97)
    command = ("prepare", tmp_path / "corpus", "--out", tmp_path / "out", "--shard-size=0.01", "--workers=1")
    assert invoke(*command, "--text-key=body").code == 0
    names = [f"a.parquet:{i + 1}" for i in range(600)] + [f"b.parquet:{i + 1}" for i in range(100)]
    documents = [Document(name, row.encode()) for name, row in zip(names, rows, strict=True)]
    assert_holds(tmp_path / "out", documents, "byte")
    assert len(list((tmp_path / "out").glob("train-*"))) > 2

    command = ("prepare", tmp_path / "corpus", "--out", tmp_path / "none", "--workers=1")
    invoke(*command).assert_refused("--text-key='text': no such column", "a.parquet; its columns are: n, body")
    invoke(*command, "--text-key=n").assert_refused("must name a string", "a.parquet, row 1, holds a int")
    (tmp_path / "corpus/b.parquet").write_bytes(b"PAR1 not")
    invoke(*command).assert_refused("cannot read", "b.parquet")


def test_a_tfds_dataset_is_prepared_without_tensorflow(tmp_path: Path, invoke: Invoke, bpe_file: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    rows = texts(300, empty=False)
    name = write_tfds(tmp_path / "tfds", {"train": rows, "test": rows[:7]})
    source = ("prepare", name, "--tfds-dir", tmp_path / "tfds")
    command = (*source, f"--tokenizer={bpe_file}", "--workers=1", "--shard-size=0.005")
    assert invoke(*command, "--out", tmp_path / "out", "--split=train").code == 0
    documents = [Document(f"train:{i}", row.encode()) for i, row in enumerate(rows)]
    assert_holds(tmp_path / "out", documents, str(bpe_file))
    assert "tensorflow" not in sys.modules

    invoke(*command, "--out", tmp_path / "none").assert_refused("--split: is required by tfds:")
    invoke(*command, "--out", tmp_path / "none", "--split=nowhere").assert_refused("with split 'nowhere'")
    refused = invoke(*command, "--out", tmp_path / "none", "--split=train", "--text-key=body")
    refused.assert_refused("--text-key='body'", "its features are: text")


def test_a_beam_runner_writes_the_same_bytes(text_corpus: Path, tmp_path: Path, invoke: Invoke) -> None:
    pytest.importorskip("apache_beam")
    command = ("prepare", text_corpus, "--shard-size=0.002")
    assert invoke(*command, "--out", tmp_path / "here", "--workers=1").code == 0
    beam = ("--runner=DirectRunner", "--runner-option=direct_num_workers=1")
    assert invoke(*command, "--out", tmp_path / "beam", *beam).code == 0
    assert contents(tmp_path / "here") == contents(tmp_path / "beam")
    invoke(*command, "--out", tmp_path / "none", "--runner=NoSuchRunner").assert_refused("--runner NoSuchRunner")


def test_a_second_run_has_nothing_to_do(text_corpus: Path, tmp_path: Path, invoke: Invoke) -> None:
    command = ("prepare", text_corpus, "--out", tmp_path / "out")
    first = invoke(*command)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = invoke(*command)
    assert again.code == 0 and again.out == f"{tmp_path / 'out'}: all of it is done already\n{first.out}"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, process_environment: dict[str, str]) -> None:
    program = (
        "import sys\nfrom hybridlm.cli import run\nassert run(sys.argv[1:]) == 0\n"
        "print(open('/proc/self/status').read())"
    )
    lines = json_lines(texts(2000))
    peaks = []
    for copies in (8, 40):
        corpus = tmp_path / f"{copies}.jsonl"
        corpus.write_bytes(lines * copies)
        command = ["prepare", str(corpus), "--out", str(tmp_path / str(copies)), "--workers=1", "--shard-size=0.5"]
        done = subprocess.run(
            [sys.executable, "-c", program, *command], env=process_environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        # Not getrusage's, which begins with what the process that started this one had.
        (peak,) = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("VmHWM:"))
        peaks.append(int(peak) * 1024)
    # The corpus grew by 15 MB, and its tokens, with the bytes they stand for, by three times that.
    assert peaks[1] - peaks[0] < (40 - 8) * len(lines) / 4, peaks


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_a_lost_shard_is_made_again(text_corpus: Path, tmp_path: Path, invoke: Invoke, harm: str) -> None:
    out = tmp_path / "out"
    command = ("prepare", text_corpus, "--out", out, "--shard-size=0.002", "--workers=1")
    assert invoke(*command).code == 0
    before = contents(out)
    path, untouched = out / "train-00003.array_record", (out / "train-00002.array_record").stat().st_mtime_ns
    match harm:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(before[path.name][:-1])
        case _:
            path.write_bytes(before[path.name][:-1] + b"!")
            assert "all of it is done already" in invoke(*command).out, "sizes alone do not tell"
    again = invoke(*command, *(["--verify"] if harm == "changed" else []))
    assert again.code == 0 and "parts are done already" in again.err
    assert again.err.startswith(str(path)) and "; it is made again\n" in again.err
    assert contents(out) == before
    assert (out / "train-00002.array_record").stat().st_mtime_ns == untouched


def test_other_settings_in_the_same_directory_are_refused(
    text_corpus: Path, bpe_file: Path, tmp_path: Path, invoke: Invoke
) -> None:
    command = ("prepare", text_corpus, "--out", tmp_path / "out")
    assert invoke(*command).code == 0
    for option, named in (
        (f"--tokenizer={bpe_file}", "tokenizer: byte then"),
        ("--validation-fraction=0.1", "share held out: 0.02 then, 0.1 now"),
        ("--record-tokens=99", "tokens of a record: 4096 then, 99 now"),
        ("--shard-size=1", "bytes of a shard: 64000000 then, 1000000 now"),
    ):
        invoke(*command, option).assert_refused(f"--out {tmp_path / 'out'}: ", named)
    (text_corpus / "0/0.txt").write_text("changed")
    invoke(*command).assert_refused("names, sizes and times of the source's files")


def test_a_corpus_that_grows_meanwhile_is_refused(
    text_corpus: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(job: Job, parts: Mapping[int, Part]) -> None:
        run_here(job, parts)
        (text_corpus / "new.txt").write_text("more")

    monkeypatch.setattr("hybridlm.data.prepare_workers.run_here", grow)
    refused = invoke("prepare", text_corpus, "--out", tmp_path / "out", "--workers=1")
    refused.assert_refused(f"SOURCE={str(text_corpus)!r}: has changed while it was prepared")
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_directory_of_something_else_is_left_alone(text_corpus: Path, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "thesis.tex").write_text("\\title")
    invoke("prepare", text_corpus, "--out", tmp_path).assert_refused("is not empty, and no prepared data")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A corpus of so many parts that a process can be stopped between them, and what it becomes."""
    root = tmp_path_factory.mktemp("long")
    corpus = root / "long.jsonl"
    corpus.write_bytes(json_lines(texts(2500)))
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", str(corpus), "--out", str(root / "out"), "--shard-size=0.01", "--workers=1"])
    assert stopped.value.code == 0
    return corpus, contents(root / "out")


def started(corpus: Path, out: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """`hybridlm prepare` with two workers, stopped nowhere before some parts are done."""
    command = ["-m", "hybridlm.cli", "prepare", str(corpus), "--out", str(out), "--shard-size=0.01", "--workers=2"]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list((out / "unfinished").glob("part-*.json"))) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def assert_ended(group: int) -> None:
    """No process of the group is left, soon."""
    deadline = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_a_stopped_preparation_goes_on_where_it_was(
    undisturbed: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    invoke: Invoke,
    process_environment: dict[str, str],
    how: signal.Signals,
) -> None:
    (corpus, expected), out = undisturbed, tmp_path / "out"
    process = started(corpus, out, process_environment)
    if how == signal.SIGKILL:
        process.kill()  # the first process alone
    else:
        os.killpg(process.pid, how)  # Ctrl-C reaches all
    _, stderr = process.communicate(timeout=60)
    assert_ended(process.pid)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.startswith("hybridlm: interrupted; ") and stderr.count("\n") == 1, stderr
    assert not (out / "manifest.json").exists()
    kept = {path.name: path.stat().st_ino for path in out.glob("*.array_record")}

    again = invoke("prepare", corpus, "--out", out, "--shard-size=0.01", "--workers=1")
    assert again.code == 0 and "parts are done already" in again.err
    assert contents(out) == expected
    # Those in the middle of being noted as done may have been made twice.
    assert sum((out / name).stat().st_ino != inode for name, inode in kept.items()) <= 4


def test_a_run_killed_before_the_manifest_has_only_that_left_to_write(
    text_corpus: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridlm.data.manifest import Manifest

    command = ("prepare", text_corpus, "--out", tmp_path / "out", "--shard-size=0.002", "--workers=1")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(Manifest, "write", full)
        failed = invoke(*command)
        assert failed.code == 1 and "No space left on device" in failed.err
    shards = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.array_record")}
    assert invoke(*command).code == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.array_record")} == shards
    assert_holds(tmp_path / "out", read_documents(config.Data(source="text", path=str(text_corpus))), "byte")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_and_what_was_done_stays(
    write_files: Write, tmp_path: Path, invoke: Invoke, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridlm.data.prepare.SMALL_CORPUS", 0)  # else it is found while names are read
    lines = json_lines(texts(3000)).splitlines(keepends=True)
    root = write_files({"a.jsonl": b"".join([*lines[:2000], b"{broken\n", *lines[2000:]])})
    out = tmp_path / "out"
    command = ("prepare", root, "--out", out, "--shard-size=0.02", f"--workers={workers}")
    refused = invoke(*command)
    refused.assert_refused(f"SOURCE={str(root)!r}", f"{root / 'a.jsonl'}:2001 is not JSON")
    assert list((out / "unfinished").glob("part-*.json")) and not (out / "manifest.json").exists()


def test_bytes_that_are_not_utf8_are_for_bytes_alone(
    write_files: Write, bpe_file: Path, tmp_path: Path, invoke: Invoke
) -> None:
    root = write_files({"a.txt": b"fine", "b.txt": b"caf\xe9"})
    command = ("prepare", root, "--out", tmp_path / "out")
    refused = invoke(*command, f"--tokenizer={bpe_file}")
    refused.assert_refused(f"{root / 'b.txt'} is not UTF-8 at byte 3", "--tokenizer=byte")
    shutil.rmtree(tmp_path / "out")
    assert invoke(*command).code == 0
    assert_holds(tmp_path / "out", [Document("a.txt", b"fine"), Document("b.txt", b"caf\xe9")], "byte")


@pytest.mark.parametrize("fraction", [0, 0.02])
def test_a_corpus_without_text_is_refused(write_files: Write, tmp_path: Path, invoke: Invoke, fraction: float) -> None:
    root = write_files({"a.txt": b"", "b.txt": b""})
    refused = invoke("prepare", root, "--out", tmp_path / "out", f"--validation-fraction={fraction}")
    refused.assert_refused(f"SOURCE={str(root)!r}: holds no text")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "SOURCE='nowhere': No such file"),
        (["python-stdlib", "--split=train"], "--split train: is about tfds:NAME"),
        (["python-stdlib", "--workers=0"], "--workers=0: must be at least 1"),
        (["python-stdlib", "--record-tokens=0"], "--record-tokens=0: must be at least 1"),
        (["python-stdlib", "--shard-size=0"], "--shard-size=0.0: must be above 0"),
        (["python-stdlib", "--shard-size=nan"], "--shard-size=nan: must be above 0"),
        (["python-stdlib", "--validation-fraction=0.6"], "--validation-fraction=0.6: must be"),
        (["python-stdlib", "--tokenizer=gone.json"], "--tokenizer='gone.json': no such file"),
        (["python-stdlib", "--runner-option=a=b"], "--runner-option: is about a --runner"),
        (["python-stdlib", "--runner=DirectRunner", "--workers=2"], "--workers: of a --runner are the runner's own"),
        (["python-stdlib", "--train.steps=3"], "train.steps=3: `hybridlm prepare` has no config"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, invoke: Invoke, words: list[str], named: str) -> None:
    invoke("prepare", *words, "--out", tmp_path / "out").assert_refused(named)
    assert not (tmp_path / "out").exists()


def test_json_lines_beside_parquet_are_refused(write_files: Write, tmp_path: Path, invoke: Invoke) -> None:
    root = write_files({"a.jsonl": b"{}", "b.parquet": b"PAR1"})
    invoke("prepare", root, "--out", tmp_path / "out").assert_refused("holds both JSON lines and Parquet")
