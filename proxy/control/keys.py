"""`GET /keys`: which keys there are. Neither secrets (nobody has them) nor hashes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError

from proxy.control.state import Given, when
from proxy.errors import NotReady
from proxy.store import KeyRow, StoreError, list_keys

router = APIRouter()


@dataclass(frozen=True)
class Key:
    """`prefix`: the first characters of the key, to tell it by."""

    id: str
    name: str
    prefix: str
    created_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True)
class KeyList:
    data: list[Key]
    object: Literal["list"] = "list"


@router.get("/keys")
def keys(given: Given, revoked: bool = False) -> KeyList:
    """`?revoked=true`: those that were revoked too. In a thread, because it waits for the database."""
    try:
        with given.feed.engine().connect() as connection:
            rows = list_keys(connection)
    except (SQLAlchemyError, StoreError):
        raise NotReady("the database can't be read just now", code="database_unavailable") from None
    return KeyList([_key(row) for row in rows if revoked or row.revoked_at is None])


def _key(row: KeyRow) -> Key:
    return Key(row.id, row.name, row.prefix, when(row.created_at), when(row.revoked_at or 0))
