"""The nouns of the catalogue but for its keys: teams, users, projects, models, backends, and what everyone together may use.

Each value is one structure of `proxy.nouns`; in the database it is what was said of it, without what is as by default, so that a
default means the same to everybody. Each change counts the catalogue's revision up and writes an audit row, in the caller's
transaction. A value that is there already changes nothing.

What a value refers to by name must be there: in the database, or in the settings file, of which the caller tells by `known`: the
names that the file declares, by noun ("teams", "users", "projects").
"""

from __future__ import annotations

import re
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import NODEFAULT, Struct
from sqlalchemy import Column, ColumnElement, Connection, Select, Table, delete, func, insert, or_, select, update

from proxy.nouns import (
    MODEL_NAME,
    NAME,
    AllowanceSettings,
    BackendSettings,
    ModelSettings,
    ProjectSettings,
    TeamSettings,
    UserSettings,
)
from proxy.store.audit import Author, lock, note, storable
from proxy.store.engine import StoreError
from proxy.store.run_time import forget_run_time
from proxy.store.tables import admin_keys, backends, catalogue, keys, models, projects, teams, users

T = TypeVar("T", bound=Struct)

Known = Mapping[str, Container[str]]
"""Names that the settings file declares, by noun."""

NOTHING: Known = {}

_SECRET = re.compile(r"gha?-[A-Za-z0-9_-]{43}")
_LONGEST_NAME = 256
_TOLD = 3
"""So many of those that refer to something are named."""


class NoSuch(StoreError):
    """Nothing has this name (or id)."""


class NameTaken(StoreError):
    """Something of this name is in use."""


class UnusableName(StoreError):
    """Not a name for what it is for."""


class InUse(StoreError):
    """Others refer to it."""


class NotAllowed(StoreError):
    """Said of a thing what can't be said of it."""


class UnknownName(NotAllowed):
    """A value refers to something that isn't there."""


@dataclass(frozen=True, eq=False)
class Noun(Generic[T]):
    """A kind of thing. `name` and `one`: what it is called ("teams", "team"). `type`: what is known of each.

    columns: fields of `type` that have a column of their own. The other fields are JSON.
    """

    name: str
    one: str
    type: type[T]
    table: Table
    columns: tuple[str, ...] = ()
    named: str = NAME
    team: Column[Any] | None = None
    """Says whose it is."""


TEAMS = Noun("teams", "team", TeamSettings, teams, ("blocked",), team=teams.c.name)
USERS = Noun("users", "user", UserSettings, users, ("team", "blocked"), team=users.c.team)
PROJECTS = Noun("projects", "project", ProjectSettings, projects, ("team", "blocked"), team=projects.c.team)
MODELS = Noun("models", "model", ModelSettings, models, named=MODEL_NAME)
BACKENDS = Noun("backends", "backend", BackendSettings, backends, ("name",))


class Entry(NamedTuple, Generic[T]):
    """One thing of a noun. Times are ns since 1970, UTC."""

    name: str
    value: T
    created_at: int
    changed_at: int


# -- reading --


def revision(connection: Connection) -> int:
    """Goes up with every change. Read it *before* what it stands for: then a change between the two is seen at the next look."""
    return int(connection.execute(select(catalogue.c.revision)).scalar_one())


def find(connection: Connection, noun: Noun[T], name: str) -> Entry[T] | None:
    """What has this name; None if nothing has."""
    found = _entries(connection, noun, select(noun.table).where(noun.table.c.name == name)) if storable(name) else []
    return found[0] if found else None


def entries(
    connection: Connection,
    noun: Noun[T],
    *,
    after: str = "",
    limit: int | None = None,
    team: str | None = None,
    containing: str = "",
) -> list[Entry[T]]:
    """Those whose names come after `after`, `limit` of them, ordered by name (by code points, as Python orders text).

    `team`: of that team only; nothing but teams, users and projects is of a team. `containing`: that have this in their name,
    letter by letter.
    """
    query = select(noun.table).order_by(noun.table.c.name).limit(limit)
    if team is not None:
        if noun.team is None or not storable(team):
            return []
        query = query.where(noun.team == team)
    if not (storable(after) and storable(containing)):
        return []
    if after:
        query = query.where(noun.table.c.name > after)
    return _entries(connection, noun, query.where(*named_like(noun.table.c.name, containing)))


