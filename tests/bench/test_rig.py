"""That the rig measures what it says, without measuring anything that depends on the machine."""

from __future__ import annotations

import mmap
import os

import pytest

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
