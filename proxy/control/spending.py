"""What is used of a budget, and what is left, from the ledger: what has ended and been stored. What runs just now is the workers'
to know, who refuse by it."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection

from proxy.control.state import when
from proxy.nouns import BudgetSettings
from proxy.spend.windows import FOREVER_NS, Period, window
from proxy.store import UsageRow, usage

Level = Literal["everyone", "team", "user", "project", "key"]
Unit = Literal["money", "tokens", "gpu_seconds"]

_NANO = Decimal(10) ** 9


class BudgetState(msgspec.Struct, kw_only=True):
    """A budget of so much (`amount`) of a `unit`: money is exact decimal text in `currency`, the others are whole numbers. `used`
    since `since`; it begins anew at `until` (null: never). `left` isn't less than nothing. `source`: who has it."""

    object: Literal["budget"] = "budget"
    level: Level
    subject: str
    unit: Unit
    per: Literal["day", "week", "month", "total"]
    soft: bool
    time_zone: str
    currency: str | None
    amount: Decimal | int
    used: Decimal | int
    left: Decimal | int
    since: datetime | None
    until: datetime | None
    source: Literal["file", "database"]


class Used(NamedTuple):
    money: Decimal = Decimal(0)
    tokens: int = 0
    gpu_seconds: int = 0


class Spending:
    """Sums are made once for each level and window. `of`: the id or name of the one at each level that alone is of interest."""

    def __init__(self, connection: Connection, currency: str, now_ns: int, of: dict[Level, str] | None = None) -> None:
        self._connection = connection
        self._currency = currency
        self._now_ns = now_ns
        self._of = of
        self._sums: dict[tuple[Level, int], dict[str, Used]] = {}

    def state(
        self, level: Level, subject: str, group: str, budget: BudgetSettings, source: Literal["file", "database"]
    ) -> BudgetState:
        """`subject` is what people call whose it is, `group` what the ledger does."""
        start_ns, end_ns = window(Period(budget.per, budget.time_zone), self._now_ns)
        unit = unit_of(budget)
        amount, used = getattr(budget, unit), getattr(self._used(level, group, start_ns), unit)
        return BudgetState(
            level=level,
            subject=subject,
            unit=unit,
            per=budget.per,
            soft=budget.soft,
            time_zone=budget.time_zone,
            currency=self._currency if unit == "money" else None,
            amount=amount,
            used=used,
            left=max(amount - used, amount * 0),
            since=when(start_ns),
            until=None if end_ns == FOREVER_NS else when(end_ns),
            source=source,
        )

    def _used(self, level: Level, group: str, start_ns: int) -> Used:
        if (level, start_ns) not in self._sums:
            self._sums[level, start_ns] = self._sum(level, start_ns)
        return self._sums[level, start_ns].get(group, Used())

    def _sum(self, level: Level, start_ns: int) -> dict[str, Used]:
        since = when(start_ns)
        if level == "everyone":
            every = [self._row(row) for row in usage(self._connection, "outcome", since)]
            return {"everyone": Used(sum((each.money for each in every), Decimal(0)), sum(each.tokens for each in every))}
        only: dict[str, Any] = {} if self._of is None else {_FILTERS[level]: self._of[level]}
        return {row.group: self._row(row) for row in usage(self._connection, level, since, **only)}

    def _row(self, row: UsageRow) -> Used:
        return Used(Decimal(row.cost_nano.get(self._currency, 0)) / _NANO, row.input_tokens + row.output_tokens)


_FILTERS: dict[Level, str] = {"team": "team", "user": "user", "project": "project", "key": "key_id"}


def unit_of(budget: BudgetSettings) -> Unit:
    if budget.money is not None:
        return "money"
    return "tokens" if budget.tokens is not None else "gpu_seconds"
