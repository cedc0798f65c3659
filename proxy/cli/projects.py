"""`glasshouse projects`: what keys are for."""

from __future__ import annotations

from proxy.cli.catalogue import NounCommands, budgets, limits, setting, source, state
from proxy.cli.fields import ALLOWANCE
from proxy.cli.report import Columns

_COLUMNS: Columns = {
    "NAME": lambda row: row["name"],
    "TEAM": setting("team"),
    "LIMITS": limits,
    "BUDGETS": budgets,
    "STATE": state,
    "DECLARED IN": source,
}
_NOUN = NounCommands("projects", "project", ("team", *ALLOWANCE), _COLUMNS)

projects = _NOUN.with_blocking(_NOUN.group("What keys are for; all of one share limits and budgets."))
