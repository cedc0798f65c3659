"""`GET /backends`: the inference servers, and how the last question to each of them went.

This is control's own view, for its model lists. Whether a backend takes requests is the workers' to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fastapi import APIRouter

from proxy.control.discovery import url_of
from proxy.control.inventory import KnownBackend
from proxy.control.state import Given, when

router = APIRouter()


@dataclass(frozen=True)
class BackendState:
    """`reachable` is None until it was asked; `error` is why it isn't. `answered_at` is the last good answer."""

    name: str
    url: str
    kind: str
    models: list[str]
    reachable: bool | None
    error: str | None
    asked_at: datetime | None
    answered_at: datetime | None


@dataclass(frozen=True)
class BackendList:
    data: list[BackendState]
    object: Literal["list"] = "list"


@router.get("/backends")
async def backends(given: Given) -> BackendList:
    return BackendList([_state(known) for known in given.inventory.known.values()])


def _state(known: KnownBackend) -> BackendState:
    return BackendState(
        name=known.backend.name,
        url=url_of(known.backend),
        kind=known.backend.kind,
        models=known.models(),
        reachable=known.reachable,
        error=known.error or None,
        asked_at=when(known.asked_unix_ns),
        answered_at=when(known.answered_unix_ns),
    )
