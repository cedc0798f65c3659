"""API keys: made, changed, rotated, revoked.

A key's secret is `gh-` and 43 url-safe characters: 32 bytes from the system's random source. It is returned once, by `create_key`
or `rotate_key`, and kept nowhere; the table has its sha256. A secret of 256 random bits needs no slow hash, and knowing the hash
helps nobody: what a caller presents is hashed before it is looked up.

A key has one newest secret, which doesn't end, and after a rotation former ones, which do. It is known by its id for ever, and by
its name while it isn't revoked.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, RowMapping, Select, and_, delete, insert, or_, select, update

from proxy.nouns import SYSTEM_KEY, KeySettings
from proxy.store.audit import GLASSHOUSE, Author, lock, note, storable
from proxy.store.catalogue import (
    NOTHING,
    Known,
    NameTaken,
    NoSuch,
    NotAllowed,
    UnusableName,
    check_references,
    named_like,
    said,
    stored,
    told,
    unchanged,
)
from proxy.store.purges import withdraw
from proxy.store.tables import key_secrets, key_tags, keys

SECRET_PREFIX = "gh-"  # noqa: S105  (what every key begins with; no secret)
LONGEST_OVERLAP_S = 366 * 86_400
_SHOWN = len(SECRET_PREFIX) + 4
_NAME_LENGTH = 64
_NO_NAMES = (SECRET_PREFIX, "gha-", "key_", "adm_")
"""What ids and secrets begin with."""

_COLUMNS = {"team": "team", "user": "user_name", "project": "project", "blocked": "blocked"}
"""Fields of KeySettings with a column of their own."""

_NO_SETTINGS = KeySettings()


class SecretRow(NamedTuple):
    """One of a key's secrets, as people may see it. Times are ns since 1970, UTC; `ends_at` is None of the newest."""

    prefix: str
    created_at: int
    ends_at: int | None


class KeyRow(NamedTuple):
    """A key as people may see it, its newest secret first. Times are ns since 1970, UTC; `revoked_at` is None while it works."""

    id: str
    name: str
    value: KeySettings
    created_at: int
    changed_at: int
    revoked_at: int | None
    secrets: tuple[SecretRow, ...]

    @property
    def prefix(self) -> str:
        """What its newest secret begins with."""
        return self.secrets[0].prefix


class LiveKey(NamedTuple):
    """A secret and its key as workers need them. `hash` is 32 bytes; `ends_at` 0 for never."""

    hash: bytes
    ends_at: int
    id: str
    name: str
    value: KeySettings


