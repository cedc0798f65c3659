"""What holds: what the file declares, over what the database has.

Of what both have, the file's holds. Its keys are of two kinds. One with a `hash` is a whole key; if a key of the database has
this secret, it is the same key and keeps its id, so that what it spent stays its own. One without lies over the key in use of its
name: what it says holds, what it doesn't say is the database's.

Functions take a `Connection` first and wait for nothing but the database.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from sqlalchemy import Connection

from proxy import store
from proxy.nouns import (
    AllowanceSettings,
    BackendSettings,
    KeySettings,
    ModelSettings,
    ProjectSettings,
    RunTimeSettings,
    TeamSettings,
    UserSettings,
)
from proxy.settings import Settings
from proxy.store import BACKENDS, MODELS, PROJECTS, TEAMS, USERS, Entry, KeyRow, Noun, SecretRow

T = TypeVar("T", bound=msgspec.Struct)
S = TypeVar("S", bound=msgspec.Struct)
Source = Literal["file", "database"]


class Held(NamedTuple, Generic[T]):
    """One object of a noun. Times are ns since 1970, UTC; of what a file declares they aren't known: 0. `run_time`: of a
    backend."""

    name: str
    value: T
    source: Source
    created_at: int = 0
    changed_at: int = 0
    run_time: RunTimeSettings = RunTimeSettings()


class HeldKey(NamedTuple):
    """A key. `declared`: the fields of `value` that are the file's (all of them where it is the `source`)."""

    id: str
    name: str
    value: KeySettings
    source: Source
    declared: tuple[str, ...] = ()
    created_at: int = 0
    changed_at: int = 0
    revoked_at: int | None = None
    secrets: tuple[SecretRow, ...] = ()
    """None of one that only the file knows: it has the hash."""


class Catalogue(msgspec.Struct, frozen=True):
    """All but the keys: the database's, or that with the file's over it."""

    everyone: AllowanceSettings = AllowanceSettings()
    teams: dict[str, TeamSettings] = {}
    users: dict[str, UserSettings] = {}
    projects: dict[str, ProjectSettings] = {}
    models: dict[str, ModelSettings] = {}
    backends: dict[str, BackendSettings] = {}
    run_time: dict[str, RunTimeSettings] = {}
    """Of backends."""


# -- one noun --


def declared(settings: Settings, noun: Noun[T]) -> Mapping[str, T]:
    """What the file has of a noun."""
    every: dict[str, Mapping[str, Any]] = {
        TEAMS.name: settings.teams,
        USERS.name: settings.users,
        PROJECTS.name: settings.projects,
        MODELS.name: settings.models,
        BACKENDS.name: _declared_backends(settings),
    }
    return every[noun.name]


def one(connection: Connection, settings: Settings, noun: Noun[T], name: str) -> Held[T] | None:
    """The object of that name, None if there is none."""
    if (value := declared(settings, noun).get(name)) is not None:
        found: list[Held[T]] = [Held(name, value, "file")]
    else:
        entry = store.find(connection, noun, name)
        found = [] if entry is None else [_stored(entry)]
    return next(iter(_with_run_time(connection, noun, found)), None)


def page(
    connection: Connection,
    settings: Settings,
    noun: Noun[T],
    *,
    after: str = "",
    limit: int | None = None,
    team: str | None = None,
    containing: str = "",
) -> list[Held[T]]:
    """The objects after that name, by name. `team`: of that team only."""
    ours = declared(settings, noun)
    most = None if limit is None else limit + len(ours)  # of which the file's may take the place
    entries = store.entries(connection, noun, after=after, limit=most, team=team, containing=containing)
    merged = [_stored(entry) for entry in entries if entry.name not in ours]
    for name, value in ours.items():
        if name > after and containing in name and (team is None or _team(noun, name, value) == team):
            merged.append(Held(name, value, "file"))
    return _with_run_time(connection, noun, sorted(merged, key=lambda each: each.name)[:limit])


def everyone(connection: Connection, settings: Settings) -> Held[AllowanceSettings]:
    """What everyone together may use."""
    if settings.everyone != AllowanceSettings():
        return Held("everyone", settings.everyone, "file")
    return Held("everyone", store.everyone(connection), "database")


# -- keys --


def file_key_id(digest: bytes) -> str:
    """Of a key that only the file knows."""
    return f"key_{digest.hex()[:16]}"


def digest_of(value: KeySettings) -> bytes | None:
    """The sha256 of the whole secret, where the file says it."""
    return None if value.hash is None else bytes.fromhex(value.hash.removeprefix("sha256:"))


def laid_over(said: S, other: S) -> S:
    """Field by field: `said`, and where that says nothing (it holds the default) what `other` has."""
    return msgspec.structs.replace(other, **{field: getattr(said, field) for field in said_fields(said)})


def said_fields(said: msgspec.Struct) -> tuple[str, ...]:
    """The fields that hold something else than their default."""
    return tuple(field.name for field in msgspec.structs.fields(said) if getattr(said, field.name) != _default(field))


