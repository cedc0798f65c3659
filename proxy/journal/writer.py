"""Appending: `Journal` belongs to one worker incarnation, is used from its event loop and never waits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import threading
import time
import zlib
from pathlib import Path

from proxy.journal import segment
from proxy.journal.segment import END, FRAME, FRAME_BYTES, HEADER_BYTES, MAX_FRAME_BYTES, NO_ROOM, SegmentName

_OVERHEAD = HEADER_BYTES + 2 * FRAME_BYTES
"""What a segment holds besides one record: its header, the record's frame, END."""

RESERVE_SHARE = 8
"""One in so many bytes of a segment is kept for closing records whose openings are in the journal: when the disk is full, what
has begun still ends as it did, and not as `crashed`. Of 64 MiB it is room for about 18,000 of them."""

SPARE_SEGMENTS = 2
"""So many segments' room on the disk is left to others. What waits in the journal goes away when the collector has stored it, and
for that it must be able to write: a row of the ledger takes half as much again as its records."""

_pack_frame = FRAME.pack
_crc32 = zlib.crc32


class JournalFull(Exception):
    """No segment could be prepared (the disk is full, or not writable); the record was not kept, and that was counted."""


class _Segment:
    """One preallocated, mapped, locked file."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, size)
            self.map = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        self.fd = fd
        self.map[:HEADER_BYTES] = segment.header()

    def rename(self, name: str) -> None:
        self.path = self.path.rename(self.path.with_name(name))

    def close(self, length: int) -> None:
        """Cut the file to what was written, make sure of it and let go of the lock: readers may finish it."""
        self.map.close()
        try:
            os.ftruncate(self.fd, length)
            os.fdatasync(self.fd)
        finally:
            os.close(self.fd)

    def discard(self) -> None:
        self.map.close()
        self.path.unlink(missing_ok=True)
        os.close(self.fd)


class Journal:
    """The journal of one worker incarnation.

    `append` costs about a microsecond and makes no system call, except when a segment is full. A thread prepares the next
    segment before it is needed and syncs once a second, so a full disk is known one segment ahead (`full`). It also begins on a
    full disk: then everything is refused until there is room.
    """

    def __init__(self, directory: Path, segment_bytes: int, spare_bytes: int | None = None) -> None:
        """`spare_bytes`: what is left of the disk to others, by default `SPARE_SEGMENTS`. Raises OSError if the directory can't
        be written to for another reason than want of room."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.incarnation = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._spare_bytes = SPARE_SEGMENTS * segment_bytes if spare_bytes is None else spare_bytes
        self._sequence = 0
        self.unrecorded = 0
        """Records that could not be kept since this incarnation began."""
        self._current: _Segment | None = None
        self._next: _Segment | None = None
        self._ended: list[tuple[_Segment, int]] = []
        """Segments that have their END mark and the length to which the thread cuts them."""
        self._wanted = threading.Event()
        self._closing = False
        self._position = self._limit = self._end_of_room = 0
        self._alarm = -1
        try:
            self._enter(self._prepare())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        self._thread = threading.Thread(target=self._tend, name="journal", daemon=True)
        self._thread.start()
        self._wanted.set()

    @property
    def full(self) -> bool:
        """There is no next segment and this one is three quarters written: the disk is full."""
        return self._next is None and self._position > self._alarm

    @property
    def position(self) -> tuple[int, int]:
        """(segment sequence, bytes written in it)."""
        return self._sequence, self._position

    def append(self, payload: bytes, owed: bool = False) -> None:
        """Keep `payload`. When this returns it survives the process. Raises JournalFull, and counts, if it can't be kept.
        `owed`: it ends what the journal has the beginning of, so that it may have what is reserved for that."""
        if not self.offer(payload, owed):
            self.unrecorded += 1
            raise JournalFull("no room for a record")

    def offer(self, payload: bytes, owed: bool = False) -> bool:
        """The same for what a later record will say again: False if it can't be kept, which then is no loss."""
        length = len(payload)
        stop = self._position + FRAME_BYTES + length
        if stop > self._limit or not 0 < length <= MAX_FRAME_BYTES:
            if not self._make_room(length, owed):
                return False
            stop = self._position + FRAME_BYTES + length
        # One copy, length first: a frame that a kill cut short has a wrong crc, and a reader takes it for unwritten.
        self._write(_pack_frame(length, _crc32(payload, length)) + payload)
        self._position = stop
        return True

    def close(self) -> None:
        """End the incarnation: the last segment gets its END mark and its lock is let go."""
        self._closing = True
        self._wanted.set()
        self._thread.join()
        if self._current is not None:
            self._end(self._current, self._position)
        self._close_ended()
        if self._next is not None:
            self._next.discard()

    # -- segments --

    def _prepare(self) -> _Segment:
        """Raises OSError. The room is looked for first: taking what there is until there is no more would be felt by others."""
        disk = os.statvfs(self._directory)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < self._segment_bytes + self._spare_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
        return _Segment(self._directory / f"{self.incarnation}-{self._sequence + 1:06d}.next", self._segment_bytes)

    def _enter(self, current: _Segment) -> None:
        current.rename(str(SegmentName(self.incarnation, self._sequence + 1)))
        self._sequence += 1
        self._current = current
        current.map.seek(HEADER_BYTES)
        self._write = current.map.write
        self._position = HEADER_BYTES
        self._end_of_room = self._segment_bytes - FRAME_BYTES  # room for END
        self._limit = self._end_of_room - self._segment_bytes // RESERVE_SHARE
        self._alarm = self._segment_bytes * 3 // 4

    def _end(self, finished: _Segment, position: int) -> None:
        FRAME.pack_into(finished.map, position, END, 0)
        self._ended.append((finished, position + FRAME_BYTES))

    def _make_room(self, length: int, owed: bool) -> bool:
        """For a record beyond the limit: the next segment or, if there is none, what is reserved. False: it can have neither."""
        if not 0 < length <= min(MAX_FRAME_BYTES, self._segment_bytes - _OVERHEAD):
            return False
        if self._position == HEADER_BYTES:
            return True  # it has the segment to itself
        return self._rotate() or (owed and self._position + FRAME_BYTES + length <= self._end_of_room)

    def _rotate(self) -> bool:
        """Go on in the next segment; False if there is none."""
        following, finished, position = self._next, self._current, self._position
        if following is None:
            return False
        self._next = None
        try:
            self._enter(following)  # the new segment is visible before the old one ends
        except OSError:
            self._next = following
            return False
        if finished is not None:
            self._end(finished, position)
        self._wanted.set()
        return True

    def _tend(self) -> None:
        """The thread: closes what has ended, prepares the next segment, syncs the current one."""
        while not self._closing:
            self._wanted.wait(timeout=1.0)
            self._wanted.clear()
            self._close_ended()
            if self._next is None and not self._closing:
                try:
                    self._next = self._prepare()
                except OSError:
                    self._next = None  # `full` tells, and the next second tries again
            if (current := self._current) is not None:
                with contextlib.suppress(OSError):
                    os.fdatasync(current.fd)

    def _close_ended(self) -> None:
        while self._ended:
            finished, length = self._ended.pop(0)
            with contextlib.suppress(OSError):  # the END mark is there; a reader doesn't need the cut
                finished.close(length)
