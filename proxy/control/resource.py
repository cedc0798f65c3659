"""A noun's routes: list, one, PUT (create or replace), PATCH (JSON merge patch), DELETE. The same for all that have a name and
settings; what is special of a noun is in its own file.

What is of another team than the caller's isn't there: 404, in the same words as for what nobody has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Path
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import Caller, Standing, allow
from proxy.control.answers import Page, PartOf, Text, answer, documented
from proxy.control.bodies import as_written, body_of, patch_of
from proxy.control.catalogue import Held
from proxy.control.errors import Conflict, DeclaredInFile
from proxy.control.state import Asking, Given, State, when
from proxy.control.writes import REPLAYED, Signed, declared_names, done_before
from proxy.errors import NotFound
from proxy.store import TEAMS, Author, Noun, lock, put, remove

T = TypeVar("T", bound=msgspec.Struct)


class Object(msgspec.Struct, kw_only=True):
    """What each object of a noun has besides its settings. `source`: whether the configuration file declares it (then it is
    changed there) or the database has it; when it was made and changed is known of the latter only."""

    name: str
    source: Literal["file", "database"]
    created_at: datetime | None
    changed_at: datetime | None


class Removed(msgspec.Struct, kw_only=True):
    object: str
    name: str
    deleted: Literal[True] = True


def common(held: Held[Any]) -> dict[str, Any]:
    """The fields of an Object."""
    return {
        "name": held.name,
        "source": held.source,
        "created_at": when(held.created_at),
        "changed_at": when(held.changed_at),
        "settings": held.value,
    }


def team_of(noun: Noun[Any], name: str, value: Any) -> str | None:
    """Whose an object is."""
    return name if noun is TEAMS else getattr(value, "team", None)


def missing(noun: str, name: str) -> NotFound:
    return NotFound(f"there is no {noun} {name!r}", code="not_found")


Check = Callable[[Connection, State, Caller, str, Any, Any], Any]
"""(connection, state, caller, name, value, the value before or None) → the value as it may be put. Raises ProxyError."""


def unchecked(_connection: Connection, _state: State, _caller: Caller, _name: str, value: Any, _before: Any) -> Any:
    return value


@dataclass(frozen=True)
class Resource(Generic[T]):
    """How a noun differs from others. `show`: an object as it is answered, a `shown`."""

    noun: Noun[T]
    shown: type[Object]
    show: Callable[[State, Held[T]], Object]
    readers: tuple[Standing, ...]
    writers: tuple[Standing, ...]
    check: Check = unchecked
    prepare: Callable[[Any], Any] = as_written

    # -- in a transaction --

    def find(self, connection: Connection, state: State, caller: Caller, name: str) -> Held[T]:
        held = catalogue.one(connection, state.settings, self.noun, name)
        if held is None or not caller.sees(team_of(self.noun, name, held.value)):
            raise missing(self.noun.one, name)
        return held

    def put(
        self, connection: Connection, state: State, caller: Caller, name: str, value: T, author: Author
    ) -> tuple[Held[T], bool, bool]:
        """→ what is there now, whether it was created, whether that was done before."""
        lock(connection)
        if done_before(connection, author, self.noun.name, name, "create", "change"):
            return self.find(connection, state, caller, name), False, True
        before = catalogue.one(connection, state.settings, self.noun, name)
        if before is not None:
            if not caller.sees(team_of(self.noun, name, before.value)):
                raise Conflict(f"the name {name!r} is not free", code="name_taken")
            self._refuse_declared(before)
        value = self.check(connection, state, caller, name, value, None if before is None else before.value)
        _, created = put(connection, self.noun, name, value, author, declared_names(state.settings))
        return self.find(connection, state, caller, name), created, False

    def change(
        self, connection: Connection, state: State, caller: Caller, name: str, changed: Callable[[T], T], author: Author
    ) -> tuple[Held[T], bool, bool]:
        """The same for what is there, from what it is."""
        lock(connection)
        held = self.find(connection, state, caller, name)
        if done_before(connection, author, self.noun.name, name, "create", "change"):
            return held, False, True
        self._refuse_declared(held)
        return self.put(connection, state, caller, name, changed(held.value), author)

    def remove(self, connection: Connection, state: State, caller: Caller, name: str, author: Author) -> bool:
        """→ whether that was done before."""
        lock(connection)
        if done_before(connection, author, self.noun.name, name, "remove"):
            return True
        self._refuse_declared(self.find(connection, state, caller, name))
        remove(connection, self.noun, name, author)
        return False

    def _refuse_declared(self, held: Held[T]) -> None:
        if held.source == "file":
            raise DeclaredInFile(f"the {self.noun.one} {held.name!r}")

    # -- routes --

    def routes(self, *, listed: bool = True, names: str = "{name}") -> APIRouter:
        """`listed`: list and one are among them. `names`: how names stand in paths."""
        router, path = APIRouter(tags=[self.noun.name]), f"/{self.noun.name}"
        if listed:
            self._reading(router, path, names)
        self._writing(router, path, names)
        return router

    def _reading(self, router: APIRouter, path: str, names: str) -> None:
        noun, shown = self.noun, self.shown

        @router.get(path, summary=f"List {noun.name}", **documented(Page[shown]))  # type: ignore[valid-type]  # known at run time
        @allow(*self.readers)
        async def several(given: Given, caller: Asking, part: PartOf, containing: Text = "") -> Response:
            def look(connection: Connection) -> list[Held[T]]:
                return catalogue.page(
                    connection,
                    given.settings,
                    noun,
                    after=part.after,
                    limit=part.most,
                    team=caller.team,
                    containing=containing,
                )

            found = await given.database.read(look)
            return answer(part.page(found, lambda held: self.show(given, held), lambda held: held.name))

        @router.get(f"{path}/{names}", summary=f"One {noun.one}", **documented(shown))
        @allow(*self.readers)
        async def one(given: Given, caller: Asking, name: Named) -> Response:
            held = await given.database.read(self.find, given, caller, name)
            return answer(self.show(given, held))

    def _writing(self, router: APIRouter, path: str, names: str) -> None:
        noun, shown, kind = self.noun, self.shown, self.noun.type
        body, changes = Depends(body_of(kind, self.prepare)), Depends(patch_of(kind, self.prepare))

        @router.put(f"{path}/{names}", summary=f"Create or replace a {noun.one}", **documented(shown, 200, 201, body=kind))
        @allow(*self.writers)
        async def put_one(given: Given, caller: Asking, author: Signed, name: Named, value: Any = body) -> Response:
            return self._answer(given, *await given.database.write(self.put, given, caller, name, value, author))

        @router.patch(f"{path}/{names}", summary=f"Change a {noun.one}", **documented(shown, body=kind))
        @allow(*self.writers)
        async def patch_one(given: Given, caller: Asking, author: Signed, name: Named, patch: Any = changes) -> Response:
            return self._answer(given, *await given.database.write(self.change, given, caller, name, patch.onto, author))

        @router.delete(f"{path}/{names}", summary=f"Delete a {noun.one}", **documented(Removed))
        @allow(*self.writers)
        async def delete_one(given: Given, caller: Asking, author: Signed, name: Named) -> Response:
            replayed = await given.database.write(self.remove, given, caller, name, author)
            return answer(Removed(object=noun.one, name=name), headers=REPLAYED if replayed else None)

    def _answer(self, given: State, held: Held[T], created: bool, replayed: bool) -> Response:
        return answer(self.show(given, held), 201 if created else 200, REPLAYED if replayed else None)


Named = Annotated[str, Path(description="Its name.")]
