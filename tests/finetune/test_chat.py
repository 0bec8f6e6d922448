"""Conversations: templates against strings by hand, and what losses count token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlm.config import Chat, Data
from hybridlm.config_check import ConfigError
from hybridlm.data.chat import render, template_of
from hybridlm.data.conversations import Message
from hybridlm.data.corpus import load_corpus, load_whole
from hybridlm.data.tokenizers import load_tokenizer
from hybridlm.evaluation.texts import data_from_spec, read_texts

Write = Callable[..., Path]
MESSAGES = [
    Message("system", " Be brief."),
    Message("user", "Hi\n"),
    Message("assistant", "Hello"),
    Message("user", "1+1?"),
    Message("assistant", "2"),
]


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (
            Chat(template="chatml"),
            "<|im_start|>system\n Be brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
            "<|im_start|>assistant\n[Hello<|im_end|>\n]<|im_start|>user\n1+1?<|im_end|>\n"
            "<|im_start|>assistant\n[2<|im_end|>\n]",
        ),
        (
            Chat(template="llama3"),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[Hello<|eot_id|>]"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[2<|eot_id|>]",
        ),
        (
            Chat(template="gemma"),
            "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n[Hello<end_of_turn>\n]"
            "<start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n[2<end_of_turn>\n]",
        ),
        (
            Chat(template="plain"),
            "system: Be brief.\nuser: Hi\nassistant: [Hello\n]user: 1+1?\nassistant: [2\n]",
        ),
        (
            Chat(template="custom", turn="<{role}>{content}</>"),
            "<system> Be brief.</><user>Hi\n</><assistant>[Hello</>]<user>1+1?</><assistant>[2</>]",
        ),
    ],
    ids=lambda x: x.template if isinstance(x, Chat) else "",
)
def test_templates_are_these_strings(chat: Chat, expected: str) -> None:
    """What is in brackets is counted in losses."""
    pieces = render(MESSAGES, template_of(chat))
    text = "".join(f"[{piece.text}]" if piece.is_answer else piece.text for piece in pieces)
    assert text.replace("][", "") == expected


def test_a_turn_and_the_custom_template_need_each_other() -> None:
    with pytest.raises(ConfigError, match="turn: is required by template=custom"):
        Chat(template="custom")
    with pytest.raises(ConfigError, match="is of template=custom, and this is chatml"):
        Chat(turn="{role}: {content}")


def chat_data(path: Path, seq_len: int = 64, **chat: str) -> Data:
    return Data(
        source="chat",
        path=str(path),
        seq_len=seq_len,
        chat=Chat(**{"template": "plain"} | chat),
        validation_fraction=0.01,
    )


def shown(window: dict[str, np.ndarray]) -> str:
    """Targets as text, `|` for the end of a document, those that are counted in upper case."""
    told = ("|" if t == 256 else chr(t) for t in window["targets"])
    real = zip(told, window["loss_weight"], window["segment_ids"], strict=True)
    return "".join(c.upper() if weight and c != "|" else "!" if weight else c for c, weight, of in real if of)


def test_losses_count_answers_and_the_end_behind_one(write_lines: Write) -> None:
    lines = [{"prompt": "a", "response": "yes"}] * 3 + [
        {"messages": [{"role": "assistant", "content": "so"}, {"role": "user", "content": "no"}]}
    ] * 3
    corpus = load_corpus(chat_data(write_lines(*lines), seq_len=48))
    windows = [*(corpus.train.sources[0].windows[i] for i in range(len(corpus.train.sources[0].windows)))]
    text = "".join(shown(window) for window in windows)
    one, other = "user: a\nassistant: YES\n!", "assistant: SO\nuser: no\n|"
    assert text.count(one) + text.count(other) == 5
    assert text.replace(one, "").replace(other, "") == ""
    held_out = shown(corpus.validation[0])
    assert held_out in (one, other)
    assert (
        corpus.validation_bytes().decode().upper()
        == held_out.split(": ")[-1 if held_out == one else 1].split("!")[0].split("user")[0].upper()
    )


def test_documents_of_a_window_do_not_see_each_other(write_lines: Write) -> None:
    corpus = load_corpus(chat_data(write_lines(*[{"prompt": "a", "response": "b"}] * 7), seq_len=70))
    window = corpus.train.sources[0].windows[0]
    starts = np.flatnonzero((window["tokens"] == 256) & (window["segment_ids"] > 0))
    assert window["segment_ids"][starts].tolist() == [1, 2, 3]
    assert window["positions"][starts].tolist() == [0, 0, 0]


def test_long_conversations_are_cut_or_dropped_and_counted(write_lines: Write) -> None:
    short, long = {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b" * 60}
    hopeless = {"prompt": "a" * 70, "response": "b"}
    path = write_lines(short, short, long, hopeless, short)
    corpus = load_corpus(chat_data(path, seq_len=32))
    assert "5 conversations, plain, 1 truncated and 1 dropped" in corpus.description
    source = corpus.train.sources[0].windows
    texts = [shown(source[i]) for i in range(len(source))] + [shown(corpus.validation[0])]
    assert any(text.startswith("user: a\nassistant: BBBBBBBBBBBB|") for text in texts)
    assert "0 truncated and 2 dropped" in load_corpus(chat_data(path, seq_len=32, too_long="drop")).description


def test_evaluation_reads_conversations_in_the_runs_template_and_counts_answers(write_lines: Write) -> None:
    path = write_lines({"prompt": "a", "response": "yes"})
    data = data_from_spec(chat_data(path), str(path))
    assert shown(load_whole(data).validation[0]) == "user: a\nassistant: YES\n!"
    with pytest.raises(ConfigError, match=r"data\.source=chat: .* packed windows"):
        read_texts(data, load_tokenizer("byte"), whole=True)
    for line in ({"text": "a", "messages": []}, "{"):
        assert data_from_spec(data, str(write_lines(line))).source == "jsonl"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ({"text": "a"}, "must have `messages`, or `prompt` and `response`, and has text"),
        ({"prompt": "a", "response": 3}, "message 1 has content of type int"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 0 has role 'robot'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "holds no message of the assistant"),
    ],
    ids=str,
)
def test_a_broken_line_is_told_by_its_number(write_lines: Write, line: object, problem: str) -> None:
    path = write_lines({"prompt": "a", "response": "b"}, line)
    with pytest.raises(ConfigError, match=r"chat\.jsonl:2") as refused:
        load_corpus(chat_data(path))
    assert problem in str(refused.value)


def tokenizer_with(*special: str) -> Any:
    """A byte-level BPE of Hugging Face's with these special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["assistant\nok"] * 9, trainer)
    return inner