def hash_key(secret: str) -> bytes:
    """The sha256 of a whole secret, 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


# -- changing --


def create_key(
    connection: Connection, name: str, value: KeySettings = _NO_SETTINGS, author: Author = GLASSHOUSE, known: Known = NOTHING
) -> tuple[str, KeyRow]:
    """A new key → (the secret, its row). Raises UnusableName, NameTaken, UnknownName, NotAllowed, Repeated.

    `known`: as in `catalogue.py`.
    """
    check_name(name)
    if name == SYSTEM_KEY:
        raise UnusableName(f"{name!r} is what the proxy's own requests are booked to; allowed: any other name")
    _check(value)
    lock(connection)
    if _found(connection, name) is not None:
        raise NameTaken(f"there is a key named {name!r} already; revoke it first, or choose another name")
    check_references(connection, value, known)
    now = time.time_ns()
    key_id = f"key_{secrets.token_hex(8)}"
    connection.execute(insert(keys).values(id=key_id, name=name, created_at=now, changed_at=now, **_columns(value)))
    _set_tags(connection, key_id, value.tags)
    secret = _new_secret(connection, key_id, now)
    row = _get(connection, key_id)
    _note(connection, author, "create", None, row)
    return secret, row


def change_key(
    connection: Connection, id_or_name: str, value: KeySettings, author: Author = GLASSHOUSE, known: Known = NOTHING
) -> KeyRow:
    """What the key may do from now on; a value that it has already changes nothing. Raises NoSuch, UnknownName, NotAllowed,
    Repeated."""
    _check(value)
    lock(connection)
    former = _in_use(connection, id_or_name)
    check_references(connection, value, known)
    if unchanged(former.value, value):
        return former
    connection.execute(update(keys).where(keys.c.id == former.id).values(**_columns(value), changed_at=time.time_ns()))
    _set_tags(connection, former.id, value.tags)
    return _noted(connection, author, "change", former)


def rotate_key(connection: Connection, id_or_name: str, overlap_s: int, author: Author = GLASSHOUSE) -> tuple[str, KeyRow]:
    """A new secret → (it, the key's row). The former ones go on working for `overlap_s`, or less where they had less.

    Raises NoSuch, NotAllowed, Repeated.
    """
    if not 0 <= overlap_s <= LONGEST_OVERLAP_S:
        raise NotAllowed(f"overlap: {overlap_s} s is not usable; allowed: 0 to {LONGEST_OVERLAP_S} s")
    lock(connection)
    former = _in_use(connection, id_or_name)
    now = time.time_ns()
    ends_at = now + overlap_s * 1_000_000_000
    own = key_secrets.c.key_id == former.id
    longer = or_(key_secrets.c.ends_at.is_(None), key_secrets.c.ends_at > ends_at)
    connection.execute(update(key_secrets).where(own, longer).values(ends_at=ends_at))
    connection.execute(delete(key_secrets).where(own, key_secrets.c.ends_at <= now))
    connection.execute(update(keys).where(keys.c.id == former.id).values(changed_at=now))
    secret = _new_secret(connection, former.id, now)
    return secret, _noted(connection, author, "rotate", former)


def revoke_key(connection: Connection, id_or_name: str, author: Author = GLASSHOUSE) -> KeyRow:
    """End a key, and withdraw the answers that the cache has of it; one that was ended before stays as it is. Raises NoSuch,
    Repeated."""
    lock(connection)
    former = _get(connection, id_or_name)
    if former.revoked_at is not None:
        return former
    now = time.time_ns()
    connection.execute(update(keys).where(keys.c.id == former.id).values(revoked_at=now, changed_at=now))
    withdraw(connection, author, key_id=former.id)
    return _noted(connection, author, "revoke", former)


# -- reading --


def find_key(connection: Connection, id_or_name: str) -> KeyRow | None:
    """The key of this id, or the one in use that has this name."""
    return _found(connection, id_or_name)


def holder(connection: Connection, secret_hash: bytes, now_ns: int) -> KeyRow | None:
    """The key in use that this secret opens at that time, None if none does. It may be blocked or expired: its row says so."""
    live = and_(key_secrets.c.hash == secret_hash, or_(key_secrets.c.ends_at.is_(None), key_secrets.c.ends_at > now_ns))
    query = select(keys).join(key_secrets, keys.c.id == key_secrets.c.key_id).where(live, keys.c.revoked_at.is_(None))
    return _one(connection, query)


def list_keys(
    connection: Connection,
    *,
    after: str = "",
    limit: int | None = None,
    revoked: bool = True,
    team: str | None = None,
    user: str | None = None,
    project: str | None = None,
    tag: str | None = None,
    containing: str = "",
) -> list[KeyRow]:
    """Keys, ordered by name and then by id (by code points, as Python orders text). `after`: from behind this name, "\\0" and id.

    `revoked`: those that were revoked too. `containing`: that have this in their name, letter by letter.
    """
    name, _, key_id = after.partition("\0")
    wanted = {keys.c.team: team, keys.c.user_name: user, keys.c.project: project}
    if not all(storable(text) for text in (name, key_id, containing, tag or "", *filter(None, wanted.values()))):
        return []
    query = select(keys).limit(limit).where(*named_like(keys.c.name, containing))
    query = query.where(*(column == value for column, value in wanted.items() if value is not None))
    if after:
        query = query.where(or_(keys.c.name > name, and_(keys.c.name == name, keys.c.id > key_id)))
    if not revoked:
        query = query.where(keys.c.revoked_at.is_(None))
    if tag is not None:
        query = query.where(keys.c.id.in_(select(key_tags.c.key_id).where(key_tags.c.tag == tag)))
    return _rows(connection, query)


def live_keys(connection: Connection, names: Collection[str] | None = None) -> Iterator[LiveKey]:
    """Every secret of every key that isn't revoked; blocked and expired ones and secrets that ended too: a worker says why they
    don't work. `names`: of the keys of these names only."""
    may = (keys.c.settings, *(keys.c[column] for column in _COLUMNS.values()))
    query = select(key_secrets.c.hash, key_secrets.c.ends_at, keys.c.id, keys.c.name, *may)
    query = query.join(keys, keys.c.id == key_secrets.c.key_id).where(keys.c.revoked_at.is_(None))
    if names is not None:
        query = query.where(keys.c.name.in_(names))
    values: dict[tuple[Any, ...], KeySettings] = {}  # of a hundred thousand keys most may the same
    for digest, ends_at, key_id, name, *rest in connection.execute(query):
        if (value := values.get(row := tuple(rest))) is None:
            columns = dict(zip(_COLUMNS, row[1:], strict=True))
            value = values[row] = told(KeySettings, row[0], f"key {name!r}", **columns)
        yield LiveKey(bytes(digest), ends_at or 0, key_id, name, value)


# -- rows --


def _rows(connection: Connection, query: Select[Any]) -> list[KeyRow]:
    """The keys of `query`, ordered, with their secrets."""
    found = query.order_by(keys.c.name, keys.c.id).subquery()
    secret = [key_secrets.c[field].label(f"secret_{field}") for field in SecretRow._fields]
    newest_first = (key_secrets.c.ends_at.is_not(None), key_secrets.c.created_at.desc(), key_secrets.c.hash)
    joined = select(found, *secret).outerjoin(key_secrets, key_secrets.c.key_id == found.c.id)
    rows = connection.execute(joined.order_by(found.c.name, found.c.id, *newest_first)).mappings()
    return [_row(list(group)) for _, group in groupby(rows, key=lambda row: row["id"])]


def _row(rows: list[RowMapping]) -> KeyRow:
    """Of one key, a row for each secret."""
    first = rows[0]
    own = tuple(SecretRow(*(row[f"secret_{field}"] for field in SecretRow._fields)) for row in rows)
    return KeyRow(first["id"], first["name"], _value(first), first["created_at"], first["changed_at"], first["revoked_at"], own)


def _value(row: RowMapping) -> KeySettings:
    columns = {field: row[column] for field, column in _COLUMNS.items()}
    return told(KeySettings, row["settings"], f"key {row['name']!r}", **columns)


def _one(connection: Connection, query: Select[Any]) -> KeyRow | None:
    return next(iter(_rows(connection, query)), None)


def _found(connection: Connection, id_or_name: str) -> KeyRow | None:
    if not storable(id_or_name):
        return None
    in_use = and_(keys.c.name == id_or_name, keys.c.revoked_at.is_(None))
    return _one(connection, select(keys).where(or_(keys.c.id == id_or_name, in_use)))


def _get(connection: Connection, id_or_name: str) -> KeyRow:
    row = _found(connection, id_or_name)
    if row is None:
        raise NoSuch(_not_found(id_or_name))
    return row


def _in_use(connection: Connection, id_or_name: str) -> KeyRow:
    row = _get(connection, id_or_name)
    if row.revoked_at is not None:
        raise NotAllowed(f"the key {row.name!r} ({row.id}) was revoked; allowed: to create another")
    return row


def _not_found(id_or_name: str) -> str:
    if id_or_name.startswith(("gh-", "gha-")):
        return "no key found; a key is known by its id or name, not by its secret"
    return f"there is no key with the id or name {id_or_name[:_NAME_LENGTH]!r}"


# -- what changes have in common --


def check_name(name: str) -> None:
    """A name gets into logs, labels and tables: printable, short, and nothing that could be taken for an id or a secret."""
    if not 0 < len(name) <= _NAME_LENGTH or not name.isprintable() or name != name.strip():
        raise UnusableName(f"not usable as a name; allowed: 1 to {_NAME_LENGTH} printable characters, no space at either end")
    if name.startswith(_NO_NAMES):
        raise UnusableName(f"not usable as a name; allowed: names that don't begin with {' or '.join(map(repr, _NO_NAMES))}")


def _check(value: KeySettings) -> None:
    if value.hash is not None:
        raise NotAllowed("hash: a key of the database has secrets of its own; allowed: in the settings file")


def _columns(value: KeySettings) -> dict[str, Any]:
    columns = stored(value, _COLUMNS)
    return {_COLUMNS.get(field, field): each for field, each in columns.items()}


def _set_tags(connection: Connection, key_id: str, tags: Iterable[str]) -> None:
    connection.execute(delete(key_tags).where(key_tags.c.key_id == key_id))
    if rows := [{"tag": tag, "key_id": key_id} for tag in dict.fromkeys(tags)]:
        connection.execute(insert(key_tags), rows)


def _new_secret(connection: Connection, key_id: str, now: int) -> str:
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    values = {"hash": hash_key(secret), "key_id": key_id, "prefix": secret[:_SHOWN], "created_at": now}
    connection.execute(insert(key_secrets).values(values))
    return secret


def _noted(connection: Connection, author: Author, action: str, former: KeyRow) -> KeyRow:
    row = _get(connection, former.id)
    _note(connection, author, action, former, row)
    return row


def _note(connection: Connection, author: Author, action: str, former: KeyRow | None, row: KeyRow) -> None:
    before = None if former is None else _audited(former)
    team = row.value.team or (former.value.team if former is not None else None) or ""
    note(connection, author, action, "keys", row.name, team=team, before=before, after=_audited(row))


def _audited(row: KeyRow) -> dict[str, Any]:
    own = [secret._asdict() for secret in row.secrets]
    return {"id": row.id, **said(row.value), "revoked_at": row.revoked_at, "secrets": own}