def key(connection: Connection, settings: Settings, id_or_name: str) -> HeldKey | None:
    """The key with that id or, among those in use, that name."""
    for name, value in settings.keys.items():
        if (digest := digest_of(value)) is not None:
            held = _whole(connection, name, value, digest)
            if id_or_name in (held.id, name):
                return held
    row = store.find_key(connection, id_or_name)
    return None if row is None else _with_declared(settings, row)


def key_page(
    connection: Connection,
    settings: Settings,
    *,
    after: str = "",
    limit: int | None = None,
    revoked: bool = True,
    team: str | None = None,
    user: str | None = None,
    project: str | None = None,
    tag: str | None = None,
    containing: str = "",
) -> list[HeldKey]:
    """The keys after `after` (name, "\\0" and id), by name and id."""

    def wanted(held: HeldKey) -> bool:
        value = held.value
        return (
            (held.name, held.id) > ((*after.split("\0"), "")[:2] if after else ("", ""))
            and containing in held.name
            and (team is None or value.team == team)
            and (user is None or value.user == user)
            and (project is None or value.project == project)
            and (tag is None or tag in value.tags)
        )

    ours = list(_declared_keys(connection, settings))
    known = {held.id for held in ours}
    rows = store.list_keys(
        connection,
        after=after,
        limit=None if limit is None else limit + len(ours),
        revoked=revoked,
        team=team,
        user=user,
        project=project,
        tag=tag,
        containing=containing,
    )
    merged = [_of_row(row) for row in rows if row.id not in known]
    merged += filter(wanted, ours)
    return sorted(merged, key=lambda each: (each.name, each.id))[:limit]


def _declared_keys(connection: Connection, settings: Settings) -> Iterator[HeldKey]:
    """Every key that the file says something of: what the database thinks of its team, it may not be in."""
    for name, value in settings.keys.items():
        if (digest := digest_of(value)) is not None:
            yield _whole(connection, name, value, digest)
        elif (row := store.find_key(connection, name)) is not None and row.name == name:
            yield _with_declared(settings, row)


def _whole(connection: Connection, name: str, value: KeySettings, digest: bytes) -> HeldKey:
    fields = tuple(field.name for field in msgspec.structs.fields(KeySettings))
    row = store.holder(connection, digest, 0)  # also by a secret that has ended there: the file says that it works
    if row is None:
        return HeldKey(file_key_id(digest), name, value, "file", fields)
    return HeldKey(row.id, name, value, "file", fields, row.created_at, row.changed_at, None, row.secrets)


def _with_declared(settings: Settings, row: KeyRow) -> HeldKey:
    said = settings.keys.get(row.name)
    if said is None or said.hash is not None or row.revoked_at is not None:
        return _of_row(row)
    return _of_row(row)._replace(value=laid_over(said, row.value), declared=said_fields(said))


def _of_row(row: KeyRow) -> HeldKey:
    return HeldKey(
        row.id, row.name, row.value, "database", (), row.created_at, row.changed_at, row.revoked_at, tuple(row.secrets)
    )


# -- everything --


def stored(connection: Connection) -> Catalogue:
    """What the database has."""

    def every(noun: Noun[T]) -> dict[str, T]:
        return {entry.name: entry.value for entry in store.entries(connection, noun)}

    return Catalogue(
        everyone=store.everyone(connection),
        teams=every(TEAMS),
        users=every(USERS),
        projects=every(PROJECTS),
        models=every(MODELS),
        backends=every(BACKENDS),
        run_time=store.run_time(connection),
    )


def holding(settings: Settings, database: Catalogue) -> Catalogue:
    """The file's over the database's, and before it."""
    return Catalogue(
        everyone=database.everyone if settings.everyone == AllowanceSettings() else settings.everyone,
        teams=_over(settings.teams, database.teams),
        users=_over(settings.users, database.users),
        projects=_over(settings.projects, database.projects),
        models=_over(settings.models, database.models),
        backends=_over(_declared_backends(settings), database.backends),
        run_time=database.run_time,
    )


def _over(file: dict[str, T], database: dict[str, T]) -> dict[str, T]:
    return file | {name: value for name, value in database.items() if name not in file}


def _declared_backends(settings: Settings) -> dict[str, BackendSettings]:
    return {settings.backend_name(index): each for index, each in enumerate(settings.backends)}


def _with_run_time(connection: Connection, noun: Noun[T], found: list[Held[T]]) -> list[Held[T]]:
    if noun.name != BACKENDS.name or not found:
        return found
    said = store.run_time(connection)
    return [each._replace(run_time=said.get(each.name, RunTimeSettings())) for each in found]


def _stored(entry: Entry[T]) -> Held[T]:
    return Held(entry.name, entry.value, "database", entry.created_at, entry.changed_at)


def _team(noun: Noun[Any], name: str, value: Any) -> str | None:
    return name if noun.name == TEAMS.name else getattr(value, "team", None)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
