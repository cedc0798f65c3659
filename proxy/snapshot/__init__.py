"""What workers know of the catalogue: keys, models, backends, prices. Immutable, versioned, replaced as a whole.

Control writes one file in the state directory, atomically; workers watch it and swap by assignment. A file that can't be read
changes nothing: the last good snapshot stays (`feed.py`). What is in it is `model.py`, how it lies in the file `file.py`, and its
keys and users, however many, `table.py`.
"""

from proxy.snapshot.feed import SnapshotFeed
from proxy.snapshot.file import decode_snapshot, encode_snapshot, read_snapshot, write_snapshot
from proxy.snapshot.model import (
    FIRST,
    LAST,
    NEVER_NS,
    OWNER,
    UNLIMITED,
    USUAL,
    Allowance,
    Backend,
    Bounds,
    Budget,
    Issuer,
    LaterPrice,
    Model,
    ModelCache,
    Principal,
    Purge,
    Snapshot,
    SnapshotFile,
    decode_principal,
    encode_principal,
)
from proxy.snapshot.table import KeyTable, Secret, SnapshotError

__all__ = [
    "FIRST",
    "LAST",
    "NEVER_NS",
    "OWNER",
    "UNLIMITED",
    "USUAL",
    "Allowance",
    "Backend",
    "Bounds",
    "Budget",
    "Issuer",
    "KeyTable",
    "LaterPrice",
    "Model",
    "ModelCache",
    "Principal",
    "Purge",
    "Secret",
    "Snapshot",
    "SnapshotError",
    "SnapshotFeed",
    "SnapshotFile",
    "decode_principal",
    "decode_snapshot",
    "encode_principal",
    "encode_snapshot",
    "read_snapshot",
    "write_snapshot",
]
