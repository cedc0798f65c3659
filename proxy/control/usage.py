"""`/usage`: what was used, summed up from the ledger by key, team, user, project, model, backend, operation, outcome, what the
cache did, or day.

`/v1/usage` is for who holds a key or a token for the models: what was used with it, what limits it, and what is left of budgets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import msgspec
from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import READERS, Caller, allow
from proxy.control.answers import MaybeText, Page, PartOf, answer, documented
from proxy.control.catalogue import Held, HeldKey
from proxy.control.moments import MaybeMoment
from proxy.control.spending import BudgetState, Level, Spending
from proxy.control.state import Asking, Given, State
from proxy.nouns import AllowanceSettings
from proxy.store import PROJECTS, TEAMS, USERS, Noun, UsageRow, usage
from proxy.store.ledger import By

LOOK_BACK = timedelta(days=30)

router = APIRouter(tags=["usage"])


class Usage(msgspec.Struct, kw_only=True):
    """Sums over a group's requests. `group`: a key's id, a UTC day, or what was grouped by; `label`: what people call it. `cost`:
    by currency, exact decimal text. `errors`: whatever is neither ok, client_gone nor crashed.

    Answers that the cache had (`cache_hits`) and those that were shared (`coalesced`) are among the requests and cost nothing;
    `saved_*` is what an engine would have taken for them."""

    group: str
    label: str
    requests: int
    ok: int
    errors: int
    client_gone: int
    crashed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    audio_seconds: int
    cost: dict[str, str]
    cache_hits: int
    cache_misses: int
    coalesced: int
    saved_input_tokens: int
    saved_output_tokens: int
    saved_cost: dict[str, str]
    saved_ms: float
    first_token_p50_ms: float | None
    first_token_p95_ms: float | None


class Limits(msgspec.Struct, kw_only=True):
    """What limits one level. Of all levels the tightest counts."""

    level: Literal["key", "user", "project", "team", "everyone"]
    name: str
    settings: AllowanceSettings


class OwnUsage(msgspec.Struct, kw_only=True):
    """Of one key, or of a token's subject: from `since` to `until`, whatever limits it, and budgets with what is left of them."""

    object: Literal["usage"] = "usage"
    key_id: str
    key_name: str
    team: str | None
    user: str | None
    project: str | None
    since: datetime
    until: datetime
    by_model: list[Usage]
    by_day: list[Usage]
    limits: list[Limits]
    budgets: list[BudgetState]


@router.get("/usage", summary="What was used", **documented(Page[Usage]))
@allow(*READERS)
async def several(
    given: Given,
    caller: Asking,
    part: PartOf,
    by: By = "key",
    since: MaybeMoment = None,
    until: MaybeMoment = None,
    team: MaybeText = None,
    user: MaybeText = None,
    project: MaybeText = None,
    key: MaybeText = None,
    model: MaybeText = None,
    backend: MaybeText = None,
) -> Response:
    """`since` is included, `until` isn't. `key` is a key's id."""
    if caller.team is not None and team not in (None, caller.team):
        return answer(part.page([], _show, _group))
    filters = {"team": caller.team or team, "user": user, "project": project, "key_id": key, "model": model, "backend": backend}
    rows = await given.database.read(usage, by, since, until, **filters)
    return answer(part.page([row for row in rows if _group(row) > part.after][: part.most], _show, _group))


@router.get("/v1/usage", summary="What was used with the caller's own key", **documented(OwnUsage))
@allow("holder")
async def own(given: Given, caller: Asking, since: MaybeMoment = None, until: MaybeMoment = None) -> Response:
    """From `since` (a month ago, if nothing is said) to `until` (now)."""
    until = until or datetime.now(UTC)
    return answer(await given.database.read(_own, given, caller, since or until - LOOK_BACK, until))


def _own(connection: Connection, state: State, caller: Caller, since: datetime, until: datetime) -> OwnUsage:
    now_ns = time.time_ns()
    held = catalogue.key(connection, state.settings, caller.key)
    owner = Owner(caller.key, caller.name, caller.team, caller.user, caller.project)
    if held is not None:
        owner = Owner(held.id, held.name, held.value.team, held.value.user, held.value.project)
    levels = list(_levels(connection, state, owner, held))
    names: dict[Level, str] = {level: group for level, _, group, _ in levels}
    spending = Spending(connection, state.settings.currency, now_ns, names)
    return OwnUsage(
        key_id=owner.key_id,
        key_name=owner.name,
        team=owner.team,
        user=owner.user,
        project=owner.project,
        since=since,
        until=until,
        by_model=[_show(row) for row in usage(connection, "model", since, until, key_id=owner.key_id)],
        by_day=[_show(row) for row in usage(connection, "day", since, until, key_id=owner.key_id)],
        limits=[Limits(level=level, name=name, settings=_allowance(held.value)) for level, name, _, held in levels],
        budgets=[
            spending.state(level, name, group, budget, held.source)
            for level, name, group, held in levels
            for budget in held.value.budgets
        ],
    )


class Owner(NamedTuple):
    """Whose usage it is."""

    key_id: str
    name: str
    team: str | None
    user: str | None
    project: str | None


def _levels(
    connection: Connection, state: State, owner: Owner, key: HeldKey | None
) -> Iterator[tuple[Level, str, str, HeldKey | Held[Any]]]:
    """What applies to him: level, name, what the ledger calls it, what is declared."""
    if key is not None:
        yield "key", key.name, key.id, key
    of: tuple[tuple[Level, Noun[Any], str | None], ...] = (
        ("user", USERS, owner.user),
        ("project", PROJECTS, owner.project),
        ("team", TEAMS, owner.team),
    )
    for level, noun, name in of:
        if name is not None and (held := catalogue.one(connection, state.settings, noun, name)) is not None:
            yield level, name, name, held
    yield "everyone", "everyone", "everyone", catalogue.everyone(connection, state.settings)


def _allowance(value: AllowanceSettings) -> AllowanceSettings:
    """What limits, without whose it is."""
    return AllowanceSettings(**{field: getattr(value, field) for field in AllowanceSettings.__struct_fields__})


def _group(row: UsageRow) -> str:
    """What is of none is a group too, and "" would stand for the beginning of the list."""
    return f"={row.group}"


def _show(row: UsageRow) -> Usage:
    fields = {field: getattr(row, field) for field in _SAME}
    return Usage(
        **fields,
        cost=_money(row.cost_nano),
        saved_cost=_money(row.saved_cost_nano),
        saved_ms=row.saved_ns / 1e6,
        first_token_p50_ms=_ms(row.first_token_p50_ns),
        first_token_p95_ms=_ms(row.first_token_p95_ns),
    )


_SAME = [field for field in Usage.__struct_fields__ if field in UsageRow.__struct_fields__]


def _money(nano: dict[str, int]) -> dict[str, str]:
    return {currency: f"{Decimal(amount).scaleb(-9):f}" for currency, amount in nano.items()}


def _ms(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e6
