"""Appending: `Journal` belongs to one worker incarnation, is used from its event loop and never waits."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
import time
import zlib
from pathlib import Path
from typing import NoReturn

from proxy.journal import segment
from proxy.journal.segment import END, FRAME, FRAME_BYTES, HEADER_BYTES, MAX_FRAME_BYTES, SegmentName

_OVERHEAD = HEADER_BYTES + 2 * FRAME_BYTES
"""What a segment holds besides one record: its header, the record's frame, END."""


_pack_frame = FRAME.pack
_crc32 = zlib.crc32


class JournalFull(Exception):
    """No segment could be prepared (the disk is full, or not writable); the record was not kept."""


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
    segment before it is needed and syncs once a second, so a full disk is known one segment ahead (`full`).
    """

    def __init__(self, directory: Path, segment_bytes: int) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.incarnation = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._sequence = 0
        self.unrecorded = 0
        """Records that could not be kept since this incarnation began."""
        self._next: _Segment | None = None
        self._ended: list[tuple[_Segment, int]] = []
        """Segments that have their END mark and the length to which the thread cuts them."""
        self._wanted = threading.Event()
        self._closing = False
        self._position = self._limit = self._alarm = 0
        self._enter(self._prepare())
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

    def append(self, payload: bytes) -> None:
        """Keep `payload`. When this returns it survives the process. Raises JournalFull, and counts, if it can't be kept."""
        length = len(payload)
        stop = self._position + FRAME_BYTES + length
        if stop > self._limit or not 0 < length <= MAX_FRAME_BYTES:
            self._rotate(length)
            self.append(payload)
            return
        # One copy, length first: a frame that a kill cut short has a wrong crc, and a reader takes it for unwritten.
        self._write(_pack_frame(length, _crc32(payload, length)) + payload)
        self._position = stop

    def close(self) -> None:
        """End the incarnation: the last segment gets its END mark and its lock is let go."""
        self._closing = True
        self._wanted.set()
        self._thread.join()
        self._end(self._current, self._position)
        self._close_ended()
        if self._next is not None:
            self._next.discard()

    # -- segments --

    def _prepare(self) -> _Segment:
        return _Segment(self._directory / f"{self.incarnation}-{self._sequence + 1:06d}.next", self._segment_bytes)

    def _enter(self, current: _Segment) -> None:
        current.rename(str(SegmentName(self.incarnation, self._sequence + 1)))
        self._sequence += 1
        self._current = current
        current.map.seek(HEADER_BYTES)
        self._write = current.map.write
        self._position = HEADER_BYTES
        self._limit = self._segment_bytes - FRAME_BYTES  # room for END
        self._alarm = self._segment_bytes * 3 // 4

    def _end(self, finished: _Segment, position: int) -> None:
        FRAME.pack_into(finished.map, position, END, 0)
        self._ended.append((finished, position + FRAME_BYTES))

    def _rotate(self, length: int) -> None:
        following, finished, position = self._next, self._current, self._position
        if following is None or not 0 < length <= min(MAX_FRAME_BYTES, self._segment_bytes - _OVERHEAD):
            self._refuse("no room for a record")
        self._next = None
        try:
            self._enter(following)  # the new segment is visible before the old one ends
        except OSError as error:
            self._next = following
            self._refuse(str(error))
        self._end(finished, position)
        self._wanted.set()

    def _refuse(self, reason: str) -> NoReturn:
        self.unrecorded += 1
        self._wanted.set()
        raise JournalFull(reason)

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
            with contextlib.suppress(OSError):
                os.fdatasync(self._current.fd)

    def _close_ended(self) -> None:
        while self._ended:
            finished, length = self._ended.pop(0)
            with contextlib.suppress(OSError):  # the END mark is there; a reader doesn't need the cut
                finished.close(length)
