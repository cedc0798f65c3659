"""The live view of a worker: a small file, mapped, overwritten a few times a second.

It doesn't go through the journal, so that a backlog there never makes it stale. `flock` is held on it while the worker lives.
Layout: u32 length, u32 crc32, MessagePack. A torn read fails its crc and is tried again by the reader at its next look.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from pathlib import Path

import msgspec

_HEAD = struct.Struct("<II")
_SIZE = 16 * 1024


class Heartbeat(msgspec.Struct):
    """What a worker says of itself. Counters are totals since the incarnation began."""

    incarnation: str
    unix_ns: int = 0
    in_flight: int = 0
    in_flight_by_backend: dict[str, int] = {}
    connections: int = 0
    loop_delay_ns: int = 0
    snapshot_unix_ns: int = 0
    segment: int = 0
    segment_position: int = 0
    unrecorded: int = 0
    journal_full: bool = False
    draining: bool = False
    unaccepted: dict[str, int] = {}
    """Requests that never were accepted, by error code: bad key, unknown path, too large, ..."""
    alive: bool = True
    """Set by the reader: False is the last word of a worker that has gone."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Heartbeat)


class HeartbeatFile:
    """The writer's side: one file per worker incarnation."""

    def __init__(self, directory: Path, incarnation: str) -> None:
        scratch = directory / f"{incarnation}.heartbeat.new"
        self._fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._fd, _SIZE)
        self._map = mmap.mmap(self._fd, _SIZE)
        scratch.rename(directory / f"{incarnation}.heartbeat")  # locked before a reader can see it

    def write(self, beat: Heartbeat) -> None:
        payload = _encoder.encode(beat)
        if len(payload) > _SIZE - _HEAD.size:
            beat.in_flight_by_backend = {}
            payload = _encoder.encode(beat)
        self._map[_HEAD.size : _HEAD.size + len(payload)] = payload
        _HEAD.pack_into(self._map, 0, len(payload), zlib.crc32(payload))

    def close(self) -> None:
        """Let go of the lock. The file stays for one more look; the reader removes it."""
        self._map.close()
        os.close(self._fd)


def read_heartbeats(directory: Path) -> list[Heartbeat]:
    """What the workers say. A worker that has gone is read once more (`alive=False`, nothing in flight), then its file is
    removed: there is one reader, the collector."""
    beats = []
    for path in sorted(directory.glob("*.heartbeat")):
        with contextlib.suppress(FileNotFoundError):
            if (beat := _read(path)) is not None:
                beats.append(beat)
    return beats


def _read(path: Path) -> Heartbeat | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alive = False
            path.unlink(missing_ok=True)
        except BlockingIOError:
            alive = True
        data = os.pread(fd, _SIZE, 0)
    finally:
        os.close(fd)
    length, crc = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))
    payload = data[_HEAD.size : _HEAD.size + length]
    if not length or zlib.crc32(payload) != crc:
        return None
    beat = _decoder.decode(payload)
    if not alive:
        beat.alive, beat.in_flight, beat.in_flight_by_backend, beat.connections = False, 0, {}, 0
    return beat
