"""The snapshot's types, and what is looked up in one. Keys decode one by one, when they are first used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TypeVar

import msgspec

from proxy.nouns import MODEL_NAME, covering
from proxy.snapshot.table import KeyTable, SnapshotError, Table

SNAPSHOT_VERSION = 2
"""Readers take this version and the one before. Fields are only ever appended, with defaults."""

T = TypeVar("T")

NEVER_NS = 2**63 - 1
"""A moment that doesn't come, ns since 1970."""

FIRST, USUAL, LAST = 0, 1, 2
"""Priorities."""

OWNER = "glasshouse"
"""Of models of which no engine has told, as their cards say."""

MOST_COVERED = 1024
"""Names that callers made up by a pattern, and that a worker remembers; the oldest is forgotten."""

_is_name = re.compile(MODEL_NAME).match


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
    priority: int = USUAL
    """Where requests wait for an engine: 0 comes before 1, and that before 2."""
    cache: str = ""
    """Which answers may be given again; "": nothing is said here."""
    engine_parameters: tuple[str, ...] = ()
    """Parameters for the engine's own use that requests may set; what one level allows is allowed."""


UNLIMITED = Allowance()


class AllowanceTable(Table, Mapping[str, Allowance]):
    """Name → allowance, for names of which there may be as many as keys. What looks one up raises SnapshotError for damage."""

    @classmethod
    def of(cls, allowances: Mapping[str, Allowance]) -> AllowanceTable:
        if isinstance(allowances, AllowanceTable):
            return allowances
        return cls.build((_digest(name), 0, msgspec.msgpack.encode((name, each))) for name, each in allowances.items())

    def __getitem__(self, name: str) -> Allowance:
        if (found := self.look_up(_digest(name))) is None:
            raise KeyError(name)
        return _read(_entry, found[1])[1]

    def __iter__(self) -> Iterator[str]:
        return (_read(_entry, value)[0] for _, _, value in self.entries())

    def __len__(self) -> int:
        return self.sizes[0]


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
    weight: float = 1.0
    depth: int = 0
    """Requests that a host may have there at a time; 0: as many as come."""
    prefill_tokens: int = 8192
    """Prompt tokens that one of several keys may have it compute at a time."""
    drained: bool = False
    """It gets no more requests."""
    version: str = ""
    """Of its engine, as it says; "": it has never said."""
    essences: dict[str, str] = {}
    """Model → a digest of what the backend says of it, as control knew it last. Nobody else needs it."""


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


class ModelCache(msgspec.Struct, array_like=True, frozen=True):
    """What is said about the cache for one model; "" and 0: what is said for all. `semantic_model` "": only what is the same."""

    policy: str = ""
    scope: str = ""
    ttl_s: float = 0.0
    semantic_model: str = ""
    semantic_threshold: float = 0.0


class Purge(msgspec.Struct, array_like=True, frozen=True):
    """Answers that were complete before `before_unix_ns` are not to be given again, as far as all of the rest that is said fits
    them: the model, whose request it was."""

    before_unix_ns: int
    model: str = ""
    key_id: str = ""
    team: str = ""
    user: str = ""
    """Whose key it was, or whom the caller named."""


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
    """Those to come when the snapshot was published, and of a little while before; the next one first."""
    defaults: tuple[tuple[str, bytes], ...] = ()
    """Parameters (name, JSON) for requests that don't say them."""
    policy: str = ""
    """Who of several backends is to answer; "": as for all models."""
    fallbacks: tuple[str, ...] = ()
    """Models that are asked instead, one after the other, when no backend of this one can answer."""
    revision: str = ""
    """Another one: it may answer otherwise."""
    cache: ModelCache = ModelCache()
    prefix_isolation: str = ""
    """Who shares computed prompts in an engine: `key` or `team`; "": whoever asks."""

    def price_at(self, unix_ns: int) -> Model | LaterPrice:
        """What has the price of that moment."""
        valid: Model | LaterPrice = self
        for later in self.later_prices:
            if later.from_unix_ns > unix_ns:
                break
            valid = later
        return valid


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
    """What is in the file. `keys`: sha256 of a secret → encoded Principal; a KeyTable also says when a secret ends."""

    version: int = SNAPSHOT_VERSION
    revision: int = 0
    published_unix_ns: int = 0
    currency: str = "USD"
    keys: Mapping[bytes, msgspec.Raw] = {}
    models: dict[str, Model] = {}
    backends: dict[str, Backend] = {}
    everyone: Allowance = UNLIMITED
    teams: dict[str, Allowance] = {}
    users: Mapping[str, Allowance] = {}
    projects: dict[str, Allowance] = {}
    issuers: tuple[Issuer, ...] = ()
    patterns: dict[str, Model] = {}
    """Pattern (`gpt-*`) → what is known of all models of such names, but for those in `models`. `Model.name` is the pattern."""
    cache_secret: bytes = b""
    """With which the cache makes its keys and vouches for its entries; without one nothing is cached."""
    purges: tuple[Purge, ...] = ()


