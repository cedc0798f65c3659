"""What a kind of server is."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from msgspec import Struct


class Verdict(Enum):
    """What an answer says of the server that gave it."""

    FINE = auto()
    """It does what it should; also where it finds fault with the request."""
    BUSY = auto()
    """It is well, and has no room: another one may have."""
    FAILING = auto()
    """It can't answer now: another one may."""
    GAVE_UP = auto()
    """It ended this one's answer of its own accord: another one may do it."""
    BROKEN = auto()
    """It failed with this request, maybe with others: nobody else is asked, and a probe shall tell."""
    DEAD = auto()
    """It won't answer anything until it is started anew."""
    ELSEWHERE = auto()
    """It doesn't serve this model."""
    STRANGER = auto()
    """It doesn't have what the request goes on from: another one may."""


class Kind(Struct, frozen=True, kw_only=True):
    """`judge`: status, and what an error body says (`type`, `message`) → what that means. `health_path`: where it says that it is
    well, b"" if nowhere."""

    name: str
    judge: Callable[[int, str, str], Verdict]
    health_path: bytes = b""
