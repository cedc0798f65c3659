"""Transcriptions and translations: a form with a file, the text that was heard. Of a file it is said what it is and how large,
never what is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from collectors.records.content.chat import choices
from collectors.records.content.conversation import Conversation, Message, answer, conversation, message, text_part
from collectors.records.content.loose_json import dict_of, parse_json, text_of

_NAME = re.compile(rb'\bname="([^"\r\n]*)"')
_FILENAME = re.compile(rb"\bfilename\*?=", re.IGNORECASE)
_TYPE = re.compile(rb"^content-type:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


def read_audio(request: bytes, body: bytes) -> Conversation:
    parts = [text_part(text) for part in _form(request) if (text := _shown(part))]
    return conversation([message("user", parts)] if parts else [], _answers(body))


# -- requests --


class _FormPart(NamedTuple):
    head: bytes
    value: memoryview
    whole: bool


def _form(body: bytes) -> Iterator[_FormPart]:
    """Its parts, also of one that was cut off. The boundary is its first line."""
    boundary = b"\r\n" + body[: max(0, body.find(b"\r\n"))]
    if not boundary.startswith(b"\r\n--"):
        return
    at = len(boundary) - 2
    while at >= 0 and body.startswith(b"\r\n", at):
        start = body.find(b"\r\n\r\n", at)
        if start < 0:
            return
        end = body.find(boundary, start + 2)
        yield _FormPart(body[at:start], memoryview(body)[start + 4 : end if end >= 0 else len(body)], end >= 0)
        at = end + len(boundary) if end >= 0 else -1


def _shown(part: _FormPart) -> str:
    name = _NAME.search(part.head)
    if name is None:
        return ""
    kind = _TYPE.search(part.head)
    if name[1] == b"file" or kind is not None or _FILENAME.search(part.head) is not None:
        described = kind[1][:100].decode("utf-8", "replace") if kind is not None else "unknown type"
        return f"[file: {described}, {'' if part.whole else 'cut off after '}{len(part.value)} bytes]"
    return f"{name[1].decode('utf-8', 'replace')}: {bytes(part.value).decode('utf-8', 'replace')}"


# -- answers --


def _answers(body: bytes) -> list[Message]:
    """JSON, chunks, or where an engine gives other forms too, the text itself."""
    body = body.lstrip()
    if body.startswith(b"{"):
        heard = dict_of(parse_json(body))
        return [answer([text_part(text_of(heard["text"]))], "stop")] if "text" in heard else []
    if not body or body.startswith((b"data:", b"event:", b":")):
        return choices(body)
    return [answer([text_part(body.decode("utf-8", "replace"))], "stop")]
