"""What the routers read: the control process's parts, given to each request."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Request

from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.publish import Publisher
from proxy.settings import Settings


@dataclass(frozen=True)
class State:
    settings: Settings
    inventory: Inventory
    feed: CatalogueFeed
    publisher: Publisher


def _state(request: Request) -> State:
    state: State = request.app.state.control
    return state


Given = Annotated[State, Depends(_state)]
"""A route's parameter of this type is the process's State."""


def when(unix_ns: int) -> datetime | None:
    """ns since 1970 → a time for people; None for never."""
    return datetime.fromtimestamp(unix_ns / 1e9, UTC) if unix_ns else None
