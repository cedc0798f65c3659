"""Captured bodies, looked up by request. They are short-lived: whoever asks too late gets nothing, and that is normal."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy.journal import Content, Tail, decode_content
from proxy.journal.reader import read_frames
from proxy.journal.segment import FRAME_BYTES, HEADER_BYTES, SegmentName

log = logging.getLogger(__name__)

KEEP_BYTES = 256 * 1024 * 1024
KEEP_SECONDS = 600.0


class _Place(NamedTuple):
    name: SegmentName
    offset: int
    length: int


class Captured:
    """The content segments of a host's workers. `find` and `tidy` may come from different threads."""

    def __init__(self, directory: Path, keep_bytes: int = KEEP_BYTES, keep_seconds: float = KEEP_SECONDS) -> None:
        self._tail = Tail(directory)
        self._directory = directory
        self._keep_bytes = keep_bytes
        self._keep_seconds = keep_seconds
        self._lock = threading.Lock()
        self._places: dict[bytes, _Place] = {}
        self._positions: dict[SegmentName, int] = {}

    def find(self, identity: bytes) -> Content | None:
        """What was captured of a request; None if nothing was, or not any more."""
        with self._lock:
            if identity not in self._places:
                self._look()
            place = self._places.get(identity)
        return self._read(place) if place is not None else None

    def tidy(self, now_unix: float) -> None:
        """Delete segments that are finished and old, and the oldest of those that are too many."""
        self._tail.remove_abandoned()
        finished = [name for name in self._tail.segments() if self._tail.is_dead(name)]
        total = sum(self._size(name) for name in finished)
        for name in finished:
            size, age = self._size(name), now_unix - self._modified(name)
            if total > self._keep_bytes or age > self._keep_seconds:
                self._tail.path(name).unlink(missing_ok=True)
                total -= size
        with self._lock:
            self._forget(set(self._tail.segments()))

    def _look(self) -> None:
        """Index what is new."""
        for name in self._tail.segments():
            try:
                fd = os.open(self._tail.path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                self._positions[name] = self._index(fd, name, self._positions.get(name, HEADER_BYTES))
            finally:
                os.close(fd)

    def _index(self, fd: int, name: SegmentName, position: int) -> int:
        while True:
            payloads, consumed, ended = read_frames(fd, position)
            for payload in payloads:
                self._places[payload[:16]] = _Place(name, position + FRAME_BYTES, len(payload))
                position += FRAME_BYTES + len(payload)
            if ended or not consumed:
                return position

    def _read(self, place: _Place) -> Content | None:
        try:
            fd = os.open(self._tail.path(place.name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return decode_content(os.pread(fd, place.length, place.offset))[1]
        except msgspec.MsgspecError as error:
            log.warning("captured content not readable", extra={"segment": str(place.name), "error": str(error)})
            return None
        finally:
            os.close(fd)

    def _forget(self, present: set[SegmentName]) -> None:
        if self._positions.keys() - present:
            self._positions = {name: position for name, position in self._positions.items() if name in present}
            self._places = {identity: place for identity, place in self._places.items() if place.name in present}

    def _size(self, name: SegmentName) -> int:
        try:
            return self._tail.path(name).stat().st_size
        except FileNotFoundError:
            return 0

    def _modified(self, name: SegmentName) -> float:
        try:
            return self._tail.path(name).stat().st_mtime
        except FileNotFoundError:
            return time.time()
