"""`/backends`: the inference servers, and how the last question to each of them went.

That is control's own view, for its model lists. Whether a backend takes requests is the workers' to know.

A backend can be drained and weighed while everything runs, also one that the configuration file declares. That is said of its
name, and lies over what is declared until it is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Depends
from msgspec.structs import replace
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control.access import ADMIN, OVERSEERS, Caller, allow
from proxy.control.answers import answer, documented
from proxy.control.bodies import body_of
from proxy.control.catalogue import Held
from proxy.control.discovery import address_of, url_of
from proxy.control.inventory import weight_of
from proxy.control.resource import Named, Object, Resource, common
from proxy.control.state import Asking, Given, State, when
from proxy.control.writes import REPLAYED, Signed, done_before
from proxy.errors import InvalidRequest
from proxy.nouns import BackendSettings, RunTimeSettings, Weight
from proxy.store import BACKENDS, Author, lock, put_run_time
from proxy.store.run_time import Action


class BackendState(Object, kw_only=True):
    """`kind`, `version`, `models`: what it turned out to be and to serve. `reachable` is null until it was asked; `error` is why
    it isn't. `answered_at` is the last good answer. `drained`: it gets no more requests. `weight`: what holds, whether it is
    declared or was said at run time."""

    object: Literal["backend"] = "backend"
    url: str
    kind: str
    version: str | None
    models: list[str]
    reachable: bool | None
    error: str | None
    asked_at: datetime | None
    answered_at: datetime | None
    drained: bool
    weight: float
    settings: BackendSettings


class NewWeight(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """weight: null: the declared one again."""

    weight: Weight | None


def _show(state: State, held: Held[BackendSettings]) -> BackendState:
    known = state.inventory.known.get(held.name)
    backend = address_of(held.value, held.name)
    return BackendState(
        **common(held),
        url=url_of(backend),
        kind=backend.kind if known is None else known.backend.kind,
        version=None if known is None else known.backend.version or None,
        models=list(held.value.models) if known is None else known.models(),
        reachable=None if known is None else known.reachable,
        error=None if known is None else known.error or None,
        asked_at=None if known is None else when(known.asked_unix_ns),
        answered_at=None if known is None else when(known.answered_unix_ns),
        drained=held.run_time.drained,
        weight=weight_of(held.value, held.run_time),
    )


def _check(
    _connection: Connection, _state: State, _caller: Caller, name: str, value: BackendSettings, _before: BackendSettings | None
) -> BackendSettings:
    """Raises InvalidRequest: it names itself otherwise."""
    if value.name not in (None, name):
        raise InvalidRequest(
            f"name: {value.name!r} is not {name!r}, by which it is known here; allowed: the same, or none", param="name"
        )
    return value


resource = Resource(BACKENDS, BackendState, _show, OVERSEERS, ADMIN, _check)
router = resource.routes()


# -- at run time --


@router.post("/backends/{name}/drain", summary="Drain a backend", **documented(BackendState))
@allow(*ADMIN)
async def drain(given: Given, caller: Asking, author: Signed, name: Named) -> Response:
    """It gets no more requests. Those that it has go on."""
    return await _say(given, caller, author, name, "drain", lambda said: replace(said, drained=True))


@router.post("/backends/{name}/undrain", summary="Let a backend have requests again", **documented(BackendState))
@allow(*ADMIN)
async def undrain(given: Given, caller: Asking, author: Signed, name: Named) -> Response:
    return await _say(given, caller, author, name, "undrain", lambda said: replace(said, drained=False))


@router.put("/backends/{name}/weight", summary="Weigh a backend", **documented(BackendState, body=NewWeight))
@allow(*ADMIN)
async def weigh(
    given: Given, caller: Asking, author: Signed, name: Named, new: Annotated[Any, Depends(body_of(NewWeight))]
) -> Response:
    """Until it is taken back, also against what is declared later."""
    return await _say(given, caller, author, name, "weigh", lambda said: replace(said, weight=new.weight))


async def _say(
    given: State,
    caller: Caller,
    author: Author,
    name: str,
    action: Action,
    changed: Callable[[RunTimeSettings], RunTimeSettings],
) -> Response:
    def change(connection: Connection) -> tuple[Held[BackendSettings], bool]:
        lock(connection)
        held = resource.find(connection, given, caller, name)
        if done_before(connection, author, BACKENDS.name, name, action):
            return held, True
        value = changed(held.run_time)
        put_run_time(connection, name, value, action, author)
        return held._replace(run_time=value), False

    held, replayed = await given.database.write(change)
    return answer(_show(given, held), headers=REPLAYED if replayed else None)
