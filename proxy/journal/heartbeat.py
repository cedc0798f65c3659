"""The live view of a worker: a small file, mapped, overwritten a few times a second.

It doesn't go through the journal, so that a backlog there never makes it stale. `flock` is held on it while the worker lives.
Layout: two slots, written in turn, so that one of them is whole at any moment: a writer may lose its CPU in the middle of the
other. A slot is u32 length, u32 crc32, MessagePack, and at its end a u64 number, from which the crc starts; the higher counts.

What a dead worker said last stays until the collector has kept it: looking changes nothing, `remove_heartbeat` does.

Its blocks are allocated when it is made: a write into a mapping for which the disk has no room kills the process (SIGBUS).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import zlib
from operator import itemgetter
from pathlib import Path

import msgspec

from proxy.journal.segment import NO_ROOM

_HEAD = struct.Struct("<II")
_NUMBER = struct.Struct("<Q")
_SLOT = 16 * 1024
_SIZE = 2 * _SLOT


class BackendBeat(msgspec.Struct, array_like=True):
    """What a worker knows of one backend. `state`: `up`, `suspect`, `out` or `drained`; `reason`: the error code of what was
    wrong last."""

    state: str = "up"
    reason: str = ""
    in_flight: int = 0
    tokens: int = 0
    """Of these requests: prompts as far as the engine has to compute them, answers as long as they are expected to become."""
    prefilling: int = 0
    """Of these, the prompts' that wait for their first token."""
    part: float = 1.0
    """Of its usual load, what it may have at present: less for a while after its return."""
    ejections: int = 0
    """How often it was put out of service; a total."""
    probes: int = 0
    failed_probes: int = 0


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
    certificate_expiry_unix_s: int = 0
    """Of the listener's certificate; 0 = it has none."""
    tasks: int = 0
    """Of asyncio."""
    reservations: int = 0
    """Requests that hold something of a limit or a budget."""
    redis: str = ""
    """What several workers share: `up`, or `down` (limits are then this worker's part of them); "" where there is no Redis."""
    redis_failures: int = 0
    """Round trips that failed or took too long."""
    worker: int = 0
    """Its place among the workers of this host; whoever takes over from it has the same."""
    requests: int = 0
    """Accepted so far."""
    waiting: int = 0
    """Requests that wait for a backend with room."""
    backends: dict[str, BackendBeat] = {}
    retries_denied: int = 0
    """Answers with an engine's error that went out since enough others had been tried again (`routing/budget.py`)."""
    cache_entries: int = 0
    """Answers that the worker keeps in memory, and their bytes."""
    cache_bytes: int = 0
    cache_evictions: int = 0
    """Answers that had to make room for others."""
    cache_stored: int = 0
    """Answers that were kept, in memory or in Redis."""
    cache_dropped: int = 0
    """Answers that would have been kept in Redis, had there not been too many under way already."""
    cache_redis: str = ""
    """The Redis that keeps answers: `up`, or `down` (only memory has any then); "" where there is none."""
    cache_redis_failures: int = 0
    """Its questions and errands that failed or took too long."""
    alive: bool = True
    """Set by the reader: False is the last word of a worker that has gone."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Heartbeat)


class HeartbeatFile:
    """The writer's side: one file per worker incarnation. On a full disk it says nothing until there is room."""

    def __init__(self, directory: Path, incarnation: str) -> None:
        """Raises OSError if the file can't be made for another reason than want of room."""
        self._path = directory / f"{incarnation}.heartbeat"
        self._map: mmap.mmap | None = None
        self._number = 0
        self._make()

    def _make(self) -> None:
        scratch = self._path.with_name(f"{self._path.name}.new")
        try:
            fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.posix_fallocate(fd, 0, _SIZE)
                mapped = mmap.mmap(fd, _SIZE)  # it has a descriptor of its own, and with that the lock
            finally:
                os.close(fd)
            scratch.rename(self._path)  # locked before a reader can see it
        except OSError as error:
            scratch.unlink(missing_ok=True)
            if error.errno not in NO_ROOM:
                raise
        else:
            self._map = mapped

    def write(self, beat: Heartbeat) -> None:
        if self._map is None:
            self._make()
        if self._map is None:
            return
        payload = _encoder.encode(beat)
        if len(payload) > _SLOT - _HEAD.size - _NUMBER.size:
            beat.in_flight_by_backend, beat.backends = {}, {}
            payload = _encoder.encode(beat)
        self._number += 1
        start = self._number % 2 * _SLOT
        self._map[start + _HEAD.size : start + _HEAD.size + len(payload)] = payload
        _NUMBER.pack_into(self._map, start + _SLOT - _NUMBER.size, self._number)
        _HEAD.pack_into(self._map, start, len(payload), zlib.crc32(payload, self._number))

    def close(self) -> None:
        """Let go of the lock. The file stays: it holds the last word."""
        if self._map is not None:
            self._map.close()


def read_heartbeats(directory: Path) -> list[Heartbeat]:
    """What the workers say, oldest incarnation first; of one that has gone its last word (`alive=False`, nothing in flight)."""
    return [beat for path in sorted(directory.glob("*.heartbeat")) if (beat := _read(path)) is not None]


def remove_heartbeat(directory: Path, incarnation: str) -> None:
    """Delete the last word of a worker that has gone."""
    (directory / f"{incarnation}.heartbeat").unlink(missing_ok=True)


def _read(path: Path) -> Heartbeat | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        alive = _is_locked(fd)  # before the look: whatever a dead writer wrote is there by then
        data = os.pread(fd, _SIZE, 0)
    finally:
        os.close(fd)
    slots = [slot for start in (0, _SLOT) if (slot := _decode(data[start : start + _SLOT])) is not None]
    beat = max(slots, key=itemgetter(0))[1] if slots else None
    if beat is not None and not alive:
        beat.alive, beat.in_flight, beat.in_flight_by_backend, beat.connections = False, 0, {}, 0
        beat.waiting = 0
        for each in beat.backends.values():
            each.in_flight = each.tokens = each.prefilling = 0
    return beat


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _decode(slot: bytes) -> tuple[int, Heartbeat] | None:
    """(number, what was said). None if it is torn, empty or another version's."""
    slot = slot.ljust(_SLOT, b"\0")
    length, crc = _HEAD.unpack_from(slot)
    (number,) = _NUMBER.unpack_from(slot, _SLOT - _NUMBER.size)
    payload = slot[_HEAD.size : _HEAD.size + length]
    if not length or zlib.crc32(payload, number & 0xFFFFFFFF) != crc:
        return None
    try:
        return number, _decoder.decode(payload)
    except msgspec.MsgspecError:
        return None
