"""Limits and budgets over several workers and hosts, with a real Redis: the guarantee holds, nothing that fits is refused, and
whatever happens to Redis or to a worker, budgets return to what the ledger says.

Requests here take exactly what is set aside for them (`exact`), so a budget for so many is full after so many, neither before nor
later.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pytest

from tests.support.glasshouse import Glasshouse
from tests.support.hosts import hosts
from tests.support.redis import Redis, redis_server
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, MODEL, chat

TOKENS: Final = 20
"""Of an answer."""


def exact(script: dict[str, Any] | None = None) -> tuple[dict[str, Any], int]:
    """A request, and the tokens that it takes: as many of its prompt as its bytes are taken for."""
    prompt = 0
    while True:
        said = {"tokens": TOKENS, "prompt_tokens": prompt, "finish": "length", **(script or {})}
        body = chat(said, max_tokens=TOKENS)
        if prompt == (prompt := len(json.dumps(body)) // 4 + 1):
            return body, prompt + TOKENS


def send(url: str, key: str, body: dict[str, Any]) -> Reply:
    with WireClient(url, timeout=60) as client:
        return client.ask(CHAT, body, key=key)


def send_many(glasshouse: Glasshouse, body: dict[str, Any], count: int) -> list[Reply]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: send(glasshouse.url, glasshouse.key, body), range(count)))


def statuses(replies: list[Reply]) -> Counter[int]:
    return Counter(reply.status for reply in replies)


def spent(glasshouse: Glasshouse) -> int:
    """What the ledger says, in tokens."""
    return sum(row["input_tokens"] + row["output_tokens"] for row in glasshouse.rows())


def fill(glasshouse: Glasshouse, body: dict[str, Any], within: float = 60.0) -> int:
    """Ask until the budget is full and stays so → how many more passed."""
    passed, refused, deadline = 0, 0, time.monotonic() + within
    while refused < 5:
        assert time.monotonic() < deadline
        reply = send(glasshouse.url, glasshouse.key, body)
        if reply.status == 200:
            passed, refused = passed + 1, 0
        else:
            assert reply.json()["error"]["code"] == "insufficient_quota"
            refused += 1
            time.sleep(0.5)
    return passed


def until_idle(glasshouse: Glasshouse) -> None:
    """Nothing in flight, and nothing set aside: neither by a worker's own word nor in Redis."""
    glasshouse.until_beats(lambda beats: all(beat.in_flight == beat.reservations == 0 for beat in beats), "nothing to be held")


