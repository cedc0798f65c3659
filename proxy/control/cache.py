"""`/cache`: which answers aren't to be given again.

A purge says what is withdrawn: of a model, of a key, of a team, of a user, in any combination, or everything; and of what age. It
counts from the moment at which the database has it, by the database's clock; workers know of it within two seconds, and what
Redis has of it is deleted soon afterwards. It stays in the list until all that it is about would have expired anyway.

Who is of a team withdraws what its keys have had, and sees no other purges than those.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import MANAGERS, READERS, Caller, allow
from proxy.control.answers import Page, PartOf, answer, documented
from proxy.control.bodies import body_of
from proxy.control.models import visible
from proxy.control.state import Asking, Given, State, when
from proxy.control.writes import REPLAYED, Signed, done_before
from proxy.errors import InvalidRequest
from proxy.nouns import covering, is_pattern
from proxy.snapshot import Purge
from proxy.store import MODELS, TEAMS, Author, Mark, lock, marks, purge
from proxy.store.purges import LONGEST_NS

NOUN = "cache"
_NANO = 10**9

router = APIRouter(tags=[NOUN])
Named = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Withdrawal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What isn't to be given again; what isn't said is any, so that nothing said is everything.

    model: its name, or an alias. key: whose request it was; its id or name.
    user: whose key that was, or whom the caller named.
    older_than: seconds since the answer was complete.
    """

    model: Named | None = None
    key: Named | None = None
    team: Named | None = None
    user: Named | None = None
    older_than: Annotated[int, msgspec.Meta(ge=0, le=LONGEST_NS // _NANO)] = 0


class Purged(msgspec.Struct, kw_only=True):
    """`before`: answers that were complete earlier are meant, as far as all the rest that is said fits them; `key`: its id.
    `deleted`: so many went from Redis when it was looked through, for this purge and others of that moment; null: that is still
    to come, or there is no Redis."""

    object: Literal["purge"] = "purge"
    id: str
    before: datetime | None
    model: str | None
    key: str | None
    team: str | None
    user: str | None
    made_at: datetime | None
    author: str
    deleted: int | None


@router.get("/cache", summary="What isn't to be given again", **documented(Page[Purged]))
@allow(*READERS)
async def several(given: Given, caller: Asking, part: PartOf) -> Response:
    """The newest first."""

    def look(connection: Connection) -> list[Mark]:
        return [each for each in marks(connection) if caller.sees(each.purge.team) and _is_behind(each.id, part.after)]

    return answer(part.page(await given.database.read(look), _show, lambda each: each.id))


@router.post("/cache/purge", summary="Withdraw answers", **documented(Purged, body=Withdrawal))
@allow(*MANAGERS)
async def withdraw(
    given: Given, caller: Asking, author: Signed, wanted: Annotated[Any, Depends(body_of(Withdrawal))]
) -> Response:
    made, replayed = await given.database.write(_withdraw, given, caller, wanted, author)
    return answer(_show(made), headers=REPLAYED if replayed else None)


# -- in a transaction --


def _withdraw(connection: Connection, state: State, caller: Caller, wanted: Withdrawal, author: Author) -> tuple[Mark, bool]:
    """→ the mark, whether that was done before. Raises InvalidRequest: what is named isn't there, or not there for him."""
    lock(connection)
    if (row := done_before(connection, author, NOUN, NOUN, "purge")) is not None:
        there = next((each for each in marks(connection) if each.id == row.after["id"]), None)
        return there or _again(row.after, row.author), True
    made = purge(
        connection,
        author,
        model="" if wanted.model is None else _model(connection, state, caller, wanted.model),
        key_id="" if wanted.key is None else _key(connection, state, caller, wanted.key),
        team=caller.team or "" if wanted.team is None else _team(connection, state, caller, wanted.team),
        user=wanted.user or "",
        age_ns=wanted.older_than * _NANO,
    )
    return made, False


def _model(connection: Connection, state: State, caller: Caller, name: str) -> str:
    """As engines call it."""
    models, patterns = state.inventory.serving(time.time_ns())
    if visible(connection, state, caller)(name):
        if (model := models.get(name)) is not None:
            return model.name
        for held in catalogue.page(connection, state.settings, MODELS):  # what nobody serves now may have had answers before
            if name == held.name or name in held.value.aliases:
                return held.name
        if not is_pattern(name) and covering(patterns, name) is not None:
            return name
    raise InvalidRequest(f"model: there is no model {name!r}", param="model")


def _key(connection: Connection, state: State, caller: Caller, key: str) -> str:
    held = catalogue.key(connection, state.settings, key)
    if held is None or not caller.sees(held.value.team):
        raise InvalidRequest(f"key: there is no key {key!r}", param="key")
    return held.id


def _team(connection: Connection, state: State, caller: Caller, name: str) -> str:
    if not caller.sees(name) or catalogue.one(connection, state.settings, TEAMS, name) is None:
        raise InvalidRequest(f"team: there is no team {name!r}", param="team")
    return name


def _again(noted: dict[str, Any], author: str) -> Mark:
    """One that is no longer there: another one covers it, or it was about nothing any more."""
    fields = {name: noted.get(name, "") for name in ("model", "key_id", "team", "user")}
    return Mark(noted["id"], Purge(noted["before_at"], **fields), noted["made_at"], author, None)


# -- answers --


def _is_behind(number: str, after: str) -> bool:
    """In a list whose greatest number is the first."""
    return not after or (after.isdecimal() and int(number) < int(after))


def _show(mark: Mark) -> Purged:
    said = mark.purge
    return Purged(
        id=mark.id,
        before=when(said.before_unix_ns),
        model=said.model or None,
        key=said.key_id or None,
        team=said.team or None,
        user=said.user or None,
        made_at=when(mark.made_at),
        author=mark.author,
        deleted=mark.deleted,
    )
