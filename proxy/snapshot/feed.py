"""A worker's view of the snapshot file: polled by its sweep, swapped by assignment."""

from __future__ import annotations

import logging
from pathlib import Path

from proxy.snapshot.file import MappedFile
from proxy.snapshot.model import Snapshot
from proxy.snapshot.table import SnapshotError

log = logging.getLogger(__name__)


class SnapshotFeed:
    """`current` is the last good snapshot, None until there was one. What only was dated anew is the same snapshot: all that was
    learned from it stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mapped: MappedFile | None = None
        self._refused: tuple[int, ...] = ()
        self.current: Snapshot | None = None

    def poll(self) -> bool:
        """Look whether the file was replaced; True if `current` did. One `stat` and eight bytes when it wasn't."""
        try:
            stat = self._path.stat()
        except OSError:
            return False
        current, mapped = self.current, self._mapped
        if current is not None and mapped is not None and (stat.st_dev, stat.st_ino) == mapped.identity:
            if (published_unix_ns := mapped.published_unix_ns) is not None:
                current.published_unix_ns = published_unix_ns
            return False
        found = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if found == self._refused:
            return False
        try:
            newer = MappedFile(self._path)
            self.current = Snapshot(newer.decode())
        except (OSError, SnapshotError) as error:
            self._refused = found
            log.error("snapshot not readable; the last good one stays", extra={"error": str(error)})
            return False
        self._mapped = newer
        if current is not None and mapped is not None:
            current.retire()
            mapped.close()
        return True