def until(look: Callable[[], bool], what: str, within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not look():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def living(redis: Redis) -> set[str]:
    """The workers whose leases hold."""
    leases: Any = redis.client.zrangebyscore("{glasshouse}:leases", time.time() * 1000, "+inf")
    return set(leases)


def set_aside(redis: Redis) -> int:
    """What living workers have set aside, as Redis has it."""
    client: Any = redis.client
    alive = living(redis)
    total = 0
    for key in client.scan_iter("{glasshouse}:standing:*"):
        for field, value in client.hgetall(key).items():
            kind, _, worker = field.rpartition("|")
            if worker in alive and kind.startswith(("r|", "c")):
                total += int(value)
    return total


@pytest.fixture(scope="module")
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


@contextmanager
def workers(count: int, redis: Redis, vllm: ScriptedVLLM, **allowance: Any) -> Iterator[Glasshouse]:
    config = {"workers": count, "redis": {"url": redis.url}, "keys": {"default": allowance}}
    with Glasshouse([vllm.url], config) as glasshouse:
        glasshouse.wait_metric("glasshouse_redis_up", count)
        yield glasshouse


@pytest.mark.timeout(300)
def test_two_hundred_streams_over_four_workers_with_a_budget_for_twenty(redis: Redis, vllm: ScriptedVLLM) -> None:  # failure 60
    body, each = exact({"interval": 0.1})
    with workers(4, redis, vllm, budgets=[{"tokens": 20 * each, "per": "total"}]) as glasshouse:
        replies = send_many(glasshouse, body, 200)
        assert statuses(replies) == {200: 20, 429: 180}
        rows = glasshouse.rows(200)
        assert sum(row["input_tokens"] + row["output_tokens"] for row in rows) == 20 * each
        assert Counter((row["outcome"], row["refused_by"]) for row in rows) == {("ok", ""): 20, ("rejected", "key.budget"): 180}
        assert len({row["worker"] for row in rows}) == 4
        until_idle(glasshouse)
        assert set_aside(redis) == 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_answers_that_take_less_than_was_set_aside_make_room_again(redis: Redis, vllm: ScriptedVLLM) -> None:
    """spent ≤ budget, and whoever comes one after the other is refused only when nothing more fits."""
    body, each = exact()
    body["max_tokens"] = 10 * TOKENS
    largest = each + 9 * TOKENS
    budget = 30 * each
    with workers(4, redis, vllm, budgets=[{"tokens": budget, "per": "day", "time_zone": "Europe/Vienna"}]) as glasshouse:
        replies = send_many(glasshouse, body, 60)
        passed = statuses(replies)[200] + fill(glasshouse, body)
        glasshouse.rows(60)
        until_idle(glasshouse)
        assert budget - largest - each < spent(glasshouse) <= budget
        assert spent(glasshouse) == passed * each
        assert set_aside(redis) == 0


@pytest.mark.timeout(300)
def test_two_of_four_workers_killed_midway(redis: Redis, vllm: ScriptedVLLM) -> None:  # failure 49
    body, each = exact({"interval": 0.5})
    with workers(4, redis, vllm, budgets=[{"tokens": 20 * each, "per": "total"}]) as glasshouse:
        with ThreadPoolExecutor(60) as pool:
            asked = [pool.submit(send, glasshouse.url, glasshouse.key, body) for _ in range(60)]
            glasshouse.until_beats(lambda beats: sum(beat.in_flight for beat in beats) == 20, "the budget to be set aside")
            time.sleep(1.5)  # their progress is in the journal
            for pid in glasshouse.pids()["worker"][:2]:
                os.kill(pid, signal.SIGKILL)
            replies = [each.result() for each in asked]
        cut = sum(reply.status == 200 and reply.ending != "complete" for reply in replies)
        assert statuses(replies) == {200: 20, 429: 40}
        glasshouse.rows(60)
        until(lambda: len(living(redis)) == 4, "the leases of the dead to have run out")
        quick, _ = exact({"interval": 0.0})
        fill(glasshouse, quick)
        until_idle(glasshouse)
        rows = glasshouse.rows()
        assert sum(row["outcome"] == "crashed" for row in rows) == cut > 0
        assert 19 * each < spent(glasshouse) <= 20 * each
        assert set_aside(redis) == 0


@pytest.mark.timeout(300)
def test_places_and_rates_over_two_workers(redis: Redis, vllm: ScriptedVLLM) -> None:  # failure 61
    body, _ = exact({"interval": 0.1})
    with workers(2, redis, vllm, concurrent_requests=5, requests_per_minute=30) as glasshouse:
        replies = send_many(glasshouse, body, 20)
        assert statuses(replies) == {200: 5, 429: 15}
        until_idle(glasshouse)
        quick, _ = exact()
        replies = [send(glasshouse.url, glasshouse.key, quick) for _ in range(40)]
        passed = statuses(replies)[200]
        assert 25 <= passed <= 35  # 30 at once, those before, and what a slow machine's seconds bring back
        assert set_aside(redis) == 0
        clients = [WireClient(glasshouse.url) for _ in range(2)]
        for client in clients:
            client.send(request(CHAT, body, key=glasshouse.key))
            client.reset()
        until_idle(glasshouse)


# -- Redis away --


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "trouble", ["killed", *(pytest.param(each, marks=pytest.mark.long) for each in ("slow", "flushed", "restarted"))]
)
def test_redis_in_trouble_under_load(redis: Redis, vllm: ScriptedVLLM, trouble: str) -> None:  # failures 42, 43, 44
    """Requests go on, a metric says so, and afterwards the budget is what the ledger says."""
    body, each = exact({"interval": 0.01})
    count = 110
    with workers(2, redis, vllm, budgets=[{"tokens": count * each, "per": "total"}], concurrent_requests=40) as glasshouse:
        ended: list[Reply] = []
        stop = time.monotonic() + 6.0

        def client() -> None:
            while time.monotonic() < stop:
                ended.append(send(glasshouse.url, glasshouse.key, body))
                time.sleep(0.2)

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            time.sleep(1.0)
            _trouble(redis, trouble, glasshouse)
            for each_client in clients:
                each_client.result()
        assert statuses(ended).keys() == {200}
        assert len(ended) < count
        glasshouse.wait_metric("glasshouse_redis_up", 2)
        glasshouse.rows(len(ended))
        passed = len(ended) + fill(glasshouse, body)
        until_idle(glasshouse)
        assert passed == count
        assert spent(glasshouse) == count * each
        assert set_aside(redis) == 0


