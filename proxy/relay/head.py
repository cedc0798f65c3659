"""The head of an engine's answer: forwarded as the engine wrote it, but for the fields of a single hop.

What must be known of it (is there a length, is it an event stream, is anything of a single hop in it) is the same for all heads
that differ in digits only: dates, lengths. So it is found out once for each, by the HTTP parser, and remembered.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import httptools

_HOP_BY_HOP = (
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"x-glasshouse-backend",
    b"x-request-id",
)
"""RFC 9110 §7.6.1; the last two, since those that the client gets are ours."""
_HOP_BY_HOP_LINE = re.compile(rb"\r\n(?:%b)[ \t]*:[^\r\n]*" % b"|".join(_HOP_BY_HOP), re.IGNORECASE)
_LENGTH_LINE = re.compile(rb"\r\ncontent-length[ \t]*:[^\r\n]*", re.IGNORECASE)
_DIGITS = b"0123456789"
_MAX_SHAPES = 1000


class Shape(NamedTuple):
    sized: bool
    """There is a content-length."""
    until_close: bool
    """There is neither a length nor an encoding that has an end: the body ends with the connection (RFC 9112 §6.3)."""
    event_stream: bool
    hop_by_hop: bool
    encoded: bool = False
    """The body is compressed: it passes as it is, and nothing can be read in it."""
    text: bool = False
    """The body is plain text."""


_shapes: dict[bytes, Shape] = {}


def shape_of(head: bytes) -> Shape:
    """Of a well-formed head, without its empty line."""
    key = head.translate(None, _DIGITS)
    return _shapes.get(key) or _learn(key, head)


def without_hop_by_hop(head: bytes) -> bytes:
    return _HOP_BY_HOP_LINE.sub(b"", head)


def without_length(head: bytes) -> bytes:
    """For an answer that may come out shorter or longer than it went in."""
    return _LENGTH_LINE.sub(b"", head)


class _Fields:
    def __init__(self) -> None:
        self.fields: dict[bytes, bytes] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields[name.lower()] = value


def _learn(key: bytes, head: bytes) -> Shape:
    reader = _Fields()
    httptools.HttpResponseParser(reader).feed_data(head + b"\r\n\r\n")
    fields = reader.fields
    media = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
    shape = Shape(
        b"content-length" in fields,
        fields.keys().isdisjoint((b"content-length", b"transfer-encoding")),
        media == b"text/event-stream",
        not fields.keys().isdisjoint(_HOP_BY_HOP),
        fields.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"),
        media == b"text/plain",
    )
    if len(_shapes) < _MAX_SHAPES:
        _shapes[key] = shape
    return shape
