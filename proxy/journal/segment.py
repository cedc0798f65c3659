"""The bytes of a segment: a header, then frames.

    header   8 bytes magic, u32 segment version, u32 record version, 8 bytes reserved
    frame    u32 length, u32 crc32(payload, seeded with the length), payload
    END      a frame whose length is 0xFFFFFFFF

All little-endian. A length of 0 means that nothing has been written there.
"""

from __future__ import annotations

import errno
import re
import struct
import zlib
from typing import NamedTuple

from proxy.exchange import RECORD_VERSION

MAGIC = b"GLASSSEG"
SEGMENT_VERSION = 1
HEADER = struct.Struct("<8sII8x")
FRAME = struct.Struct("<II")
HEADER_BYTES = HEADER.size
FRAME_BYTES = FRAME.size
END = 0xFFFFFFFF
END_MARK = FRAME.pack(END, 0)
MAX_FRAME_BYTES = 16 * 1024 * 1024
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a full disk says. Whoever runs on it waits for room; every other error of a disk is somebody's to mend."""

INCARNATION_LENGTH = 24
_NAME = re.compile(r"^(?P<incarnation>[0-9a-f]{24})-(?P<sequence>[0-9]{6})\.seg$")


class SegmentName(NamedTuple):
    incarnation: str
    sequence: int

    def __str__(self) -> str:
        return f"{self.incarnation}-{self.sequence:06d}.seg"

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        match = _NAME.match(name)
        return cls(match["incarnation"], int(match["sequence"])) if match else None


class Corrupt(Exception):
    """The file isn't a segment that this version can read."""


def header() -> bytes:
    return HEADER.pack(MAGIC, SEGMENT_VERSION, RECORD_VERSION)


def check_header(data: bytes) -> None:
    """Raises Corrupt. Reads its own version and the one before (rolling upgrades)."""
    if len(data) < HEADER_BYTES:
        raise Corrupt("shorter than a segment's header")
    magic, version, record_version = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise Corrupt("no segment: it starts with other bytes")
    if version != SEGMENT_VERSION:
        raise Corrupt(f"segment version {version}; this version reads {SEGMENT_VERSION}")
    if not RECORD_VERSION - 1 <= record_version <= RECORD_VERSION:
        raise Corrupt(f"record version {record_version}; this version reads {RECORD_VERSION - 1} and {RECORD_VERSION}")


def frame(payload: bytes) -> bytes:
    length = len(payload)
    return FRAME.pack(length, zlib.crc32(payload, length)) + payload


def parse(data: bytes) -> tuple[list[bytes], int, bool]:
    """Whole frames at the start of `data` → (payloads, bytes consumed, END seen).

    Stops without complaint at the first frame that isn't (yet) whole.
    """
    payloads: list[bytes] = []
    position, size = 0, len(data)
    while position + FRAME_BYTES <= size:
        length, crc = FRAME.unpack_from(data, position)
        if length == END and crc == 0:
            return payloads, position, True
        if length == 0 or length > MAX_FRAME_BYTES:
            break
        stop = position + FRAME_BYTES + length
        if stop > size:
            break
        payload = data[position + FRAME_BYTES : stop]
        if zlib.crc32(payload, length) != crc:
            break
        payloads.append(payload)
        position = stop
    return payloads, position, False
