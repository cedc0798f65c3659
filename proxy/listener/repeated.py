"""Heads that come again: a client sends the same one with each request of a connection, but for the length of the body. The
parser reads the first; what has the same bytes says the same."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

LESSONS: Final = 3
"""So many heads of a connection are learnt. Where they differ each time, by a trace's id, none will come again."""
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


class Repeated(NamedTuple):
    """`before` and `after`: the head's bytes around the number in its content-length; `head` is without that field."""

    before: bytes
    after: bytes
    method: bytes
    target: bytes
    head: dict[bytes, bytes]

    def body_in(self, read: bytes, most_digits: int) -> tuple[int, int] | None:
        """Where the body begins in what was read, and how long it is. None if this isn't the same head, or the number has more
        digits than that."""
        before, after, _, _, _ = self
        if not read.startswith(before):
            return None
        at = len(before)
        end = read.find(b"\r", at, at + most_digits + 1)
        number = read[at:end]
        if not number.isdigit() or not read.startswith(after, end):
            return None
        return end + len(after), int(number)


def learn(read: bytes, method: bytes, target: bytes, head: dict[bytes, bytes], body: bytes) -> Repeated | None:
    """`read`: bytes in which a request came that was found to be well-formed, and nothing else: all of it, or its head alone.
    None if its length isn't said in the usual way."""
    end = read.find(b"\r\n\r\n") + 4
    length = _LENGTH.search(read, 0, end)
    if length is None or len(read) - end not in (0, len(body)):
        return None
    kept = {name: value for name, value in head.items() if name != b"content-length"}
    return Repeated(read[: length.start(1)], read[length.end(1) : end], method, target, kept)
