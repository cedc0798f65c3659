"""A small disk of a test's own, which can be filled to the last byte: a tmpfs.

Mounting one needs root (CAP_SYS_ADMIN). Where that isn't to be had the test is skipped, and says so.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PIECE = 64 * 1024


class Disk:
    """`path`: where it is mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        """Bytes."""
        room = os.statvfs(self.path)
        return room.f_bavail * room.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Until about so many bytes are left, rounded down to whole pages."""
        with self._ballast.open("ab", buffering=0) as ballast:
            while (more := min(PIECE, self.free - leave)) > 0:
                ballast.write(bytes(more))

    def make_room(self) -> None:
        """Take away what `fill` put there."""
        self._ballast.unlink()


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes at `path`, which is made."""
    path.mkdir()
    options = f"size={size},mode=0700"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk can't be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
