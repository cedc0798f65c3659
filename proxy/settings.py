"""Every knob, frozen, checked before a socket opens.

`glasshouse.yaml` is read by the CLI, checked here (`Settings.of`), and handed to the other processes as a JSON file in the
state directory, so that all of them run on exactly what was checked. This module imports no YAML: workers load it.

A bad value raises `SettingsError` whose text names the field, the value and what is allowed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from datetime import datetime
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, urlsplit

import msgspec
from msgspec import Meta, Struct

from proxy.files import replace_file
from proxy.nouns import (
    NAME,
    SYSTEM_KEY,
    AllowanceSettings,
    BackendSettings,
    BoundsSettings,
    CachePolicyName,
    CacheScopeName,
    KeySettings,
    ModelSettings,
    Name,
    PolicyName,
    ProjectSettings,
    TeamSettings,
    Ttl,
    UserSettings,
)
from proxy.pricelist import CURRENCY, pricelist

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Bytes = Annotated[int, Meta(ge=1)]


class SettingsError(Exception):
    """The settings can't be used; the text says which field, what it holds and what it may hold."""


class RedisSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What several workers share: limits and budgets. All keys begin with `{prefix}:`, and are of one slot in a cluster.
    `timeout`: seconds that a request waits for it at most."""

    url: str
    prefix: Name = "glasshouse"
    timeout: Annotated[float, Meta(gt=0, le=0.1)] = 0.1

    def __post_init__(self) -> None:
        if not _is_redis_url(self.url):
            raise ValueError(
                "url: not usable as Redis's address; allowed: redis[s]://[USER:PASSWORD@]HOST[:PORT][/DB] or unix://PATH"
            )

    @property
    def shown(self) -> str:
        """The address, for people: without user, password and options."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class TimeoutSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds. There is never a total timeout on a stream."""

    connect: Seconds = 5.0
    first_byte: Seconds = 600.0
    between_chunks: Seconds = 60.0
    client_write: Seconds = 60.0
    client_idle: Seconds = 120.0
    client_request: Seconds = 60.0
    drain: Seconds = 30.0
    upstream_idle: Annotated[float, Meta(gt=0, lt=5)] = 4.0


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one worker. `connections` is also bounded by the file descriptors that it may have, two for each.
    `decompressed_body_bytes`: how large a compressed request body may become; without it none is taken."""

    header_bytes: Bytes = 64 * 1024
    body_bytes: Bytes = 64 * 1024 * 1024
    pipelined_bytes: Bytes = 256 * 1024
    event_bytes: Bytes = 4 * 1024 * 1024
    held_body_bytes: Bytes = 1024 * 1024
    decompressed_body_bytes: Bytes | None = None
    connections: Annotated[int, Meta(ge=1)] = 10_000
    connections_per_client: Annotated[int, Meta(ge=1)] = 2_000


class TlsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The listener speaks TLS with this certificate (PEM, the chain included) and its key. Changed files are followed."""

    certificate: Annotated[str, Meta(min_length=1)]
    key: Annotated[str, Meta(min_length=1)]


class CorsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which web pages may read answers. Like vLLM: all of them, since a request needs a key, which no browser adds by itself."""

    origins: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^\s/,?#@\x00-\x1f\x7f]+", origin, re.ASCII):
                raise ValueError(f"origins: {origin!r} is not an origin; allowed: * or SCHEME://HOST[:PORT]")


class JournalSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    segment_bytes: Annotated[int, Meta(ge=64 * 1024, le=4 * 1024**3)] = 64 * 1024 * 1024
    on_full: Literal["serve", "refuse"] = "serve"


class ControlSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: str = "127.0.0.1:8401"
    discover_every: Seconds = 5.0


class MetricsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: str = "127.0.0.1:9464"


class PhoenixSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where traces go. `url: null` sends none. `start: true` lets `glasshouse up` run a Phoenix of its own at that address."""

    url: str | None = "http://127.0.0.1:6006"
    project: str = "glasshouse"
    start: bool = False
    api_key_env: str | None = None


class ClaimsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where in a token is what: names of claims, with dots between the steps into objects (`realm_access.roles`). Of a claim that
    holds a list, the first value that is known here counts.

    user: who it is. team, project: of those declared; a value that isn't declared is refused. models: a list of names or
    patterns, or a text with spaces between them; a token without this claim may use none. role: what may be done on the control
    API, see `IssuerSettings.roles`.
    """

    user: Annotated[str, Meta(min_length=1)] = "sub"
    team: Annotated[str, Meta(min_length=1)] | None = None
    project: Annotated[str, Meta(min_length=1)] | None = None
    models: Annotated[str, Meta(min_length=1)] | None = None
    role: Annotated[str, Meta(min_length=1)] | None = None


class IssuerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose tokens (JWT) are taken beside keys, as `Authorization: Bearer TOKEN`.

    issuer: the tokens' `iss`, literally. audience: one of these must be in `aud`. algorithms: others are refused.
    jwks_url: where its public keys are; without it and `jwks_file` the issuer is asked (OpenID Connect Discovery).
    roles: value of the claim `claims.role` → role on the control API; without a role of it a token opens nothing there.
    leeway: seconds by which clocks may differ.
    """

    issuer: Annotated[str, Meta(min_length=1)]
    audience: Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)]
    algorithms: Annotated[
        tuple[Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"], ...],
        Meta(min_length=1),
    ] = ("RS256", "ES256")
    jwks_url: str | None = None
    jwks_file: str | None = None
    ca_file: str | None = None
    claims: ClaimsSettings = ClaimsSettings()
    roles: dict[str, Literal["admin", "manager", "viewer"]] = {}
    leeway: Annotated[float, Meta(ge=0, le=300)] = 30.0

    def __post_init__(self) -> None:
        if self.jwks_url is not None and self.jwks_file is not None:
            raise ValueError("jwks_url: is said together with jwks_file; allowed: one of them")
        if self.jwks_file is None:
            for name, value in (("issuer", self.issuer), ("jwks_url", self.jwks_url)):
                if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
                    raise ValueError(f"{name}: {value!r} is nowhere to ask for keys; allowed: http[s]://HOST[:PORT][/PATH]")


class RetentionSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the ledger keeps single requests: so many days, or for ever. Of older ones the sums of each day stay, by key,
    team, user, project, model and backend. `audit_days`: how long it is kept who changed what."""

    requests_days: Annotated[int, Meta(ge=32)] | None = None
    audit_days: Annotated[int, Meta(ge=1)] | None = None


class MediaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images, audio and video that a request only names by a URL, which the engine would fetch from inside your network. `data:`
    URLs are taken; `hosts`: from where else it may fetch (`images.example.com`, `*.example.com`, by https)."""

    hosts: tuple[Annotated[str, Meta(pattern=r"^(\*\.)?[a-z0-9][a-z0-9.-]*$")], ...] = ()


class HealthSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a backend is left alone. Seconds, but for `failures`: so many in a row, and it has to leave.

    silence: one that owes answers and sends nothing for so long (and a second more for each 500 prompt tokens that it has to
    compute) is asked for a token, and has to leave if it doesn't give one within `probe`.
    ejection: for how long at first; each time that it fails again soon, twice as long, up to `longest_ejection`.
    slow_start: how long it takes, back again, until it has all of its load.
    """

    failures: Annotated[int, Meta(ge=1)] = 3
    silence: Seconds = 30.0
    probe: Seconds = 10.0
    ejection: Seconds = 5.0
    longest_ejection: Seconds = 300.0
    slow_start: Annotated[float, Meta(ge=0)] = 30.0


class WaitingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests that wait for an engine, of one worker: how many at most (of one key seven eighths of them), and for how many
    seconds. `keep_alive`: a stream that waits gets a comment every so many seconds, so that what is between the client and here
    doesn't take it for dead."""

    requests: Annotated[int, Meta(ge=0)] = 1000
    timeout: Seconds = 120.0
    keep_alive: Seconds | None = None


class RoutingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who of several backends is to answer; a model may have a policy of its own."""

    policy: PolicyName = "auto"


class CacheSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers that are given again: in each worker's memory, and in Redis where there is one.

    policy: which may be. `deterministic`: those to requests with temperature 0 or a seed, and n of 1; `all`: any.
    scope: who may get an answer that somebody else had: nobody (`key`), the same team, everyone. A key of no team is alone.
    ttl: seconds.
    memory_bytes: of one worker; 0: nothing is kept there. entry_bytes: longer answers aren't kept.
    pace: events per second of a stream that is given again; all at once unless said.
    """

    policy: CachePolicyName = "deterministic"
    scope: CacheScopeName = "key"
    ttl: Ttl = 3600.0
    memory_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024
    entry_bytes: Bytes = 1024 * 1024
    pace: Annotated[float, Meta(gt=0, le=100_000)] | None = None


class CaptureSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prompts and answers in traces: off unless switched on."""

    content: bool = False
    max_bytes: Bytes = 256 * 1024


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: str = "127.0.0.1:8400"
    workers: Annotated[int, Meta(ge=1)] = 1
    state_dir: str = ".glasshouse"
    database: str = ""
    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$")] = "USD"
    backends: list[BackendSettings] = []
    models: dict[str, ModelSettings] = {}
    bounds: BoundsSettings = BoundsSettings()
    everyone: AllowanceSettings = AllowanceSettings()
    teams: dict[str, TeamSettings] = {}
    users: dict[str, UserSettings] = {}
    projects: dict[str, ProjectSettings] = {}
    keys: dict[str, KeySettings] = {}
    """By the name of the key in use (`glasshouse keys create NAME`)."""
    issuers: list[IssuerSettings] = []
    redis: RedisSettings | None = None
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
    tls: TlsSettings | None = None
    cors: CorsSettings = CorsSettings()
    trusted_proxies: list[str] = []
    """Addresses and networks whose `X-Forwarded-For` is believed."""
    journal: JournalSettings = JournalSettings()
    control: ControlSettings = ControlSettings()
    metrics: MetricsSettings = MetricsSettings()
    phoenix: PhoenixSettings = PhoenixSettings()
    capture: CaptureSettings = CaptureSettings()
    media: MediaSettings = MediaSettings()
    retention: RetentionSettings = RetentionSettings()
    routing: RoutingSettings = RoutingSettings()
    health: HealthSettings = HealthSettings()
    waiting: WaitingSettings = WaitingSettings()
    cache: CacheSettings | None = None

    def __post_init__(self) -> None:
        for field, value in (
            ("listen", self.listen),
            ("control.listen", self.control.listen),
            ("metrics.listen", self.metrics.listen),
        ):
            try:
                address(value)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        for value in self.trusted_proxies:
            try:
                ipaddress.ip_network(value)
            except ValueError as error:
                raise ValueError(
                    f"trusted_proxies: {value!r} is not a network ({error}); allowed: addresses and networks such as 10.0.0.0/8"
                ) from None
        for name, model in self.models.items():
            for price in filter(None, (model.price, *model.prices)):
                if price.from_ is not None and self.currency != CURRENCY:
                    raise ValueError(
                        f"models.{name}.price.from: {price.from_!r} has its price in {CURRENCY}, and currency is "
                        f"{self.currency!r}; allowed: input, cached_input and output in {self.currency}"
                    )
        if SYSTEM_KEY in self.keys:
            raise ValueError(
                f"keys: {SYSTEM_KEY!r} is what the proxy's own requests are booked to; allowed: any other name for a key"
            )
        self._check_members()
        if self.workers > 1 and self.redis is None:
            raise ValueError(
                f"workers: {self.workers} is not allowed without Redis, through which workers share limits and budgets; "
                "allowed: 1, or set redis.url"
            )
        names = [self.backend_name(i) for i in range(len(self.backends))]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"backends: the name {sorted(twice)[0]!r} is used twice; allowed: names that differ")

    def _check_members(self) -> None:
        sections: dict[str, Collection[str]] = {"teams": self.teams, "users": self.users, "projects": self.projects}
        for section, declared in sections.items():
            for name in declared:
                if not re.fullmatch(NAME, name):
                    raise ValueError(f"{section}: {name!r} is not a name for one; allowed: {NAME}")
        for section in ("users", "projects", "keys"):
            for name, member in getattr(self, section).items():
                for of in ("team", "user", "project"):
                    wanted = getattr(member, of, None)
                    if wanted is not None and wanted not in sections[f"{of}s"]:
                        known = ", ".join(sections[f"{of}s"]) or "none is declared"
                        raise ValueError(
                            f"{section}.{name}.{of}: there is no {of} {wanted!r}; allowed: those of `{of}s` ({known})"
                        )
        aliases = [alias for model in self.models.values() for alias in model.aliases]
        if twice := sorted({alias for alias in aliases if aliases.count(alias) > 1}):
            raise ValueError(f"models: the alias {twice[0]!r} stands for two models; allowed: for one")
        for name, model in self.models.items():
            if itself := {name, *model.aliases} & set(model.fallbacks):
                raise ValueError(f"models.{name}.fallbacks: {sorted(itself)[0]!r} is the model itself; allowed: others")
            semantic = model.cache.semantic
            if semantic is not None and semantic.model in (name, *model.aliases):
                raise ValueError(
                    f"models.{name}.cache.semantic.model: {semantic.model!r} is the model itself; "
                    "allowed: one that makes embeddings"
                )

    def backend_name(self, index: int) -> str:
        return self.backends[index].name or f"backend-{index}"

    @property
    def allowances(self) -> list[AllowanceSettings]:
        """Everything that is declared."""
        return [self.everyone, *self.teams.values(), *self.users.values(), *self.projects.values(), *self.keys.values()]

    # -- places in the state directory (ARCHITECTURE §7) --

    @property
    def state_path(self) -> Path:
        return Path(self.state_dir)

    @property
    def journal_path(self) -> Path:
        return self.state_path / "journal"

    @property
    def content_path(self) -> Path:
        return self.state_path / "content"

    @property
    def snapshot_path(self) -> Path:
        return self.state_path / "snapshot"

    @property
    def catalogue_path(self) -> Path:
        """What control has read of the database last, all but the keys."""
        return self.state_path / "catalogue"

    @property
    def periods_path(self) -> Path:
        """For which periods somebody has a budget."""
        return self.state_path / "periods"

    @property
    def spend_path(self) -> Path:
        """What was spent so far, as far as the collector has stored it."""
        return self.state_path / "spend"

    @property
    def engines_path(self) -> Path:
        """What engines say of their own load, as the collector heard it last."""
        return self.state_path / "engines"

    @property
    def control_socket_path(self) -> Path:
        """Where control answers who may open it: whoever can may do everything, as he could with the database beside it."""
        return self.state_path / "control.sock"

    @property
    def last_reload_path(self) -> Path:
        return self.state_path / "last-reload"

    @property
    def log_path(self) -> Path:
        return self.state_path / "log"

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.database_path}"

    @property
    def database_path(self) -> Path:
        """Of the one that is taken if none is named."""
        return self.state_path.absolute() / "glasshouse.db"

    # -- reading and writing --

    @classmethod
    def of(cls, mapping: object) -> Settings:
        """Check what a YAML or JSON file held. Raises SettingsError."""
        mapping = {} if mapping is None else _worded(mapping)
        try:
            return msgspec.convert(_priced(mapping), cls)
        except msgspec.ValidationError as error:
            raise SettingsError(explain(str(error), mapping, cls, "the file")) from None

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the effective settings that another process of ours wrote."""
        return cls.of(msgspec.json.decode(path.read_bytes()))

    def write(self, path: Path) -> None:
        replace_file(path, msgspec.json.format(msgspec.json.encode(self), indent=2))


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT` → (host, port); `[::1]:80` for IPv6. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address; allowed: HOST:PORT with a port of 0 to 65535")
    return host.strip("[]"), int(port)


def _is_redis_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if parts.fragment or not all(option.startswith("ssl_") for option, _ in parse_qsl(parts.query, keep_blank_values=True)):
        return False
    if parts.scheme == "unix":
        return bool(parts.path)
    return parts.scheme in ("redis", "rediss") and bool(parts.hostname) and re.fullmatch(r"/?\d{0,6}", parts.path) is not None


def _worded(mapping: Any) -> Any:
    """The same, with the word where YAML took `off` for false: for the cache as a whole, for whoever has an allowance, for a
    model."""
    if not isinstance(mapping, dict):
        return mapping
    whole = {name: _off(value, "cache") if name == "everyone" else value for name, value in mapping.items()}
    for name in ("teams", "users", "projects", "keys", "models"):
        if isinstance(section := whole.get(name), dict):
            policy = _off_policy if name == "models" else partial(_off, field="cache")
            whole[name] = {each: policy(value) for each, value in section.items()}
    return _off_policy(whole | {"cache": None} if whole.get("cache") is False else whole)


def _off_policy(section: Any) -> Any:
    match section:
        case {"cache": dict() as cache}:
            return {**section, "cache": _off(cache, "policy")}
        case _:
            return section


def _off(section: Any, field: str) -> Any:
    return {**section, field: "off"} if isinstance(section, dict) and section.get(field) is False else section


def _priced(mapping: Any) -> Any:
    """The same, with prices filled in `from` the price list. What a file of ours holds is complete: the list isn't opened.
    Raises SettingsError: no such row."""
    match mapping:
        case {"models": dict() as models}:
            return {**mapping, "models": {name: priced_model(f"models.{name}.", model) for name, model in models.items()}}
        case _:
            return mapping


def priced_model(place: str, model: Any) -> Any:
    """The same of one model, as it is written at `place`."""
    match model:
        case {"price": dict() as price}:
            model = {**model, "price": filled_price(f"{place}price.", price)}
    match model:
        case {"prices": list() as prices}:
            model = {**model, "prices": [filled_price(f"{place}prices[{at}].", each) for at, each in enumerate(prices)]}
    return model


def filled_price(place: str, price: Any) -> Any:
    """The same of one price."""
    match price:
        case {"from": str() as row, **said} if not {"input", "cached_input", "output"} <= said.keys():
            prices = pricelist()
            if row not in prices.rows:
                alike = "".join(f", such as {each}" for each in prices.alike(row)[:1])
                known = f"{len(prices.rows)} models of {prices.source}{alike}"
                raise SettingsError(f"{place}from: {row!r} is not in the price list; allowed: the {known}")
            _, price, cached, output, _ = prices.rows[row]
            return {"from": row, "input": price, "cached_input": cached, "output": output, **said}
        case _:
            return price


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?$", re.DOTALL)
_SECRET = ("redis", "database")
"""Sections whose values may hold a password."""
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


def explain(text: str, mapping: object, kind: Any, whole: str) -> str:
    """Turn msgspec's message into: field, value, what is allowed. `mapping` was to be a `kind`; people call it `whole`."""
    match = _AT.match(text)
    what, path = (match["what"], match["path"] or "$") if match else (text, "$")
    value: Any = mapping
    section: Any = kind
    for name, index in _STEP.findall(path):
        if index == "...":  # msgspec names no key of a mapping
            section = _element(section)
            name = _first_wrong(value, section)
            path = path.replace("[...]", f".{name}", 1)
            value = value[name]
            continue
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            value = None
        section = _hint(section, name) if name else _element(section)
    field = path.removeprefix("$").removeprefix(".") or whole
    if unknown := _UNKNOWN.search(what):
        allowed = ", ".join(sorted(section.__struct_encode_fields__)) if hasattr(section, "__struct_fields__") else "none"
        return f"{field}: there is no setting {unknown[1]!r} here; allowed: {allowed}"
    if field == whole and ":" in what:
        return what  # a check over several fields, which names its own
    if get_origin(section) is Literal:
        what = f"{what}; allowed: {', '.join(map(str, get_args(section)))}"
    elif section is datetime:
        what = f"{what}; allowed: a time with its zone, such as 2026-12-31T18:00:00+01:00"
    if isinstance(value, dict | list) or value is None or field.startswith(_SECRET):
        return f"{field}: {what}"
    return f"{field}: {value!r} is not allowed: {what}"


def _first_wrong(mapping: dict[str, Any], section: Any) -> str:
    """The key of the value that msgspec found fault with: it goes through a mapping in its order."""
    for name, value in mapping.items():
        try:
            msgspec.convert(value, section)
        except msgspec.ValidationError:
            return name
    raise AssertionError("nothing is wrong with it")


def _hint(section: Any, name: str) -> Any:
    try:
        hint = get_type_hints(section).get(name)
    except TypeError:
        return None
    return get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint


def _element(section: Any) -> Any:
    arguments = [each for each in get_args(section) if each is not ...]
    return arguments[-1] if arguments else None
