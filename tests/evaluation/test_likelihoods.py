"""Log-likelihoods against a float64 loop; marks of questions and passages; mistakes in their files."""

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import ByteTokenizer
from hybridlm.evaluation.lambada import lambada, read_passages
from hybridlm.evaluation.loglikelihood import Likelihood, log_likelihoods, request
from hybridlm.evaluation.multiple_choice import Question, marks, multiple_choice, read_questions
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer
from tests.evaluation.oracle import Oracle

ASKED = [
    ("the cat", " sat. a dog"),
    ("the cat", " é"),
    ("", "one bird"),
    ("the cat ", "ran"),
    ("a dog ran. one bird sang. the cat sat", "."),
    ("the cat", " sang"),
]


@pytest.fixture(scope="module")
def oracle(run: Path) -> Oracle:
    return Oracle(run)


def expected(oracle: Oracle, context: str, continuation: str) -> Likelihood:
    """Blanks at the end of the context belong to the continuation."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    before, words = [oracle.tokenizer.end_id, *context.encode()], list(continuation.encode())
    log_p = oracle.log_probabilities([*before, *words[:-1]])[len(before) - 1 :]
    best = log_p[:, : oracle.tokenizer.vocab_size].argmax(axis=-1).tolist()
    return Likelihood(float(log_p[np.arange(len(words)), words].sum()), best == words)


def test_log_likelihoods_are_those_of_a_float64_loop(scorer: Scorer, oracle: Oracle) -> None:
    greedy = oracle.log_probabilities([oracle.tokenizer.end_id, *b"the cat"])[-1, :256].argmax()
    asked = [*ASKED, ("the cat", bytes([greedy]).decode())]
    found = log_likelihoods(scorer, [request(scorer.tokenizer, *words) for words in asked])
    for words, likelihood in zip(asked, found, strict=True):
        right = expected(oracle, *words)
        assert likelihood.log_likelihood == pytest.approx(right.log_likelihood, rel=1e-4)
        assert likelihood.greedy == right.greedy
    assert found[-1].greedy


def test_blanks_go_to_the_continuation() -> None:
    class Words(ByteTokenizer):
        """A tokenizer of words with the blank before them."""

        end_id, begin_id, vocab_size = 0, 0, 99

        def encode(self, data: bytes) -> np.ndarray:
            known = {"a": 1, " b": 2, " ": 3, "b": 4, " c": 5}
            text, ids = data.decode(), []
            while text:
                word = max((w for w in known if text.startswith(w)), key=len)
                ids, text = [*ids, known[word]], text.removeprefix(word)
            return np.array(ids, np.uint32)

    context, continuation = request(Words(), "a ", "b c")
    assert (context.tolist(), continuation.tolist()) == ([0, 1], [2, 5])


def test_choices_are_marked_by_likelihood_characters_and_bytes() -> None:
    question = Question((("", " éé"), ("", " abcd"), ("", " a")), label=1)
    assert marks(question, [-6.0, -9.0, -5.0]) == {
        "acc": 0.0,  # the third
        "acc_norm": 1.0,  # -3, -2.25, -5
        "acc_per_byte": 0.0,  # -1.5, -2.25, -5
        "chance": 1 / 3,
        "bits": 9 / math.log(2),
        "bytes": 4.0,
    }


def line(doc: int, index: int, **more: Any) -> dict[str, Any]:
    words = {"context": f"question {doc}", "continuation": f" choice {index}"}
    return {"doc_id": doc, "idx": index, "label": 1, "request": words, "task_name": "two"} | more


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_multiple_choice_of_a_gzipped_file(scorer: Scorer, oracle: Oracle, tmp_path: Path) -> None:
    records = [line(doc, index) for doc in (3, 4, 7) for index in (1, 0)]
    path = tmp_path / "requests.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    report = multiple_choice(scorer, Options(file=path, bootstrap=10))
    right = 0
    for doc in (3, 4, 7):
        given = [expected(oracle, f"question {doc}", f" choice {i}").log_likelihood for i in range(2)]
        right += given[1] > given[0]
    assert report["name"] == "two"
    assert report["questions"] == 3
    assert report["acc"] == pytest.approx(right / 3)
    assert report["chance"] == 0.5
    assert report["acc_low"] <= report["acc"] <= report["acc_high"]
    assert multiple_choice(scorer, Options(file=path, limit=2))["questions"] == 2


def test_lambada_asks_for_the_last_word(scorer: Scorer, oracle: Oracle, tmp_path: Path) -> None:
    path = write(tmp_path / "passages.jsonl", [{"text": "the cat sat. a dog ran."}, {"text": "one bird sang.\n"}])
    assert read_passages(path) == [("the cat sat. a dog", " ran."), ("one bird", " sang.")]
    report = lambada(scorer, Options(file=path))
    given = [expected(oracle, *passage) for passage in read_passages(path)]
    assert report["acc"] == sum(likelihood.greedy for likelihood in given) / 2
    mean = -sum(likelihood.log_likelihood for likelihood in given) / 2
    assert report["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    twice = lambada(scorer, Options(file=path, read_twice=True))
    again = [expected(oracle, f"{context}\n\n{context}", word) for context, word in read_passages(path)]
    mean = -sum(likelihood.log_likelihood for likelihood in again) / 2
    assert twice["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty; each line must hold one JSON object"),
        ([line(0, 0), line(0, 1), '{"doc_id": '], ":3: is not JSON"),
        ([line(0, 0), "7"], ":2: is not a JSON object"),
        ([line(0, 0), line(0, 1, request={"context": "a"})], ":2: has no field request.continuation"),
        (
            [line(0, 0, request={"context": "a", "continuation": 3})],
            ":1: request.continuation must be a string",
        ),
        ([line(0, 0, label=None)], ":1: label must be a number of a choice, from 0 on, not None"),
        ([line(0, 0), line(0, 1, label=0)], ":2: question 0 has another label here than at line 1"),
        ([line(0, 0), line(0, 0)], ":2: choice 0 of question 0 is there already"),
        ([line(0, 0), line(0, 2)], r"question 0 has choices \[0, 2\] and label 1"),
    ],
)
def test_mistakes_in_files_are_named_by_line(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_questions(write(tmp_path / "requests.jsonl", records))


def test_a_passage_of_one_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=":2: text is a single word"):
        read_passages(write(tmp_path / "passages.jsonl", [{"text": "a b"}, {"text": "b "}]))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--task", "lamabda"), ("--task lamabda: no such task; did you mean lambada?",)),
        (("--task", "q"), ("--task q: no such task; there are perplexity,",)),
        (("--task", "lambada"), ("--task lambada: 1 tasks need a --task-file and 0 are given",)),
        (("--task", "lambada", "--task-file", "nowhere"), ("--task-file nowhere: is not there",)),
        (("--task", "recall", "--task-file", "nowhere"), ("--task-file nowhere: recall needs none; leave it out",)),
        (("--task", "passkey", "--stride", "3"), ("--stride: does nothing for passkey; leave it out",)),
        (("--task", "passkey", "--depth", "1.5"), ("--depth=1.5: must be from 0",)),
        (("--task", "passkey", "--length", "9"), ("--length=9: what is hidden, the question and the answer take",)),
        (("--task", "collapse", "--length", "32"), ("--length=32: must be at least 64",)),
    ],
)
def test_wrong_words(invoke: Callable, run: Path, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    invoke("eval", run, *words).assert_refused(*parts)


def test_tasks_are_listed(invoke: Callable) -> None:
    code, out, _ = invoke("list", "tasks")
    assert code == 0
    assert re.search(r"^lambada +the last words of the passages in a file$", out, re.MULTILINE)


def test_several_tasks_in_one_call(invoke: Callable, run: Path, tmp_path: Path) -> None:
    passages = write(tmp_path / "passages.jsonl", [{"text": "the cat sat"}, {"text": "a dog ran"}])
    out = tmp_path / "report.json"
    words = ("--task", "lambada", "--task", "recall", "--task-file", passages, "--limit", 1, "--json", out)
    code, printed, err = invoke("eval", run, *words)
    assert (code, err) == (0, "")
    assert f"task             lambada of {passages}\n" in printed
    one, other = json.loads(out.read_text())["results"]
    assert (one["task"], one["passages"], one["limit"], other["task"]) == ("lambada", 1, 1, "recall")
    kept = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert kept[-2:] == [one, other]


def test_a_run_that_cannot_be_written_to_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from hybridlm.cli.evaluate import keep

    keep(tmp_path / "nowhere", {"step": 1})
    assert "eval.jsonl: cannot be written: No such file" in capsys.readouterr().err
