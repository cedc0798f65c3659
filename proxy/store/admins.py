"""Admin keys: who may use the control API.

Their secrets are `gha-` and 43 url-safe characters, made, shown and kept as those of API keys are (`keys.py`). One may also be
given from outside, as a deployment's secret store does; then it must be one that nobody guesses.
"""

from __future__ import annotations

import secrets
import time
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, insert, or_, select, update

from proxy.store.audit import GLASSHOUSE, Author, lock, note, storable
from proxy.store.catalogue import NOTHING, TEAMS, Known, NameTaken, NoSuch, NotAllowed, UnknownName, find, shown
from proxy.store.engine import StoreError
from proxy.store.keys import check_name, hash_key
from proxy.store.tables import admin_keys

Role = Literal["admin", "manager", "viewer"]

ADMIN_PREFIX = "gha-"
_SHOWN = 4
_SHORTEST, _LONGEST, _DIFFERENT = 32, 256, 12
_KNOWN = (
    *("sk-1234", "changeme", "change-me", "change_me", "password", "passwd", "secret", "example", "default", "admin", "master"),
    *("letmein", "token", "test", "glasshouse", "qwerty", "asdfgh", "zxcvbn", "your-", "api-key", "api_key", "deadbeef"),
)
"""Words of documentation and of habit: what they add to a secret counts for nothing."""


class WeakSecret(StoreError):
    """A given secret that somebody could guess."""


class AdminRow(NamedTuple):
    """An admin key as people may see it. `role`: "admin", "manager" (of `team`) or "viewer" (of `team`, None: of all). Times
    are ns since 1970, UTC."""

    id: str
    name: str
    role: str
    team: str | None
    prefix: str
    created_at: int
    revoked_at: int | None
    expires_at: int | None


def create_admin_key(
    connection: Connection,
    name: str,
    role: Role,
    team: str | None = None,
    expires_at: int | None = None,
    author: Author = GLASSHOUSE,
    secret: str | None = None,
    known: Known = NOTHING,
) -> tuple[str, AdminRow]:
    """A new admin key → (the secret, its row). `secret`: this one, instead of a new one. `known`: as in `catalogue.py`.

    Raises UnusableName, NameTaken, NotAllowed, UnknownName, WeakSecret, Repeated.
    """
    check_name(name)
    if secret is None:
        secret = ADMIN_PREFIX + secrets.token_urlsafe(32)
    check_secret(secret)
    _check_role(role, team)
    lock(connection)
    if team is not None and team not in known.get(TEAMS.name, ()) and find(connection, TEAMS, team) is None:
        raise UnknownName(f"team: there is no team named {shown(team)}; create it first")
    if _rows(connection, admin_keys.c.name == name, admin_keys.c.revoked_at.is_(None)):
        raise NameTaken(f"there is an admin key named {name!r} already; revoke it first, or choose another name")
    digest = hash_key(secret)
    if same := _rows(connection, admin_keys.c.hash == digest):
        raise NameTaken(f"this secret is or was that of the admin key {same[0].name!r}; choose another secret")
    prefix = secret[: _SHOWN + (len(ADMIN_PREFIX) if secret.startswith(ADMIN_PREFIX) else 0)]
    row = AdminRow(f"adm_{secrets.token_hex(8)}", name, role, team, prefix, time.time_ns(), None, expires_at)
    connection.execute(insert(admin_keys).values(**row._asdict(), hash=digest))
    _note(connection, author, "create", None, row)
    return secret, row


def list_admin_keys(
    connection: Connection, *, after: str = "", limit: int | None = None, revoked: bool = True, team: str | None = None
) -> list[AdminRow]:
    """Ordered by name and then by id. `after`: from behind this name, "\\0" and id."""
    name, _, key_id = after.partition("\0")
    if not (storable(name) and storable(key_id) and storable(team or "")):
        return []
    where: list[ColumnElement[bool]] = []
    if after:
        where.append(or_(admin_keys.c.name > name, and_(admin_keys.c.name == name, admin_keys.c.id > key_id)))
    if not revoked:
        where.append(admin_keys.c.revoked_at.is_(None))
    if team is not None:
        where.append(admin_keys.c.team == team)
    return _rows(connection, *where, limit=limit)


