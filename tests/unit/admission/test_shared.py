"""Several workers, one real Redis."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from proxy import redis_line
from proxy.admission import shared as module
from proxy.admission.standing import Plan, Window
from proxy.snapshot import Allowance, Budget
from proxy.spend.windows import Period, window
from tests.support import tls
from tests.support.redis import Redis, redis_server
from tests.unit.admission.conftest import Ask, Ledger, Worker, until, verdicts

MONTH = "month"


def money(amount: int, per: str = MONTH, *, soft: bool = False) -> Allowance:
    return Allowance(budgets=(Budget("money", amount, per, soft=soft),))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def workers(redis: Redis, number: int, **more: Any) -> list[Worker]:
    return [await Worker(redis.url, **more).start() for _ in range(number)]


async def close(*workers: Worker) -> None:
    for worker in workers:
        assert worker.shared.failures == 0
        await worker.shared.close()


def stored(redis: Redis, what: str) -> dict[str, str]:
    """The one hash whose key contains that; nothing if there is none."""
    keys = redis.client.keys(f"*{what}*")
    assert len(keys) <= 1
    return cast("dict[str, str]", redis.client.hgetall(keys[0])) if keys else {}


def spent(redis: Redis) -> int:
    """What Redis thinks was spent in the one window that there is."""
    return int(stored(redis, ":spent:").get("sum", -1))


# -- the guarantee --


def test_a_budget_for_three_is_granted_three_times_by_four_workers(redis: Redis) -> None:  # failure 60
    async def scenario() -> None:
        four = await workers(redis, 4, workers=4)
        asked = [worker.ask(worker.plan(money(3000)), 1000) for _ in range(25) for worker in four]
        said = await verdicts(asked)
        assert (said.count("granted"), said.count("budget")) == (3, 97)
        refusal = next(each.refusal for each in asked if each.refusal)
        assert (refusal.allowed, refusal.used, refusal.requested) == (3000, 3000, 1000)
        assert refusal.wait is not None
        assert 0 < refusal.wait < 32 * 86_400

        for each in asked:
            if each.said == ["granted"]:
                each.settle(100)
        await until(lambda: spent(redis) == 300 and not stored(redis, ":standing:"))
        again = [worker.ask(worker.plan(money(3000)), 1000) for _ in range(5) for worker in four]
        assert (await verdicts(again)).count("granted") == 2, "300 are spent: 2 of 1000 fit, and none is refused that fits"
        await close(*four)

    run(scenario())


def test_every_budget_counts_and_nothing_is_taken_of_one_that_has_room(redis: Redis) -> None:  # failure 60
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(money(10_000), team=money(2500))
        asked = [worker.ask(plan, 1000) for _ in range(4)]
        assert await verdicts(asked) == ["granted", "granted", "budget", "budget"]
        assert asked[2].refusal is not None
        assert (asked[2].refusal.standing.level, asked[2].refusal.used) == ("team", 2000)
        await worker.ask(plan, 500).verdict()
        assert [window.reserved for window in asked[0].windows] == [2500, 2500]
        assert [list(stored(redis, subject).values()) for subject in ("standing:key", "standing:team")] == [["2500"], ["2500"]]
        await close(worker)

    run(scenario())


def test_a_soft_budget_refuses_nothing_and_is_counted(redis: Redis) -> None:
    async def scenario() -> None:
        one, other = await workers(redis, 2)
        for worker in (one, other):
            asked = worker.ask(worker.plan(money(1, soft=True)), 1000)
            assert await asked.verdict() == "granted"
            asked.settle(700)
        await until(lambda: spent(redis) == 1400)
        await (asked := one.ask(one.plan(money(1, soft=True)), 1000)).verdict()
        assert asked.windows[0].elsewhere == 700
        await close(one, other)

    run(scenario())


@pytest.mark.parametrize(
    ("allowance", "tokens", "granted", "limit"),
    [
        (Allowance(requests_per_minute=7), 0, 7, "requests_per_minute"),
        (Allowance(tokens_per_minute=1000), 300, 3, "tokens_per_minute"),
        (Allowance(concurrent_requests=5), 0, 5, "concurrent_requests"),
    ],
)
def test_a_rate_is_one_rate_over_all_workers(
    redis: Redis, allowance: Allowance, tokens: int, granted: int, limit: str
) -> None:  # failure 61
    async def scenario() -> None:
        four = await workers(redis, 4)
        asked = [worker.ask(worker.plan(allowance), tokens=tokens) for _ in range(5) for worker in four]
        said = await verdicts(asked)
        assert (said.count("granted"), said.count(limit)) == (granted, 20 - granted)
        refusal = next(each.refusal for each in asked if each.refusal)
        assert (refusal.wait is None) == (limit == "concurrent_requests")
        assert refusal.used == granted * max(1, tokens)
        assert refusal.wait is None or 0 < refusal.wait <= 60
        await close(*four)

    run(scenario())


def test_a_place_that_one_worker_frees_is_another_s(redis: Redis) -> None:  # failure 61
    async def scenario() -> None:
        one, other = await workers(redis, 2)
        allowance = Allowance(concurrent_requests=1)
        first = one.ask(one.plan(allowance))
        assert await first.verdict() == "granted"
        assert await other.ask(other.plan(allowance)).verdict() == "concurrent_requests"
        assert other.standings["key:k"].elsewhere == 1
        first.settle()
        await until(lambda: not stored(redis, ":standing:"))
        assert await other.ask(other.plan(allowance)).verdict() == "granted"
        await close(one, other)

    run(scenario())


def test_tokens_are_set_right_afterwards(redis: Redis) -> None:  # failure 61
    async def scenario() -> None:
        one, other = await workers(redis, 2)
        allowance = Allowance(tokens_per_minute=1000)
        first = one.ask(one.plan(allowance), tokens=1000)
        assert await first.verdict() == "granted"
        first.settle(tokens=400)
        heard = asyncio.create_task(asyncio.sleep(0))
        await until(lambda: not one.plan(allowance).buckets[0].owed)
        await heard
        second = other.ask(other.plan(allowance), tokens=600)
        assert await second.verdict() == "granted", "600 were given back"
        second.settle(tokens=5000)
        await until(lambda: float(stored(redis, ":standing:")["b|3"]) / 1e6 > time.time() + 200)
        refused = one.ask(one.plan(allowance), tokens=1)
        assert await refused.verdict() == "tokens_per_minute"
        assert refused.refusal is not None
        assert refused.refusal.wait is not None
        assert 200 < refused.refusal.wait < 264.1, "5400 of 1000 a minute"
        await close(one, other)

    run(scenario())


def test_more_than_a_bucket_holds_takes_all_of_it(redis: Redis) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(Allowance(tokens_per_minute=100))
        first, second = worker.ask(plan, tokens=100_000), worker.ask(plan, tokens=1)
        assert await verdicts([first, second]) == ["granted", "tokens_per_minute"]
        assert second.refusal is not None
        assert second.refusal.wait is not None
        assert second.refusal.wait <= 60
        assert plan.buckets[0].remaining(time.monotonic()) < 100
        await close(worker)

    run(scenario())


def test_redis_decides_as_a_worker_alone_does() -> None:
    """Random requests and ends. Each token takes seconds to come back, so that the clocks of the two don't matter."""
    with redis_server() as redis:
        for seed in range(6):
            run(_as_alone(redis, random.Random(seed)))


