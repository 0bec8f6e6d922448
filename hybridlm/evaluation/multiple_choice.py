"""`--task multiple_choice`: which of several continuations is most likely, from a file of requests.

A line holds `{"doc_id", "idx", "label", "request": {"context", "continuation"}}`: choice number `idx` of a question,
whose right choice is `label`. `task_name` names the task; other fields are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.evaluation.bootstrap import intervals
from hybridlm.evaluation.loglikelihood import log_likelihoods, request
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.request_files import objects, refuse, text_field
from hybridlm.evaluation.scoring import Scorer

METRICS = ("acc", "acc_norm", "acc_per_byte")


@dataclass(frozen=True)
class Question:
    choices: tuple[tuple[str, str], ...]
    """Context and continuation of each."""
    label: int


def multiple_choice(scorer: Scorer, options: Options) -> dict[str, Any]:
    """`acc`: the choice with the highest log-likelihood is right; `acc_norm`: divided by its characters, and
    `acc_per_byte`: by its bytes, both without the blank before it. `chance` is what guessing has, `bits_per_byte` that
    of the right choices.
    """
    assert options.file is not None  # tasks.check
    name, questions = read_questions(options.file)
    questions = questions[: options.limit]
    requests = [
        request(scorer.tokenizer, read_twice(context) if options.read_twice else context, continuation)
        for question in questions
        for context, continuation in question.choices
    ]
    likelihoods = iter([found.log_likelihood for found in log_likelihoods(scorer, requests)])
    rows = [marks(question, [next(likelihoods) for _ in question.choices]) for question in questions]
    sums = {key: np.array([row[key] for row in rows]) for key in rows[0]} | {"questions": np.ones(len(rows))}
    report: dict[str, Any] = {"file": str(options.file)} if name is None else {"name": name}
    report |= {"questions": len(rows)} | metrics_of({key: float(values.sum()) for key, values in sums.items()})
    if options.bootstrap is not None:
        report |= intervals(sums, metrics_of, num=options.bootstrap, seed=options.seed)
    return report


def read_twice(context: str) -> str:
    """Arora et al., 2024 (arXiv:2407.05483), section 3.2: a recurrent model that has seen what is asked for before it
    reads the context a second time knows what to keep of it."""
    return f"{context}\n\n{context}"


def marks(question: Question, likelihoods: Sequence[float]) -> dict[str, float]:
    """Of one question; ties go to the first choice."""
    given = np.array(likelihoods)
    words = [continuation.removeprefix(" ") for _, continuation in question.choices]
    num_bytes = np.array([max(len(word.encode()), 1) for word in words])
    by = {"acc": 1, "acc_norm": np.array([max(len(word), 1) for word in words]), "acc_per_byte": num_bytes}
    return {name: float(np.argmax(given / length) == question.label) for name, length in by.items()} | {
        "chance": 1 / len(words),
        "bits": -float(given[question.label]) / np.log(2),
        "bytes": float(num_bytes[question.label]),
    }


def metrics_of(sums: Mapping[str, float]) -> dict[str, float]:
    means = {name: sums[name] / sums["questions"] for name in (*METRICS, "chance")}
    return means | {"bits_per_byte": sums["bits"] / sums["bytes"]}


def read_questions(path: Path) -> tuple[str | None, list[Question]]:
    """The name of the task where lines say it, and its questions. Raises ConfigError, which names the line."""
    name: str | None = None
    by_question: dict[Any, dict[int, tuple[str, str]]] = {}
    labels: dict[Any, tuple[int, int]] = {}
    for number, record in objects(path):
        key = record.get("doc_id")
        if not isinstance(key, int | str):
            refuse(path, "has no doc_id, which says whose choice it is; correct or remove the line", number)
        index, label = (record.get(field) for field in ("idx", "label"))
        for field, value in (("idx", index), ("label", label)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                refuse(path, f"{field} must be a number of a choice, from 0 on, not {value!r}", number)
        assert isinstance(index, int) and isinstance(label, int)
        context, continuation = (text_field(path, number, record, "request", f) for f in ("context", "continuation"))
        if not continuation:
            refuse(path, "request.continuation is empty; correct or remove the line", number)
        if index in by_question.setdefault(key, {}):
            refuse(path, f"choice {index} of question {key!r} is there already; correct or remove the line", number)
        by_question[key][index] = (context, continuation)
        if labels.setdefault(key, (label, number))[0] != label:
            refuse(path, f"question {key!r} has another label here than at line {labels[key][1]}", number)
        if name is None and isinstance(record.get("task_name"), str):
            name = record["task_name"]
    questions = []
    for key, choices in by_question.items():
        label, number = labels[key]
        if sorted(choices) != list(range(len(choices))) or label >= len(choices) or len(choices) < 2:
            refuse(
                path,
                f"question {key!r} has choices {sorted(choices)} and label {label}; add the others",
                number,
            )
        questions.append(Question(tuple(choices[i] for i in range(len(choices))), label))
    return name, questions
