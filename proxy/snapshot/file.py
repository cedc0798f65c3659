"""The snapshot's file.

    header       magic, version; CRC of the catalogue; date; how long what follows is
    catalogue    a SnapshotFile without its keys and users, in MessagePack: decoded when the file is loaded
    keys         a KeyTable: mapped, and read where something is looked up (table.py)
    users        an AllowanceTable, the same

The file is replaced as a whole, by `rename`, so that what is mapped stays as it was; only its date is written in place, where
nothing else has changed: who has the file mapped sees that without loading anything. A file that was cut off and a damaged
catalogue are found when the file is loaded, a damaged key when it is looked up.

Version 1 was one SnapshotFile in MessagePack, keys included.
"""

from __future__ import annotations

import os
from _thread import start_new_thread
from mmap import PROT_READ, mmap
from pathlib import Path
from struct import Struct
from zlib import crc32

import msgspec

from proxy.files import replace_file
from proxy.snapshot.model import SNAPSHOT_VERSION, AllowanceTable, SnapshotFile
from proxy.snapshot.table import KeyTable, SnapshotError, Table

_MAGIC = b"\xc1gh-keys"
"""Its first byte begins nothing in MessagePack."""
_VERSION = Struct("<8sI")
_DATE = Struct("<q")
_DATE_AT = 16
_HEADER = Struct("<8sIIqQQQQQ")
_file = msgspec.msgpack.Decoder(SnapshotFile)


class MappedFile:
    """A snapshot's file as it is just now. `identity` is no other file's for as long as this object lives. Raises OSError,
    SnapshotError."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.fstat(fd)
            if not stat.st_size:
                raise SnapshotError("not a snapshot: the file is empty")
            self.identity = (stat.st_dev, stat.st_ino)
            self._data = mmap(fd, stat.st_size, prot=PROT_READ)
        finally:
            os.close(fd)

    def decode(self) -> SnapshotFile:
        """Its keys stay where they are. Raises SnapshotError."""
        return decode_snapshot(self._data)

    @property
    def published_unix_ns(self) -> int | None:
        """The date of a file that could be decoded, as it is now; None of one of the version before, where it never changes."""
        is_dated = self._data[: len(_MAGIC)] == _MAGIC
        return int(_DATE.unpack_from(self._data, _DATE_AT)[0]) if is_dated else None

    def close(self) -> None:
        """Whoever is the last to have a replaced file gives its memory back, 25 ms for a million keys: a thread does. (One of
        `threading` would have to be waited for until it runs.)"""
        start_new_thread(self._data.close, ())


def decode_snapshot(data: bytes | mmap) -> SnapshotFile:
    """Raises SnapshotError."""
    if data[: len(_MAGIC)] != _MAGIC:
        return _decode_catalogue(data[:], 1)
    if len(data) < _VERSION.size:
        raise SnapshotError("the snapshot is cut off in its header")
    if (version := _VERSION.unpack_from(data)[1]) != SNAPSHOT_VERSION:
        raise SnapshotError(f"snapshot version {version}; this version reads {SNAPSHOT_VERSION}")
    if len(data) < _HEADER.size:
        raise SnapshotError("the snapshot is cut off in its header")
    _, _, check, published_unix_ns, catalogue_bytes, *sizes = _HEADER.unpack_from(data)
    keys, users = sizes[:2], sizes[2:]
    keys_at = _HEADER.size + catalogue_bytes
    users_at = keys_at + Table.bytes_of(*keys)
    if len(data) != users_at + Table.bytes_of(*users):
        raise SnapshotError("the snapshot has another length than its header says")
    catalogue = data[_HEADER.size : keys_at]
    if crc32(catalogue) != check:
        raise SnapshotError("the snapshot's catalogue is damaged")
    file = _decode_catalogue(catalogue, SNAPSHOT_VERSION)
    file.published_unix_ns = published_unix_ns
    file.keys, file.users = KeyTable(data, keys_at, *keys), AllowanceTable(data, users_at, *users)
    return file


def encode_snapshot(file: SnapshotFile) -> bytes:
    """As it is in a file, in this version."""
    catalogue = msgspec.structs.replace(file, version=SNAPSHOT_VERSION, published_unix_ns=0, keys={}, users={})
    keys, users = KeyTable.of(file.keys), AllowanceTable.of(file.users)
    return assemble(msgspec.msgpack.encode(catalogue), file.published_unix_ns, keys, users)


def assemble(catalogue: bytes, published_unix_ns: int, keys: KeyTable, users: AllowanceTable) -> bytes:
    sizes = (len(catalogue), *keys.sizes, *users.sizes)
    header = _HEADER.pack(_MAGIC, SNAPSHOT_VERSION, crc32(catalogue), published_unix_ns, *sizes)
    return b"".join((header, catalogue, keys.encoded(), users.encoded()))


def read_snapshot(path: Path) -> SnapshotFile:
    """Raises SnapshotError, OSError."""
    return MappedFile(path).decode()


def write_snapshot(path: Path, file: SnapshotFile, before: SnapshotFile | None = None) -> None:
    """Replace the file: readers see the old one or the new one. `before`: what is in it, as far as is known; where only the date
    has changed since, only the date is written. Raises OSError."""
    same = before is not None and before == msgspec.structs.replace(file, published_unix_ns=before.published_unix_ns)
    if not (same and _redate(path, file.published_unix_ns)):
        replace_file(path, encode_snapshot(file))


def _redate(path: Path, published_unix_ns: int) -> bool:
    """False if there is no file of this version."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if os.pread(fd, _VERSION.size, 0) != _VERSION.pack(_MAGIC, SNAPSHOT_VERSION):
            return False
        os.pwrite(fd, _DATE.pack(published_unix_ns), _DATE_AT)
        return True
    finally:
        os.close(fd)


def _decode_catalogue(data: bytes, version: int) -> SnapshotFile:
    try:
        file = _file.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotError(f"not a snapshot: {error}") from None
    if file.version != version:
        raise SnapshotError(f"snapshot version {file.version}; this version reads {SNAPSHOT_VERSION}")
    return file
