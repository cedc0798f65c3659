"""`/admins`: the keys for this API itself. Only administrators have to do with them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control.access import ADMIN, allow
from proxy.control.answers import Page, PartOf, answer, documented
from proxy.control.bodies import body_of
from proxy.control.declared import unix_ns
from proxy.control.resource import missing
from proxy.control.state import Given, State, when
from proxy.control.writes import REPLAYED, Signed, declared_names, done_before, other_change
from proxy.nouns import Name
from proxy.store import (
    AdminRow,
    Author,
    create_admin_key,
    find_admin_key,
    list_admin_keys,
    lock,
    revoke_admin_key,
)

NOUN = "admins"

router = APIRouter(tags=[NOUN])
Known = Annotated[str, Path(description="Its id or name.")]


class AdminKey(msgspec.Struct, kw_only=True):
    """`role`: admin, manager (of `team`), or viewer (of `team`, or of everything)."""

    object: Literal["admin"] = "admin"
    id: str
    name: str
    prefix: str
    role: str
    team: str | None
    created_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None


class AdminKeyWithSecret(AdminKey, kw_only=True):
    """`secret` is told this once; it is null if the request repeats another one."""

    secret: str | None
    secret_told_before: bool = False


class NewAdminKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    role: Literal["admin", "manager", "viewer"]
    team: Name | None = None
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


@router.get("/admins", summary="List admin keys", **documented(Page[AdminKey]))
@allow(*ADMIN)
async def several(given: Given, part: PartOf, revoked: bool = False) -> Response:
    def look(connection: Connection) -> list[AdminRow]:
        return list_admin_keys(connection, after=part.after, limit=part.most, revoked=revoked)

    return answer(part.page(await given.database.read(look), _show, lambda row: f"{row.name}\0{row.id}"))


@router.get("/admins/{key}", summary="One admin key", **documented(AdminKey))
@allow(*ADMIN)
async def one(given: Given, key: Known) -> Response:
    return answer(_show(await given.database.read(_find, key)))


@router.post("/admins", summary="Create an admin key", **documented(AdminKeyWithSecret, 201, 200, body=NewAdminKey))
@allow(*ADMIN)
async def post(given: Given, author: Signed, new: Annotated[Any, Depends(body_of(NewAdminKey))]) -> Response:
    row, secret = await given.database.write(_create, given, new, author)
    shown = AdminKeyWithSecret(**_fields(row), secret=secret, secret_told_before=secret is None)
    return answer(shown, *((200, REPLAYED) if secret is None else (201, None)))


@router.delete("/admins/{key}", summary="Revoke an admin key", **documented(AdminKey))
@allow(*ADMIN)
async def revoke(given: Given, author: Signed, key: Known) -> Response:
    row, replayed = await given.database.write(_revoke, key, author)
    return answer(_show(row), headers=REPLAYED if replayed else None)


# -- in a transaction --


def _find(connection: Connection, key: str) -> AdminRow:
    row = find_admin_key(connection, key)
    if row is None:
        raise missing("admin key", key)
    return row


def _create(connection: Connection, state: State, new: NewAdminKey, author: Author) -> tuple[AdminRow, str | None]:
    lock(connection)
    if (done := done_before(connection, author, NOUN, new.name, "create")) is not None:
        return _find(connection, done.after["id"]), None
    expires_at = None if new.expires_at is None else unix_ns(new.expires_at)
    known = declared_names(state.settings)
    secret, row = create_admin_key(connection, new.name, new.role, new.team, expires_at, author, known=known)
    return row, secret


def _revoke(connection: Connection, key: str, author: Author) -> tuple[AdminRow, bool]:
    lock(connection)
    if (done := done_before(connection, author, NOUN, None, "revoke")) is not None:
        row = _find(connection, done.after["id"])
        if key not in (row.id, row.name):
            raise other_change()
        return row, True
    return revoke_admin_key(connection, _find(connection, key).id, author), False


# -- answers --


def _show(row: AdminRow) -> AdminKey:
    return AdminKey(**_fields(row))


def _fields(row: AdminRow) -> dict[str, Any]:
    times = {field: when(getattr(row, field)) for field in ("created_at", "expires_at", "revoked_at")}
    return {"id": row.id, "name": row.name, "prefix": row.prefix, "role": row.role, "team": row.team, **times}
