"""Every knob, frozen, checked before a socket opens.

`glasshouse.yaml` is read by the CLI, checked here (`Settings.of`), and handed to the other processes as a JSON file in the
state directory, so that all of them run on exactly what was checked. This module imports no YAML: workers load it.

A bad value raises `SettingsError` whose text names the field, the value and what is allowed.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Bytes = Annotated[int, Meta(ge=1)]
Price = Annotated[Decimal, Meta()]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SettingsError(Exception):
    """The settings can't be used; the text says which field, what it holds and what it may hold."""


class BackendSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One inference server. `url` is its root, with or without `/v1`."""

    url: str
    name: Name | None = None
    kind: Literal["auto", "vllm", "openai"] = "auto"
    models: list[str] = []
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"{self.url!r} is not usable as a backend URL; allowed: http://HOST[:PORT][/PATH]")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError(f"{self.url!r} has a port outside 1..65535") from None


class PriceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Per million tokens, in `currency`. Cached input defaults to the input price."""

    input: Price = Decimal(0)
    cached_input: Price | None = None
    output: Price = Decimal(0)

    def __post_init__(self) -> None:
        for field in ("input", "cached_input", "output"):
            value = getattr(self, field)
            if value is not None and not (value.is_finite() and 0 <= value <= 1_000_000):
                raise ValueError(f"{field}: {value} is not a price; allowed: 0 to 1000000 per million tokens")


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    price: PriceSettings = PriceSettings()


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
    header_bytes: Bytes = 64 * 1024
    body_bytes: Bytes = 64 * 1024 * 1024
    pipelined_bytes: Bytes = 256 * 1024
    event_bytes: Bytes = 4 * 1024 * 1024
    held_body_bytes: Bytes = 1024 * 1024


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
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
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
        if self.workers > 1:
            raise ValueError(
                f"workers: {self.workers} is not allowed; allowed: 1 "
                "(several workers share limits through Redis, which this version doesn't use yet)"
            )
        names = [self.backend_name(i) for i in range(len(self.backends))]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"backends: the name {sorted(twice)[0]!r} is used twice; allowed: names that differ")

    def backend_name(self, index: int) -> str:
        return self.backends[index].name or f"backend-{index}"

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
    def log_path(self) -> Path:
        return self.state_path / "log"

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.state_path.absolute() / 'glasshouse.db'}"

    # -- reading and writing --

    @classmethod
    def of(cls, mapping: object) -> Settings:
        """Check what a YAML or JSON file held. Raises SettingsError."""
        if mapping is None:
            mapping = {}
        try:
            return msgspec.convert(mapping, cls)
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


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


def _explain(text: str, mapping: object) -> str:
    """Turn msgspec's message into: field, value, what is allowed."""
    match = _AT.match(text)
    what, path = (match["what"], match["path"] or "$") if match else (text, "$")
    value: Any = mapping
    section: Any = Settings
    for name, index in _STEP.findall(path):
        if index == "...":  # msgspec names no key of a mapping; the message itself says what is wrong
            value = section = None
            break
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            value = None
        section = _hint(section, name) if name else _element(section)
    field = path.removeprefix("$").removeprefix(".") or "the file"
    if unknown := _UNKNOWN.search(what):
        allowed = ", ".join(sorted(section.__struct_fields__)) if hasattr(section, "__struct_fields__") else "none"
        return f"{field}: there is no setting {unknown[1]!r} here; allowed: {allowed}"
    if field == "the file" and ":" in what:
        return what  # a check over several fields, which names its own
    if isinstance(value, dict | list) or value is None:
        return f"{field}: {what}"
    return f"{field}: {value!r} is not allowed: {what}"


def _hint(section: Any, name: str) -> Any:
    try:
        return get_type_hints(section).get(name)
    except TypeError:
        return None


def _element(section: Any) -> Any:
    arguments = getattr(section, "__args__", ())
    return arguments[-1] if arguments else None
