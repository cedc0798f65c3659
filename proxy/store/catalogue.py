"""API keys: made, listed, revoked.

A key is `gh-` and 43 url-safe characters: 32 bytes from the system's random source. It is returned once, by `create_key`, and
kept nowhere; the table has its sha256. A secret of 256 random bits needs no slow hash, and knowing the hash helps nobody: what
a caller presents is hashed before it is looked up.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from proxy.store.engine import StoreError
from proxy.store.tables import catalogue, keys

SECRET_PREFIX = "gh-"  # noqa: S105  (what every key begins with; no secret)
_SHOWN = len(SECRET_PREFIX) + 4
_NAME_LENGTH = 64


class UnusableName(StoreError):
    """Not a name for a key."""


class NameTaken(StoreError):
    """A key of this name is in use."""


class NoSuchKey(StoreError):
    """No key has this id or, among those in use, this name."""


class KeyRow(NamedTuple):
    """A key as people may see it. Times are ns since 1970, UTC; `revoked_at` is None while it works."""

    id: str
    name: str
    prefix: str
    created_at: int
    revoked_at: int | None


class LiveKey(NamedTuple):
    """A key as workers need it. `hash` is 32 bytes."""

    hash: bytes
    id: str
    name: str


def hash_key(secret: str) -> bytes:
    """The sha256 of a whole key, 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def create_key(connection: Connection, name: str) -> tuple[str, KeyRow]:
    """A new key → (the secret, its row). Raises UnusableName, NameTaken."""
    _check_name(name)
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    row = KeyRow(f"key_{secrets.token_hex(8)}", name, secret[:_SHOWN], time.time_ns(), None)
    _count_up(connection)
    try:
        connection.execute(insert(keys).values(**row._asdict(), hash=hash_key(secret)))
    except IntegrityError:
        raise NameTaken(f"there is a key named {name!r} already; revoke it first, or choose another name") from None
    return secret, row


def list_keys(connection: Connection) -> list[KeyRow]:
    """All keys, the revoked ones too, oldest first."""
    return _rows(connection)


def revoke_key(connection: Connection, id_or_name: str) -> KeyRow:
    """End a key; one that was ended before stays as it is. Raises NoSuchKey."""
    found = _rows(connection, or_(keys.c.id == id_or_name, (keys.c.name == id_or_name) & keys.c.revoked_at.is_(None)))
    if not found:
        raise NoSuchKey(_not_found(id_or_name))
    row = found[0]
    if row.revoked_at is not None:
        return row
    row = row._replace(revoked_at=time.time_ns())
    _count_up(connection)
    connection.execute(update(keys).where(keys.c.id == row.id, keys.c.revoked_at.is_(None)).values(revoked_at=row.revoked_at))
    return row


def revision(connection: Connection) -> int:
    """Goes up with every change. Read it *before* what it stands for: then a change between the two is seen at the next look."""
    return int(connection.execute(select(catalogue.c.revision)).scalar_one())


def live_keys(connection: Connection) -> Iterator[LiveKey]:
    """Every key that works."""
    query = select(keys.c.hash, keys.c.id, keys.c.name).where(keys.c.revoked_at.is_(None))
    for digest, key_id, name in connection.execute(query):
        yield LiveKey(bytes(digest), key_id, name)


def _count_up(connection: Connection) -> None:
    connection.execute(update(catalogue).values(revision=catalogue.c.revision + 1))


def _rows(connection: Connection, *where: ColumnElement[bool]) -> list[KeyRow]:
    query = select(*(keys.c[field] for field in KeyRow._fields)).where(*where).order_by(keys.c.created_at, keys.c.id)
    return [KeyRow(*row) for row in connection.execute(query)]


def _check_name(name: str) -> None:
    """A name gets into logs, labels and tables: printable, short, and nothing that could be taken for an id or a secret."""
    if not 0 < len(name) <= _NAME_LENGTH or not name.isprintable() or name != name.strip():
        raise UnusableName(f"not usable as a name; allowed: 1 to {_NAME_LENGTH} printable characters, no space at either end")
    if name.startswith((SECRET_PREFIX, "key_")):
        raise UnusableName(f"not usable as a name; allowed: names that don't begin with {SECRET_PREFIX!r} or 'key_'")


def _not_found(id_or_name: str) -> str:
    if id_or_name.startswith(SECRET_PREFIX):
        return "no key found; a key is revoked by its id or name, not by its secret"
    return f"there is no key with the id or name {id_or_name!r}"
