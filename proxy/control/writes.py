"""What changes have in common: they are signed, and one that is sent twice is done once.

A write may carry an `Idempotency-Key`, 1 to 255 printable characters of the caller's choice. A second request of the same caller
with the same key is told how things are now, with `idempotent-replayed: true`, and changes nothing; for something else than the
first one was about it is refused. What counts is the audit log, so a key is remembered for as long as that is kept.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header
from sqlalchemy import Connection

from proxy.control.errors import KeyReused
from proxy.control.state import Asking
from proxy.settings import Settings
from proxy.store import AuditRow, Author, Known, repeated

REPLAYED = {"idempotent-replayed": "true"}
_Key = Annotated[str | None, Header(description="Sent again, it changes nothing.", pattern="^[!-~]([ -~]{0,253}[!-~])?$")]


def _author(caller: Asking, idempotency_key: _Key = None) -> Author:
    return Author(caller.name, caller.role, caller.address, idempotency_key or "")


Signed = Annotated[Author, Depends(_author)]
"""A route's parameter of this type is who signs what the route changes."""


def declared_names(settings: Settings) -> Known:
    """What a value may refer to though the database doesn't have it."""
    return {"teams": settings.teams, "users": settings.users, "projects": settings.projects}


def done_before(connection: Connection, author: Author, noun: str, name: str | None, *actions: str) -> AuditRow | None:
    """What this author did under the same key, None if nothing. `name` None: any. Raises KeyReused: it was something else."""
    if not author.idempotency_key:
        return None
    row = repeated(connection, author)
    if row is not None and (row.noun != noun or (name is not None and row.name != name) or row.action not in actions):
        raise other_change()
    return row


def other_change() -> KeyReused:
    return KeyReused("this Idempotency-Key was used for another change; allowed: a new one for each")
