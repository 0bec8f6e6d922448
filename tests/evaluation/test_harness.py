"""lm-evaluation-harness: its model class against ours, a task of local files, and a process that ends."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hybridlm
from hybridlm.evaluation.loglikelihood import log_likelihoods, request
from hybridlm.evaluation.scoring import Scorer
from hybridlm.generate import Sampling, generate
from tests.evaluation.oracle import Oracle

pytest.importorskip("lm_eval")

DATA = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
CHOICES = """
task: animals
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WORDS = """
task: animal_words
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1] | join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
"""
WORDS_OF_CHOICES = ("sat.", "a dog", "é", "xyzzy qq", "ran. one bird sang.", "t")
DOCS = [
    {
        "context": context,
        "choices": WORDS_OF_CHOICES[first : first + 3],
        "label": (first + len(context)) % 3,
        "text": " ".join((context, *WORDS_OF_CHOICES[: first + 1])),
    }
    for first in range(4)
    for context in ("the cat", "one bird", "a dog ran. the")
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of tasks, and nothing of the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = tmp_path / "tasks"
    directory.mkdir()
    data = directory / "animals.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for number, task in enumerate((CHOICES, WORDS)):
        (directory / f"{number}.yaml").write_text(DATA.format(data=data) + task)
    return directory


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.mark.slow
def test_likelihoods_and_texts_are_ours(scorer: Scorer, run: Path) -> None:
    from hybridlm.evaluation.harness import HybridLM

    model = HybridLM(scorer)
    pairs = [("the cat", " sat"), ("", "a dog")]
    found = model.loglikelihood([asked(*pair) for pair in pairs])
    assert found == [tuple(x) for x in log_likelihoods(scorer, [request(scorer.tokenizer, *pair) for pair in pairs])]

    text = "the cat sat. a dog ran. one bird sang!"  # a window of 32 tokens and 6 more
    oracle = Oracle(run)
    tokens = [oracle.tokenizer.end_id, *text.encode()]
    nats = oracle.nats(tokens[:32], tokens[1:33]).sum() + oracle.nats(tokens[6:38], tokens[7:39])[-6:].sum()
    assert model.loglikelihood_rolling([asked(text)]) == [pytest.approx(-nats, rel=1e-5)]

    trained, tokenizer, _ = hybridlm.load(run)
    sampling = Sampling(temperature=0.0)
    greedy = tokenizer.decode(generate(trained, tokenizer, b"the cat", max_new_tokens=8, sampling=sampling))
    ending = greedy[3]
    requests = [asked("the cat", {"max_gen_toks": 8}), asked("the cat", {"until": [ending], "max_gen_toks": 8})]
    assert model.generate_until(requests) == [greedy, greedy[: greedy.index(ending)]]


@pytest.mark.slow
def test_the_harness_and_files_of_requests_give_the_same_numbers(
    invoke: Callable, run: Path, tasks: Path, tmp_path: Path
) -> None:
    """Of the same questions and passages."""
    requests, passages = tmp_path / "requests.jsonl", tmp_path / "passages.jsonl"
    lines = [
        {"doc_id": number, "idx": index, "label": doc["label"]}
        | {"request": {"context": doc["context"], "continuation": f" {choice}"}}
        for number, doc in enumerate(DOCS)
        for index, choice in enumerate(doc["choices"])
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    passages.write_text("".join(json.dumps({"text": doc["text"]}) + "\n" for doc in DOCS))
    named = [word for task in ("multiple_choice", "harness:animals") for word in ("--task", task)]
    named += [word for task in ("lambada", "harness:animal_words") for word in ("--task", task)]
    files = ["--task-file", requests, "--task-file", passages]
    out = tmp_path / "report.json"
    code, printed, err = invoke("eval", run, *named, *files, "--include", tasks, "--json", out)
    assert code == 0, err
    choices, animals, words, animal_words = json.loads(out.read_text())["results"]
    assert (animals["acc,none"], animals["acc_norm,none"]) == (choices["acc"], choices["acc_norm"])
    assert choices["acc"] != choices["acc_norm"]
    assert f"acc,none         {choices['acc']:.4f}\n" in printed
    assert animal_words["acc,none"] == words["acc"]
    assert animal_words["perplexity,none"] == pytest.approx(words["perplexity"], rel=1e-6)
    kept = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [(line["task"], line.get("acc,none")) for line in kept[-3:]] == [
        ("harness:animals", animals["acc,none"]),
        ("lambada", None),
        ("harness:animal_words", words["acc"]),
    ]


def test_a_task_that_the_harness_lacks(invoke: Callable, run: Path, tasks: Path) -> None:
    invoke("eval", run, "--task", "harness:animlas", "--include", tasks).assert_refused("there is no such task")


@pytest.mark.slow
def test_its_own_command_knows_the_model_and_ends(
    run: Path, tasks: Path, process_environment: dict[str, str], tmp_path: Path
) -> None:
    """A metric whose error it bootstraps, in a pool of processes if it may."""
    words = ["run", "--model", "hybridlm", "--model_args", f"run={run}", "--tasks", "animal_words"]
    done = subprocess.run(
        [sys.executable, "-m", "hybridlm.evaluation.harness", *words, "--include_path", str(tasks)],
        env=process_environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
