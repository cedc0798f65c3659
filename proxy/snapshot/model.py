"""The snapshot's types and its encoding (MessagePack; keys decode one by one, when they are first used)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

SNAPSHOT_VERSION = 1
"""Readers take this version and the one before. Fields are only ever appended, with defaults."""


class SnapshotError(Exception):
    """The file isn't a snapshot that this version can read."""


class Principal(msgspec.Struct, array_like=True, frozen=True):
    """Who a key belongs to."""

    key_id: str
    key_name: str


class Backend(msgspec.Struct, array_like=True, frozen=True):
    """One inference server. `base_path` is what precedes `/v1`, without a trailing slash."""

    name: str
    host: str
    port: int
    kind: str = "vllm"
    base_path: str = ""
    api_key_env: str = ""
    tls: bool = False
    ca_file: str = ""
    """Whom its certificate must be from, instead of the system's authorities (PEM)."""


class Bounds(msgspec.Struct, array_like=True, frozen=True):
    """What one request may ask for. `max_tokens` None: as many as the engine allows."""

    n: int = 128
    max_tokens: int | None = None
    logprobs: int = 100
    stop: int = 64
    tools: int = 256
    schema_bytes: int = 256 * 1024


class Model(msgspec.Struct, array_like=True, frozen=True):
    """A model name that callers may use. Prices are integer pico-units of `SnapshotFile.currency` per token."""

    name: str
    backends: tuple[str, ...] = ()
    input_pico: int = 0
    cached_input_pico: int = 0
    output_pico: int = 0
    card: bytes = b"null"
    """The engine's own entry in `GET /v1/models`, as the engine wrote it (JSON)."""
    bounds: Bounds = Bounds()


class SnapshotFile(msgspec.Struct, array_like=True):
    """What is in the file. `keys`: sha256 of the key → encoded Principal."""

    version: int = SNAPSHOT_VERSION
    revision: int = 0
    published_unix_ns: int = 0
    currency: str = "USD"
    keys: dict[bytes, msgspec.Raw] = {}
    models: dict[str, Model] = {}
    backends: dict[str, Backend] = {}


_principal = msgspec.msgpack.Decoder(Principal)
_file = msgspec.msgpack.Decoder(SnapshotFile)


class Snapshot:
    """A decoded snapshot, ready for look-ups."""

    def __init__(self, file: SnapshotFile) -> None:
        self.revision = file.revision
        self.published_unix_ns = file.published_unix_ns
        self.currency = file.currency
        self.models = file.models
        self.backends = file.backends
        self._keys = file.keys
        self._principals: dict[bytes, Principal] = {}
        cards = [model.card for model in file.models.values()]
        self.models_json = b'{"object":"list","data":[' + b",".join(cards) + b"]}"

    def principal(self, key_hash: bytes) -> Principal | None:
        """Whose key has this sha256; None if nobody's."""
        known = self._principals.get(key_hash)
        if known is None and (raw := self._keys.get(key_hash)) is not None:
            known = self._principals[key_hash] = _principal.decode(raw)
        return known


def encode_principal(principal: Principal) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(principal))


def decode_snapshot(data: bytes) -> SnapshotFile:
    """Raises SnapshotError."""
    try:
        file = _file.decode(data)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"not a snapshot: {error}") from None
    if not SNAPSHOT_VERSION - 1 <= file.version <= SNAPSHOT_VERSION:
        raise SnapshotError(f"snapshot version {file.version}; this version reads {SNAPSHOT_VERSION}")
    return file


def read_snapshot(path: Path) -> SnapshotFile:
    """Raises SnapshotError, FileNotFoundError."""
    return decode_snapshot(path.read_bytes())


def write_snapshot(path: Path, file: SnapshotFile) -> None:
    """Replace the file: readers see the old one or the new one."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb", closefd=False) as stream:
            stream.write(msgspec.msgpack.encode(file))
        os.fsync(fd)
    finally:
        os.close(fd)
    scratch.replace(path)