class _Caller:
    """What a snapshot says of one caller, found out when it is first asked."""

    __slots__ = ("blocked", "expires_unix_ns", "levels", "models", "patterns", "principal", "priority")

    def __init__(self, principal: Principal, levels: list[tuple[str, str, Allowance]]) -> None:
        self.principal = principal
        self.levels = levels
        self.blocked = any(allowance.blocked for _, _, allowance in levels)
        moments = [allowance.expires_unix_ns for _, _, allowance in levels]
        self.expires_unix_ns = min((moment for moment in moments if moment), default=NEVER_NS)
        self.patterns = tuple(allowance.models for _, _, allowance in levels if allowance.models is not None)
        """A model's name must match one of each."""
        self.priority = _priority({allowance.priority for _, _, allowance in levels})
        self.models: dict[str, Model] | None = None


class Snapshot:
    """A decoded snapshot, ready for look-ups. `published_unix_ns` alone may change while it is in use."""

    def __init__(self, file: SnapshotFile) -> None:
        self.revision = file.revision
        self.published_unix_ns = file.published_unix_ns
        self.currency = file.currency
        self.models = file.models
        self.backends = file.backends
        self.everyone = file.everyone
        self.teams = file.teams
        self.users = file.users
        self.projects = file.projects
        self.issuers = file.issuers
        self.patterns = file.patterns
        self.cache_secret = file.cache_secret
        self.purges = file.purges
        self._covered: dict[str, Model] = {}
        self._keys = KeyTable.of(file.keys)
        self._found: dict[bytes, tuple[Principal, int]] = {}
        self._principals: dict[Principal, Principal] = {}
        self._callers: dict[str, _Caller] = {}
        self._matching: dict[tuple[tuple[str, ...], ...], dict[str, Model]] = {(): file.models}
        self._models_json = _list(file.models)

    # -- keys --

    def find(self, digest: bytes) -> tuple[Principal, int] | None:
        """Whose secret has this sha256, and when this secret ends (ns since 1970; NEVER_NS); None if nobody's. The secrets of a
        key lead to one and the same Principal. Raises SnapshotError if the file is damaged there."""
        found = self._found.get(digest)
        if found is None and (secret := self._keys.find(digest)) is not None:
            principal = self.interned(decode_principal(secret.principal))
            found = self._found[digest] = principal, secret.ends_unix_ns or NEVER_NS
        return found

    def interned(self, principal: Principal) -> Principal:
        """The one object that stands for all that are equal: what is known of a caller is known of that."""
        return self._principals.setdefault(principal, principal)

    def principal(self, digest: bytes) -> Principal | None:
        """Whose secret has this sha256; None if nobody's. Raises SnapshotError."""
        found = self.find(digest)
        return None if found is None else found[0]

    def retire(self) -> None:
        """There is a newer one: let go of the file. Requests that still work by this one look up no caller any more, and nobody
        else asks it."""
        self._keys, self.users = KeyTable(), {}
        self._found, self._principals, self._callers = {}, {}, {}

    # -- levels --

    def levels(self, principal: Principal) -> list[tuple[str, str, Allowance]]:
        """(level, name, allowance) of all that counts for a caller, from the narrowest on. Raises SnapshotError."""
        return self._caller(principal).levels

    def expires_unix_ns(self, principal: Principal) -> int:
        """The first moment at which the key is none any more: that of one of its levels. Raises SnapshotError."""
        return self._caller(principal).expires_unix_ns

    def blocked(self, principal: Principal) -> bool:
        """One of its levels is. Raises SnapshotError."""
        return self._caller(principal).blocked

    def priority(self, principal: Principal) -> int:
        """Where its requests wait: 0 comes before 1, and that before 2. A level that is last puts it last, else one that is first
        puts it first. Raises SnapshotError."""
        return self._caller(principal).priority

    def _caller(self, principal: Principal) -> _Caller:
        known = self._callers.get(principal.key_id)
        if known is None or known.principal is not principal:  # two tokens of one person may differ
            known = self._callers[principal.key_id] = _Caller(principal, self._levels(principal))
        return known

    def _levels(self, principal: Principal) -> list[tuple[str, str, Allowance]]:
        levels = [("key", principal.key_name, principal.allowance)]
        if principal.user:
            levels.append(("user", principal.user, self.users.get(principal.user, UNLIMITED)))
        if principal.project:
            levels.append(("project", principal.project, self.projects.get(principal.project, UNLIMITED)))
        if principal.team:
            levels.append(("team", principal.team, self.teams.get(principal.team, UNLIMITED)))
        levels.append(("everyone", "", self.everyone))
        return levels

    # -- models --

    def allowed_models(self, principal: Principal) -> dict[str, Model]:
        """The models that exist for this key: those that all its levels may use. `models` itself where that is all."""
        caller = self._callers.get(principal.key_id)
        if caller is None or caller.principal is not principal or caller.models is None:
            caller = self._caller(principal)
            caller.models = self._allow(caller.patterns)
        return caller.models

    def model(self, principal: Principal, name: str) -> Model | None:
        """What this key gets under a name: that model, the one whose alias it is, or what the longest pattern that matches says.
        None: for this key there is none. Raises SnapshotError."""
        found = self.allowed_models(principal).get(name)
        if found is None and self.patterns:
            found = self._cover(name)
            if found is not None and not all(_matches(name, each) for each in self._caller(principal).patterns):
                return None
        return found

    def _cover(self, name: str) -> Model | None:
        """A model that only a pattern covers. So many are remembered, each the same object every time."""
        found = self._covered.get(name)
        if found is None:
            if not _is_name(name):
                return None
            pattern = covering(self.patterns, name)
            if pattern is None:
                return None
            found = msgspec.structs.replace(self.patterns[pattern], name=name, card=_card(name))
            if len(self._covered) >= MOST_COVERED:
                del self._covered[next(iter(self._covered))]
            self._covered[name] = found
        return found

    def _allow(self, patterns: tuple[tuple[str, ...], ...]) -> dict[str, Model]:
        known = self._matching.get(patterns)
        if known is None:
            known = {name: model for name, model in self.models.items() if all(_matches(name, each) for each in patterns)}
            self._matching[patterns] = known
        return known

    def models_json(self, principal: Principal) -> bytes:
        """`GET /v1/models` as this key sees it."""
        allowed = self.allowed_models(principal)
        return self._models_json if allowed is self.models else _list(allowed)


def _priority(said: Set[int]) -> int:
    return LAST if LAST in said else min(said)


def _card(name: str) -> bytes:
    """As OpenAI writes them. What the engine would say of it isn't known, nor since when it is there."""
    return msgspec.json.encode({"id": name, "object": "model", "created": 0, "owned_by": OWNER})


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _list(models: dict[str, Model]) -> bytes:
    return b'{"object":"list","data":[' + b",".join(model.card for model in models.values()) + b"]}"


_principal = msgspec.msgpack.Decoder(Principal)
_entry = msgspec.msgpack.Decoder(tuple[str, Allowance])


def encode_principal(principal: Principal) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(principal))


def decode_principal(raw: msgspec.Raw) -> Principal:
    """Raises SnapshotError."""
    return _read(_principal, raw)


def _digest(name: str) -> bytes:
    return sha256(name.encode()).digest()


def _read(decoder: msgspec.msgpack.Decoder[T], data: bytes | msgspec.Raw) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotError(f"not what is looked up: {error}") from None
