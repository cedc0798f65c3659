"""Which kinds of servers tell their load, where, and who reads it: to add a kind, add a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from collectors.engines import vllm
from proxy.engines import EngineLoad


class Kind(NamedTuple):
    """`read`: what stands at `path` → a load; None if it isn't in it."""

    path: str
    read: Callable[[bytes], EngineLoad | None]


KINDS: Final[Mapping[str, Kind]] = {"vllm": Kind("/metrics", vllm.read)}
