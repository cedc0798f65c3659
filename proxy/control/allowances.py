"""`GET /allowances`: what keys, teams and everyone may use, in the words of the settings, and for which keys there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from fastapi import APIRouter

from proxy.control.state import Given
from proxy.nouns import AllowanceSettings

router = APIRouter()


@dataclass(frozen=True)
class KeyAllowance:
    """`in_use`: a key has this name. None until the keys are known."""

    team: str | None
    allowance: dict[str, Any]
    in_use: bool | None


@dataclass(frozen=True)
class AllowanceList:
    """What isn't in it isn't limited."""

    everyone: dict[str, Any]
    teams: dict[str, dict[str, Any]]
    keys: dict[str, KeyAllowance]
    object: Literal["allowances"] = "allowances"


@router.get("/allowances")
async def allowances(given: Given) -> AllowanceList:
    settings, missing = given.settings, given.feed.without_key
    return AllowanceList(
        everyone=_said(settings.everyone),
        teams={name: _said(each) for name, each in settings.teams.items()},
        keys={
            name: KeyAllowance(key.team, _said(key), None if missing is None else name not in missing)
            for name, key in settings.keys.items()
        },
    )


def _said(allowance: AllowanceSettings) -> dict[str, Any]:
    """Without what isn't set, and as JSON has it."""
    fields: dict[str, Any] = msgspec.to_builtins(allowance)
    fields.pop("team", None)
    budgets = [{name: value for name, value in each.items() if value is not None} for each in fields.pop("budgets")]
    said = {name: value for name, value in fields.items() if value is not None}
    return {**said, "budgets": budgets} if budgets else said
