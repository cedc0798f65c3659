"""`/keys`: who may use the models. A key is known by its id or, while it is in use, by its name.

Its secret is told once, to who creates or rotates it: nobody has it afterwards. A name that holds a slash can't stand in a path;
such a key has its id.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import MANAGERS, READERS, Caller, allow
from proxy.control.answers import MaybeText, Page, PartOf, Text, answer, documented
from proxy.control.bodies import body_of, patch_of
from proxy.control.catalogue import HeldKey
from proxy.control.errors import Conflict, DeclaredInFile
from proxy.control.members import of_own_team
from proxy.control.resource import missing
from proxy.control.state import Asking, Given, State, when
from proxy.control.writes import REPLAYED, Signed, declared_names, done_before, other_change
from proxy.nouns import KeySettings
from proxy.store import Author, change_key, create_key, find_key, lock, revoke_key, rotate_key

DAY_S = 86_400
NOUN = "keys"
_NOTHING = KeySettings()

router = APIRouter(tags=[NOUN])
Known = Annotated[str, Path(description="Its id or name.")]


class Secret(msgspec.Struct, kw_only=True):
    """One of a key's secrets. `prefix`: its first characters, to tell it by. `ends_at`: when it stops working, after a
    rotation."""

    prefix: str
    created_at: datetime | None
    ends_at: datetime | None


class Key(msgspec.Struct, kw_only=True):
    """`declared`: which of `settings` the configuration file says. `prefix`: of the newest secret."""

    object: Literal["key"] = "key"
    id: str
    name: str
    prefix: str | None
    source: Literal["file", "database"]
    declared: list[str]
    created_at: datetime | None
    changed_at: datetime | None
    revoked_at: datetime | None
    secrets: list[Secret]
    settings: KeySettings


class KeyWithSecret(Key, kw_only=True):
    """`secret` is told this once. It is null if no new one was made: the key was there and only its settings were replaced, or
    the request repeats another one (`secret_told_before`)."""

    secret: str | None
    secret_told_before: bool = False


class NewKey(KeySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key's name and its settings."""

    name: str


class Rotation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """overlap_seconds: for how long the former secret goes on working."""

    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=366 * DAY_S)] = DAY_S


# -- routes --


@router.get("/keys", summary="List keys", **documented(Page[Key]))
@allow(*READERS)
async def several(
    given: Given,
    caller: Asking,
    part: PartOf,
    revoked: bool = False,
    team: MaybeText = None,
    user: MaybeText = None,
    project: MaybeText = None,
    tag: MaybeText = None,
    containing: Text = "",
) -> Response:
    """`revoked=true`: those that were revoked too."""
    if caller.team is not None and team not in (None, caller.team):
        return answer(part.page([], show, place_of))

    def look(connection: Connection) -> list[HeldKey]:
        return catalogue.key_page(
            connection,
            given.settings,
            after=part.after,
            limit=part.most,
            revoked=revoked,
            team=caller.team or team,
            user=user,
            project=project,
            tag=tag,
            containing=containing,
        )

    return answer(part.page(await given.database.read(look), show, place_of))


@router.get("/keys/{key}", summary="One key", **documented(Key))
@allow(*READERS)
async def one(given: Given, caller: Asking, key: Known) -> Response:
    return answer(show(await given.database.read(_find, given, caller, key)))


@router.post("/keys", summary="Create a key", **documented(KeyWithSecret, 201, 200, body=NewKey))
@allow(*MANAGERS)
async def post(given: Given, caller: Asking, author: Signed, new: Annotated[Any, Depends(body_of(NewKey))]) -> Response:
    settings = KeySettings(**{field: getattr(new, field) for field in KeySettings.__struct_fields__})
    held, secret, replayed = await given.database.write(_create, given, caller, new.name, settings, author)
    return _told(held, secret, replayed)


