"""Event framing of server-sent events (WHATWG HTML §9.2.6) across any chunk borders.

An event ends with a blank line; lines end with LF, CRLF or CR. Events come out as the very bytes that went in, so a relay can
forward them untouched. Two rules that are easy to get wrong:

- CRLF is one line end, also when CR and LF arrive apart: after `CRLF CR` or `LF CR` the next byte decides where the event ends,
  so it is waited for. (`CR CR` ends one at once: who ends lines with CR doesn't end the next with CRLF.)
- An event without an end is bounded: `OversizedEvent` after `limit` bytes.
"""

from __future__ import annotations

import re

_BLANK_LINE = re.compile(rb"(?:\r\n|\n)(?:\r\n|\n|\r(?=[^\n]))|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class OversizedEvent(Exception):
    """An event grew over the limit without ending."""


class Framer:
    """Cuts a byte stream into whole events."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0

    @property
    def empty(self) -> bool:
        return not self._buffer

    def feed(self, data: bytes) -> list[bytes]:
        """Whole events, in order, with their line ends. Raises OversizedEvent."""
        buffer = self._buffer
        buffer += data
        events: list[bytes] = []
        start = 0
        search = _BLANK_LINE.search
        # A blank line may straddle what was scanned before: go back over the longest beginning of one.
        match = search(buffer, max(0, self._scanned - 3))
        while match is not None:
            stop = match.end()
            events.append(bytes(buffer[start:stop]))
            start = stop
            match = search(buffer, start)
        if start:
            del buffer[:start]
        self._scanned = len(buffer)
        if len(buffer) > self._limit:
            raise OversizedEvent(f"an event of more than {self._limit} bytes")
        return events

    def rest(self) -> bytes:
        """What is left when the stream has ended: an event without its blank line, or nothing."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._scanned = 0
        return rest


def data_of(event: bytes) -> bytes | None:
    """The event's data: its `data:` lines joined by LF; None if it has none (a comment, an id, a retry)."""
    if event.startswith(b"data: ") and event.count(b"\n") == 2 and event.endswith(b"\n\n") and b"\r" not in event:
        return event[6:-2]
    lines = []
    for line in _LINE_END.split(event.removeprefix(_BOM)):
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None
