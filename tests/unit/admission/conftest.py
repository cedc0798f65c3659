"""A Redis for a test, and workers that share limits over it: several in one event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from proxy.admission.shared import Shared
from proxy.admission.standing import Amounts, Costs, Plan, Refusal, Standing, Window
from proxy.settings import RedisSettings
from proxy.snapshot import Allowance
from proxy.spend import Amounts as Spent
from proxy.spend import Holder, Period, Spend
from tests.support.redis import Redis, redis_server

PATIENCE = 10.0
"""Seconds that an admission waits for Redis where a test isn't about waiting."""


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


class Ledger:
    """What a host's journal says: of each worker, for each key. `known` False: it doesn't."""

    def __init__(self, **totals: int) -> None:
        self.totals_by_worker = totals
        self.known = True
        self.looks = 0
        self.look: Callable[[], Spend] = self.read
        self.may_look = threading.Event()
        self.may_look.set()

    def read(self) -> Spend:
        assert self.may_look.wait(60)
        self.looks += 1
        return cast(Spend, self)  # of a Spend nothing is asked but `totals`

    def totals(self, period: Period, start_ns: int) -> dict[str, dict[Holder, Spent]] | None:
        """The same in every window."""
        if not self.known:
            return None
        return {worker: {Holder("k", "t"): Spent(cost_nano=money)} for worker, money in self.totals_by_worker.items()}


class Worker:
    """One worker's part: its own view of the standings, and its Shared."""

    _names = itertools.count()

    def __init__(self, url: str, name: str = "", ledger: Ledger | None = None, **more: Any) -> None:
        self.name = name or f"worker-{next(self._names)}"
        self.ledger = ledger or Ledger()
        self.standings: dict[str, Standing] = {}
        host, workers, timeout = more.get("host", "host"), more.get("workers", 1), more.get("timeout", PATIENCE)
        settings = RedisSettings(url=url, timeout=timeout)
        self.shared = Shared(settings, self.name, host, workers, lambda: self.ledger.look(), self.standings.values)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Worker:
        self.begin()
        await until(lambda: self.shared.up)
        return self

    def begin(self) -> None:
        self._task = asyncio.create_task(self.shared.run())

    async def die(self) -> None:
        """As if it were killed: nothing is given back."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.shared._line.drop()

    def plan(self, allowance: Allowance, *, key: str = "k", team: Allowance | None = None) -> Plan:
        standings = [self.standing("key", f"key:{key}", allowance)]
        if team is not None:
            standings.append(self.standing("team", "team:t", team))
        return Plan(standings)

    def standing(self, level: str, subject: str, allowance: Allowance) -> Standing:
        standing = self.standings.setdefault(subject, Standing(level, subject, subject))
        standing.follow(allowance, lambda window: None)
        return standing

    def ask(self, plan: Plan, money: int = 0, tokens: int = 0, at_ns: int | None = None) -> Ask:
        asked = Ask(self, plan, (1, 0, 0, tokens), (money, tokens, 0), at_ns)
        self.shared.ask(asked)
        return asked


class Ask:
    """An admission, as a permit makes it: it counts itself where it is granted, and lets go again."""

    def __init__(self, worker: Worker, plan: Plan, amounts: Amounts, costs: Costs, at_ns: int | None) -> None:
        self._shared = worker.shared
        self.plan = plan
        self.amounts = amounts
        self.costs = costs
        now_ns = time.time_ns() + self._shared.clock_offset_ns if at_ns is None else at_ns
        self.windows: tuple[Window, ...] = tuple(account.at(now_ns) for account in plan.accounts)
        self.abandoned = False
        self.said: list[str] = []
        self.refusal: Refusal | None = None
        self.parts = 0

    def granted(self) -> None:
        self.said.append("granted")
        for gauge in self.plan.gauges:
            gauge.concurrent += 1
        for window in self.windows:
            window.reserved += self.costs[window.account.unit]

    def refused(self, refusal: Refusal) -> None:
        self.said.append(refusal.limit)
        self.refusal = refusal

    def undecided(self, parts: int) -> None:
        self.said.append("undecided")
        self.parts = parts

    def settle(self, money: int = 0, tokens: int = 0) -> None:
        assert self.said == ["granted"]
        for gauge in self.plan.gauges:
            gauge.concurrent -= 1
        used = (1, 0, 0, tokens)
        for window in self.windows:
            window.reserved -= self.costs[window.account.unit]
            window.spent += (money, tokens, 0)[window.account.unit]
        for bucket in self.plan.buckets:
            bucket.owed += used[bucket.kind] - min(self.amounts[bucket.kind], bucket.limit)
        for standing in self.plan.standings:
            self._shared.changed(standing)
        for window in self.windows:
            self._shared.changed(window.account.standing, window)

    async def verdict(self) -> str:
        await until(lambda: bool(self.said))
        assert len(self.said) == 1
        return self.said[0]


async def verdicts(asked: list[Ask]) -> list[str]:
    return [await each.verdict() for each in asked]


async def until(condition: Callable[[], bool], seconds: float = 60.0, pause: float = 0.002) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(pause)