def everyone(connection: Connection) -> AllowanceSettings:
    """What everyone together may use."""
    return told(AllowanceSettings, connection.execute(select(catalogue.c.everyone)).scalar_one(), "everyone")


# -- changing --


def put(
    connection: Connection, noun: Noun[T], name: str, value: T, author: Author, known: Known = NOTHING
) -> tuple[Entry[T], bool]:
    """Make it what `value` says → (as it is now, whether it is new). Raises UnusableName, UnknownName, Repeated."""
    value = _named(noun, name, value)
    lock(connection)
    check_references(connection, value, known)
    former = find(connection, noun, name)
    if former is not None and unchanged(former.value, value):
        return former, False
    now = time.time_ns()
    columns = stored(value, noun.columns) | {"name": name}
    if former is None:
        entry = Entry(name, value, now, now)
        connection.execute(insert(noun.table).values(**columns, created_at=now, changed_at=now))
    else:
        entry = former._replace(value=value, changed_at=now)
        connection.execute(update(noun.table).where(noun.table.c.name == name).values(**columns, changed_at=now))
    before = None if former is None else said(former.value)
    team = _team(noun, entry) or ("" if former is None else _team(noun, former))
    action = "create" if former is None else "change"
    note(connection, author, action, noun.name, name, team=team, before=before, after=said(value))
    return entry, former is None


def remove(connection: Connection, noun: Noun[T], name: str, author: Author) -> Entry[T]:
    """→ what it was. Raises NoSuch, InUse, Repeated."""
    lock(connection)
    entry = find(connection, noun, name)
    if entry is None:
        raise NoSuch(f"there is no {noun.one} named {shown(name)}")
    if users_of := _referring(connection, noun, name):
        raise InUse(f"the {noun.one} {name!r} is in use by {users_of}; change or revoke them first")
    connection.execute(delete(noun.table).where(noun.table.c.name == name))
    if noun.name == BACKENDS.name:
        forget_run_time(connection, name)
    note(connection, author, "remove", noun.name, name, team=_team(noun, entry), before=said(entry.value))
    return entry


def put_everyone(connection: Connection, value: AllowanceSettings, author: Author) -> AllowanceSettings:
    """→ what everyone together may use from now on. Raises Repeated."""
    lock(connection)
    former = everyone(connection)
    if unchanged(former, value):
        return former
    connection.execute(update(catalogue).values(everyone=_json(said(value))))
    note(connection, author, "change", "everyone", "everyone", before=said(former), after=said(value))
    return value


# -- what the tables of names have in common --


def said(value: Struct) -> dict[str, Any]:
    """What was said of something, as JSON and YAML can hold it: every field that isn't as by default."""
    result = {}
    for field in msgspec.structs.fields(type(value)):
        each = getattr(value, field.name)
        default = field.default if field.default_factory is NODEFAULT else field.default_factory()
        if each != default or type(each) is not type(default):
            result[field.encode_name] = _builtins(each)
    return result


def unchanged(former: Struct, value: Struct) -> bool:
    """Whether both say the same to whoever reads JSON (to Python 1, 1.0 and True are equal)."""
    return _json(said(former), order="deterministic") == _json(said(value), order="deterministic")


def stored(value: Struct, columns: Iterable[str]) -> dict[str, Any]:
    """A row's columns: those of these names, and `settings` with the rest."""
    own = {name: getattr(value, name) for name in columns}
    rest = {name: each for name, each in said(value).items() if name not in own}
    return own | {"settings": _json(rest)}


def told(of: type[T], settings: str, what: str, **columns: Any) -> T:
    """The structure that a row says. Raises StoreError."""
    try:
        value: T = _decoder(of).decode(settings)
    except msgspec.ValidationError as error:
        raise StoreError(f"the database's {what} can't be read; perhaps a newer version has written it: {error}") from None
    return msgspec.structs.replace(value, **columns) if columns else value


def named_like(name: Column[Any], containing: str) -> list[ColumnElement[bool]]:
    """The condition that a name has `containing` in it: exactly what Python's `in` says, and nothing in it is a wildcard."""
    if not containing:
        return []
    if len(containing) > _LONGEST_NAME:
        return [or_(False)]
    return [func.replace(name, containing, "") != name]


