"""Examples of every task against plain programs for it, and their order: from a seed and a number alone."""

import itertools
import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm import config
from hybridlm.config import Data
from hybridlm.config_check import ConfigError
from hybridlm.config_tasks import TASKS
from hybridlm.data.corpus import load_corpus, tokenizer_of
from hybridlm.data.packing import FIELDS
from hybridlm.data.pipeline import Batches, evaluation_batches
from hybridlm.data.sources import read_documents
from hybridlm.data.synthetic.windows import held_out_windows, training_windows, windows_of_length
from tests.data.rows import assert_same, draw

VARIANTS: dict[str, config.Task] = {
    **{name: kind() for name, kind in TASKS.items()},
    "mqar of 2 to 9 pairs": config.MQAR(num_pairs=9, min_pairs=2, vocab_size=37),
    "parity, last": config.Parity(answers="last"),
    "modular_arithmetic, every": config.ModularArithmetic(modulus=7, answers="every"),
    "addition, plain": config.Addition(order="plain"),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_task = pytest.mark.parametrize("name", TASKS)

Row = tuple[list[int], dict[int, int]]


def rows_of(task: config.Task, seq_len: int = 45, num: int = 40) -> list[Row]:
    """(tokens, answers by place) of the first examples; all other fields are checked against these."""
    rows = []
    windows = training_windows(task, seq_len)
    for i in range(num):
        window = windows[i]
        end = int((window["segment_ids"] == 1).sum())
        assert {name: array.dtype for name, array in window.items()} == FIELDS
        assert all(array.shape == (seq_len,) for array in window.values())
        assert window["segment_ids"].tolist() == [1] * end + [0] * (seq_len - end)
        assert window["positions"].tolist() == [*range(end)] + [0] * (seq_len - end)
        assert set(window["loss_weight"].tolist()) <= {0.0, 1.0}
        assert np.array_equal(window["target_bytes"], window["loss_weight"])
        assert not window["targets"][window["loss_weight"] == 0].any()
        assert not window["tokens"][end:].any()
        places = np.flatnonzero(window["loss_weight"])
        assert len(places) and places[-1] < end
        answers = {int(place): int(window["targets"][place]) for place in places}
        tokens = window["tokens"][:end].tolist()
        assert 0 <= min([*tokens, *answers.values()]) and max([*tokens, *answers.values()]) < task.num_ids
        rows.append((tokens, answers))
    return rows


@pytest.mark.parametrize("name", ["mqar", "mqar of 2 to 9 pairs"])
def test_mqar_answers_each_key_once_with_its_value(name: str) -> None:
    task = VARIANTS[name]
    assert isinstance(task, config.MQAR)
    numbers = set()
    for tokens, answers in rows_of(task):
        n = len(answers)
        pairs = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == n
        assert all(0 < key < task.vocab_size // 2 <= value for key, value in pairs.items())
        behind = {place: token for place, token in enumerate(tokens) if place >= 2 * n and token}
        assert sorted(behind.values()) == sorted(pairs)
        assert answers == {place: pairs[key] for place, key in behind.items()}
        numbers.add(n)
    assert numbers == ({4} if task.min_pairs is None else set(range(2, 10)))


def test_mqar_asks_sooner_more_often() -> None:
    """The gap of the first of one query is drawn from p(g) ~ g^(alpha - 1), so half of them are below its median."""
    task = config.MQAR(num_pairs=1, vocab_size=8, alpha=0.5)
    gaps = [(next(iter(answers)) - 2) // 2 for _, answers in rows_of(task, seq_len=82, num=1500)]
    weights = np.arange(1, 41) ** -0.5
    expected = np.cumsum(weights / weights.sum())
    measured = np.array([np.mean(np.array(gaps) <= g) for g in range(40)])
    assert np.abs(measured - expected).max() < 0.05  # Kolmogorov and Smirnov: 0.042 once in a hundred


@pytest.mark.parametrize("name", ["parity", "parity, last"])
def test_parity_is_the_sum_modulo_two(name: str) -> None:
    for tokens, answers in rows_of(VARIANTS[name]):
        places = range(len(tokens)) if name == "parity" else [len(tokens) - 1]
        assert answers == {t: sum(tokens[: t + 1]) % 2 for t in places}
        assert 3 <= len(tokens) <= 45


@pytest.mark.parametrize("name", ["modular_arithmetic", "modular_arithmetic, every"])
def test_modular_arithmetic_is_what_python_says(name: str) -> None:
    task = VARIANTS[name]
    assert isinstance(task, config.ModularArithmetic)
    m = task.modulus
    for tokens, answers in rows_of(task):
        text = [str(token) if token < m else "+-*="[token - m] for token in tokens]
        assert text[-1] == "=" and "=" not in text[:-1]
        expected = {len(text) - 1: eval("".join(text[:-1])) % m}
        if task.answers == "every":
            expected |= {t: eval("".join(text[: t + 1])) % m for t in range(0, len(text), 2)}
        assert answers == expected


@pytest.mark.parametrize(("name", "degree"), [("s3", 3), ("s5", 5), ("s5_swaps", 5)])
def test_word_problems_compose_permutations(name: str, degree: int) -> None:
    elements = sorted(itertools.permutations(range(degree)))
    seen = set()
    for tokens, answers in rows_of(VARIANTS[name]):
        things = list(range(degree))
        for t, token in enumerate(tokens):
            things = [elements[token][thing] for thing in things]
            assert elements[answers[t]] == tuple(things)
        seen |= set(tokens)
    moved = {token: sum(i != thing for i, thing in enumerate(elements[token])) for token in seen}
    assert len(seen) == {"s3": 6, "s5": 120, "s5_swaps": 11}[name]
    assert name != "s5_swaps" or max(moved.values()) == 2


@pytest.mark.parametrize("name", ["addition", "addition, plain"])
def test_addition_adds(name: str) -> None:
    lengths = set()
    for tokens, answers in rows_of(VARIANTS[name]):
        first, rest = tokens[: tokens.index(10)], tokens[tokens.index(10) + 1 :]
        second, written = rest[: rest.index(11)], rest[rest.index(11) + 1 :]
        assert list(answers) == list(range(len(tokens) - len(written) - 1, len(tokens)))
        total = list(answers.values())
        assert total[:-1] == written
        digits = total[::-1] if name == "addition" else total
        a, b, c = (int("".join(map(str, number))) for number in (first, second, digits))
        assert a + b == c
        assert len(first) == len(second) == len(total) - 1
        lengths.add(len(first))
    assert lengths <= set(range(1, 15)) and {1, 14} <= lengths


def test_copying_repeats() -> None:
    for tokens, answers in rows_of(VARIANTS["copying"]):
        n = tokens.index(26)
        assert answers == {n + i: symbol for i, symbol in enumerate(tokens[:n])}
        assert tokens[n + 1 :] == tokens[: n - 1]


def test_selective_copying_leaves_out_the_blanks() -> None:
    for tokens, answers in rows_of(VARIANTS["selective_copying"]):
        text, markers = tokens[:-16], tokens[-16:]
        assert set(markers) == {15} and 15 not in text
        assert list(answers) == list(range(len(text), len(tokens)))
        assert list(answers.values()) == [token for token in text if token]


def test_induction_recalls_what_came_after() -> None:
    places = set()
    for tokens, answers in rows_of(VARIANTS["induction"], seq_len=11, num=80):
        place = tokens.index(15)
        assert [t for t, token in enumerate(tokens) if token == 15] == [place, 10]
        assert answers == {10: tokens[place + 1]}
        places.add(place)
    assert places == set(range(9))


@every_variant
def test_an_example_fills_what_its_length_says(name: str) -> None:
    task = VARIANTS[name]
    for length in {task.shortest, task.longest(64)}:
        windows = windows_of_length(task, length)
        assert windows.seq_len == task.num_tokens(length) <= 64
        assert windows[5]["segment_ids"].all()
    assert task.num_tokens(task.longest(64) + 1) > 64


@every_variant
def test_training_and_held_out_examples_are_numbered_apart(name: str) -> None:
    task = replace(VARIANTS[name], num_examples=7, num_validation=3)
    train, held_out = training_windows(task, 64), held_out_windows(task, 64)
    assert (len(train), len(held_out)) == (7, 3)
    more = replace(task, num_examples=2**40)
    assert training_windows(more, 64).first + 2**40 <= held_out_windows(more, 64).first == held_out.first
    for windows in (train, held_out):
        with pytest.raises(IndexError):
            windows[len(windows)]


def test_no_example_comes_twice() -> None:
    task = config.S5(min_length=40)
    windows = [training_windows(task, 40), held_out_windows(task, 40), held_out_windows(replace(task, seed=1), 40)]
    rows = {tuple(each[i]["tokens"].tolist()) for each in windows for i in range(100)}
    assert len(rows) == 300


def data_of(name: str, **task: Any) -> Data:
    return Data(source=name, task=TASKS[name](num_examples=50, **task), seq_len=64)


def batches_of(data: Data, sharding: NamedSharding | None = None, workers: int = 0) -> Batches:
    return Batches(load_corpus(data).train, batch_size=8, seed=3, sharding=sharding, prefetch=2, workers=workers)


@every_task
def test_batches_go_on_where_they_stopped_on_any_mesh(name: str) -> None:
    data = data_of(name)
    expected = draw(batches_of(data), 7)
    first = batches_of(data)
    assert_same(draw(first, 3), expected[:3])
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    second = batches_of(data, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    second.set_state(json.loads(json.dumps(first.state())))
    assert_same(draw(second, 4), expected[3:])


def test_workers_make_the_same_examples() -> None:
    data = data_of("mqar", min_pairs=1)
    assert_same(draw(batches_of(data, workers=2), 4), draw(batches_of(data), 4))


def test_another_task_is_not_gone_on_with() -> None:
    state = batches_of(data_of("mqar")).state()
    for other in (data_of("mqar", alpha=0.1), data_of("mqar", seed=1), replace(data_of("mqar"), seq_len=62)):
        with pytest.raises(ConfigError, match=r"^data: mqar is other text"):
            batches_of(other).set_state(state)


def test_all_held_out_examples_are_evaluated_on_once() -> None:
    corpus = load_corpus(data_of("copying", num_validation=13))
    batches = list(evaluation_batches(corpus.validation, batch_size=8, sharding=None, limit=None))
    assert len(batches) == 2
    weights = np.concatenate([np.asarray(batch["loss_weight"]) for batch in batches])
    assert (weights.sum(axis=1) > 0).tolist() == [True] * 13 + [False] * 3


def test_ids_are_written_as_numbers() -> None:
    tokenizer = tokenizer_of(data_of("s5"))
    assert tokenizer.vocab_size == 120
    assert tokenizer.encode(b"3 0 119").tolist() == [3, 0, 119]
    assert tokenizer.decode(np.array([3, 0, 119])) == "3 0 119"
    ids, lengths = tokenizer.encode_with_lengths(b"7 7")
    assert (ids.tolist(), lengths.tolist()) == ([7, 7], [1, 1])


def test_a_task_has_no_documents() -> None:
    with pytest.raises(ConfigError, match=r"^data\.source=s5: is a task, which has no documents"):
        read_documents(data_of("s5"))
