"""`/projects`: what keys are for."""

from __future__ import annotations

from typing import Literal

from proxy.control.access import MANAGERS, READERS
from proxy.control.catalogue import Held
from proxy.control.members import of_own_team
from proxy.control.resource import Object, Resource, common
from proxy.control.state import State
from proxy.nouns import ProjectSettings
from proxy.store import PROJECTS


class Project(Object, kw_only=True):
    object: Literal["project"] = "project"
    settings: ProjectSettings


def show(_: State, held: Held[ProjectSettings]) -> Project:
    return Project(**common(held))


resource = Resource(PROJECTS, Project, show, READERS, MANAGERS, of_own_team)
router = resource.routes()