def revoke_admin_key(connection: Connection, id_or_name: str, author: Author = GLASSHOUSE) -> AdminRow:
    """End an admin key; one that was ended before stays as it is. Raises NoSuch, Repeated."""
    lock(connection)
    former = find_admin_key(connection, id_or_name)
    if former is None:
        raise NoSuch(_not_found(id_or_name))
    if former.revoked_at is not None:
        return former
    row = former._replace(revoked_at=time.time_ns())
    connection.execute(update(admin_keys).where(admin_keys.c.id == row.id).values(revoked_at=row.revoked_at))
    _note(connection, author, "revoke", former, row)
    return row


def find_admin_key(connection: Connection, id_or_name: str) -> AdminRow | None:
    """The admin key of this id, or the one in use that has this name."""
    if not storable(id_or_name):
        return None
    in_use = and_(admin_keys.c.name == id_or_name, admin_keys.c.revoked_at.is_(None))
    return next(iter(_rows(connection, or_(admin_keys.c.id == id_or_name, in_use))), None)


def find_admin(connection: Connection, secret_hash: bytes, now_ns: int) -> AdminRow | None:
    """Whose secret this is, if the key is neither revoked nor expired at that time."""
    expired = or_(admin_keys.c.expires_at.is_(None), admin_keys.c.expires_at > now_ns)
    found = _rows(connection, admin_keys.c.hash == secret_hash, admin_keys.c.revoked_at.is_(None), expired)
    return next(iter(found), None)


def check_secret(secret: str) -> None:
    """Raises WeakSecret for what could be guessed, or couldn't be sent."""
    if why := _weakness(secret):
        raise WeakSecret(
            f"not usable as the secret of an admin key: {why}; allowed: {_SHORTEST} to {_LONGEST} printable ASCII characters "
            f"without spaces, at least {_DIFFERENT} of them different, that are no known words and don't repeat themselves, "
            "such as the output of: openssl rand -base64 32"
        )


def _weakness(secret: str) -> str:
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        return "it has spaces or characters that can't be sent"
    if not _SHORTEST <= len(secret) <= _LONGEST:
        return f"it has {len(secret)} characters"
    if secret.startswith("gh-"):
        return "what begins with 'gh-' is a caller's key"
    rest = secret.casefold()
    for word in _KNOWN:
        rest = rest.replace(word, "")
    if len(rest) < len(secret) and len(rest) < _SHORTEST:
        return "it is made of words that everybody knows"
    if len(set(secret)) < _DIFFERENT:
        return f"only {len(set(secret))} of its characters are different"
    if _is_pattern(rest):
        return "it repeats itself or counts up"
    return ""


def _is_pattern(text: str) -> bool:
    """Whether half of it follows from the characters before: three that were there already, or neighbours in the alphabet."""
    threes = {text[at : at + 3] for at in range(len(text) - 2)}
    steps = sum(abs(ord(left) - ord(right)) <= 1 for left, right in pairwise(text))
    return len(threes) * 2 < len(text) - 2 or steps * 2 > len(text) - 1


def _check_role(role: str, team: str | None) -> None:
    if role not in ("admin", "manager", "viewer"):
        raise NotAllowed(f"role: {role!r} is not known; allowed: admin, manager, viewer")
    if role == "manager" and team is None:
        raise NotAllowed("role: a manager is one of a team; allowed: with a team")
    if role == "admin" and team is not None:
        raise NotAllowed("role: an admin is everybody's; allowed: without a team")


def _rows(connection: Connection, *where: ColumnElement[bool], limit: int | None = None) -> list[AdminRow]:
    columns = (admin_keys.c[field] for field in AdminRow._fields)
    query = select(*columns).where(*where).order_by(admin_keys.c.name, admin_keys.c.id).limit(limit)
    return [AdminRow(*row) for row in connection.execute(query)]


def _note(connection: Connection, author: Author, action: str, former: AdminRow | None, row: AdminRow) -> None:
    before = None if former is None else _audited(former)
    note(connection, author, action, "admins", row.name, team=row.team or "", before=before, after=_audited(row))


def _audited(row: AdminRow) -> dict[str, Any]:
    return {field: value for field, value in row._asdict().items() if field != "name" and value is not None}


def _not_found(id_or_name: str) -> str:
    if id_or_name.startswith(("gh-", "gha-")):
        return "no admin key found; one is known by its id or name, not by its secret"
    return f"there is no admin key with the id or name {shown(id_or_name)}"
