"""That the rig measures what it says, without measuring anything that depends on the machine."""

from __future__ import annotations

import asyncio
import mmap
import os
from typing import cast

import pytest

from tests.bench.load import Load
from tests.bench.measure import Plan, Sample, measure, ratio
from tests.bench.processes import Cpu, JsonProcess, cpu, memory
from tests.bench.report import as_json, as_table
from tests.bench.targets import Direct, Nginx, Target
from tests.support.wire_client import request

TINY = Plan(rounds=2, connections=4, requests=40, streams=8, warm_up=8, chunks=5, interval=0.0, idle=20, held=6)


@pytest.mark.skipif(not Nginx.installed(), reason="nginx isn't installed")
def test_every_request_is_answered_and_counted() -> None:
    targets: list[Target] = [Direct(), Nginx()]
    try:
        direct, nginx = measure(targets, TINY)
    finally:
        for target in targets:
            target.stop()
    for result in (direct, nginx):
        assert [(s.completed, s.failed) for s in result.requests] == [(40, 0)] * 2
        assert [(s.completed, s.failed) for s in result.streams] == [(8, 0)] * 2
        assert [s.events for s in result.streams] == [8 * (1 + 5 + 1)] * 2  # role, tokens, [DONE]
    assert all(sample.worker_us > 0 for sample in nginx.requests + nginx.streams)
    assert nginx.footprint is not None
    assert nginx.footprint.rest.rss >= nginx.footprint.rest.pss > 0
    assert nginx.sent - direct.sent == TINY.warm_up + TINY.idle + TINY.held  # only what has processes has a footprint
    assert "nginx" in as_table([direct, nginx], TINY)
    assert as_json([direct, nginx], TINY)["summary"]["nginx"]["requests"]["ratio"] == 1.0


def test_failures_are_counted() -> None:
    with JsonProcess("tests.support.scripted_vllm", "--exit-with-stdin", "--script", '{"status": 503}') as upstream:
        url = upstream.hear()["url"]
        with JsonProcess("tests.bench.load") as load:
            load.ask(do="open", url=url, connections=3)
            asked = request("/v1/chat/completions", {"messages": [], "model": "smollm2"}).decode()
            whole = load.ask(do="run", request=asked, count=9, stream=False, at_once=3)
            stream = load.ask(do="run", request=asked, count=3, stream=True, at_once=3)
    assert (whole["completed"], whole["failed"]) == (0, 9)
    assert (stream["completed"], stream["failed"]) == (0, 3)


def test_requests_differ_as_told() -> None:
    asked: list[bytes] = []

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            asked.append(data)
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async def ask(load: Load, different: int) -> int:
        """→ how many different ones came of twelve."""
        asked.clear()
        told = await load.run("GET /00000000 HTTP/1.1\r\n\r\n", 12, stream=False, at_once=2, different=different, waits=True)
        assert (told["completed"], len(told["waits_us"]), len(asked)) == (12, 12, 12)
        return len(set(asked))

    async def ask_all() -> list[int]:
        load = Load()
        async with await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0) as server:
            await load.open(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 2)
            counts = [await ask(load, different) for different in (1, 3, 0)]
            await load.close()
        return counts

    assert asyncio.run(ask_all()) == [1, 3, 12]


def test_cpu_time_is_seen() -> None:
    before = cpu([os.getpid()])
    while (spent := cpu([os.getpid()]).since(before)) < 1_000_000:
        pass
    assert spent >= 1_000_000


def test_threads_that_ended_are_not_forgotten() -> None:
    assert Cpu(500, 90_000_000).since(Cpu(400, 0)) == 70_000_000
    assert Cpu(500, 0).since(Cpu(400, 0)) == 100


def test_memory_is_seen() -> None:
    with mmap.mmap(-1, 50_000_000) as block:  # the allocator may have as much at hand, and keep it
        block.write(b"x" * len(block))
        with_it = memory([os.getpid()])
    assert with_it.rss - memory([os.getpid()]).rss > 40_000_000


def test_ratios_are_taken_within_a_round() -> None:
    def samples(*worker: float) -> list[Sample]:
        return [Sample(completed=1, failed=0, events=0, seconds=1.0, cpu_us={"worker": us, "x": 1.0}) for us in worker]

    assert ratio(samples(20, 400, 60), samples(10, 200, 20)) == 2.0
    assert samples(20)[0].others_us == 1.0
