"""Conversations from JSON lines.

A line is `{"messages": [{"role": ..., "content": ...}, ...]}` or `{"prompt": ..., "response": ...}`.
"""

import gzip
import json
import zlib
from typing import Any, NamedTuple

from hybridlm import config
from hybridlm.data.sources import Document, json_lines_files, json_lines_of, refuse

ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"


class Message(NamedTuple):
    role: str
    content: str


def read_conversations(data: config.Data, *, whole: bool) -> list[Document]:
    """All conversations below `data.path`, each the JSON of its messages, in order of file, then line.

    Raises ConfigError that names the file and the line where one is no conversation, or there is none, or unless the
    `whole` is held out, only one.
    """
    files = json_lines_files(data)
    found = [one for name, path in files for one in json_lines_of(name, path, data, read=conversation_of)]
    if not found:
        refuse(data, "holds no conversation; give a file with some")
    if not whole and len(found) < 2:
        refuse(data, "holds one conversation; there must be two, one of them to hold out")
    return found


def begins_with_conversation(data: config.Data) -> bool:
    """Whether the first line at `data.path` is a conversation, and no text by `data.text_key`."""
    _, path = json_lines_files(data)[0]
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        record = json.loads(first.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return False  # as its reader tells
    if not isinstance(record, dict) or data.text_key in record:
        return False
    return "messages" in record or {"prompt", "response"} <= record.keys()


def messages_of(document: Document) -> list[Message]:
    """Those of a document of `read_conversations`."""
    return [Message(*message) for message in json.loads(document.text)]


def conversation_of(line: bytes, where: str, data: config.Data) -> bytes:
    """The messages of a line as JSON, one form for both that lines may have. Raises ConfigError naming the line."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        messages = _messages(record)
        return json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        refuse(data, f"{where} is not UTF-8 at byte {error.start} of the line; correct or remove the line")
    except UnicodeEncodeError:
        refuse(data, f"{where} holds half a surrogate pair, which is no character; correct or remove the line")
    except (json.JSONDecodeError, RecursionError) as error:
        refuse(data, f"{where} is not JSON ({error}); correct or remove the line")
    except ValueError as error:
        refuse(data, f"{where}: {error}; correct or remove the line")


def _messages(record: Any) -> list[Message]:
    """Raises ValueError that says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object with `messages`, or with `prompt` and `response`")
    if "messages" in record:
        given = record["messages"]
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
            raise ValueError("`messages` must be a list of objects with `role` and `content`")
        messages = [Message(message.get("role"), message.get("content")) for message in given]
    elif {"prompt", "response"} <= record.keys():
        messages = [Message("user", record["prompt"]), Message(ANSWERS, record["response"])]
    else:
        raise ValueError(f"must have `messages`, or `prompt` and `response`, and has {', '.join(record) or 'nothing'}")
    for i, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {i} has content of type {type(content).__name__}, which must be a string")
    if not any(role == ANSWERS for role, _ in messages):
        raise ValueError(f"holds no message of the {ANSWERS}, so there is nothing to learn")
    return messages
