"""`/backends`: the inference servers, and how the last question to each of them went.

That is control's own view, for its model lists. Whether a backend takes requests is the workers' to know.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from sqlalchemy import Connection

from proxy.control.access import ADMIN, OVERSEERS, Caller
from proxy.control.catalogue import Held
from proxy.control.discovery import address_of, url_of
from proxy.control.resource import Object, Resource, common
from proxy.control.state import State, when
from proxy.errors import InvalidRequest
from proxy.nouns import BackendSettings
from proxy.store import BACKENDS


class BackendState(Object, kw_only=True):
    """`kind`, `models`: what it turned out to be and to serve. `reachable` is null until it was asked; `error` is why it isn't.
    `answered_at` is the last good answer."""

    object: Literal["backend"] = "backend"
    url: str
    kind: str
    models: list[str]
    reachable: bool | None
    error: str | None
    asked_at: datetime | None
    answered_at: datetime | None
    settings: BackendSettings


def _show(state: State, held: Held[BackendSettings]) -> BackendState:
    known = state.inventory.known.get(held.name)
    backend = address_of(held.value, held.name)
    return BackendState(
        **common(held),
        url=url_of(backend),
        kind=backend.kind if known is None else known.backend.kind,
        models=list(held.value.models) if known is None else known.models(),
        reachable=None if known is None else known.reachable,
        error=None if known is None else known.error or None,
        asked_at=None if known is None else when(known.asked_unix_ns),
        answered_at=None if known is None else when(known.answered_unix_ns),
    )


def _check(_connection: Connection, _state: State, _caller: Caller, name: str, value: BackendSettings) -> BackendSettings:
    """Raises InvalidRequest: it names itself otherwise."""
    if value.name not in (None, name):
        raise InvalidRequest(
            f"name: {value.name!r} is not {name!r}, by which it is known here; allowed: the same, or none", param="name"
        )
    return value


router = Resource(BACKENDS, BackendState, _show, OVERSEERS, ADMIN, _check).routes()
