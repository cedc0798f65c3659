"""From events to writes: SSE framing, HTTP framing, and the ways in which a script breaks them. Sans-io, no clock.

Events pass through small generators, in this order: faults in the stream of events, SSE framing, coalescing, faults in
the stream of bytes, gzip, HTTP chunks, writes. Nothing is ever held whole, so a stream of 100,000 events costs no memory.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tests.support.scripted_vllm.events import Event
from tests.support.scripted_vllm.script import Script

END = b"0\r\n\r\n"
_LARGEST_CHUNK = 64 * 1024  # so that a line of 100 MB passes the transport's buffer in portions


class Step(NamedTuple):
    """One thing to do on the connection: wait, write, and perhaps something drastic."""

    wait: float = 0.0
    data: bytes = b""
    tokens: int = 0
    then: str = ""
    """"" (go on), "hang", "reset", "close" or "end" (the answer is complete)."""
    apart: bool = False
    """The write is not to be joined with the next one."""


class _Piece(NamedTuple):
    """Bytes of the body on their way to becoming a Step."""

    wait: float
    data: bytes
    tokens: int
    then: str = ""


# --- faults in the stream of events ----------------------------------------------------------------------------------


Fail = Callable[[int], Iterable[Event | str]]


def faulty(events: Iterator[Event], script: Script, fail: Fail) -> Iterator[Event | str]:
    """The events, and "hang" or the kind of cut at its place."""
    all_events: Iterator[Event | str] = events
    if script.error_event_after is not None:
        all_events = itertools.chain(itertools.islice(events, script.error_event_after), fail(script.error_event_after))
    for count, event in enumerate(all_events):
        if count == script.hang_after_events:
            yield "hang"
        if count == script.cut_after_events:
            yield script.cut
            return
        yield event


# --- SSE framing -----------------------------------------------------------------------------------------------------


def _sse(events: Iterator[Event | str], script: Script) -> Iterator[_Piece]:
    end = script.newline.encode()
    comment = b": keep-alive" + end * 2
    bom = b"\xef\xbb\xbf" if script.bom else b""
    begun, with_tokens = False, 0
    for event in events:
        if isinstance(event, str):
            yield _Piece(0.0, b"", 0, event)
            continue
        wait = event.wait
        if not begun and script.prefill_comments:
            share = wait / (script.prefill_comments + 1)
            yield _Piece(share, bom + comment, 0)
            yield from itertools.repeat(_Piece(share, comment, 0), script.prefill_comments - 1)
            wait, bom = share, b""
        yield _Piece(wait, bom + sse_event(event, script, end), event.tokens)
        bom, begun = b"", True
        with_tokens += bool(event.tokens)
        if script.comments and event.tokens and with_tokens % script.comments == 0:
            yield _Piece(0.0, comment, 0)


def sse_event(event: Event, script: Script, end: bytes) -> bytes:
    data, fields = event.data, b""
    if data.endswith(b"\n\n"):  # a captured block, framed already
        return data.replace(b"\n", end)
    if event.name or script.event_fields:
        fields = b"event: %b%b" % (event.name or b"message", end)
    if script.event_fields:
        fields += b"id: 7%bretry: 3000%b" % (end, end)
    if script.multiline and b"," in data:
        head, tail = data.split(b",", 1)  # between two fields, where JSON allows a line break
        return b"%bdata: %b,%bdata: %b%b" % (fields, head, end, tail, end * 2)
    return b"%bdata: %b%b" % (fields, data, end * 2)


# --- bytes -----------------------------------------------------------------------------------------------------------


def _coalesced(pieces: Iterator[_Piece], size: int) -> Iterator[_Piece]:
    held: list[_Piece] = []
    for piece in pieces:
        if piece.then:
            yield from _joined(held)
            held = []
            yield piece
            continue
        held.append(piece)
        if len(held) == size:
            yield from _joined(held)
            held = []
    yield from _joined(held)


def _joined(held: list[_Piece]) -> Iterator[_Piece]:
    if held:
        yield _Piece(sum(p.wait for p in held), b"".join(p.data for p in held), sum(p.tokens for p in held))


def _cut(pieces: Iterator[_Piece], limit: int, kind: str) -> Iterator[_Piece]:
    for piece in pieces:
        if len(piece.data) >= limit:
            yield piece._replace(data=piece.data[:limit])
            yield _Piece(0.0, b"", 0, kind)
            return
        limit -= len(piece.data)
        yield piece


def _gzipped(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    packer = zlib.compressobj(wbits=31)
    for piece in pieces:
        data = piece.data and packer.compress(piece.data) + packer.flush(zlib.Z_SYNC_FLUSH)
        yield piece._replace(data=data)
    yield _Piece(0.0, packer.flush(), 0)


def _slices(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


# --- HTTP framing ----------------------------------------------------------------------------------------------------


def stream_steps(events: Iterator[Event], script: Script, head: bytes, fail: Fail, *, chunked: bool = True) -> Iterator[Step]:
    """An answer of several writes. The head goes at once, unless the script keeps it back."""
    pieces = _sse(faulty(events, script, fail), script)
    if script.coalesce > 1:
        pieces = _coalesced(pieces, script.coalesce)
    if script.cut_after_bytes is not None:
        pieces = _cut(pieces, script.cut_after_bytes, script.cut)
    if script.gzip:
        pieces = _gzipped(pieces)
    if not script.late_head:
        yield from _writes(0.0, head, 0, script)
        head = b""
    for wait, data, tokens, then in pieces:
        if then == "clean":
            yield Step(data=END if chunked else b"", then="end" if chunked else "close")
            return
        if then:
            yield Step(then=then)
            if then != "hang":
                return
            continue
        size = script.chunk_bytes if script.chunk_bytes and script.split == "http" else _LARGEST_CHUNK
        for i, part in enumerate(_slices(data, size)):
            framed = b"%x\r\n%b\r\n" % (len(part), part) if chunked else part
            yield from _writes(wait if i == 0 else 0.0, head + framed, tokens if i == 0 else 0, script)
            head = b""
    yield Step(data=head + (END if chunked else b""), then="end" if chunked else "close")


def _writes(wait: float, data: bytes, tokens: int, script: Script) -> Iterator[Step]:
    if not script.chunk_bytes or script.split == "http":
        yield Step(wait, data, tokens, apart=bool(script.chunk_bytes))
        return
    for i, part in enumerate(_slices(data, script.chunk_bytes)):
        yield Step(wait if i == 0 else 0.0, part, tokens if i == 0 else 0, apart=True)


def whole_steps(head: bytes, body: bytes, tokens: int, script: Script) -> Iterator[Step]:
    """An answer with a known length, after the time that its tokens take."""
    wait = script.first
    for count in range(tokens):
        if count == script.hang_after_events:
            yield Step(then="hang")
        yield Step(wait=wait, tokens=1)
        wait = script.interval
    if not tokens:
        yield Step(wait=wait)
    cut = script.cut_after_bytes
    yield from _writes(0.0, head + (body if cut is None else body[:cut]), 0, script)
    yield Step(then="end" if cut is None else "close" if script.cut == "clean" else script.cut)
