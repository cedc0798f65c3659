"""Every knob, frozen, checked before a socket opens.

`glasshouse.yaml` is read by the CLI, checked here (`Settings.of`), and handed to the other processes as a JSON file in the
state directory, so that all of them run on exactly what was checked. This module imports no YAML: workers load it.

A bad value raises `SettingsError` whose text names the field, the value and what is allowed.
"""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta, Struct

from proxy.pricelist import CURRENCY, pricelist

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Bytes = Annotated[int, Meta(ge=1)]
Price = Annotated[Decimal, Meta()]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Meta(pattern=_NAME)]
OperationName = Literal[
    "chat",
    "completions",
    "responses",
    "messages",
    "count_tokens",
    "embeddings",
    "rerank",
    "score",
    "transcriptions",
    "translations",
    "tokenize",
    "detokenize",
]
"""What engines are asked for, as rows of the ledger call it. The list of models isn't among it: who has a key may see it."""


class SettingsError(Exception):
    """The settings can't be used; the text says which field, what it holds and what it may hold."""


class BackendSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One inference server. `url` is its root, with or without `/v1`. `ca_file`: the authorities (PEM) that may vouch for an
    `https` one, instead of the system's."""

    url: str
    name: Name | None = None
    kind: Literal["auto", "vllm", "openai"] = "auto"
    models: list[str] = []
    api_key_env: str | None = None
    ca_file: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"{self.url!r} is not usable as a backend URL; allowed: http[s]://HOST[:PORT][/PATH]")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError(f"{self.url!r} has a port outside 1..65535") from None
        if self.ca_file is not None and parts.scheme != "https":
            raise ValueError(f"ca_file: {self.ca_file!r} is of no use with {self.url!r}; allowed: with an https:// url")


class PriceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Per million tokens, in `currency`. Cached input defaults to the input price.

    `from`: a row of the price list, which fills in what isn't said beside it (`Settings.of` does that).
    """

    from_: str | None = msgspec.field(default=None, name="from")
    input: Price = Decimal(0)
    cached_input: Price | None = None
    output: Price = Decimal(0)

    def __post_init__(self) -> None:
        for field in ("input", "cached_input", "output"):
            value = getattr(self, field)
            if value is not None and not (value.is_finite() and 0 <= value <= 1_000_000):
                raise ValueError(f"{field}: {value} is not a price; allowed: 0 to 1000000 per million tokens")

    @property
    def cached(self) -> Decimal:
        """What cached input costs."""
        return self.input if self.cached_input is None else self.cached_input


class BoundsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may ask for; what isn't set is as in `proxy.snapshot.Bounds`. A model's own come before those of all."""

    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    stop: Annotated[int, Meta(ge=0)] | None = None
    tools: Annotated[int, Meta(ge=0)] | None = None
    schema_bytes: Annotated[int, Meta(ge=0)] | None = None


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model without a price costs nothing.

    assumed_output_tokens: what limits and budgets set aside for an answer whose request doesn't say how long it may become.
    """

    price: PriceSettings | None = None
    bounds: BoundsSettings = BoundsSettings()
    assumed_output_tokens: Annotated[int, Meta(ge=1)] = 1024


class BudgetSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So much of one thing: `money` (in `currency`), `tokens` (input and output) or `gpu_seconds`, from midnight to midnight in
    `time_zone`; a week begins on Monday. A `soft` one refuses nothing, it is only told of."""

    money: Annotated[Decimal, Meta()] | None = None
    tokens: Annotated[int, Meta(ge=1)] | None = None
    gpu_seconds: Annotated[int, Meta(ge=1)] | None = None
    per: Literal["day", "week", "month", "total"]
    time_zone: str = "UTC"
    soft: bool = False

    def __post_init__(self) -> None:
        said = [name for name in ("money", "tokens", "gpu_seconds") if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(f"a budget of {' and '.join(said) or 'nothing'}; allowed: one of money, tokens, gpu_seconds")
        if self.money is not None and not (self.money.is_finite() and 0 < self.money <= 1_000_000_000):
            raise ValueError(f"money: {self.money} is not an amount; allowed: more than 0, up to 1000000000")
        try:
            ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"time_zone: {self.time_zone!r} is not known; allowed: names such as UTC or Europe/Vienna") from None


class AllowanceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a key, a team or everyone together may use; what isn't set is not limited. Of all that applies the tightest counts.

    requests_per_minute, ..tokens_per_minute: a minute's worth may come at once; then it fills up again steadily. Tokens are set
    aside when a request comes and set right when it has ended.
    concurrent_requests: from a request's beginning to the last byte of its answer.
    max_input_tokens: of one request.
    models: names or patterns (`qwen*`; `*`, `?`, `[abc]`, upper and lower case differ); others don't exist for the caller.
    operations: what may be asked for.
    expires: from this moment on nothing may be; with its zone, such as 2026-12-31T18:00:00+01:00.
    """

    requests_per_minute: Annotated[int, Meta(ge=1)] | None = None
    input_tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    output_tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    concurrent_requests: Annotated[int, Meta(ge=1)] | None = None
    max_input_tokens: Annotated[int, Meta(ge=1)] | None = None
    models: tuple[Annotated[str, Meta(min_length=1)], ...] | None = None
    operations: tuple[OperationName, ...] | None = None
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    budgets: tuple[BudgetSettings, ...] = ()


class KeySettings(AllowanceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the key in use that has this name."""

    team: Name | None = None


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
    teams: dict[str, AllowanceSettings] = {}
    keys: dict[str, KeySettings] = {}
    """By the name of the key in use (`glasshouse keys create NAME`)."""
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
            if model.price is not None and model.price.from_ is not None and self.currency != CURRENCY:
                raise ValueError(
                    f"models.{name}.price.from: {model.price.from_!r} has its price in {CURRENCY}, and currency is "
                    f"{self.currency!r}; allowed: input, cached_input and output in {self.currency}"
                )
        for name in self.teams:
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"teams: {name!r} is not a team's name; allowed: {_NAME}")
        for name, key in self.keys.items():
            if key.team is not None and key.team not in self.teams:
                known = ", ".join(self.teams) or "none is declared"
                raise ValueError(f"keys.{name}.team: there is no team {key.team!r}; allowed: those of `teams` ({known})")
        if self.workers > 1 and self.redis is None:
            raise ValueError(
                f"workers: {self.workers} is not allowed without Redis, through which workers share limits and budgets; "
                "allowed: 1, or set redis.url"
            )
        names = [self.backend_name(i) for i in range(len(self.backends))]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"backends: the name {sorted(twice)[0]!r} is used twice; allowed: names that differ")

    def backend_name(self, index: int) -> str:
        return self.backends[index].name or f"backend-{index}"

    @property
    def allowances(self) -> list[AllowanceSettings]:
        """Everything that is declared."""
        return [self.everyone, *self.teams.values(), *self.keys.values()]

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
    def spend_path(self) -> Path:
        """What was spent so far, as far as the collector has stored it."""
        return self.state_path / "spend"

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
        if mapping is None:
            mapping = {}
        try:
            return msgspec.convert(_priced(mapping), cls)
        except msgspec.ValidationError as error:
            raise SettingsError(_explain(str(error), mapping)) from None

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the effective settings that another process of ours wrote."""
        return cls.of(msgspec.json.decode(path.read_bytes()))

    def write(self, path: Path) -> None:
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))
        scratch.replace(path)


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


def _priced(mapping: Any) -> Any:
    """The same, with prices filled in `from` the price list. What a file of ours holds is complete: the list isn't opened.
    Raises SettingsError: no such row."""
    match mapping:
        case {"models": dict() as models}:
            return {**mapping, "models": {name: _priced_model(name, model) for name, model in models.items()}}
        case _:
            return mapping


def _priced_model(name: str, model: Any) -> Any:
    match model:
        case {"price": {"from": str() as row, **said}} if not {"input", "cached_input", "output"} <= said.keys():
            prices = pricelist()
            if row not in prices.rows:
                alike = "".join(f", such as {each}" for each in prices.alike(row)[:1])
                known = f"{len(prices.rows)} models of {prices.source}{alike}"
                raise SettingsError(f"models.{name}.price.from: {row!r} is not in the price list; allowed: the {known}")
            _, price, cached, output, _ = prices.rows[row]
            filled = {"input": price, "cached_input": cached, "output": output}
            return {**model, "price": {"from": row, **filled, **said}}
        case _:
            return model


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?$", re.DOTALL)
_SECRET = ("redis", "database")
"""Sections whose values may hold a password."""
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


def _explain(text: str, mapping: object) -> str:
    """Turn msgspec's message into: field, value, what is allowed."""
    match = _AT.match(text)
    what, path = (match["what"], match["path"] or "$") if match else (text, "$")
    value: Any = mapping
    section: Any = Settings
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
    field = path.removeprefix("$").removeprefix(".") or "the file"
    if unknown := _UNKNOWN.search(what):
        allowed = ", ".join(sorted(section.__struct_encode_fields__)) if hasattr(section, "__struct_fields__") else "none"
        return f"{field}: there is no setting {unknown[1]!r} here; allowed: {allowed}"
    if field == "the file" and ":" in what:
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
