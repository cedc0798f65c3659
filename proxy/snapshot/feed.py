"""A worker's view of the snapshot file: polled by its sweep, swapped by assignment."""

from __future__ import annotations

import logging
from pathlib import Path

from proxy.snapshot.model import Snapshot, SnapshotError, read_snapshot

log = logging.getLogger(__name__)


class SnapshotFeed:
    """`current` is the last good snapshot, None until there was one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self.current: Snapshot | None = None

    def poll(self) -> bool:
        """Look whether the file was replaced; True if `current` changed. One `stat` when nothing did."""
        try:
            stat = self._path.stat()
        except OSError:
            return False
        identity = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if identity == self._seen:
            return False
        self._seen = identity
        try:
            self.current = Snapshot(read_snapshot(self._path))
        except (OSError, SnapshotError) as error:
            log.error("snapshot not readable; the last good one stays", extra={"error": str(error)})
            return False
        return True
