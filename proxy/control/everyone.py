"""`/everyone`: what all keys together may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import ADMIN, OVERSEERS, allow
from proxy.control.answers import answer, documented
from proxy.control.bodies import body_of, patch_of
from proxy.control.catalogue import Held
from proxy.control.errors import DeclaredInFile
from proxy.control.state import Given, State
from proxy.control.writes import REPLAYED, Signed, done_before
from proxy.nouns import AllowanceSettings
from proxy.store import Author, lock, put_everyone

NOUN = "everyone"

router = APIRouter(tags=[NOUN])


class Everyone(msgspec.Struct, kw_only=True):
    object: Literal["everyone"] = "everyone"
    source: Literal["file", "database"]
    settings: AllowanceSettings


@router.get("/everyone", summary="What all together may use", **documented(Everyone))
@allow(*OVERSEERS)
async def one(given: Given) -> Response:
    return _answer(await given.database.read(catalogue.everyone, given.settings))


@router.put("/everyone", summary="Say what all together may use", **documented(Everyone, body=AllowanceSettings))
@allow(*ADMIN)
async def put(given: Given, author: Signed, value: Annotated[Any, Depends(body_of(AllowanceSettings))]) -> Response:
    return _answer(*await given.database.write(change, given, lambda _: value, author))


@router.patch("/everyone", summary="Change what all together may use", **documented(Everyone, body=AllowanceSettings))
@allow(*ADMIN)
async def patch(given: Given, author: Signed, changes: Annotated[Any, Depends(patch_of(AllowanceSettings))]) -> Response:
    return _answer(*await given.database.write(change, given, changes.onto, author))


def change(
    connection: Connection, state: State, changed: Callable[[AllowanceSettings], AllowanceSettings], author: Author
) -> tuple[Held[AllowanceSettings], bool]:
    """→ what holds now, whether that was done before."""
    lock(connection)
    held = catalogue.everyone(connection, state.settings)
    if done_before(connection, author, NOUN, NOUN, "change"):
        return held, True
    if held.source == "file":
        raise DeclaredInFile("what everyone may use")
    put_everyone(connection, changed(held.value), author)
    return catalogue.everyone(connection, state.settings), False


def _answer(held: Held[AllowanceSettings], replayed: bool = False) -> Response:
    return answer(Everyone(source=held.source, settings=held.value), headers=REPLAYED if replayed else None)
