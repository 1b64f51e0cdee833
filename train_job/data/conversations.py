"""Conversations as records of a file: the forms in which people keep them go in, messages with roles come out.

A record is `{"messages": [{"role", "content"}]}`, as OpenAI's fine-tuning takes it, ShareGPT's
`{"conversations": [{"from", "value"}]}`, or `{"prompt", "completion"}`, each a text or a list of messages. A corpus
holds a conversation as JSON, so that it can be hashed, split and read as any other document.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptcore.errors import did_you_mean, excerpt

CONVERSATION = "*conversation"
"""In place of a column's name: the whole record is one."""
FIELDS = ("messages", "conversations", "prompt", "completion")
"""The fields of a record that are read."""
ROLES = ("system", "user", "assistant")
OTHER_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names."""
Messages = list[dict[str, Any]]


def conversation_text(record: Any) -> str:
    """The record's messages as JSON, or "" if each of its answers has the weight 0, so that there is nothing to learn.

    Raises ValueError that says what does not fit.
    """
    messages = messages_in(record)
    return json.dumps(messages, ensure_ascii=False) if any(map(is_learned, messages)) else ""


def messages_of(document: str) -> Messages:
    """The messages of a document of a corpus of conversations."""
    messages: Messages = json.loads(document)
    return messages


def contents(documents: Iterator[str]) -> Iterator[str]:
    """What is said in conversations, from which a vocabulary is learned."""
    return (message["content"] for document in documents for message in messages_of(document))


def answer_bytes(messages: Messages) -> int:
    """The UTF-8 length of the answers to learn."""
    return sum(len(message["content"].encode()) for message in messages if is_learned(message))


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer to learn: OpenAI's `weight` 0 marks others."""
    return bool(message["role"] == "assistant" and message.get("weight", 1))


def messages_in(record: Any) -> Messages:
    """The messages of a record in one of the forms. Raises ValueError."""
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object with the field 'messages', found {type(record).__name__}")
    given = {name: record[name] for name in FIELDS if record.get(name) is not None}
    if "messages" in given or "conversations" in given:
        field = "messages" if "messages" in given else "conversations"
        found = _listed(given[field], field)
    elif {"prompt", "completion"} <= given.keys():
        found = [*_listed(given["prompt"], "prompt", "user"), *_listed(given["completion"], "completion", "assistant")]
    else:
        raise ValueError(
            "no field 'messages', nor 'conversations', nor 'prompt' with 'completion'; there are "
            f"{', '.join(map(str, record)) or 'none'}"
        )
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError("no message is an answer of the assistant; expected at least one")
    return found


def _listed(value: Any, field: str, role: str = "") -> Messages:
    """The messages of a list, or of a text that has a `role`."""
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} is {type(value).__name__}, expected a list of messages")
    if not value:
        raise ValueError(f"field {field!r} is an empty list, expected messages")
    return [_message(message, f"{field}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is {type(message).__name__}, expected an object with 'role' and 'content'")
    role = _first(message, ("role", "from"), name)
    content = _first(message, ("content", "value"), name)
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(
            f"{name} has the role {excerpt(role)}; expected {', '.join(ROLES)}.{did_you_mean(str(role), ROLES)}"
        )
    if not isinstance(content, str):
        raise ValueError(f"the content of {name} is {type(content).__name__}, expected text")
    if not content.strip():
        raise ValueError(f"the content of {name} is empty, expected text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the content of {name} has half of a surrogate pair, expected Unicode text") from None
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"the weight of {name} is {excerpt(weight)}; expected 0 (not learned) or 1")
    return {"role": role, "content": content} | ({"weight": 0} if weight == 0 else {})


def _first(message: Mapping[str, Any], names: tuple[str, str], where: str) -> Any:
    for name in names:
        if message.get(name) is not None:
            return message[name]
    raise ValueError(f"{where} has no {names[0]!r}; there are {', '.join(map(str, message)) or 'none'}")