def check_references(connection: Connection, value: Struct, known: Known) -> None:
    """Raises UnknownName if the team, user or project of `value` isn't there."""
    nouns: tuple[Noun[Any], ...] = (TEAMS, USERS, PROJECTS)
    for noun in nouns:
        name = getattr(value, noun.one, None)
        if name is not None and name not in known.get(noun.name, ()) and find(connection, noun, name) is None:
            raise UnknownName(f"{noun.one}: there is no {noun.one} named {shown(name)}; create it first")


def is_secret(text: str) -> bool:
    """Whether somebody gave a secret where a name is meant. Such a text is not to be repeated."""
    return _SECRET.fullmatch(text) is not None


def shown(name: str) -> str:
    """For an error's text: what somebody took for a name."""
    return "that (it looks like a secret)" if is_secret(name) else repr(name[:_LONGEST_NAME])


def _named(noun: Noun[T], name: str, value: T) -> T:
    """The value under a name that is fine for it. Raises UnusableName."""
    if re.fullmatch(noun.named, name) is None or not storable(name):
        raise UnusableName(f"not usable as the name of a {noun.one}; allowed: {_allowed(noun)}")
    if is_secret(name):
        raise UnusableName(f"not usable as the name of a {noun.one}: it looks like a secret")
    if "name" not in noun.columns:
        return value
    if getattr(value, "name") not in (None, name):  # noqa: B009  (not every structure has one)
        raise UnusableName(f"the {noun.one} {name!r} is called otherwise in its own `name`; allowed: the same, or none")
    return msgspec.structs.replace(value, name=name)


def _allowed(noun: Noun[T]) -> str:
    if noun.named == NAME:
        return "1 to 64 letters (a-z), digits, dots, dashes and underscores, a letter or digit first"
    return "1 to 256 characters without spaces and control characters"


def _entries(connection: Connection, noun: Noun[T], query: Select[Any]) -> list[Entry[T]]:
    rows = connection.execute(query).mappings()
    return [Entry(row["name"], _value(noun, row), row["created_at"], row["changed_at"]) for row in rows]


def _value(noun: Noun[T], row: Mapping[Any, Any]) -> T:
    columns = {name: row[name] for name in noun.columns}
    return told(noun.type, row["settings"], f"{noun.one} {row['name']!r}", **columns)


def _team(noun: Noun[T], entry: Entry[T]) -> str:
    return entry.name if noun.name == TEAMS.name else getattr(entry.value, "team", None) or ""


def _referring(connection: Connection, noun: Noun[T], name: str) -> str:
    """Who refers to it, for people; "" if nobody does."""
    named = []
    for what, column, where in _REFERENCES.get(noun.name, ()):
        query = select(column.table.c.name).where(column == name, *where).order_by(column.table.c.name)
        if names := list(connection.execute(query.limit(_TOLD + 1)).scalars()):
            more = " and more" if len(names) > _TOLD else ""
            named.append(f"the {what} {', '.join(map(repr, names[:_TOLD]))}{more}")
    return ", ".join(named)


_USED_KEYS = (keys.c.revoked_at.is_(None),)
_REFERENCES: dict[str, tuple[tuple[str, Column[Any], tuple[ColumnElement[bool], ...]], ...]] = {
    TEAMS.name: (
        ("users", users.c.team, ()),
        ("projects", projects.c.team, ()),
        ("keys", keys.c.team, _USED_KEYS),
        ("admin keys", admin_keys.c.team, (admin_keys.c.revoked_at.is_(None),)),
    ),
    USERS.name: (("keys", keys.c.user_name, _USED_KEYS),),
    PROJECTS.name: (("keys", keys.c.project, _USED_KEYS),),
}
"""Noun → who may refer to one: what they are, by which column, and which of them count."""


def _builtins(value: Any) -> Any:
    if isinstance(value, Struct):
        return said(value)
    if isinstance(value, tuple | list):
        return [_builtins(each) for each in value]
    return msgspec.to_builtins(value)


def _json(value: Any, order: Literal["deterministic"] | None = None) -> str:
    return msgspec.json.encode(value, order=order).decode()


@lru_cache(maxsize=16)
def _decoder(of: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(of)