@router.put(
    "/keys/{key}", summary="Create a key, or replace its settings", **documented(KeyWithSecret, 200, 201, body=KeySettings)
)
@allow(*MANAGERS)
async def put(
    given: Given, caller: Asking, author: Signed, key: Known, settings: Annotated[Any, Depends(body_of(KeySettings))]
) -> Response:
    held, secret, replayed = await given.database.write(_put, given, caller, key, settings, author)
    return _told(held, secret, replayed)


@router.patch("/keys/{key}", summary="Change a key", **documented(Key, body=KeySettings))
@allow(*MANAGERS)
async def patch(
    given: Given, caller: Asking, author: Signed, key: Known, changes: Annotated[Any, Depends(patch_of(KeySettings))]
) -> Response:
    return _changed(*await given.database.write(change, given, caller, key, changes.onto, author))


@router.post("/keys/{key}/rotate", summary="Give a key a new secret", **documented(KeyWithSecret, body=Rotation))
@allow(*MANAGERS)
async def rotate(
    given: Given, caller: Asking, author: Signed, key: Known, rotation: Annotated[Any, Depends(body_of(Rotation))]
) -> Response:
    held, secret, replayed = await given.database.write(_rotate, given, caller, key, rotation.overlap_seconds, author)
    return answer(_with_secret(held, secret, replayed), headers=REPLAYED if replayed else None)


@router.post("/keys/{key}/block", summary="Block a key", **documented(Key))
@allow(*MANAGERS)
async def block(given: Given, caller: Asking, author: Signed, key: Known) -> Response:
    """It stays, and doesn't work."""
    return await _set_blocked(given, caller, author, key, True)


@router.post("/keys/{key}/unblock", summary="Unblock a key", **documented(Key))
@allow(*MANAGERS)
async def unblock(given: Given, caller: Asking, author: Signed, key: Known) -> Response:
    return await _set_blocked(given, caller, author, key, False)


@router.delete("/keys/{key}", summary="Revoke a key", **documented(Key))
@allow(*MANAGERS)
async def revoke(given: Given, caller: Asking, author: Signed, key: Known) -> Response:
    """It never works again. What it was used for stays."""
    return _changed(*await given.database.write(_revoke, given, caller, key, author))


# -- in a transaction --


def _find(connection: Connection, state: State, caller: Caller, key: str) -> HeldKey:
    held = catalogue.key(connection, state.settings, key)
    if held is None or not caller.sees(held.value.team):
        raise missing("key", key)
    return held


def _own(connection: Connection, state: State, caller: Caller, key: str) -> HeldKey:
    """The key, if the database has it and it is in use."""
    held = _find(connection, state, caller, key)
    if held.source == "file":
        raise DeclaredInFile(f"the key {held.name!r}")
    return held


def _create(
    connection: Connection, state: State, caller: Caller, name: str, settings: KeySettings, author: Author
) -> tuple[HeldKey, str | None, bool]:
    """→ the key, its secret, whether that was done before."""
    lock(connection)
    if (row := done_before(connection, author, NOUN, name, "create")) is not None:
        return _find(connection, state, caller, row.after["id"]), None, True
    if name in state.settings.keys and state.settings.keys[name].hash is not None:
        raise DeclaredInFile(f"the key {name!r}")
    settings = of_own_team(connection, state, caller, name, settings, None)
    secret, made = create_key(connection, name, settings, author, declared_names(state.settings))
    return _find_again(connection, state, made.id), secret, False


def _put(
    connection: Connection, state: State, caller: Caller, key: str, settings: KeySettings, author: Author
) -> tuple[HeldKey, str | None, bool]:
    lock(connection)
    held = catalogue.key(connection, state.settings, key)
    if held is None:
        return _create(connection, state, caller, key, settings, author)
    if not caller.sees(held.value.team):
        raise missing("key", key) if key == held.id else Conflict(f"the name {key!r} is not free", code="name_taken")
    if done_before(connection, author, NOUN, held.name, "create", "change"):
        return held, None, True
    return _change(connection, state, caller, held, settings, author), None, False