async def _as_alone(redis: Redis, chance: random.Random) -> None:
    redis.flush()
    (worker,) = await workers(redis, 1)
    model = Worker(redis.url)

    def either(limits: range) -> int | None:
        return chance.choice(limits) if chance.random() < 0.7 else None

    def allowance() -> Allowance:
        budgets = [Budget(unit, chance.randrange(5, 40), per) for unit in ("money", "tokens") for per in ("month", "total")]
        return Allowance(
            requests_per_minute=either(range(4, 8)),
            tokens_per_minute=either(range(3, 8)),
            concurrent_requests=either(range(2, 6)),
            budgets=tuple(chance.sample(budgets, chance.randrange(4))),
        )

    key, team = allowance(), allowance()
    plan, same = worker.plan(key, team=team), model.plan(key, team=team)
    running: list[tuple[Ask, Ask]] = []
    seen = set()
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        if running and chance.random() < 0.4:
            real, ideal = running.pop(chance.randrange(len(running)))
            used = {"money": chance.randrange(6), "tokens": chance.randrange(4)}
            real.settle(**used)
            ideal.settle(**used)
            taken = (1, 0, 0, used["tokens"])
            same.settle(ideal.amounts, taken, 1)
            continue
        wanted = {"money": chance.randrange(8), "tokens": chance.randrange(9)}
        real = worker.ask(plan, **wanted)
        ideal = Ask(model, same, real.amounts, real.costs, None)
        said = await real.verdict()
        seen.add(said)
        refusal = same.refuse(ideal.amounts, ideal.costs, ideal.windows, time.monotonic(), time.time_ns(), 1)
        if refusal is None:
            ideal.granted()
            running.append((real, ideal))
            assert said == "granted"
        else:
            assert real.refusal is not None, refusal
            told = real.refusal
            assert (told.standing.level, told.limit, told.allowed, told.used, told.requested, told.wait is None) == (
                *(refusal.standing.level, refusal.limit, refusal.allowed, refusal.used, refusal.requested, refusal.wait is None),
            )
            if refusal.wait is not None:
                assert told.wait == pytest.approx(refusal.wait, abs=3)
    await close(worker)


