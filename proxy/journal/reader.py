"""Following the journals of all workers of a host, for one sink.

`Tail.poll(checkpoint)` returns a `Batch`: records that ended since, and the checkpoint to store *together with* what the sink
made of them. A poll changes nothing: a sink that fails to store a batch asks again with the checkpoint it has.

A checkpoint holds a position per segment and the last word of every request that is still open, so that a request whose worker
died is closed exactly once, as `crashed`, with the tokens seen, also across restarts of the collector.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy.errors import Outcome
from proxy.exchange import Phase, Record, decode_record, peek_record
from proxy.journal import segment
from proxy.journal.segment import HEADER_BYTES, SegmentName

READ_BYTES = 1024 * 1024


class Checkpoint(msgspec.Struct, array_like=True):
    """How far a sink has come. `done` are segments read to their end, until their file is removed."""

    positions: dict[str, int] = {}
    done: set[str] = set()
    open: dict[str, dict[bytes, bytes]] = {}
    """incarnation → id → the latest encoded record of a request that hasn't ended."""

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Checkpoint:
        return msgspec.msgpack.decode(data, type=cls)

    def copy(self) -> Checkpoint:
        return Checkpoint(dict(self.positions), set(self.done), {name: dict(ids) for name, ids in self.open.items()})


class Batch(NamedTuple):
    records: list[Record]
    """Requests that ended, in the order of the journal; those of dead workers come last, as CRASHED."""
    checkpoint: Checkpoint
    more: bool
    """There is probably more to read at once."""
    corrupt: list[str]
    """Segments that couldn't be read to the end, with the reason; they count as done and their files stay."""


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

    def poll(self, checkpoint: Checkpoint, limit: int = 2000) -> Batch:
        """Up to about `limit` ended requests after `checkpoint`."""
        after = checkpoint.copy()
        records: list[Record] = []
        corrupt: list[str] = []
        more = False
        present = self.segments()
        _forget(after, {str(name) for name in present})
        for incarnation, names in groupby(present, key=lambda name: name.incarnation):
            if more:
                break
            more = self._follow(incarnation, list(names), after, records, corrupt, limit)
        return Batch(records, after, more, corrupt)

    def _follow(
        self,
        incarnation: str,
        names: list[SegmentName],
        after: Checkpoint,
        records: list[Record],
        corrupt: list[str],
        limit: int,
    ) -> bool:
        """Read on in one incarnation; True if `limit` stopped us. Closes its open requests if it is dead."""
        for name in names:
            if str(name) in after.done:
                continue
            # The lock first, then the last look: whatever a dead writer wrote is there by then.
            dead = self._is_dead(name)
            ended, full = self._drain(name, after, records, corrupt, limit)
            if full:
                return True
            if not (ended or dead):
                return False
            after.done.add(str(name))
            after.positions.pop(str(name), None)
        newest = [name for name in self.segments() if name.incarnation == incarnation]
        if incarnation in after.open and newest == names and self._is_dead(names[-1]):
            for payload in after.open.pop(incarnation).values():
                records.append(_crashed(payload))
        return False

    def _drain(
        self, name: SegmentName, after: Checkpoint, records: list[Record], corrupt: list[str], limit: int
    ) -> tuple[bool, bool]:
        """→ (the segment has ended, `limit` was reached)."""
        text = str(name)
        try:
            fd = os.open(self._directory / text, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True, False
        try:
            position = after.positions.get(text, 0)
            if position == 0:
                try:
                    segment.check_header(os.pread(fd, HEADER_BYTES, 0))
                except segment.Corrupt as error:
                    corrupt.append(f"{text}: {error}")
                    return True, False
                position = HEADER_BYTES
            open_requests = after.open.setdefault(name.incarnation, {})
            size = READ_BYTES
            while True:
                payloads, consumed, ended = segment.parse(os.pread(fd, size, position))
                for payload in payloads:
                    _apply(payload, open_requests, records)
                position += consumed
                after.positions[text] = position
                if ended:
                    return True, False
                if not consumed:
                    if size >= segment.MAX_FRAME_BYTES or not _frame_is_longer(fd, position, size):
                        return False, False
                    size = segment.MAX_FRAME_BYTES + segment.FRAME_BYTES
                if len(records) >= limit:
                    return False, True
        finally:
            os.close(fd)
            if not after.open.get(name.incarnation, True):
                del after.open[name.incarnation]

    def _is_dead(self, name: SegmentName) -> bool:
        """Nobody holds the segment's lock: its writer has finished it, or died."""
        try:
            fd = os.open(self._directory / str(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def remove(self, checkpoints: list[Checkpoint]) -> None:
        """Delete what every sink has stored for good: segments done in all `checkpoints`, and what the dead had prepared."""
        present = self.segments()
        newest = {name.incarnation: name for name in present}
        needed = {incarnation for checkpoint in checkpoints for incarnation in checkpoint.open}
        for name in present:
            if name.incarnation in needed or not all(str(name) in checkpoint.done for checkpoint in checkpoints):
                continue
            # The newest segment of a living incarnation stays: its lock is what says that it lives.
            if name != newest[name.incarnation] or self._is_dead(name):
                (self._directory / str(name)).unlink(missing_ok=True)
        for path in self._directory.glob("*.next"):
            current = newest.get(path.name.partition("-")[0])
            if current is not None and self._is_dead(current):
                path.unlink(missing_ok=True)

    def unread_bytes(self, checkpoint: Checkpoint, written: dict[str, tuple[int, int]]) -> int:
        """How far `checkpoint` is behind; `written`: incarnation → (segment, position) of the living, from their heartbeats."""
        return sum(size - position for position, size in self._extents(checkpoint, written) if size > position)

    def _extents(self, checkpoint: Checkpoint, written: dict[str, tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for name in self.segments():
            if str(name) in checkpoint.done:
                continue
            position = checkpoint.positions.get(str(name), HEADER_BYTES)
            sequence, current = written.get(name.incarnation, (-1, 0))
            if sequence == name.sequence:
                yield position, current
            elif name.incarnation in written:
                yield position, _size(self._directory / str(name))


def _apply(payload: bytes, open_requests: dict[bytes, bytes], records: list[Record]) -> None:
    phase, identity = peek_record(payload)
    if phase == Phase.CLOSING:
        open_requests.pop(identity, None)
        records.append(decode_record(payload))
    else:
        open_requests[identity] = payload


def _crashed(payload: bytes) -> Record:
    record = decode_record(payload)
    record.outcome = Outcome.CRASHED
    record.error_code = "worker_crashed"
    record.error = "The proxy's worker process died while the request was running."
    seen = (record.ended_ns, record.last_token_ns, record.first_byte_ns, record.sent_ns, record.authenticated_ns)
    record.ended_ns = max(seen)
    return record


def _forget(checkpoint: Checkpoint, present: set[str]) -> None:
    checkpoint.done &= present
    for name in [name for name in checkpoint.positions if name not in present]:
        del checkpoint.positions[name]


def _frame_is_longer(fd: int, position: int, size: int) -> bool:
    head = os.pread(fd, segment.FRAME_BYTES, position)
    if len(head) < segment.FRAME_BYTES:
        return False
    length: int = segment.FRAME.unpack(head)[0]
    return size - segment.FRAME_BYTES < length <= segment.MAX_FRAME_BYTES


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
