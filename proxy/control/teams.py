"""`/teams`: people who share limits and budgets. Only an administrator says what a team may use, its manager doesn't."""

from __future__ import annotations

from typing import Literal

from proxy.control.access import ADMIN, READERS
from proxy.control.catalogue import Held
from proxy.control.resource import Object, Resource, common
from proxy.control.state import State
from proxy.nouns import TeamSettings
from proxy.store import TEAMS


class Team(Object, kw_only=True):
    object: Literal["team"] = "team"
    settings: TeamSettings


def show(_: State, held: Held[TeamSettings]) -> Team:
    return Team(**common(held))


resource = Resource(TEAMS, Team, show, READERS, ADMIN)
router = resource.routes()