def test_numbers_stay_exact_up_to_nine_thousand_million_millions(redis: Redis) -> None:
    async def scenario() -> None:
        most = 9 * 10**15
        one, other = await workers(redis, 2, ledger=Ledger(before=most - 1003))
        allowance = money(most, "total")
        for worker in (one, other):
            asked = worker.ask(worker.plan(allowance), 501)
            assert await asked.verdict() == "granted"
        assert asked.windows[0].elsewhere == most - 1003 + 501
        refused = one.ask(one.plan(allowance), 2)
        assert await refused.verdict() == "budget"
        assert refused.refusal is not None
        assert (refused.refusal.used, refused.refusal.wait) == (most - 1, None)
        asked.settle(501)
        await until(lambda: spent(redis) == most - 1003 + 501)
        assert await one.ask(one.plan(allowance), 1).verdict() == "granted"
        await close(one, other)

    run(scenario())


def test_many_at_once_are_several_batches(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 4)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        asked = [worker.ask(worker.plan(money(10), key=f"k{i}"), 1) for i in range(50)]
        assert await verdicts(asked) == ["granted"] * 50
        for each in asked:
            each.settle(1)
        await until(lambda: not redis.client.keys("*:standing:*"))
        assert len(redis.client.keys("*:spent:*")) == 50
        await close(worker)

    run(scenario())


def test_all_keys_are_of_one_slot(redis: Redis) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        await worker.ask(worker.plan(money(10)), 1).verdict()
        keys = redis.client.keys("*")
        assert len(keys) == 4
        assert all(str(key).startswith("{glasshouse}:") for key in keys)
        await close(worker)

    run(scenario())


# -- workers that come and go --


