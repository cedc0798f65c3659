"""An answer's JSON: of one that came whole, its one value; of a stream, its events'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from collectors.records.content.loose_json import dict_of, parse_json, text_of
from proxy.wire.sse import Framer, data_of


class Piece(NamedTuple):
    """`name`: the event's, or what the value's `type` says; "" if neither does. `whole`: an event that has its end."""

    name: str
    value: dict[str, Any]
    whole: bool = True


def pieces_of(body: bytes) -> Iterator[Piece]:
    """Of what was cut off in the middle comes what precedes the cut."""
    if body.lstrip()[:1] == b"{":
        value = dict_of(parse_json(body))
        yield Piece(text_of(value.get("type")), value)
        return
    framer = Framer(len(body) + 1)
    for event in framer.feed(body):
        yield from _piece(event, whole=True)
    yield from _piece(framer.rest(), whole=False)


def _piece(event: bytes, *, whole: bool) -> Iterator[Piece]:
    data = data_of(event)
    if data is not None and data != b"[DONE]":
        value = dict_of(parse_json(data))
        yield Piece(_name(event) or text_of(value.get("type")), value, whole)


def _name(event: bytes) -> str:
    """The event's own: a type that stands last in its data may have been cut off."""
    field, _, value = event.partition(b"\n")[0].partition(b":")
    return value.strip().decode("utf-8", "replace") if field == b"event" else ""
