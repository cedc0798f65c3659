"""What workers know of the catalogue: keys, models, backends, prices. Immutable, versioned, replaced as a whole.

Control writes one file in the state directory, atomically; workers watch it and swap by assignment. A file that can't be read
changes nothing: the last good snapshot stays (`feed.py`).
"""

from proxy.snapshot.feed import SnapshotFeed
from proxy.snapshot.model import (
    UNLIMITED,
    Allowance,
    Backend,
    Bounds,
    Budget,
    Issuer,
    LaterPrice,
    Model,
    Principal,
    Snapshot,
    SnapshotError,
    SnapshotFile,
    read_snapshot,
    write_snapshot,
)

__all__ = [
    "UNLIMITED",
    "Allowance",
    "Backend",
    "Bounds",
    "Budget",
    "Issuer",
    "LaterPrice",
    "Model",
    "Principal",
    "Snapshot",
    "SnapshotError",
    "SnapshotFeed",
    "SnapshotFile",
    "read_snapshot",
    "write_snapshot",
]
