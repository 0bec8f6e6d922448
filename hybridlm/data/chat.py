"""Conversations to text by a template, and to tokens of which those of answers alone are counted in losses.

What an answer is closed with (`<|im_end|>`) belongs to it, and so does the end of a conversation whose last message is
an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.conversations import ANSWERS, Message, messages_of
from hybridlm.data.packing import TokenStream
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import Tokenizer


class Piece(NamedTuple):
    """A part of a conversation's text."""

    text: str
    is_answer: bool
    is_marker: bool = False
    """Of the template, and one special token where the tokenizer has it."""


@dataclass(frozen=True)
class Template:
    """What stands before a conversation, and around the content of each message, as markers and text in turn."""

    start: tuple[str, ...]
    before: tuple[str, ...]
    """With {role}."""
    after: tuple[str, ...]
    role_names: tuple[tuple[str, str], ...] = ()
    """Roles that go by other names."""
    trims: bool = True
    """White space around contents is left out."""
    has_system: bool = True
    """Else a system message stands before the user's first, and an empty line between them."""


TEMPLATES = {
    "chatml": Template((), ("<|im_start|>", "{role}\n"), ("<|im_end|>", "\n"), trims=False),
    "llama3": Template(
        ("<|begin_of_text|>",),
        ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"),
        ("<|eot_id|>",),
    ),
    "gemma": Template(
        ("<bos>",),
        ("<start_of_turn>", "{role}\n"),
        ("<end_of_turn>", "\n"),
        role_names=(("assistant", "model"),),
        has_system=False,
    ),
    "plain": Template((), ("{role}: ",), ("\n",)),
}


def template_of(chat: config.Chat) -> Template:
    """The named template, or that of `chat.turn`."""
    if chat.turn is None:
        return TEMPLATES[chat.template]
    before, _, after = chat.turn.partition("{content}")
    return Template((), (before,), (after,), trims=False)


def render(messages: Sequence[Message], template: Template) -> list[Piece]:
    """The pieces of a conversation's text, in order."""
    pieces = [Piece(text, False, True) for text in template.start]
    held = ""
    for role, content in messages:
        text = content.strip() if template.trims else content
        if role == "system" and not template.has_system:
            held += text + "\n\n"
            continue
        if role == "user":
            text, held = held + text, ""
        is_answer, name = role == ANSWERS, dict(template.role_names).get(role, role)
        pieces += [Piece(part.replace("{role}", name), False, "{role}" not in part) for part in template.before]
        pieces.append(Piece(text, is_answer))
        pieces += [Piece(part, is_answer, True) for part in template.after]
    return [piece for piece in pieces if piece.text]


@dataclass(frozen=True)
class Conversations:
    """A stream of conversations, with what became of them."""

    stream: TokenStream
    num_truncated: int
    num_dropped: int


def tokenize_conversations(
    documents: Sequence[Document], tokenizer: Tokenizer, chat: config.Chat, seq_len: int
) -> Conversations:
    """The stream of `documents`, as `read_conversations` has them, in their order.

    No conversation has more than `seq_len` predictions: longer ones lose their ends, and count as dropped where no
    answer is left, or always are with `too_long=drop`. Raises ConfigError where none is left.
    """
    template, end, begin = template_of(chat), tokenizer.end_id, tokenizer.begin_id
    tokens, num_bytes, weights, starts = [], [], [], []
    position, end_weight, num_truncated, num_dropped = 0, 0, 0, 0
    for document in documents:
        messages = messages_of(document)
        ids, lengths, counted = _encode(render(messages, template), tokenizer)
        if begin != end and ids[0] == begin:  # every document's first input
            ids, lengths, counted = ids[1:], lengths[1:], counted[1:]
        ends_in_answer = messages[-1].role == ANSWERS
        if len(ids) >= seq_len:
            ids, lengths, counted = (x[: seq_len - 1] for x in (ids, lengths, counted))
            ends_in_answer = False
            if chat.too_long == "drop" or not counted.any():
                num_dropped += 1
                continue
            num_truncated += 1
        tokens += [[end], ids]
        num_bytes += [[0], lengths]
        weights += [[end_weight], counted]
        starts.append(position)
        position, end_weight = position + 1 + len(ids), int(ends_in_answer)
    if not starts:
        raise ConfigError("data.seq_len", f"={seq_len}: no conversation has an answer within so many tokens; raise it")
    stream = TokenStream(
        tokens=np.concatenate([*tokens, [end]]).astype(np.uint32),
        num_bytes=np.concatenate([*num_bytes, [0]]).astype(np.uint32),
        starts=np.array(starts, np.int64),
        end_id=end,
        weights=np.concatenate([*weights, [end_weight]]).astype(np.uint8),
    )
    return Conversations(stream, num_truncated, num_dropped)


def _encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, the bytes of text each stands for, and whether it is counted: where any of its bytes is an answer's.

    Between special tokens all is encoded at once, so that tokens are those of the whole text.
    """
    ids, lengths, counted = [], [], []
    run: list[Piece] = []

    def flush() -> None:
        if run:
            texts = [piece.text.encode() for piece in run]
            of_run, sizes = tokenizer.encode_with_lengths(b"".join(texts))
            is_answer = np.repeat([piece.is_answer for piece in run], [len(text) for text in texts])
            before = np.concatenate([[0], np.cumsum(is_answer)])
            sizes = sizes.astype(np.int64)
            last = np.cumsum(sizes)
            ids.append(of_run)
            lengths.append(sizes)
            # Of tokens that share one character, those without bytes go with the one that has them.
            counted.append(before[last] > before[np.minimum(last - sizes, np.maximum(last - 1, 0))])
            run.clear()

    for piece in pieces:
        special = tokenizer.special_id(piece.text) if piece.is_marker else None
        if special is None:
            run.append(piece)
            continue
        flush()
        ids.append([special])
        lengths.append([len(piece.text.encode())])
        counted.append([piece.is_answer])
    flush()
    return np.concatenate(ids).astype(np.int64), np.concatenate(lengths), np.concatenate(counted)


def answers_of(documents: Sequence[Document], chat: config.Chat) -> bytes:
    """The text that losses count, for baselines on the same bytes."""
    template = template_of(chat)
    pieces = (render(messages_of(document), template) for document in documents)
    return b"".join(piece.text.encode() for of_one in pieces for piece in of_one if piece.is_answer)
