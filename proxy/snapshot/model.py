"""The snapshot's types and its encoding (MessagePack; keys decode one by one, when they are first used)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

SNAPSHOT_VERSION = 1
"""Readers take this version and the one before. Fields are only ever appended, with defaults."""

NEVER_NS = 2**63 - 1
"""A moment that doesn't come, ns since 1970."""


class SnapshotError(Exception):
    """The file isn't a snapshot that this version can read."""


class Budget(msgspec.Struct, array_like=True, frozen=True):
    """So much per day, week (from Monday), month or in total, of one `unit`: `money` (nano-units of the snapshot's currency),
    `tokens` (input and output) or `gpu_seconds` (ns). One that is `soft` refuses nothing: it is only told of."""

    unit: str
    amount: int
    per: str
    time_zone: str = "UTC"
    soft: bool = False


class Allowance(msgspec.Struct, array_like=True, frozen=True):
    """What a key, a team or everyone together may use. None: as much as is wanted. `models` are patterns as of a shell."""

    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    max_input_tokens: int | None = None
    models: tuple[str, ...] | None = None
    operations: tuple[str, ...] | None = None
    expires_unix_ns: int = 0
    """0: never."""
    budgets: tuple[Budget, ...] = ()
    blocked: bool = False


UNLIMITED = Allowance()


class Principal(msgspec.Struct, array_like=True, frozen=True):
    """Who a key belongs to. `team`, `user` and `project` are "" for a key of none."""

    key_id: str
    key_name: str
    team: str = ""
    allowance: Allowance = UNLIMITED
    user: str = ""
    project: str = ""


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


class LaterPrice(msgspec.Struct, array_like=True, frozen=True):
    """A price for requests received at `from_unix_ns` or later. Integer pico-units per token, as in Model."""

    from_unix_ns: int
    input_pico: int
    cached_input_pico: int
    output_pico: int


class Model(msgspec.Struct, array_like=True, frozen=True):
    """A model that callers may use. Prices are integer pico-units of `SnapshotFile.currency` per token.

    `name` is what engines call it; in `SnapshotFile.models` it may also stand under an alias.
    """

    name: str
    backends: tuple[str, ...] = ()
    input_pico: int = 0
    cached_input_pico: int = 0
    output_pico: int = 0
    card: bytes = b"null"
    """The engine's own entry in `GET /v1/models`, as the engine wrote it (JSON)."""
    bounds: Bounds = Bounds()
    context_tokens: int = 0
    """The most that prompt and answer may have together, as the engine says; 0: it doesn't."""
    assumed_output_tokens: int = 1024
    """What is set aside for an answer whose request doesn't say how long it may become."""
    later_prices: tuple[LaterPrice, ...] = ()
    """Those to come when the snapshot was published, the next one first."""
    defaults: tuple[tuple[str, bytes], ...] = ()
    """Parameters (name, JSON) for requests that don't say them."""


class Issuer(msgspec.Struct, array_like=True, frozen=True):
    """Whose tokens are taken. `keys`: its public ones, a JSON Web Key Set (RFC 7517). Claims are paths of names, None: not in its
    tokens. `roles`: value of the role claim → role on the control API."""

    issuer: str
    audience: tuple[str, ...]
    algorithms: tuple[str, ...]
    keys: bytes = b'{"keys":[]}'
    user_claim: tuple[str, ...] = ("sub",)
    team_claim: tuple[str, ...] | None = None
    project_claim: tuple[str, ...] | None = None
    models_claim: tuple[str, ...] | None = None
    role_claim: tuple[str, ...] | None = None
    roles: dict[str, str] = {}
    leeway_s: float = 30.0


class SnapshotFile(msgspec.Struct, array_like=True):
    """What is in the file. `keys`: sha256 of the key → encoded Principal."""

    version: int = SNAPSHOT_VERSION
    revision: int = 0
    published_unix_ns: int = 0
    currency: str = "USD"
    keys: dict[bytes, msgspec.Raw] = {}
    models: dict[str, Model] = {}
    backends: dict[str, Backend] = {}
    everyone: Allowance = UNLIMITED
    teams: dict[str, Allowance] = {}
    users: dict[str, Allowance] = {}
    projects: dict[str, Allowance] = {}
    issuers: tuple[Issuer, ...] = ()


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
        self.everyone = file.everyone
        self.teams = file.teams
        self._keys = file.keys
        self._principals: dict[bytes, Principal] = {}
        self._allowed: dict[str, dict[str, Model]] = {}
        self._matching: dict[tuple[tuple[str, ...], ...], dict[str, Model]] = {(): file.models}
        self._models_json = _list(file.models)

    def principal(self, key_hash: bytes) -> Principal | None:
        """Whose key has this sha256; None if nobody's."""
        known = self._principals.get(key_hash)
        if known is None and (raw := self._keys.get(key_hash)) is not None:
            known = self._principals[key_hash] = _principal.decode(raw)
        return known

    def team(self, principal: Principal) -> Allowance:
        """What the team of this key may use together."""
        return self.teams.get(principal.team, UNLIMITED)

    def expires_unix_ns(self, principal: Principal) -> int:
        """The first moment at which the key is none any more: its own, its team's or everyone's."""
        moments = (each.expires_unix_ns for each in (principal.allowance, self.team(principal), self.everyone))
        return min((moment for moment in moments if moment), default=NEVER_NS)

    def allowed_models(self, principal: Principal) -> dict[str, Model]:
        """The models that exist for this key: those that it, its team and everyone may use. `models` itself where that is all."""
        known = self._allowed.get(principal.key_id)
        if known is None:
            known = self._allowed[principal.key_id] = self._allow(principal)
        return known

    def _allow(self, principal: Principal) -> dict[str, Model]:
        allowances = (principal.allowance, self.team(principal), self.everyone)
        patterns = tuple(each.models for each in allowances if each.models is not None)
        known = self._matching.get(patterns)
        if known is None:
            known = {name: model for name, model in self.models.items() if all(_matches(name, each) for each in patterns)}
            self._matching[patterns] = known
        return known

    def models_json(self, principal: Principal) -> bytes:
        """`GET /v1/models` as this key sees it."""
        allowed = self.allowed_models(principal)
        return self._models_json if allowed is self.models else _list(allowed)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _list(models: dict[str, Model]) -> bytes:
    return b'{"object":"list","data":[' + b",".join(model.card for model in models.values()) + b"]}"


def encode_principal(principal: Principal) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(principal))


def decode_principal(raw: msgspec.Raw) -> Principal:
    return _principal.decode(raw)


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
