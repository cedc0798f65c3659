"""A sorted table, looked up where it lies.

A snapshot may hold a million keys, of which a worker meets a few hundred before the next snapshot comes. So nothing is built when
one is loaded: a table is a stretch of the mapped file, and a look-up is a bisection in it.

    entries    in the order of what they are looked up by, a sha256
    values     MessagePack; entries with the same value share it, as the two secrets of a rotated key do

Nothing of a table is read before it is looked up, damage included. So each entry carries a CRC of itself and of its value: what
a look-up returns was written that way, and damage is a SnapshotError for whom it concerns. Slices of memory end where that ends,
and can't be out of its bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from mmap import mmap
from operator import itemgetter
from struct import Struct
from typing import NamedTuple, Self
from zlib import crc32

import msgspec

_ENTRY = Struct("<32sqIII")
"""What it is looked up by; a number; the place of its value, from the first value on, and how long that is; CRC-32 of all this
and the value."""
_CHECKED = Struct("<32sqII")


class SnapshotError(Exception):
    """The file isn't a snapshot that this version can read."""


class Table:
    """data: what holds the table, from `start` on: `count` entries, then values of `value_bytes` together."""

    def __init__(self, data: bytes | mmap = b"", start: int = 0, count: int = 0, value_bytes: int = 0) -> None:
        self._data = data
        self._start = start
        self._count = count
        self._values = start + count * _ENTRY.size
        self._end = self._values + value_bytes

    @classmethod
    def build(cls, entries: Iterable[tuple[bytes, int, bytes | msgspec.Raw]]) -> Self:
        """From (sha256, number, value) in any order, no sha256 twice. Raises ValueError if one isn't 32 bytes long."""
        table, values = bytearray(), bytearray()
        places: dict[bytes, int] = {}
        for digest, number, raw in sorted(entries, key=itemgetter(0)):
            value = bytes(raw)
            place = places.get(value)
            if place is None:
                place = places[value] = len(values)
                values += value
            table += _entry(digest, number, place, value)
        return cls(bytes(table + values), 0, len(table) // _ENTRY.size, len(values))

    def changed(self, gone: Iterable[bytes], come: Iterable[tuple[bytes, int, bytes | msgspec.Raw]]) -> Self:
        """Without the entries of these sha256, and with those that come; of the others nothing is made anew. Values that nobody
        has any more stay: after many changes a table that is built takes less room."""
        change = dict.fromkeys(gone, b"")
        values = bytearray(self._data[self._values : self._end])
        places: dict[bytes, int] = {}
        for digest, number, raw in come:
            value = bytes(raw)
            place = places.get(value)
            if place is None:
                place = places[value] = len(values)
                values += value
            change[digest] = _entry(digest, number, place, value)
        table, copied = bytearray(), self._start
        for digest in sorted(change):
            index = self._index(digest)
            at = self._start + index * _ENTRY.size
            table += self._data[copied:at]
            table += change[digest]
            copied = at + _ENTRY.size if index < self._count and self._digest(index) == digest else at
        table += self._data[copied : self._values]
        return type(self)(bytes(table + values), 0, len(table) // _ENTRY.size, len(values))

    @property
    def sizes(self) -> tuple[int, int]:
        """(entries, bytes of their values)"""
        return self._count, self._end - self._values

    @staticmethod
    def bytes_of(count: int, value_bytes: int) -> int:
        """How long a table of these sizes is."""
        return count * _ENTRY.size + value_bytes

    def encoded(self) -> bytes:
        """As it is in a file."""
        return self._data[self._start : self._end]

    def look_up(self, digest: bytes) -> tuple[int, bytes] | None:
        """(number, value). Raises SnapshotError if they are damaged."""
        index = self._index(digest)
        return self._entry(index)[1:] if index < self._count and self._digest(index) == digest else None

    def _index(self, digest: bytes) -> int:
        """Of the first entry that isn't before it."""
        data, start, size = self._data, self._start, _ENTRY.size
        low, high = 0, self._count
        while low < high:  # `bisect` with a key would take half as long again
            middle = (low + high) >> 1
            at = start + middle * size
            if data[at : at + 32] < digest:
                low = middle + 1
            else:
                high = middle
        return low

    def _digest(self, index: int) -> bytes:
        at = self._start + index * _ENTRY.size
        return self._data[at : at + 32]

    def _entry(self, index: int) -> tuple[bytes, int, bytes]:
        at = self._start + index * _ENTRY.size
        digest, number, place, size, check = _ENTRY.unpack_from(self._data, at)
        place += self._values
        value = self._data[place : min(place + size, self._end)]
        if crc32(value, crc32(self._data[at : at + _CHECKED.size])) != check:
            raise SnapshotError("the snapshot is damaged where something was looked up")
        return digest, number, value

    def entries(self) -> Iterator[tuple[bytes, int, bytes]]:
        """All of them: (sha256, number, value). Raises SnapshotError."""
        return map(self._entry, range(self._count))


def _entry(digest: bytes, number: int, place: int, value: bytes) -> bytes:
    """Raises ValueError if `digest` is none."""
    if len(digest) != 32:
        raise ValueError(f"a sha256 has 32 bytes, not {len(digest)}")
    fields = _CHECKED.pack(digest, number, place, len(value))
    return fields + crc32(value, crc32(fields)).to_bytes(4, "little")


class Secret(NamedTuple):
    """A secret that opens something: its sha256, when it ends (ns since 1970; 0: never), and whose it is, encoded."""

    digest: bytes
    ends_unix_ns: int
    principal: msgspec.Raw


class KeyTable(Table, Mapping[bytes, msgspec.Raw]):
    """sha256 of a secret → encoded Principal, in the order of the hashes; and when each secret ends."""

    @classmethod
    def of(cls, keys: Mapping[bytes, msgspec.Raw]) -> KeyTable:
        """The same keys; those of a plain mapping never end."""
        return keys if isinstance(keys, KeyTable) else cls.build((digest, 0, principal) for digest, principal in keys.items())

    def find(self, digest: bytes) -> Secret | None:
        """The secret that has this hash. Raises SnapshotError if what is said of it is damaged."""
        found = self.look_up(digest)
        return None if found is None else Secret(digest, found[0], msgspec.Raw(found[1]))

    def secrets(self) -> Iterator[Secret]:
        """All of them. Raises SnapshotError."""
        return (Secret(digest, ends_unix_ns, msgspec.Raw(value)) for digest, ends_unix_ns, value in self.entries())

    def __getitem__(self, digest: bytes) -> msgspec.Raw:
        if (found := self.find(digest)) is None:
            raise KeyError(digest)
        return found.principal

    def __iter__(self) -> Iterator[bytes]:
        return map(self._digest, range(self._count))

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        if isinstance(other, KeyTable):
            return self is other or self.encoded() == other.encoded()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # as Python does