def _trouble(redis: Redis, which: str, glasshouse: Glasshouse) -> None:
    """For three seconds."""
    if which == "flushed":
        redis.flush()
        time.sleep(1.0)
        redis.flush()
        return
    if which == "restarted":
        redis.restart()
        time.sleep(1.0)
        redis.restart()
        return
    begin, end = (redis.kill, redis.start) if which == "killed" else (redis.pause, redis.resume)
    begin()
    glasshouse.wait_metric("glasshouse_limits_degraded", 2)
    assert glasshouse.metrics().total("glasshouse_redis_failures_total") > 0
    time.sleep(1.0)
    end()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_while_redis_is_away_each_worker_keeps_to_its_part(redis: Redis, vllm: ScriptedVLLM) -> None:  # failure 42
    body, each = exact({"interval": 0.2})
    limits = {"concurrent_requests": 8, "budgets": [{"tokens": 40 * each, "per": "total"}]}
    with workers(4, redis, vllm, **limits) as glasshouse:
        assert send(glasshouse.url, glasshouse.key, body).status == 200
        redis.kill()
        glasshouse.wait_metric("glasshouse_limits_degraded", 4)
        replies = send_many(glasshouse, body, 80)
        rows = glasshouse.rows(81)
        by_worker = Counter(row["worker"] for row in rows[1:] if row["outcome"] == "ok")
        assert set(by_worker.values()) == {2}  # 8 over 4 workers
        assert statuses(replies) == {200: sum(by_worker.values()), 429: 80 - sum(by_worker.values())}


@pytest.mark.timeout(300)
def test_without_redis_from_the_beginning(vllm: ScriptedVLLM) -> None:  # failure 42
    config = {"workers": 2, "redis": {"url": "redis://127.0.0.1:9"}, "keys": {"default": {"concurrent_requests": 4}}}
    body, _ = exact({"interval": 0.1})
    with Glasshouse([vllm.url], config) as glasshouse:
        replies = send_many(glasshouse, body, 40)
        assert statuses(replies).keys() == {200, 429}
        assert statuses(replies)[200] <= 4
        glasshouse.wait_metric("glasshouse_limits_degraded", 2)


# -- two hosts --


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_hosts_one_of_them_cut_off_and_healed() -> None:
    """Each host has a ledger of its own; the budget is one."""
    body, each = exact({"interval": 0.01})
    count = 50
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server("--bind", "0.0.0.0", "--protected-mode", "no"))
        both = stack.enter_context(hosts(2))
        vllm = stack.enter_context(ScriptedVLLM(host="0.0.0.0"))
        running = []
        for host in both:
            config = {
                "listen": f"{host.address}:0",
                "control": {"listen": f"{host.address}:0"},
                "metrics": {"listen": f"{host.address}:0"},
                "redis": {"url": f"redis://{host.redis}:{redis.port}"},
                "workers": 2,
                "everyone": {"budgets": [{"tokens": count * each, "per": "month"}], "concurrent_requests": 8},
            }
            backend = {"url": f"http://{host.home}:{vllm.port}", "models": [MODEL]}
            glasshouse = stack.enter_context(Glasshouse([backend], config, within=host.within))
            glasshouse.wait_metric("glasshouse_redis_up", 2)
            running.append(glasshouse)
        one, two = running
        for glasshouse in running:
            assert statuses(send_many(glasshouse, body, 5)) == {200: 5}
        both[0].cut()
        one.wait_metric("glasshouse_limits_degraded", 2)
        assert two.metrics().total("glasshouse_limits_degraded") == 0
        for glasshouse in running:
            assert statuses(send_many(glasshouse, body, 2)) == {200: 2}
        slow, _ = exact({"interval": 0.25})
        assert 1 <= statuses(send_many(one, slow, 20))[200] <= 4  # its part: 8 over 4 workers, and 2 of those here
        both[0].heal()
        one.wait_metric("glasshouse_redis_up", 2)
        slow_everywhere = [glasshouse for glasshouse in running for _ in range(10)]
        with ThreadPoolExecutor(20) as pool:
            replies = list(pool.map(lambda each: send(each.url, each.key, slow), slow_everywhere))
        assert statuses(replies) == {200: 8, 429: 12}
        fill(one, body)
        fill(two, body)
        for glasshouse in running:
            until_idle(glasshouse)
        assert spent(one) + spent(two) == count * each
        assert set_aside(redis) == 0
