"""Who changed what: one row for every change, written in the change's own transaction.

A row holds what was there before and after as JSON, never a secret nor a hash. Who sends an idempotency key with a change is
found by it again: `repeated` says what was done, and a second change under the same key is refused.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from proxy.store.engine import StoreError
from proxy.store.tables import audit, catalogue

_ID_DIGITS = 18
"""So many always fit into 63 bits."""


class Author(NamedTuple):
    """Who changes something. `address`: from where. `idempotency_key`: his own word for this one change, "" if he has none."""

    name: str
    role: str
    address: str = ""
    idempotency_key: str = ""


GLASSHOUSE = Author("glasshouse", "admin")
"""The program itself, as when `up` makes the first key."""


class Repeated(StoreError):
    """This author has changed something under this idempotency key before."""


class AuditRow(NamedTuple):
    """One change. `at`: ns since 1970, UTC. `noun` and `name`: of what ("teams", "research"). `team`: whose it is, "" if
    nobody's. `before` and `after`: builtins of JSON, None where there was or is nothing."""

    id: str
    at: int
    author: str
    role: str
    address: str
    action: str
    noun: str
    name: str
    team: str
    before: Any
    after: Any


def lock(connection: Connection) -> None:
    """Whoever is about to change the catalogue waits here for whoever does so already: what is read from here on to the end of
    the transaction stays true. On SQLite a transaction that may write is alone anyway."""
    connection.execute(select(catalogue.c.revision).with_for_update())


def note(
    connection: Connection,
    author: Author,
    action: str,
    noun: str,
    name: str,
    *,
    team: str = "",
    before: Any = None,
    after: Any = None,
) -> None:
    """Count the catalogue's revision up and write the audit row of one change. `before` and `after` are what JSON can hold.

    Raises Repeated.
    """
    connection.execute(update(catalogue).values(revision=catalogue.c.revision + 1))
    if repeated(connection, author) is not None:
        raise Repeated("this idempotency key belongs to an earlier change; another change needs another key")
    row = {
        **author._asdict(),
        "author": author.name,
        "name": name,
        "at": time.time_ns(),
        "action": action,
        "noun": noun,
        "team": team,
        "before": _text(before),
        "after": _text(after),
    }
    connection.execute(insert(audit).values(row))


def audit_rows(
    connection: Connection,
    *,
    before_id: str = "",
    limit: int = 100,
    noun: str | None = None,
    name: str | None = None,
    author: str | None = None,
    team: str | None = None,
    since: int | None = None,
    until: int | None = None,
) -> list[AuditRow]:
    """The newest changes first, those older than `before_id` where it is given; from `since` (included) to `until` (not
    included), ns since 1970."""
    where: list[ColumnElement[bool]] = []
    if before_id:
        if not _is_id(before_id):
            return []
        where.append(audit.c.id < int(before_id))
    for column, wanted in ((audit.c.noun, noun), (audit.c.name, name), (audit.c.author, author), (audit.c.team, team)):
        if wanted is not None:
            if not storable(wanted):
                return []
            where.append(column == wanted)
    if since is not None:
        where.append(audit.c.at >= since)
    if until is not None:
        where.append(audit.c.at < until)
    return _rows(connection, where, limit)


def repeated(connection: Connection, author: Author) -> AuditRow | None:
    """What this author did before under the same idempotency key; None without a key."""
    if not author.idempotency_key:
        return None
    where = [audit.c.author == author.name, audit.c.idempotency_key == author.idempotency_key]
    return next(iter(_rows(connection, where, 1)), None)


def prune_audit(connection: Connection, older_than_ns: int, most: int) -> int:
    """Forget the oldest changes made before that time, `most` of them → how many they were."""
    oldest = select(audit.c.id).where(audit.c.at < older_than_ns).order_by(audit.c.at).limit(most)
    return connection.execute(delete(audit).where(audit.c.id.in_(oldest))).rowcount


def storable(text: str) -> bool:
    """Whether a database can hold or compare this text at all: what nobody can have stored needs no look."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _rows(connection: Connection, where: list[ColumnElement[bool]], limit: int) -> list[AuditRow]:
    columns = (audit.c[field] for field in AuditRow._fields)
    query = select(*columns).where(*where).order_by(audit.c.id.desc()).limit(limit)
    return [_row(*row) for row in connection.execute(query)]


def _row(number: int, *rest: Any) -> AuditRow:
    *texts, before, after = rest
    return AuditRow(*(str(number), *texts, _value(before), _value(after)))


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _ID_DIGITS


def _text(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _value(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)
