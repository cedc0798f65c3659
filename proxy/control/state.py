"""What the routers have to do with: the control process's parts, given to each request."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Request

from proxy.control.access import CALLER, Caller
from proxy.control.database import Database
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.issuers import Issuers
from proxy.control.publish import Publisher
from proxy.settings import Settings


@dataclass(frozen=True)
class State:
    settings: Settings
    database: Database
    inventory: Inventory
    feed: CatalogueFeed
    issuers: Issuers
    publisher: Publisher


def _state(request: Request) -> State:
    state: State = request.app.state.control
    return state


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope[CALLER]
    return caller


Given = Annotated[State, Depends(_state)]
"""A route's parameter of this type is the process's State."""

Asking = Annotated[Caller, Depends(_caller)]
"""A route's parameter of this type is who asks."""


def when(unix_ns: int | None) -> datetime | None:
    """ns since 1970 → a time for people; None for never."""
    return datetime.fromtimestamp(unix_ns / 1e9, UTC) if unix_ns else None