def test_what_a_dead_worker_held_counts_until_its_lease_ends(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE", 1.0)
    monkeypatch.setattr(module, "HEARTBEAT", 0.1)

    async def scenario() -> None:
        one, other = await workers(redis, 2)
        allowance = Allowance(concurrent_requests=2, budgets=(Budget("money", 1000, MONTH),))
        ended, held = one.ask(one.plan(allowance), 300), one.ask(one.plan(allowance), 600)
        assert await verdicts([ended, held]) == ["granted", "granted"]
        ended.settle(300)
        await until(lambda: spent(redis) == 300)
        await one.die()
        asked = other.ask(other.plan(allowance), 700)
        assert await asked.verdict() == "budget"
        assert asked.windows[0].elsewhere == 900
        await until(lambda: other.shared.parts == 1)
        asked = other.ask(other.plan(allowance), 701)
        assert await asked.verdict() == "budget", "what it has spent it has spent"
        assert await other.ask(other.plan(allowance), 700).verdict() == "granted"
        assert other.standings["key:k"].elsewhere == 0
        assert not [field for field in stored(redis, ":standing:") if one.name in field]
        await close(other)

    run(scenario())


def test_a_worker_that_ends_leaves_what_it_spent_and_nothing_else(redis: Redis) -> None:
    async def scenario() -> None:
        one, other = await workers(redis, 2)
        await until(lambda: other.shared.parts == 2)
        asked = one.ask(one.plan(money(1000)), 400)
        assert await asked.verdict() == "granted"
        asked.settle(300)
        await one.shared.close()
        assert spent(redis) == 300
        assert redis.client.zrange("{glasshouse}:leases", 0, -1) == [other.name]
        asked = other.ask(other.plan(money(1000)), 700)
        assert await asked.verdict() == "granted"
        assert other.shared.parts == 1
        await close(other)

    run(scenario())


def test_parts_are_at_least_the_workers_of_this_host_and_all_that_live(redis: Redis) -> None:
    async def scenario() -> None:
        first = await Worker(redis.url, host="a", workers=2).start()
        assert first.shared.parts == 2
        more = await workers(redis, 2, host="b", workers=2)
        await until(lambda: first.shared.parts == 3)
        await close(first, *more)

    run(scenario())


def test_a_worker_that_was_asleep_says_again_what_it_holds(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        allowance = Allowance(concurrent_requests=2, budgets=(Budget("money", 1000, MONTH),))
        assert await worker.ask(worker.plan(allowance), 400).verdict() == "granted"
        held = stored(redis, ":standing:")
        assert len(held) == 2
        redis.client.zrem("{glasshouse}:leases", worker.name)  # as another does when it has run out
        redis.client.delete("{glasshouse}:standing:key:k")
        await until(lambda: stored(redis, ":standing:") == held)
        await close(worker)

    run(scenario())


@pytest.mark.parametrize("allowance", [Allowance(concurrent_requests=2), money(1000)])
def test_what_is_held_for_long_is_said_again(redis: Redis, monkeypatch: pytest.MonkeyPatch, allowance: Allowance) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(module, "REPEAT", 0.05)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        assert await worker.ask(worker.plan(allowance), 400).verdict() == "granted"
        held = stored(redis, ":standing:")
        assert len(held) == 1
        assert 0 < redis.client.pttl("{glasshouse}:standing:key:k") <= 600_000
        redis.client.delete("{glasshouse}:standing:key:k")
        await until(lambda: stored(redis, ":standing:") == held)
        await close(worker)

    run(scenario())


# -- requests that come and go --


def test_who_has_left_before_it_was_asked_for_gets_nothing(redis: Redis) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(Allowance(concurrent_requests=1))
        gone, next_one = worker.ask(plan), worker.ask(plan)
        gone.abandoned = True
        assert await next_one.verdict() == "granted"
        assert gone.said == []
        await close(worker)

    run(scenario())


def test_what_was_set_aside_for_one_who_left_meanwhile_is_given_back(redis: Redis) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(Allowance(concurrent_requests=1, budgets=(Budget("money", 1000, MONTH),)))
        await (first := worker.ask(plan, 1)).verdict()
        first.settle(1)
        await until(lambda: not stored(redis, ":standing:"))
        redis.pause()
        gone = worker.ask(plan, 999)
        await asyncio.sleep(0.05)  # it is on its way
        gone.abandoned = True
        redis.resume()
        await until(lambda: redis.client.info("commandstats").get("cmdstat_hset", {}).get("calls", 0) > 0)
        await until(lambda: not worker.shared._waiting and not stored(redis, ":standing:"))
        assert gone.said == []
        assert await worker.ask(plan, 999).verdict() == "granted"
        await close(worker)

    run(scenario())


def test_a_bug_in_one_request_is_its_own(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(Allowance(concurrent_requests=9))
        first, second = worker.ask(plan), worker.ask(plan)
        first.granted = broken  # type: ignore[method-assign]
        assert await second.verdict() == "granted"
        assert await worker.ask(plan).verdict() == "granted"
        await close(worker)

    def broken() -> None:
        raise ZeroDivisionError

    run(scenario())
    assert [record.getMessage() for record in caplog.records] == ["a bug in a request that was waiting for its admission"]


# -- windows --


def test_what_ends_in_another_month_is_booked_where_it_began(redis: Redis) -> None:  # failure 60
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(money(1000))
        old = worker.ask(plan, 800)
        assert await old.verdict() == "granted"
        end_ns = old.windows[0].end_ns
        new = worker.ask(plan, 900, at_ns=end_ns)
        assert await new.verdict() == "granted", "a new month"
        assert new.windows[0].start_ns == end_ns
        old.settle(700)
        new.settle(600)
        name = "{glasshouse}:spent:key:k:money:month:UTC@"
        await until(lambda: redis.client.hget(f"{name}{old.windows[0].start_ns}", "sum") == "700")
        await until(lambda: redis.client.hget(f"{name}{end_ns}", "sum") == "600")
        await until(lambda: not stored(redis, ":standing:"))
        kept_ms = redis.client.pexpiretime(f"{name}{old.windows[0].start_ns}")
        assert kept_ms == end_ns // 10**6 + 2 * 86_400_000
        await close(worker)

    run(scenario())


def test_a_budget_without_end_is_kept_for_more_than_a_year_after_its_last_use(redis: Redis) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        await (asked := worker.ask(worker.plan(money(1000, "total")), 1)).verdict()
        asked.settle(1)
        await until(lambda: spent(redis) == 1)
        assert 399 * 86_400 < redis.client.ttl("{glasshouse}:spent:key:k:money:total:UTC@0") <= 400 * 86_400
        await close(worker)

    run(scenario())


# -- the ledger's truth --


def test_two_hosts_say_what_they_spent_and_nothing_counts_twice(redis: Redis) -> None:  # failure 44
    async def scenario() -> None:
        one = await Worker(redis.url, "one", Ledger(before=500, one=20), host="a").start()
        assert await one.ask(one.plan(money(10_000)), 1).verdict() == "granted"
        assert spent(redis) == 520
        other = await Worker(redis.url, "other", Ledger(elsewhere=700), host="b").start()
        assert await other.ask(other.plan(money(10_000)), 1).verdict() == "granted"
        assert spent(redis) == 1220
        third = await Worker(redis.url, "third", Ledger(before=400, one=3), host="a").start()  # it has looked earlier
        assert await third.ask(third.plan(money(10_000)), 1).verdict() == "granted"
        await until(lambda: third.ledger.looks == 1 and not third.shared._looking and not third.shared._seeds)
        assert spent(redis) == 1220
        assert sorted(stored(redis, ":spent:")) == ["seeded|a", "seeded|b", "sum", "s|before", "s|elsewhere", "s|one"]
        await close(one, other, third)

    run(scenario())


def test_those_who_wait_for_the_ledger_are_asked_for_in_their_order(redis: Redis) -> None:
    async def scenario() -> None:
        may_look = threading.Event()
        ledger = Ledger(before=800)
        ledger.may_look = may_look
        (worker,) = await workers(redis, 1, ledger=ledger)
        plan = worker.plan(money(1000))
        asked = [worker.ask(plan, 100) for _ in range(3)]
        await until(lambda: bool(worker.shared._unseeded_permits) or worker.shared._looking is not None)
        asked += [worker.ask(plan, 100) for _ in range(3)]
        assert not any(each.said for each in asked)
        may_look.set()
        assert await verdicts(asked) == ["granted"] * 2 + ["budget"] * 4
        assert ledger.looks == 1
        await close(worker)

    run(scenario())


def test_nobody_waits_for_long_until_the_ledger_is_read(redis: Redis) -> None:
    async def scenario() -> None:
        may_look = threading.Event()
        ledger = Ledger(before=700)
        ledger.may_look = may_look
        (worker,) = await workers(redis, 1, ledger=ledger, timeout=0.5)
        plan = worker.plan(money(1000))
        asked = worker.ask(plan, 400)
        asked.windows[0].elsewhere = 650  # as this worker knows from elsewhere
        assert await asked.verdict() == "undecided"
        assert asked.windows[0].elsewhere == 650
        may_look.set()
        await until(lambda: spent(redis) == 700)
        assert await worker.ask(plan, 400).verdict() == "budget"
        assert asked.said == ["undecided"]
        await close(worker)

    run(scenario())


def test_what_a_crashed_worker_left_is_counted_by_its_successor(redis: Redis) -> None:  # failure 44
    async def scenario() -> None:
        (first,) = await workers(redis, 1)
        await (asked := first.ask(first.plan(money(1000)), 100)).verdict()
        asked.settle(100)
        await until(lambda: spent(redis) == 100)
        await first.die()
        ledger = Ledger(**{first.name: 350})  # its journal says more than it had told
        second = await Worker(redis.url, ledger=ledger).start()
        await second.ask(second.plan(money(1000)), 1).verdict()
        await until(lambda: spent(redis) == 350)
        await close(second)

    run(scenario())


def test_what_is_not_known_keeps_nobody_waiting_and_is_counted_when_it_is(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(module, "_FRESH", 0.0)

    async def scenario() -> None:
        ledger = Ledger(before=900)
        ledger.known = False
        (worker,) = await workers(redis, 1, ledger=ledger)
        plan = worker.plan(money(1000))
        assert await verdicts([worker.ask(plan, 600), worker.ask(plan, 600)]) == ["granted", "budget"]
        await until(lambda: ledger.looks > 2)
        assert "seeded|host" not in stored(redis, ":spent:")
        ledger.known = True
        await until(lambda: spent(redis) == 900)
        assert stored(redis, ":spent:")["seeded|host"] == "1"
        await until(lambda: not worker.shared._unseeded and not worker.shared._seeds)
        await close(worker)

    run(scenario())


@pytest.mark.parametrize(
    ("error", "said"), [(OSError("gone"), "what was spent can't be read"), (ValueError(), "a bug in reading what was spent")]
)
def test_a_ledger_that_cannot_be_read_keeps_nobody_waiting(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)

    async def scenario() -> None:
        ledger = Ledger(before=900)
        ledger.look = unreadable
        (worker,) = await workers(redis, 1, ledger=ledger)
        assert await worker.ask(worker.plan(money(1000)), 600).verdict() == "granted"
        ledger.look = ledger.read
        await until(lambda: spent(redis) == 900)
        await close(worker)

    def unreadable() -> Any:
        raise error

    run(scenario())
    assert said in [record.getMessage() for record in caplog.records]


def test_a_flushed_redis_gets_the_truth_back_without_a_request(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:  # failure 44
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)

    async def scenario() -> None:
        one = await Worker(redis.url, "one", Ledger(before=500), host="a").start()
        other = await Worker(redis.url, "other", Ledger(elsewhere=60), host="b").start()
        allowance = Allowance(concurrent_requests=9, budgets=(Budget("money", 1000, MONTH),))
        for worker in (one, other):
            ended, _ = asked = [worker.ask(worker.plan(allowance), 100), worker.ask(worker.plan(allowance), 30)]
            assert await verdicts(asked) == ["granted", "granted"]
            ended.settle(7)
        await until(lambda: spent(redis) == 574)
        await until(lambda: len(stored(redis, ":standing:")) == 4)
        before = stored(redis, ":standing:"), stored(redis, ":spent:")
        for _ in range(3):
            redis.flush()
            await until(lambda: (stored(redis, ":standing:"), stored(redis, ":spent:")) == before)
        refused = one.ask(one.plan(allowance), 1000 - 574 - 60 + 1)
        assert await refused.verdict() == "budget"
        assert await one.ask(one.plan(allowance), 1000 - 574 - 60).verdict() == "granted"
        await close(one, other)

    run(scenario())


# -- Redis that fails --


class AskAgain(Ask):
    """One for which Redis doesn't answer, after which another comes at once."""

    def __init__(self, worker: Worker, plan: Plan) -> None:
        super().__init__(worker, plan, (1, 0, 0, 0), (100, 0, 0), None)
        self._worker = worker

    def undecided(self, parts: int) -> None:
        super().undecided(parts)
        assert self._worker.shared.up
        self.again = self._worker.ask(self.plan, 100)


def test_redis_that_is_not_there_keeps_nobody_waiting(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:  # failure 42
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1, workers=3, ledger=Ledger(before=500), timeout=1000.0)
        plan = worker.plan(money(1000))
        held = worker.ask(plan, 100)
        assert await held.verdict() == "granted"
        redis.kill()
        asked = AskAgain(worker, plan)
        worker.shared.ask(asked)
        await until(lambda: not worker.shared.up, pause=0)
        assert worker.shared.failures == 2, "the batch, and then there is nobody to connect to"
        assert await asked.verdict() == await asked.again.verdict() == "undecided"
        assert asked.parts == 3
        assert (held.windows[0].elsewhere, held.windows[0].known) == (500, 100)
        failures = worker.shared.failures
        await until(lambda: worker.shared.failures > failures)
        held.settle(40)  # while it is away
        redis.start()
        await until(lambda: worker.shared.up)
        await until(lambda: spent(redis) == 540)
        assert await worker.ask(plan, 460).verdict() == "granted"
        await worker.shared.close()

    run(scenario())
    assert [record.getMessage() for record in caplog.records if record.name == module.__name__] == [
        "Redis can't be used: this worker keeps to its part of the limits",
        "Redis can be used again",
    ]


def test_redis_that_was_never_there_is_connected_to_when_it_is(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:  # failure 42
    async def scenario() -> None:
        redis.stop()
        worker = Worker(redis.url)
        worker.begin()
        await until(lambda: worker.shared.failures > 1)
        assert not worker.shared.up
        redis.start()
        await until(lambda: worker.shared.up)
        await worker.shared.close()

    run(scenario())
    assert len(caplog.records) == 1


def test_redis_that_is_slow_is_given_up_after_five_failures(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:  # failure 43
    async def scenario() -> None:
        (worker,) = await workers(redis, 1, timeout=0.1)
        plan = worker.plan(Allowance(concurrent_requests=9))
        redis.slow_down(3.0)
        asked = worker.ask(plan)
        assert await asked.verdict() == "undecided"
        assert worker.shared.up, "once is no reason"
        await until(lambda: not worker.shared.up, pause=0)
        assert worker.shared.failures == 5
        other = Ask(worker, worker.plan(Allowance(concurrent_requests=9), key="other"), (1, 0, 0, 0), (0, 0, 0), None)
        other.granted()  # as this worker has decided by itself
        await until(lambda: worker.shared.up)
        await until(lambda: list(stored(redis, ":standing:key:other").values()) == ["1"])
        assert await worker.ask(plan).verdict() == "granted"
        await worker.shared.close()

    run(scenario())
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_one_late_reply_costs_no_more_than_its_own_requests(redis: Redis) -> None:  # failure 43
    async def scenario() -> None:
        (worker,) = await workers(redis, 1, timeout=0.2)
        plan = worker.plan(Allowance(concurrent_requests=1))
        redis.pause()
        late = worker.ask(plan)
        assert await late.verdict() == "undecided"
        redis.resume()
        asked = worker.ask(plan)
        assert await asked.verdict() == "granted", "what the late one was given counts no more"
        assert late.said == ["undecided"]
        assert worker.standings["key:k"].concurrent == 1
        await until(lambda: list(stored(redis, ":standing:").values()) == ["1"])
        await worker.shared.close()

    run(scenario())


def test_a_batch_that_was_given_up_changes_nothing_when_it_comes_late(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Any, ...]] = []
    pack = redis_line._pack

    def keep(command: tuple[Any, ...]) -> bytes:
        sent.append(command)
        return pack(command)

    monkeypatch.setattr(redis_line, "_pack", keep)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(Allowance(concurrent_requests=3, requests_per_minute=100))
        asked = [worker.ask(plan), worker.ask(plan)]
        assert await verdicts(asked) == ["granted", "granted"]
        given_up = sent[-1]
        for each in asked:
            each.settle()
        await until(lambda: list(stored(redis, ":standing:")) == ["b|0"])
        before = stored(redis, ":standing:")
        assert redis.client.evalsha(*given_up[1:]) is None
        assert stored(redis, ":standing:") == before
        await close(worker)

    run(scenario())


def test_a_restarted_redis_knows_the_script_again(redis: Redis) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        redis.client.script_flush()
        assert await worker.ask(worker.plan(Allowance(concurrent_requests=3))).verdict() == "granted"
        await close(worker)

    run(scenario())


def test_the_end_does_not_wait_for_redis(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        (worker,) = await workers(redis, 1, timeout=0.2)
        asked = worker.ask(worker.plan(money(1000)), 1)
        assert await asked.verdict() == "granted"
        redis.pause()
        asked.settle(1)
        waits = worker.ask(worker.plan(money(1000)), 1)
        await asyncio.sleep(0)
        await worker.shared.close()
        assert waits.said == ["undecided"]
        redis.resume()

    run(scenario())
    assert "Redis wasn't told of the end" in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("ending", [True, False])
def test_what_a_lost_batch_said_is_said_again(redis: Redis, ending: bool) -> None:
    """Of a window that is over and that nothing is held of any more: what else is there to say it?"""

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        yesterday_ns = time.time_ns() - 86_400 * 10**9
        start_ns, _ = window(Period("day"), yesterday_ns)
        asked = worker.ask(worker.plan(money(1000, "day")), 5, at_ns=yesterday_ns)
        assert await asked.verdict() == "granted"
        redis.pause()
        asked.settle(5)
        await asyncio.sleep(0.05)  # that is on its way
        redis.restart()
        if ending:
            await worker.shared.close()
            assert redis.client.zcard("{glasshouse}:leases") == 0
        await until(lambda: stored(redis, f"@{start_ns}").get("sum") == "5")
        await worker.shared.close()

    run(scenario())


# -- what isn't ours, or isn't ours any more --


def test_what_is_not_ours_in_our_keys_counts_for_nothing(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 45
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)

    async def scenario() -> None:
        worker = await Worker(redis.url, "mine", Ledger(before=100)).start()
        allowance = Allowance(concurrent_requests=2, requests_per_minute=60, budgets=(Budget("money", 1000, MONTH),))
        await (first := worker.ask(worker.plan(allowance), 300)).verdict()
        assert first.said == ["granted"]
        client = redis.client
        spent_key = client.keys("*:spent:*")[0]
        types = {
            "{glasshouse}:leases": "text",
            "{glasshouse}:sequences": "text",
            "{glasshouse}:standing:key:k": "text",
            spent_key: "text",
        }
        for key, value in types.items():
            client.set(key, value)
        await until(lambda: all(client.type(key) != "string" for key in types) and spent(redis) == 100)
        second = worker.ask(worker.plan(allowance), 600)
        assert await second.verdict() == "granted"
        assert await worker.ask(worker.plan(allowance), 1).verdict() == "concurrent_requests"
        await close(worker)

    run(scenario())


@pytest.mark.parametrize("damage", ["", "text", "nan", "inf", "-5", "1e400", "\x00\xff", "9" * 400])
def test_damaged_numbers_count_for_nothing(redis: Redis, damage: str) -> None:  # failure 45
    async def scenario() -> None:
        mine = await Worker(redis.url, "mine", Ledger(before=100)).start()
        other = await Worker(redis.url, "other").start()
        allowance = Allowance(concurrent_requests=2, requests_per_minute=60, budgets=(Budget("money", 1000, MONTH),))
        for worker in (other, mine):
            await (asked := worker.ask(worker.plan(allowance), 100)).verdict()
            assert asked.said == ["granted"]
        client = redis.client
        for field in client.hkeys("{glasshouse}:standing:key:k"):
            client.hset("{glasshouse}:standing:key:k", field, damage)
        client.hset("{glasshouse}:standing:key:k", mapping={"foreign": damage, "r|x": damage, "b|nine": damage})
        spent_key = client.keys("*:spent:*")[0]
        for field in ("s|mine", "s|other", "sum"):
            client.hset(spent_key, field, damage)
        client.hset("{glasshouse}:sequences", "mine", damage)
        again = mine.ask(mine.plan(allowance), 800)
        assert await again.verdict() == "granted"
        assert again.windows[0].elsewhere == 100
        asked.settle(90)
        await until(lambda: stored(redis, ":spent:")["sum"] == "190")
        await close(mine, other)

    run(scenario())


def test_a_clock_that_was_put_back_blocks_nobody_for_long(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 60
    monkeypatch.setattr(module, "LEASE", 0.5)
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        redis.client.zadd("{glasshouse}:leases", {"dead": time.time() * 1000 + 86_400_000})
        redis.client.hset("{glasshouse}:standing:key:k", mapping={"c|dead": 2, "b|0": int((time.time() + 86_400) * 1e6)})
        plan = worker.plan(Allowance(requests_per_minute=60, concurrent_requests=1))
        assert await worker.ask(plan).verdict() == "concurrent_requests"
        await until(lambda: worker.shared.parts == 1)
        asked = worker.ask(plan)
        assert await asked.verdict() == "requests_per_minute"
        assert asked.refusal is not None
        assert asked.refusal.wait is not None
        assert asked.refusal.wait <= 3600
        await close(worker)

    run(scenario())


# -- addresses --


def test_a_unix_socket(redis: Redis) -> None:
    async def scenario() -> None:
        worker = await Worker(redis.unix_url).start()
        assert await worker.ask(worker.plan(Allowance(concurrent_requests=1))).verdict() == "granted"
        await close(worker)

    run(scenario())


def test_tls() -> None:
    async def scenario(port: int) -> None:
        worker = await Worker(f"rediss://localhost:{port}?ssl_ca_certs={tls.CA}").start()
        assert await worker.ask(worker.plan(Allowance(concurrent_requests=1))).verdict() == "granted"
        await close(worker)
        untrusted = Worker(f"rediss://localhost:{port}?ssl_ca_certs={tls.OTHER_CA}")
        untrusted.begin()
        await until(lambda: untrusted.shared.failures > 0)
        assert not untrusted.shared.up
        await untrusted.shared.close()

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = ("--tls-cert-file", str(tls.certificate("server")), "--tls-key-file", str(tls.key("server")))
    with redis_server("--tls-port", str(port), *files, "--tls-auth-clients", "no"):
        run(scenario(port))


def test_a_password_is_used_and_never_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(redis: Redis) -> None:
        worker = await Worker(f"redis://:s3cret-right@127.0.0.1:{redis.port}/3").start()
        assert await worker.ask(worker.plan(Allowance(concurrent_requests=1))).verdict() == "granted"
        await close(worker)
        wrong = Worker(f"redis://:s3cret-wrong@127.0.0.1:{redis.port}/3")
        wrong.begin()
        await until(lambda: wrong.shared.failures > 0)
        assert not wrong.shared.up
        await wrong.shared.close()

    with redis_server(password="s3cret-right") as redis:
        run(scenario(redis))
    (record,) = caplog.records
    assert "s3cret" not in repr(record.__dict__)
    assert record.__dict__["redis"] == f"redis://127.0.0.1:{redis.port}/3"


def test_a_window_is_forgotten_when_it_is_over_and_nothing_of_it_is_held(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(module, "REPEAT", 0.05)

    async def scenario() -> None:
        (worker,) = await workers(redis, 1)
        plan = worker.plan(money(1000))
        long_ago = itertools.count(time.time_ns() - 400 * 86_400 * 10**9, 40 * 86_400 * 10**9)
        asked = [worker.ask(plan, 10, at_ns=next(long_ago)) for _ in range(5)]
        assert await verdicts(asked) == ["granted"] * 5
        windows: set[Window] = {each.windows[0] for each in asked}
        assert len(windows) == 5
        for each in asked[1:]:
            each.settle(1)
        await until(lambda: worker.shared._windows == {asked[0].windows[0]})
        await close(worker)

    run(scenario())


def test_whatever_happens_to_redis_the_sums_are_right_at_last(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:  # failure 44
    """Random requests of three workers, some of whose clients leave, while Redis is flushed, restarted, killed and hangs."""
    # failure 44
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    chance = random.Random(4)

    async def request(worker: Worker) -> None:
        plan = worker.plan(Allowance(concurrent_requests=50, budgets=(Budget("money", 10**6, MONTH),)))
        if not worker.shared.up:
            await asyncio.sleep(0.05)
            return
        asked = worker.ask(plan, chance.randrange(100))
        if chance.random() < 0.1:
            await asyncio.sleep(0)
            asked.abandoned = True
        else:
            said = await asked.verdict()
            await asyncio.sleep(chance.random() * 0.05)
            if said == "granted":
                asked.settle(chance.randrange(120))

    async def requests(worker: Worker) -> None:
        while not over.is_set():
            await request(worker)

    over = asyncio.Event()

    async def scenario() -> None:
        three = [await Worker(redis.url, host=f"host-{i}", timeout=0.1).start() for i in range(3)]
        clients = [asyncio.create_task(requests(worker)) for worker in three for _ in range(8)]
        for disturb in (
            redis.flush,
            redis.pause,
            redis.resume,
            redis.restart,
            redis.flush,
            redis.kill,
            redis.start,
            redis.flush,
        ) * 2:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(disturb)
        over.set()
        await asyncio.gather(*clients)
        await until(lambda: all(worker.shared.up for worker in three))
        windows = [worker.standings["key:k"].accounts[0].window for worker in three]
        assert [window.reserved for window in windows] == [0, 0, 0]
        await until(lambda: spent(redis) == sum(window.spent for window in windows))
        await until(lambda: not stored(redis, ":standing:"))
        assert all(worker.shared.failures for worker in three)
        for worker in three:
            await worker.shared.close()

    run(scenario())
