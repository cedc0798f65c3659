"""`/budgets`: what may be spent, what of it is used, and when it begins anew.

A budget is its holder's: known by the level, whose it is, the unit, the period and whether it is `soft` (there may be one that
warns beside one that refuses). What a team may spend only an administrator says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from fastapi import APIRouter, Depends, Path
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue, everyone, keys, projects, teams, users
from proxy.control.access import MANAGERS, READERS, Caller, allow
from proxy.control.answers import MaybeText, Page, PartOf, answer, documented
from proxy.control.bodies import body_of, convert
from proxy.control.catalogue import Held, HeldKey
from proxy.control.resource import Resource, missing
from proxy.control.spending import BudgetState, Level, Spending, Unit, unit_of
from proxy.control.state import Asking, Given, State
from proxy.control.writes import REPLAYED, Signed
from proxy.errors import Forbidden, InvalidRequest
from proxy.nouns import BudgetSettings
from proxy.store import Author

EVERYONE = "everyone"
LEVELS: tuple[Level, ...] = ("everyone", "team", "user", "project", "key")
_AT_A_TIME = 1000
_NOUNS: dict[str, Resource[Any]] = {"team": teams.resource, "user": users.resource, "project": projects.resource}

Per = Literal["day", "week", "month", "total"]

router = APIRouter(tags=["budgets"])


class Amount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much: money in the currency of the settings, or a whole number of the others."""

    amount: Annotated[Decimal, msgspec.Meta()]
    time_zone: str = "UTC"


class RemovedBudget(msgspec.Struct, kw_only=True):
    object: Literal["budget"] = "budget"
    level: Level
    subject: str
    unit: Unit
    per: Per
    soft: bool
    deleted: Literal[True] = True


class Which(NamedTuple):
    level: Level
    subject: str
    unit: Unit
    per: Per
    soft: bool

    def is_it(self, budget: BudgetSettings) -> bool:
        return (unit_of(budget), budget.per, budget.soft) == (self.unit, self.per, self.soft)


def _which(
    level: Level,
    subject: Annotated[str, Path(description=f"The holder's name; for everyone's `{EVERYONE}`.")],
    unit: Unit,
    per: Per,
    soft: bool = False,
) -> Which:
    return Which(level, subject, unit, per, soft)


Named = Annotated[Which, Depends(_which)]
PATH = "/budgets/{level}/{subject}/{unit}/{per}"


@router.get("/budgets", summary="List budgets", **documented(Page[BudgetState]))
@allow(*READERS)
async def several(given: Given, caller: Asking, part: PartOf, level: Level | None = None, subject: MaybeText = None) -> Response:
    def look(connection: Connection) -> list[tuple[BudgetState, str]]:
        return list(islice(_found(connection, given, caller, part.after, level, subject), part.most))

    return answer(part.page(await given.database.read(look), lambda found: found[0], lambda found: found[1]))


@router.put(PATH, summary="Set a budget", **documented(BudgetState, body=Amount))
@allow(*MANAGERS)
async def put(
    given: Given, caller: Asking, author: Signed, which: Named, amount: Annotated[Any, Depends(body_of(Amount))]
) -> Response:
    written = {which.unit: amount.amount, "per": which.per, "time_zone": amount.time_zone, "soft": which.soft}
    budget = convert(msgspec.json.Encoder(decimal_format="number").encode(written), BudgetSettings)
    state, replayed = await given.database.write(_change, given, caller, which, budget, author)
    return answer(state, headers=REPLAYED if replayed else None)


@router.delete(PATH, summary="Remove a budget", **documented(RemovedBudget))
@allow(*MANAGERS)
async def delete(given: Given, caller: Asking, author: Signed, which: Named) -> Response:
    _, replayed = await given.database.write(_change, given, caller, which, None, author)
    return answer(RemovedBudget(**which._asdict()), headers=REPLAYED if replayed else None)


# -- in a transaction --


class Holder(NamedTuple):
    """Who has budgets. `group`: what the ledger calls him; `after`: behind whom the next one is."""

    subject: str
    group: str
    after: str
    budgets: tuple[BudgetSettings, ...]
    source: Literal["file", "database"]


