"""Following the journals of all workers of a host, for one sink.

`Tail.poll(checkpoint)` returns a `Batch`: records that ended since, and the checkpoint to store *together with* what the sink
made of them. A poll changes nothing: a sink that fails to store a batch asks again with the checkpoint it has.

A checkpoint holds a position per segment and the last word of every request that is still open, so that a request whose worker
died is closed exactly once, as `crashed`, with the tokens seen, also across restarts of the collector.

Of a dead writer's segment a torn last frame is the normal end: its worker died before it released the answer. Bytes that aren't
a frame with frames after them are damage (a page that never reached the disk, a bad block): it is reported, the frames around it
count, and the file is put aside instead of deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from enum import Enum, auto
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy.errors import Outcome
from proxy.exchange import Phase, Record, decode_record, peek_record
from proxy.journal import segment
from proxy.journal.segment import END_MARK, FRAME, FRAME_BYTES, HEADER_BYTES, INCARNATION_LENGTH, MAX_FRAME_BYTES, SegmentName

FIRST_READ_BYTES = 16 * 1024
READ_BYTES = 1024 * 1024
SEARCH_BYTES = 1024 * 1024
"""How far a whole frame is looked for after damage, zeros not counted."""
CHECKED_BYTES = 256 * 1024 * 1024
"""How many bytes are read meanwhile of what might be frames."""

ABANDONED_SECONDS = 60.0
"""A segment that was being prepared, of an incarnation that has no other, and that nobody holds is left over after this time."""


class Checkpoint(msgspec.Struct, array_like=True):
    """How far a sink has come. `done` are segments read to their end, until their file is removed."""

    positions: dict[str, int] = {}
    done: set[str] = set()
    open: dict[str, dict[bytes, bytes]] = {}
    """incarnation → id → the latest encoded record of a request that hasn't ended."""
    damaged: set[str] = set()
    """Segments with bytes that couldn't be read."""

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Checkpoint:
        """Raises msgspec.MsgspecError if `data` isn't a checkpoint."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(str(error)) from None

    def requests(self) -> Iterator[Record]:
        """The last word of every request that hasn't ended. One that isn't a record is reported when its worker ends."""
        for incarnation, ids in self.open.items():
            for payload in ids.values():
                with contextlib.suppress(msgspec.MsgspecError):
                    yield _of(incarnation, decode_record(payload))

    def copy(self) -> Checkpoint:
        requests = {name: dict(ids) for name, ids in self.open.items()}
        return Checkpoint(dict(self.positions), set(self.done), requests, set(self.damaged))


class Batch(NamedTuple):
    records: list[Record]
    """Requests that ended, in the order of the journal, each with its `worker`; those of dead workers come last, as CRASHED."""
    checkpoint: Checkpoint
    more: bool
    """There is probably more to read at once."""
    corrupt: list[str]
    """What couldn't be read, `<segment>: <reason>`. Such a segment ends there, and `Tail.remove` puts it aside."""


class _Read(Enum):
    """Why reading a segment stopped."""

    ENDED = auto()
    CAUGHT_UP = auto()
    LIMIT = auto()


