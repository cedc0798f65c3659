"""Several workers of the real product on one address. Redis is away here: they start and serve without it, and say so."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from proxy.journal import Heartbeat, read_heartbeats
from tests.conftest import Start
from tests.server.test_keys import until
from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import WireClient, request
from tests.support.worker import CHAT, chat

NOBODY: Final = {"url": "redis://127.0.0.1:1"}


@pytest.fixture
def product(glasshouse: Start, vllm: ScriptedVLLM) -> Callable[[int], Glasshouse]:
    """`product(workers)`."""
    return lambda workers: glasshouse([vllm.url], {"workers": workers, "redis": NOBODY})


def serving(running: Glasshouse) -> dict[int, Heartbeat]:
    """What the workers that take connections say, by their places."""
    return {beat.worker: beat for beat in read_heartbeats(running.settings.journal_path) if beat.alive and not beat.draining}


def incarnations(running: Glasshouse) -> set[str]:
    return {beat.incarnation for beat in serving(running).values()}


def process_at(running: Glasshouse, place: int) -> int:
    """The id of the worker's process that has this place."""
    arguments = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in running.pids()["worker"]}
    [found] = [pid for pid, argv in arguments.items() if argv[argv.index("--place") + 1] == str(place)]
    return found


def per_worker(running: Glasshouse, name: str) -> dict[str, float]:
    return {each.labels["worker"]: each.value for each in running.metrics() if each.name == name}


def begun(running: Glasshouse, seconds: int) -> WireClient:
    """A stream that takes so long, and of which something has come."""
    client = WireClient(running.url, timeout=60)
    client.send(request(CHAT, chat({"tokens": 2 * seconds, "interval": 0.5}), key=running.key))
    assert client.read(events=1).status == 200
    return client


def test_connections_and_requests_are_spread_over_them(product: Callable[[int], Glasshouse]) -> None:
    running = product(2)
    with ExitStack() as stack:
        clients = [stack.enter_context(WireClient(running.url)) for _ in range(200)]
        for client in clients:
            assert client.ask("/v1/models", key=running.key).status == 200
        until(lambda: sum(per_worker(running, "glasshouse_connections").values()) == 200, "all connections to be told of")
        connections = per_worker(running, "glasshouse_connections")
        assert connections.keys() == {"0", "1"}
        assert min(connections.values()) >= 50, "each goes by a fair coin: one run of 10^13 has fewer"
        running.wait_metric("glasshouse_worker_requests_total", 200)
        assert per_worker(running, "glasshouse_worker_requests_total") == connections
    assert len(running.rows(200)) == 200


def test_one_that_is_killed_is_restarted_alone_and_takes_nobody_elses_streams_along(
    product: Callable[[int], Glasshouse],
) -> None:
    running = product(3)
    before = serving(running)
    assert before.keys() == {0, 1, 2}
    with ExitStack() as stack:
        clients = [stack.enter_context(begun(running, 8)) for _ in range(12)]
        running.until_in_flight(12)
        in_flight = {place: beat.in_flight for place, beat in serving(running).items()}
        victim = max(in_flight, key=lambda place: in_flight[place])
        os.kill(process_at(running, victim), signal.SIGKILL)
        endings = Counter("complete" if client.read().ending == "complete" else "lost" for client in clients)
    assert endings == Counter(complete=12 - in_flight[victim], lost=in_flight[victim])
    outcomes = Counter(row["outcome"] for row in running.rows(12))
    assert outcomes == Counter(ok=endings["complete"], crashed=endings["lost"])
    until(lambda: serving(running).keys() == before.keys(), "another in its place")
    after = serving(running)
    assert [place for place in before if after[place].incarnation != before[place].incarnation] == [victim]


def test_a_reload_replaces_all_of_them_and_a_stop_drains_all(product: Callable[[int], Glasshouse]) -> None:
    running = product(2)
    before = incarnations(running)
    with ExitStack() as stack:
        old = [stack.enter_context(begun(running, 4)) for _ in range(8)]
        running.signal(signal.SIGHUP)
        until(lambda: len(incarnations(running)) == 2 and incarnations(running).isdisjoint(before), "two new workers")
        assert [client.read().ending for client in old] == ["complete"] * 8
        last = [stack.enter_context(begun(running, 3)) for _ in range(8)]
        running.signal(signal.SIGTERM)
        assert [client.read().ending for client in last] == ["complete"] * 8
    assert running.wait_exit() == 0
    assert Counter(row["outcome"] for row in running.rows(16)) == Counter(ok=16)
