"""What the converters of all APIs stand on: events, JSON of which every member is known, text in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Raw, Struct, UnsetType

from proxy.wire.sse import Framer, data_of

NULL: Final = Raw(b"null")
_EMPTY: Final = Raw(b"[]")
_NONE: Final = Raw(b'"none"')
_NO_TOOL: Final = Raw(b'{"type":"none"}')
_PIECE: Final = re.compile(r"\s*\S{1,16}|\s+")
_NAME: Final = re.compile(rb"event: ([a-z_.]+)\n")

T = TypeVar("T")


class Odd(Exception):
    """Something that a converter doesn't know, or can't say in the other form."""


class Made(NamedTuple):
    """An answer in another form, and its usage (JSON) where that isn't in it."""

    body: bytes
    usage: bytes = b""


class Offer(Struct):
    """What a request says of tools."""

    tools: Raw = NULL
    tool_choice: Raw = NULL

    @property
    def made(self) -> bool:
        """An answer may have calls."""
        return self.tools not in (NULL, _EMPTY) and self.tool_choice not in (_NONE, _NO_TOOL)


class Strict(Struct, forbid_unknown_fields=True):
    """JSON as an engine writes it: the members in this order, and no others."""


UNREADABLE: Final = (Odd, msgspec.MsgspecError, RecursionError, UnicodeError, ValueError)


def check(known: bool, otherwise: str) -> None:
    """Raises Odd."""
    if not known:
        raise Odd(otherwise)


def given(value: T | UnsetType | None, otherwise: str) -> T:
    """What is there. Raises Odd where it isn't."""
    if value is None or isinstance(value, UnsetType):
        raise Odd(otherwise)
    return value


def split(body: bytes) -> list[bytes]:
    """A stream's events and comments, each as the bytes that it is."""
    framer = Framer(len(body))
    events = framer.feed(body)
    rest = framer.rest()
    return [*events, rest] if rest else events


def events_of(body: bytes) -> Iterator[tuple[str, bytes]]:
    """(name or "", data) of each event, comments left out. Raises Odd for one with other fields, or without an end."""
    for event in split(body):
        if event.startswith(b":"):
            check(event.count(b"\n") == 2 and event.endswith(b"\n\n"), "more than a comment")
            continue
        match = _NAME.match(event)
        name, rest = (match[1].decode(), event[match.end() :]) if match else ("", event)
        check(rest.startswith(b"data: ") and rest.count(b"\n") == 2, "an event with other fields")
        check(rest.endswith(b"\n\n"), "an event without an end")
        yield name, data_of(rest) or b""


def event(data: bytes, name: str = "") -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data) if name else b"data: %b\n\n" % data


def one(values: Iterable[T]) -> T:
    """The value that all of them are. Raises Odd."""
    first, *rest = values
    check(all(value == first for value in rest), "one answer with two identities")
    return first


def raw(value: object) -> Raw:
    return Raw(msgspec.json.encode(value))


def without_nulls(value: Any) -> Any:
    """As pydantic's `exclude_none` has it, at any depth of objects."""
    if isinstance(value, Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return value


def pieces(text: str) -> list[str]:
    """Text about as an engine streams it, a word at a time."""
    return _PIECE.findall(text)


def pieces_by(tokens: Sequence[str], text: str) -> list[str]:
    """The tokens that the text is made of, if it is made of the first of these; else none."""
    end, count = 0, 0
    while count < len(tokens) and end < len(text):
        end += len(tokens[count])
        count += 1
    first = list(tokens[:count])
    return first if "".join(first) == text else []


def shares(items: Sequence[T] | None, parts: int, *, each: bool = False) -> list[list[T] | None]:
    """`items` dealt out in order to so many parts: evenly, or one to `each` and the rest to the last. No items: none for each."""
    if items is None:
        return [None] * parts
    cuts = [part if each else len(items) * part // parts for part in range(parts)]
    return [list(items[start:stop]) for start, stop in pairwise([*cuts, len(items)])]
