"""What users, projects and keys have in common: they are of a team, or of none, and what concerns other teams too (coming before
them, having a hand in engines) they may only if the team may, or an administrator said so."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection

from proxy.control import catalogue
from proxy.control.access import Caller
from proxy.control.state import State
from proxy.errors import Forbidden, InvalidRequest
from proxy.nouns import MemberSettings
from proxy.store import PROJECTS, TEAMS, USERS, Noun

M = TypeVar("M", bound=MemberSettings)


def of_own_team(connection: Connection, state: State, caller: Caller, _name: str, value: M, before: M | None) -> M:
    """The same, of the caller's team if he has one and nothing else is said. Raises InvalidRequest: what it is of isn't there, or
    not there for him; Forbidden: it would come before what is of other teams, or have a hand in engines, and his own doesn't."""
    if caller.team is not None and value.team is None:
        value = msgspec.structs.replace(value, team=caller.team)
    for noun in (TEAMS, USERS, PROJECTS):
        wanted = getattr(value, noun.one, None)
        if wanted is not None and not _is_there(connection, state, caller, noun, wanted):
            raise InvalidRequest(f"{noun.one}: there is no {noun.one} {wanted!r}", param=noun.one)
    if caller.team is not None:
        _check_privileges(connection, state, caller.team, value, before)
    return value


def _check_privileges(connection: Connection, state: State, team: str, value: M, before: M | None) -> None:
    """What an administrator has to give: to the team, or to this one."""
    held = catalogue.one(connection, state.settings, TEAMS, team)
    given = [each for each in (before, None if held is None else held.value) if each is not None]
    if value.priority == "high" and all(each.priority != "high" for each in given):
        raise Forbidden("priority: 'high' is for an administrator to give; allowed: normal, low", param="priority")
    known = {parameter for each in given for parameter in each.engine_parameters}
    if new := [parameter for parameter in value.engine_parameters if parameter not in known]:
        raise Forbidden(f"engine_parameters: {new[0]!r} is for an administrator to give", param="engine_parameters")


def _is_there(connection: Connection, state: State, caller: Caller, noun: Noun[Any], name: str) -> bool:
    held = catalogue.one(connection, state.settings, noun, name)
    return held is not None and caller.sees(name if noun is TEAMS else held.value.team)
