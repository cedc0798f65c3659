"""`glasshouse teams`: people who share limits and budgets."""

from __future__ import annotations

from proxy.cli.catalogue import NounCommands, budgets, limits, source, state
from proxy.cli.fields import ALLOWANCE
from proxy.cli.report import Columns

_COLUMNS: Columns = {"NAME": lambda row: row["name"], "LIMITS": limits, "BUDGETS": budgets, "STATE": state, "DECLARED IN": source}
_NOUN = NounCommands("teams", "team", ALLOWANCE, _COLUMNS)

teams = _NOUN.with_blocking(_NOUN.group("People who share limits and budgets."))
