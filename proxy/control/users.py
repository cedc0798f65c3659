"""`/users`: whose keys there are.

`DELETE /users/{name}/content` takes what a person said, and what is said of him, out of traces and the ledger; what it took and
cost stays. An administrator may do that for everybody, also for whom callers only named (`whose=end_user`) and for users that
are gone; a manager for his team's users.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.responses import Response

from proxy.control.access import MANAGERS, READERS, allow
from proxy.control.answers import answer, documented
from proxy.control.catalogue import Held
from proxy.control.forget import forget
from proxy.control.members import of_own_team
from proxy.control.resource import Named, Object, Resource, common
from proxy.control.state import Asking, Given, State
from proxy.control.writes import REPLAYED, Signed, done_before
from proxy.errors import Forbidden
from proxy.nouns import UserSettings
from proxy.store import USERS
from proxy.store.forget import Whose


class User(Object, kw_only=True):
    object: Literal["user"] = "user"
    settings: UserSettings


def show(_: State, held: Held[UserSettings]) -> User:
    return User(**common(held))


resource = Resource(USERS, User, show, READERS, MANAGERS, of_own_team)
router = resource.routes()


class Forgotten(msgspec.Struct, kw_only=True):
    """`requests`: blanked in the ledger; `traces`: deleted; `pending`: left, because their traces may be on their way: ask again
    in an hour."""

    object: Literal["forgotten"] = "forgotten"
    name: str
    requests: int
    traces: int
    pending: int


@router.delete("/users/{name}/content", summary="Delete what a person said", **documented(Forgotten))
@allow(*MANAGERS)
async def forget_content(given: Given, caller: Asking, author: Signed, name: Named, whose: Whose = "user") -> Response:
    """`whose`: `user`, by whose keys it was; `end_user`, whom callers named in their requests."""
    if caller.team is not None:
        if whose != "user":
            raise Forbidden("you may not do this")
        await given.database.read(resource.find, given, caller, name)
    noun, of = ("users", name) if whose == "user" else ("requests", "")
    row = await given.database.read(done_before, author, noun, of, "forget")
    if row is not None:
        return answer(Forgotten(name=name, **row.after), headers=REPLAYED)
    done = await forget(given.database, given.settings.phoenix, whose, name, author)
    return answer(Forgotten(name=name, **msgspec.structs.asdict(done)))
