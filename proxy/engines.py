"""The file `engines`: what each engine says of its own load, once a second. The collector writes it, workers read it.

It is a hint. A worker that finds none, an old one, or one that it can't read, routes by what it knows itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from proxy.files import replace_file

VERSION: Final = 1
FRESH_NS: Final = 5_000_000_000
"""What is older says nothing of now."""


class EngineLoad(msgspec.Struct, array_like=True, frozen=True):
    """One engine's, as its own metrics tell. `started_unix_s`: when its process began; of one that doesn't say, when it was
    noticed to have begun anew, 0 = never."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Of its KV cache, 0 to 1."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    """Both since it began."""
    started_unix_s: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    """Tokens that it looked for in its prefix cache, and those that it found; since it began."""


class Engines(msgspec.Struct, array_like=True, frozen=True):
    """`loads`: by backend; one whose engine didn't answer isn't among them."""

    version: int
    unix_ns: int
    loads: dict[str, EngineLoad] = {}


_decoder = msgspec.msgpack.Decoder(Engines)


def write_engines(path: Path, engines: Engines) -> None:
    """Raises OSError; the old one stays then. After a power cut it would say nothing of use."""
    replace_file(path, msgspec.msgpack.encode(engines), lasting=False)


def read_engines(path: Path, unix_ns: int) -> Engines | None:
    """What it says if it is fresh and whole; None otherwise."""
    try:
        engines = _decoder.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    fresh = abs(unix_ns - engines.unix_ns) <= FRESH_NS
    return engines if fresh and engines.version in (VERSION, VERSION - 1) else None
