"""What a request asks at its end, apart from all that it is asked about: the text that another one may ask in other words.

Only a last message of the user's that is nothing but text counts. Where an answer repeats its prompt, no other request's will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
from msgspec import Raw

from proxy.errors import InvalidRequest
from proxy.wire.body import read_object, write_object

LONGEST: Final = 8192
"""Characters of a text that is a question. Models that embed texts take no more, or compare no better."""
_MARKER: Final = b'"?"'
_REPEATING: Final = ("echo", "prompt_logprobs", "return_token_ids")
"""With one of these an answer has its prompt in it."""
_NOTHING: Final = (b"null", b"false")

_list = msgspec.json.Decoder(list[Raw]).decode
_text = msgspec.json.Decoder(str).decode
_unreadable = (InvalidRequest, msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class Question(NamedTuple):
    """`body`: the same request with another text in its place, always the same one."""

    text: str
    body: bytes


_Found = tuple[str, bytes]
"""The text, and the JSON in which it was found without it."""


def question_of(operation: str, body: bytes) -> Question | None:
    """`operation`: its name; `body`: JSON. None: it asks nothing of the kind."""
    place = _PLACES.get(operation)
    if place is None:
        return None
    name, find = place
    try:
        fields = read_object(body)
        if name not in fields or any(bytes(fields.get(each, b"null")) not in _NOTHING for each in _REPEATING):
            return None
        found = find(fields[name])
    except _unreadable:
        return None
    if found is None:
        return None
    text, rest = found
    if len(text) > LONGEST or not text.strip():
        return None
    fields[name] = Raw(rest)
    return Question(text, write_object(fields))


def _prompt(value: Raw) -> _Found | None:
    """Of completions: a text, or a list of a single one."""
    if _is_list(value):
        texts = _list(value)
        return (_text(texts[0]), b"[%b]" % _MARKER) if len(texts) == 1 else None
    return _text(value), _MARKER


def _input(value: Raw) -> _Found | None:
    """Of responses: a text, or messages."""
    return _last_message(value, "input_text") if _is_list(value) else (_text(value), _MARKER)


def _messages(value: Raw) -> _Found | None:
    return _last_message(value, "text")


def _last_message(value: Raw, kind: str) -> _Found | None:
    """The user's."""
    messages = _list(value)
    if not messages:
        return None
    message = read_object(bytes(messages[-1]))
    if _text(message.get("role", Raw(b'""'))) != "user" or _text(message.get("type", Raw(b'"message"'))) != "message":
        return None
    found = _content(message.get("content", Raw(b"null")), kind)
    if found is None:
        return None
    text, message["content"] = found[0], Raw(found[1])
    return text, b"[%b]" % b",".join([*messages[:-1], write_object(message)])


def _content(value: Raw, kind: str) -> _Found | None:
    """A text, or a list of a single part that is one."""
    if not _is_list(value):
        return _text(value), _MARKER
    parts = _list(value)
    if len(parts) != 1:
        return None
    part = read_object(bytes(parts[0]))
    if _text(part.get("type", Raw(b'""'))) != kind:
        return None
    text, part["text"] = _text(part.get("text", Raw(b"null"))), Raw(_MARKER)
    return text, b"[%b]" % write_object(part)


def _is_list(value: Raw) -> bool:
    return bytes(value).startswith(b"[")


_PLACES: Final[dict[str, tuple[str, Callable[[Raw], _Found | None]]]] = {
    "chat": ("messages", _messages),
    "completions": ("prompt", _prompt),
    "messages": ("messages", _messages),
    "responses": ("input", _input),
}
