"""Budgets that come while a worker serves: what was spent before counts, to the token, whoever spent it.

Requests here take exactly what is set aside for them (`exact`). So two budgets show whether a worker counts right: one token less
than the next request needs must refuse it, as soon as it is known what was spent; one token more must not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from proxy.nouns import AllowanceSettings, BudgetSettings, KeySettings, UserSettings
from proxy.snapshot import Allowance, Budget, SnapshotFile
from proxy.store import GLASSHOUSE, USERS, change_key, open_database, put, put_everyone, revision
from tests.server.conftest import StartWorker
from tests.server.test_shared_limits import exact, send
from tests.support.glasshouse import Glasshouse
from tests.support.redis import redis_server
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply
from tests.support.worker import Worker

PATIENCE = 60.0
PLENTY = 10**9


@pytest.fixture(scope="module")
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


@dataclass
class Counting:
    """`allow` makes a budget of so many tokens and waits until workers have it; `ask` sends a request that takes `each`."""

    allow: Callable[[int], None]
    ask: Callable[[], Reply]
    each: int
    spent: int = 0

    def spend(self, times: int) -> None:
        for _ in range(times):
            assert self.ask().status == 200
            self.spent += self.each

    def check(self) -> None:
        """What was spent is counted: as soon as it is known, and from then on to the token. More is never counted."""
        deadline = time.monotonic() + PATIENCE
        right = 0
        while right < 3:
            assert time.monotonic() < deadline, "what was spent before is never counted"
            self.allow(self.spent + self.each - 1)
            reply = self.ask()
            if reply.status == 200:
                self.spent += self.each
                right = 0
            else:
                assert reply.json()["error"]["code"] == "insufficient_quota"
                self.allow(self.spent + self.each)
                self.spend(1)
                right += 1


def alone(one: Worker, field: str = "everyone") -> Counting:
    body, each = exact()

    def allow(tokens: int) -> None:
        allowance = Allowance(budgets=(Budget("tokens", tokens, "day"),))
        one.publish(**{field: allowance if field == "everyone" else {"x": allowance}})

    return Counting(allow, lambda: one.ask(body), each)


@pytest.mark.parametrize("field", ["everyone", "teams", "users", "projects"])
def test_what_a_worker_has_spent_itself_counts(worker: StartWorker, vllm: ScriptedVLLM, field: str) -> None:  # failure 60
    declared: dict[str, Any] = {
        "teams": {"x": {}},
        "users": {"x": {}},
        "projects": {"x": {}},
        "keys": {"name 0": {"team": "x", "user": "x", "project": "x"}},
    }
    one = worker(vllm.url, config=declared)
    counting = alone(one, field)
    counting.spend(3)
    counting.check()
    one.publish()  # the budget goes, and comes again
    counting.spend(1)
    counting.check()


def test_what_is_under_way_when_a_budget_comes_counts_when_it_ends(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url)
    counting = alone(one)
    body, each = exact({"interval": 0.3})
    counting.spend(1)
    with one.begin(body) as running:
        running.read(events=1)
        counting.check()
        running.read()
    counting.spent += each
    counting.allow(PLENTY)
    counting.check()


class House:
    """A whole Glasshouse whose database is changed beside it."""

    def __init__(self, glasshouse: Glasshouse) -> None:
        self.glasshouse = glasshouse
        self.engine: Engine = open_database(glasshouse.settings.database_url)

    def change(self, how: Callable[[Connection], object]) -> None:
        """Until every worker works by it."""
        with self.engine.begin() as connection:
            how(connection)
            wanted = revision(connection)
        found: list[SnapshotFile] = []

        def published() -> bool:
            found[:] = [self.glasshouse.snapshot()]
            return found[0].revision >= wanted

        self.glasshouse._until(published, "the change in the snapshot")
        date = found[0].published_unix_ns
        self.glasshouse.until_beats(
            lambda beats: all(beat.snapshot_unix_ns >= date for beat in beats), "the change in the workers"
        )

    def counting(self, allow: Callable[[Connection, int], object]) -> Counting:
        body, each = exact()
        glasshouse = self.glasshouse
        return Counting(
            lambda tokens: self.change(lambda connection: allow(connection, tokens)),
            lambda: send(glasshouse.url, glasshouse.key, body),
            each,
        )


def of_key(connection: Connection, tokens: int) -> object:
    budget = BudgetSettings(tokens=tokens, per="month", time_zone="Asia/Kathmandu")
    return change_key(connection, "default", KeySettings(user="u", budgets=(budget,)), GLASSHOUSE)


def of_user(connection: Connection, tokens: int) -> object:
    return put(connection, USERS, "u", UserSettings(budgets=(BudgetSettings(tokens=tokens, per="week"),)), GLASSHOUSE)


def of_everyone(connection: Connection, tokens: int) -> object:
    return put_everyone(connection, AllowanceSettings(budgets=(BudgetSettings(tokens=tokens, per="total"),)), GLASSHOUSE)


def belongs_to_u(connection: Connection) -> None:
    put(connection, USERS, "u", UserSettings(), GLASSHOUSE)
    change_key(connection, "default", KeySettings(user="u"), GLASSHOUSE)


@pytest.mark.timeout(300)
def test_what_was_spent_before_a_worker_counts_too(vllm: ScriptedVLLM) -> None:
    """In the ledger for long, or not yet; under a period that nobody had."""
    with Glasshouse([vllm.url]) as glasshouse:
        house = House(glasshouse)
        house.change(belongs_to_u)
        counting = house.counting(of_key)
        counting.spend(2)
        glasshouse.rows(2)
        pid = glasshouse.kill("worker")
        glasshouse.wait_replaced("worker", pid)
        glasshouse.wait_ready()
        counting.spend(1)
        counting.check()
        counting.allow(PLENTY)
        for each in (of_user, of_everyone):
            spent, counting = counting.spent, house.counting(each)
            counting.spent = spent
            counting.check()
            counting.allow(PLENTY)
        glasshouse._until(
            lambda: sum(row["input_tokens"] + row["output_tokens"] for row in glasshouse.rows()) == counting.spent,
            "the ledger to say the same",
        )
        house.engine.dispose()


@pytest.mark.timeout(300)
def test_what_several_workers_have_spent_counts(vllm: ScriptedVLLM) -> None:
    with (
        redis_server() as redis,
        Glasshouse([vllm.url], {"workers": 2, "redis": {"url": redis.url}}) as glasshouse,
    ):
        glasshouse.wait_metric("glasshouse_redis_up", 2)
        house = House(glasshouse)
        counting = house.counting(of_key)
        house.change(belongs_to_u)
        counting.spend(12)
        assert len({row["worker"] for row in glasshouse.rows(12)}) == 2
        counting.check()
        house.engine.dispose()