class Tail:
    """Reads one directory of segments. Holds no position of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def segments(self) -> list[SegmentName]:
        """Oldest first, per incarnation."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(name for text in names if (name := SegmentName.parse(text)) is not None)

    def damaged(self) -> list[str]:
        """The segments that were put aside, for a person to look at."""
        return sorted(path.name for path in self._directory.glob("*.damaged"))

    def poll(self, checkpoint: Checkpoint, limit: int = 2000) -> Batch:
        """Up to about `limit` ended requests after `checkpoint`."""
        present = self.segments()
        reading = _Reading(self, checkpoint.copy(), limit)
        _forget(reading.after, {str(name) for name in present})
        for incarnation, names in groupby(present, key=lambda name: name.incarnation):
            if not reading.follow(incarnation, list(names)):
                return reading.batch(more=True)
        if gone := reading.after.open.keys() - {name.incarnation for name in present}:
            for incarnation in gone - {name.incarnation for name in self.segments()}:
                reading.close(incarnation)  # somebody took its segments away; a living worker always has one
        return reading.batch(more=False)

    def path(self, name: SegmentName) -> Path:
        return self._directory / str(name)

    def is_dead(self, name: SegmentName) -> bool:
        """Nobody holds the segment's lock: its writer has finished it, or died."""
        return not _is_locked(self.path(name))

    def remove(self, checkpoints: list[Checkpoint]) -> None:
        """Delete what every sink has stored for good: segments done in all `checkpoints`, and what the dead had prepared."""
        self.remove_abandoned()
        if not checkpoints:
            return
        present = self.segments()
        newest = {name.incarnation: name for name in present}
        needed = {incarnation for checkpoint in checkpoints for incarnation in checkpoint.open}
        damaged = {text for checkpoint in checkpoints for text in checkpoint.damaged}
        for name in present:
            if not all(str(name) in checkpoint.done for checkpoint in checkpoints):
                continue
            # The newest segment says whether its incarnation lives, as long as anybody asks.
            if name == newest[name.incarnation] and (name.incarnation in needed or not self.is_dead(name)):
                continue
            path = self.path(name)
            if str(name) in damaged:
                path.replace(path.with_name(f"{name}.damaged"))
            else:
                path.unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Delete what the dead had prepared and never used."""
        newest = {name.incarnation: name for name in self.segments()}
        dead = {incarnation for incarnation, name in newest.items() if self.is_dead(name)}
        before = time.time() - ABANDONED_SECONDS
        for path in self._directory.glob("*.next"):
            try:
                over = path.name[:INCARNATION_LENGTH] in dead or path.stat().st_mtime < before
                if over and not _is_locked(path):
                    path.unlink()
            except FileNotFoundError:
                continue  # it got its name in the meantime

    def unread_bytes(self, checkpoint: Checkpoint, written: dict[str, tuple[int, int]]) -> int:
        """How far `checkpoint` is behind. `written`: incarnation → (segment, position), from the heartbeats: what is written of a
        segment can't be told from its size."""
        return sum(size - position for position, size in self._extents(checkpoint, written) if size > position)

    def _extents(self, checkpoint: Checkpoint, written: dict[str, tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for name in self.segments():
            if str(name) in checkpoint.done:
                continue
            position = checkpoint.positions.get(str(name), HEADER_BYTES)
            sequence, current = written.get(name.incarnation, (name.sequence + 1, 0))
            if name.sequence == sequence:
                yield position, current
            elif name.sequence < sequence:
                yield position, _size(self.path(name))


class _Reading:
    """One poll: what it has found so far."""

    def __init__(self, tail: Tail, after: Checkpoint, limit: int) -> None:
        self._tail = tail
        self._limit = limit
        self._records: list[Record] = []
        self._corrupt: list[str] = []
        self.after = after

    def batch(self, more: bool) -> Batch:
        return Batch(self._records, self.after, more, self._corrupt)

    def follow(self, incarnation: str, names: list[SegmentName]) -> bool:
        """Read on in one incarnation; False if the limit stopped us. Closes its open requests if it is dead."""
        for name in names:
            if str(name) in self.after.done:
                continue
            if len(self._records) >= self._limit:
                return False
            # The lock first, then the last look: whatever a dead writer wrote is there by then.
            dead = self._tail.is_dead(name)
            stopped = self._drain(name, dead)
            if stopped is _Read.LIMIT:
                return False
            if stopped is _Read.CAUGHT_UP and not dead:
                return True
            self.after.done.add(str(name))
            self.after.positions.pop(str(name), None)
        newest = [name for name in self._tail.segments() if name.incarnation == incarnation]
        if incarnation in self.after.open and newest == names and self._tail.is_dead(names[-1]):
            self.close(incarnation)
        return True

    def close(self, incarnation: str) -> None:
        """Its worker is dead: what it left open has ended."""
        for payload in self.after.open.pop(incarnation).values():
            try:
                self._records.append(_crashed(_of(incarnation, decode_record(payload))))
            except msgspec.MsgspecError as error:
                self._corrupt.append(f"{incarnation}: the last word of a request isn't a record: {error}")

    def _drain(self, name: SegmentName, dead: bool) -> _Read:
        try:
            fd = os.open(self._tail.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return _Read.ENDED
        try:
            return self._read(fd, name, dead)
        except segment.Corrupt as error:
            self._damage(name, str(error))
            return _Read.ENDED
        finally:
            os.close(fd)
            if not self.after.open.get(name.incarnation, True):
                del self.after.open[name.incarnation]

    def _read(self, fd: int, name: SegmentName, dead: bool) -> _Read:
        text = str(name)
        position = self.after.positions.get(text, 0)
        if position == 0:
            segment.check_header(os.pread(fd, HEADER_BYTES, 0))
            position = self.after.positions[text] = HEADER_BYTES
        size = FIRST_READ_BYTES
        while True:
            payloads, consumed, ended = read_frames(fd, position, size)
            for payload in payloads:
                self._apply(payload, name)
            position += consumed
            self.after.positions[text] = position
            if ended:
                return _Read.ENDED
            if len(self._records) >= self._limit:
                return _Read.LIMIT
            if consumed:
                size = READ_BYTES
            elif not dead:
                return _Read.CAUGHT_UP
            elif (position_after := _next_frame(fd, position)) is not None:
                self._damage(name, f"no frame at byte {position}, and again at {position_after}")
                position = position_after
            else:
                if _is_cut_off(fd, position):
                    self._damage(name, f"cut off in the frame at byte {position}")
                return _Read.ENDED

    def _apply(self, payload: bytes, name: SegmentName) -> None:
        open_requests = self.after.open.setdefault(name.incarnation, {})
        try:
            phase, identity = peek_record(payload)
            if phase == Phase.CLOSING:
                self._records.append(_of(name.incarnation, decode_record(payload)))
                open_requests.pop(identity, None)
            else:
                open_requests[identity] = payload
        except (ValueError, msgspec.MsgspecError) as error:
            self._damage(name, f"a frame that isn't a record: {error}")

    def _damage(self, name: SegmentName, reason: str) -> None:
        self.after.damaged.add(str(name))
        self._corrupt.append(f"{name}: {reason}")


def _of(incarnation: str, record: Record) -> Record:
    record.worker = incarnation
    return record


def _crashed(record: Record) -> Record:
    record.outcome = Outcome.CRASHED
    record.error_code = "worker_crashed"
    record.error = "The proxy's worker process died while the request was running."
    seen = (
        record.ended_ns,
        record.last_token_ns,
        record.first_byte_ns,
        record.sent_ns,
        record.looked_up_ns,
        record.authenticated_ns,
    )
    record.ended_ns = max(seen)
    return record


def _forget(checkpoint: Checkpoint, present: set[str]) -> None:
    checkpoint.done &= present
    checkpoint.damaged &= present
    for name in [name for name in checkpoint.positions if name not in present]:
        del checkpoint.positions[name]


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_frames(fd: int, position: int, size: int = READ_BYTES) -> tuple[list[bytes], int, bool]:
    """Whole frames from `position` on, about `size` bytes of them → (payloads, bytes consumed, END seen)."""
    found = segment.parse(os.pread(fd, size, position))
    if not found[0] and not found[2] and size - FRAME_BYTES < (length := _length_at(fd, position)) <= MAX_FRAME_BYTES:
        return segment.parse(os.pread(fd, FRAME_BYTES + length, position))  # one frame longer than `size`
    return found


def _next_frame(fd: int, position: int) -> int | None:
    """Where frames, or the END mark, come after `position`, where there is none; None if nothing more was written. Raises Corrupt
    if there is a lot of something else."""
    size = os.fstat(fd).st_size
    begin, searched, checked = position, 0, 0
    while position < size:
        data = os.pread(fd, READ_BYTES + FRAME_BYTES - 1, position)
        zeros = len(data) - len(data.lstrip(b"\0"))
        start = max(0, zeros - FRAME_BYTES + 1)  # a frame's length may begin with zeros, in no other way
        for offset in range(start, min(READ_BYTES, len(data) - FRAME_BYTES + 1)):
            if data.startswith(END_MARK, offset):
                return position + offset
            length, _ = FRAME.unpack_from(data, offset)
            if 0 < length <= min(MAX_FRAME_BYTES, size - position - offset - FRAME_BYTES):
                checked += length
                if checked > CHECKED_BYTES:
                    break
                if segment.parse(os.pread(fd, FRAME_BYTES + length, position + offset))[0]:
                    return position + offset
        searched += len(data) - zeros
        if searched > SEARCH_BYTES or checked > CHECKED_BYTES:
            raise segment.Corrupt(f"no frame at byte {begin}, nor soon after it")
        position += READ_BYTES
    return None


def _is_cut_off(fd: int, position: int) -> bool:
    """Is the file shorter than the frame there says? (What a killed writer leaves is as long as it was made.)"""
    return position + FRAME_BYTES + _length_at(fd, position) > os.fstat(fd).st_size and _length_at(fd, position) > 0


def _length_at(fd: int, position: int) -> int:
    """The length of the frame there; 0 if nothing was written."""
    head = os.pread(fd, FRAME_BYTES, position)
    return int(FRAME.unpack(head)[0]) if len(head) == FRAME_BYTES else len(head.strip(b"\0"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