def change(
    connection: Connection,
    state: State,
    caller: Caller,
    key: str,
    changed: Callable[[KeySettings], KeySettings],
    author: Author,
) -> tuple[HeldKey, bool]:
    """→ what is there now, whether that was done before."""
    lock(connection)
    held = _find(connection, state, caller, key)
    if done_before(connection, author, NOUN, held.name, "change"):
        return held, True
    return _change(connection, state, caller, held, changed(held.value), author), False


def _change(
    connection: Connection, state: State, caller: Caller, held: HeldKey, settings: KeySettings, author: Author
) -> HeldKey:
    if held.source == "file":
        raise DeclaredInFile(f"the key {held.name!r}")
    if said := [field for field in held.declared if getattr(settings, field) not in _as_before(held, field)]:
        raise DeclaredInFile(f"{', '.join(said)} of the key {held.name!r}")
    stored = find_key(connection, held.id)
    assert stored is not None  # noqa: S101  (that is where it came from)
    settings = of_own_team(connection, state, caller, held.name, settings, held.value)
    settings = msgspec.structs.replace(settings, **{field: getattr(stored.value, field) for field in held.declared})
    change_key(connection, held.id, settings, author, declared_names(state.settings))
    return _find_again(connection, state, held.id)


def _as_before(held: HeldKey, field: str) -> tuple[Any, Any]:
    """What may be sent for a field that is the file's: what it is, or nothing."""
    return getattr(held.value, field), getattr(_NOTHING, field)


def _rotate(
    connection: Connection, state: State, caller: Caller, key: str, overlap_s: int, author: Author
) -> tuple[HeldKey, str | None, bool]:
    lock(connection)
    held = _own(connection, state, caller, key)
    if done_before(connection, author, NOUN, held.name, "rotate"):
        return held, None, True
    secret, _ = rotate_key(connection, held.id, overlap_s, author)
    return _find_again(connection, state, held.id), secret, False


def _revoke(connection: Connection, state: State, caller: Caller, key: str, author: Author) -> tuple[HeldKey, bool]:
    lock(connection)
    if (row := done_before(connection, author, NOUN, None, "revoke")) is not None:
        held = _find(connection, state, caller, row.after["id"])  # its name may be another's by now
        if key not in (held.id, held.name):
            raise other_change()
        return held, True
    held = _own(connection, state, caller, key)
    revoke_key(connection, held.id, author)
    return _find_again(connection, state, held.id), False


def _find_again(connection: Connection, state: State, key_id: str) -> HeldKey:
    held = catalogue.key(connection, state.settings, key_id)
    assert held is not None  # noqa: S101  (it was just written)
    return held


async def _set_blocked(given: State, caller: Caller, author: Author, key: str, blocked: bool) -> Response:
    def changed(value: KeySettings) -> KeySettings:
        return msgspec.structs.replace(value, blocked=blocked)

    return _changed(*await given.database.write(change, given, caller, key, changed, author))


# -- answers --


def show(held: HeldKey) -> Key:
    return Key(**_fields(held))


def _fields(held: HeldKey) -> dict[str, Any]:
    secrets = [Secret(prefix=each.prefix, created_at=when(each.created_at), ends_at=when(each.ends_at)) for each in held.secrets]
    return {
        "id": held.id,
        "name": held.name,
        "prefix": secrets[0].prefix if secrets else None,
        "source": held.source,
        "declared": list(held.declared),
        "created_at": when(held.created_at),
        "changed_at": when(held.changed_at),
        "revoked_at": when(held.revoked_at),
        "secrets": secrets,
        "settings": held.value,
    }


def _with_secret(held: HeldKey, secret: str | None, replayed: bool) -> KeyWithSecret:
    return KeyWithSecret(**_fields(held), secret=secret, secret_told_before=replayed)


def _told(held: HeldKey, secret: str | None, replayed: bool) -> Response:
    return answer(_with_secret(held, secret, replayed), 200 if secret is None else 201, REPLAYED if replayed else None)


def _changed(held: HeldKey, replayed: bool) -> Response:
    return answer(show(held), headers=REPLAYED if replayed else None)


def place_of(held: HeldKey) -> str:
    """Behind which the list goes on."""
    return f"{held.name}\0{held.id}"
