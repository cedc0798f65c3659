"""What beginnings of prompts were sent where: an engine that has computed one needn't again (vLLM's automatic prefix caching).

A prompt's text is cut at fixed places, and what is before each place is one *mark*, a checksum of all of it. Requests that begin
alike have the same marks up to where they part. Bytes of JSON stand in for tokens: nothing is tokenised here, and a hint that is
wrong costs a prefill.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import Final
from zlib import crc32


def _places() -> Iterable[int]:
    """Fine where prompts part, coarse where they are long: at most 46 of them, up to 128 KiB."""
    at = 0
    for step, until in ((256, 4096), (1024, 16 * 1024), (4096, 48 * 1024), (8192, 128 * 1024)):
        while at < until:
            at += step
            yield at


PLACES: Final = tuple(_places())
_PIECES: Final = tuple(pairwise((0, *PLACES)))
MOST_MARKS: Final = 100_000
"""That are remembered: some 20 MiB. The ones that were not seen for longest go first."""


def marks_of(parts: Sequence[bytes], seed: int) -> list[int]:
    """The marks of a prompt: one for each place that it reaches. `seed`: what makes equal texts different, the model."""
    most = PLACES[-1]
    text = b"".join(parts if sum(map(len, parts)) <= most else [memoryview(part)[:most] for part in parts])
    marks: list[int] = []
    length = len(text)
    for start, end in _PIECES:
        if end > length:
            break
        seed = crc32(text[start:end], seed)
        marks.append(seed)
    return marks


def leading(marks: Sequence[int]) -> int:
    """The mark of a prompt's first KiB, or of all of a shorter one: what comes later tells requests of the same kind apart."""
    return marks[3] if len(marks) > 3 else marks[-1]


class Prefixes:
    """Mark → where it was sent, as bits. A backend has another bit each time that it begins with an empty cache."""

    def __init__(self, most: int = MOST_MARKS) -> None:
        self._most = most
        self._sent: dict[int, int] = {}
        self._live = 0

    def __len__(self) -> int:
        return len(self._sent)

    def enter(self) -> int:
        """A bit for a backend that has computed nothing yet."""
        free = ~self._live
        bit = free & -free
        self._live |= bit
        return bit

    def leave(self, bit: int) -> None:
        """This one's cache is lost; the bit may soon be another's."""
        self._live &= ~bit
        self._sent = {mark: left for mark, bits in self._sent.items() if (left := bits & ~bit)}

    def sent(self, marks: Iterable[int], bit: int) -> None:
        sent = self._sent
        for mark in marks:
            sent[mark] = sent.pop(mark, 0) | bit  # what is used again is youngest again
        if len(sent) > self._most:
            for mark in list(islice(sent, self._most // 16)):
                del sent[mark]

    def reach(self, marks: Sequence[int]) -> dict[int, int]:
        """Bit → bytes of this prompt that were sent there; nothing for those that saw none of it."""
        sent = self._sent
        reach: dict[int, int] = {}
        known, place = -1, 0
        for mark, end in zip(marks, PLACES):  # noqa: B905  (it takes time)
            bits = sent.get(mark, 0) & known
            if bits != known:
                if place:
                    _write(reach, known & ~bits, place)  # these saw no more than what comes before
                known = bits
                if not known:
                    return reach
            place = end
        if place:
            _write(reach, known, place)
        return reach


def _write(reach: dict[int, int], bits: int, place: int) -> None:
    while bits:
        bit = bits & -bits
        reach[bit] = place
        bits ^= bit