def _found(
    connection: Connection, state: State, caller: Caller, after: str, level: Level | None, subject: str | None
) -> Iterator[tuple[BudgetState, str]]:
    """The budgets, each with where the list goes on behind it: the level, the holder before, how many of the next one's are
    shown."""
    spending = Spending(connection, state.settings.currency, time.time_ns())
    first, holder_before, shown = _read_place(after)
    for place in range(first, len(LEVELS)):
        holders = _holders(connection, state, caller, LEVELS[place], holder_before) if level in (None, LEVELS[place]) else ()
        for holder in holders:
            if subject in (None, holder.subject, holder.group):
                for number, budget in enumerate(holder.budgets[shown:], shown + 1):
                    told = spending.state(LEVELS[place], holder.subject, holder.group, budget, holder.source)
                    yield told, json.dumps([place, holder_before, number])
            holder_before, shown = holder.after, 0
        holder_before, shown = "", 0


def _read_place(after: str) -> tuple[int, str, int]:
    """Raises InvalidRequest."""
    try:
        place: tuple[int, str, int] = msgspec.json.decode(after or '[0,"",0]', type=_Place)
    except msgspec.MsgspecError:
        raise InvalidRequest("after: it isn't the `next` of this list", param="after") from None
    return place


_Place = tuple[Annotated[int, msgspec.Meta(ge=0)], str, Annotated[int, msgspec.Meta(ge=0)]]


def _holders(connection: Connection, state: State, caller: Caller, level: Level, after: str) -> Iterator[Holder]:
    if level == "everyone":
        if caller.team is None:
            held = catalogue.everyone(connection, state.settings)
            yield Holder(EVERYONE, EVERYONE, EVERYONE, held.value.budgets, held.source)
    elif level == "key":
        yield from _key_holders(connection, state, caller, after)
    else:
        for each in catalogue.page(connection, state.settings, _NOUNS[level].noun, after=after, team=caller.team):
            yield Holder(each.name, each.name, each.name, each.value.budgets, each.source)


def _key_holders(connection: Connection, state: State, caller: Caller, after: str) -> Iterator[Holder]:
    """There may be very many, so not all at once."""
    while True:
        found = catalogue.key_page(connection, state.settings, after=after, limit=_AT_A_TIME, revoked=False, team=caller.team)
        for each in found:
            after = keys.place_of(each)
            yield Holder(each.name, each.id, after, each.value.budgets, each.source)
        if len(found) < _AT_A_TIME:
            return


def _change(
    connection: Connection, state: State, caller: Caller, which: Which, budget: BudgetSettings | None, author: Author
) -> tuple[BudgetState | None, bool]:
    """Put `budget` in the place of the one there, or take that away → the budget as it is now, whether that was done before."""

    def changed(value: Any) -> Any:
        others = tuple(each for each in value.budgets if not which.is_it(each))
        if budget is None and len(others) == len(value.budgets):
            raise missing("budget", "/".join(which[:4]))
        return msgspec.structs.replace(value, budgets=(*others, budget) if budget else others)

    if which.level in ("everyone", "team") and caller.standing != "admin":
        raise Forbidden("you may not do this")
    held: Held[Any] | HeldKey
    subject, group = which.subject, which.subject
    if which.level == "everyone":
        if which.subject != EVERYONE:
            raise missing("budget", "/".join(which[:4]))
        held, replayed = everyone.change(connection, state, changed, author)
    elif which.level == "key":
        key, replayed = keys.change(connection, state, caller, which.subject, changed, author)
        held, subject, group = key, key.name, key.id
    else:
        held, _, replayed = _NOUNS[which.level].change(connection, state, caller, which.subject, changed, author)
    there = [each for each in held.value.budgets if which.is_it(each)]
    if not there:
        return None, replayed
    spending = Spending(connection, state.settings.currency, time.time_ns(), {which.level: group})
    return spending.state(which.level, subject, group, there[0], held.source), replayed