def test_a_template_does_not_repeat_the_token_that_documents_begin_with(write_lines: Write, tmp_path: Path) -> None:
    inner = tokenizer_with("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    inner.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    path = write_lines(*[{"prompt": "a", "response": "ok"}] * 3)
    chat = Chat(template="gemma")
    data = Data(source="chat", path=str(path), seq_len=40, tokenizer=str(tmp_path / "tokenizer.json"), chat=chat)
    window = load_corpus(data).train.sources[0].windows[0]
    of_first = window["segment_ids"] == 1
    said = "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nok<end_of_turn>\n"
    assert inner.decode(window["tokens"][of_first].tolist(), skip_special_tokens=False) == said
    assert window["targets"][of_first][-1] == inner.token_to_id("<eos>")


def test_special_tokens_come_from_the_template_alone(write_lines: Write, tmp_path: Path) -> None:
    """What a person writes is text, also where it looks like a special token."""
    inner = tokenizer_with("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    inner.save(str(tmp_path / "tokenizer.json"))
    lines = [{"prompt": "<|im_end|>", "response": "ok<|im_start|>"}] * 7
    data = Data(source="chat", path=str(write_lines(*lines)), seq_len=96, tokenizer=str(tmp_path / "tokenizer.json"))
    window = load_corpus(data).train.sources[0].windows[0]
    of_first = window["targets"][window["segment_ids"] == 1]
    counted = window["loss_weight"][window["segment_ids"] == 1]
    start, end = inner.token_to_id("<|im_start|>"), inner.token_to_id("<|im_end|>")
    assert np.count_nonzero(of_first == start) == 2
    assert np.count_nonzero(of_first == end) == 2
    assert (
        inner.decode(of_first[counted == 1].tolist(), skip_special_tokens=False)
        == "ok<|im_start|><|im_end|>\n<|endoftext|>"
    )
