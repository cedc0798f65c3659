"""A state directory belongs to one collector at a time, and the collector has an identity that outlives it."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from pathlib import Path

from proxy.files import replace_file

PATIENCE_SECONDS = 5.0


class InUse(Exception):
    """Another collector works in the directory."""


def claim(directory: Path, patience: float = PATIENCE_SECONDS) -> int:
    """Hold `collector.lock` for as long as this process lives → its descriptor. Waits for a predecessor that is just ending.
    Raises InUse, OSError."""
    path = directory / "collector.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    while not _lock(fd):
        if time.monotonic() >= deadline:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise InUse(f"another collector (process {holder}) works in {directory}; one is enough, and two would disagree")
        time.sleep(0.05)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def identity(directory: Path) -> str:
    """Who keeps this directory's position in a database that several collectors may share. Made at the first start."""
    path = directory / "collector-id"
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except FileNotFoundError:
        pass
    except ValueError:
        path.replace(path.with_name("collector-id.damaged"))
    made = str(uuid.uuid4())
    replace_file(path, f"{made}\n".encode())
    return made
