"""The measurement: interleaved rounds over all targets, CPU time per request, memory per connection.

CPU time is what is compared, not throughput: throughput says which process is the bottleneck on this machine. Rounds are
interleaved (A B C A B C …) and ratios are taken within a round, so that a neighbour's noise hits all of them.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from tests.bench.processes import Cpu, JsonProcess, Memory, cpu, memory, pin, raise_file_limit
from tests.bench.targets import Target
from tests.support.wire_client import request

BASELINE: Final = "nginx"
_PATH: Final = "/v1/chat/completions"
_ANSWER_BYTES: Final = 700  # vLLM's empty answer is 590 bytes


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything."""

    rounds: int = 5
    connections: int = 64
    requests: int = 50_000
    streams: int = 512
    warm_up: int = 2_000
    chunks: int = 64
    interval: float = 0.01
    idle: int = 1_000
    held: int = 200
    pinned: bool = True
    """The target on one CPU of its own (all of its processes), upstream and load generator on the others. Otherwise the scheduler
    moves and interrupts the target for the sake of its own clients, which is not its cost."""


QUICK: Final = Plan(rounds=5, requests=8_000, streams=128, warm_up=1_000, idle=200, held=50)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One target in one round, doing one kind of work."""

    completed: int
    failed: int
    events: int
    seconds: float
    cpu_us: dict[str, float]
    """CPU time per completed request, by role."""
    waits_us: list[int] = []
    """Until the first byte of each answer, where that was to be told."""

    @property
    def worker_us(self) -> float:
        return self.cpu_us.get("worker", 0.0)

    @property
    def others_us(self) -> float:
        return sum(value for role, value in self.cpu_us.items() if role != "worker")


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of memory of the worker."""

    rest: Memory
    idle: Memory
    held: Memory
    connections: int
    streams: int

    @property
    def per_connection(self) -> float:
        return (self.idle.pss - self.rest.pss) / self.connections

    @property
    def per_stream(self) -> float:
        return (self.held.pss - self.rest.pss) / self.streams


class Result(msgspec.Struct, kw_only=True):
    """Everything measured about one target."""

    name: str
    requests: list[Sample] = []
    streams: list[Sample] = []
    footprint: Footprint | None = None
    sent: int = 0
    """Requests sent to it in all, warm-up included: what its ledger must have."""


class Rig:
    """The upstream and the load generator, each in a process of its own."""

    def __init__(self, plan: Plan, upstream: JsonProcess, load: JsonProcess, upstream_url: str) -> None:
        self.plan = plan
        self.load = load
        self.upstream_url = upstream_url
        cpus = sorted(os.sched_getaffinity(0))
        self._pinned = plan.pinned and len(cpus) > 1
        self._target_cpus = set(cpus[-1:]) if self._pinned else set(cpus)
        if self._pinned:
            pin([upstream.pid, load.pid], set(cpus[:-1]))

    def start(self, target: Target) -> None:
        target.start(self.upstream_url)
        if self._pinned:
            pin([pid for pids in target.pids().values() for pid in pids], self._target_cpus)

    def requests(self, target: Target, result: Result) -> None:
        """Whole answers, as many as go."""
        plan, asked = self.plan, request_to(target)
        self.load.ask(do="open", url=target.url, connections=plan.connections)
        warm = self.load.ask(do="run", request=asked, count=plan.warm_up, stream=False, at_once=plan.connections)
        result.requests.append(self._timed(target, asked, plan.requests, stream=False))
        self.load.ask(do="close")
        result.sent += warm["completed"] + warm["failed"] + plan.requests

    def streams(self, target: Target, result: Result) -> None:
        """Streams of so many chunks, one after another on each connection."""
        plan = self.plan
        script = {"tokens": plan.chunks, "interval": plan.interval, "finish": "length"}
        asked, warm_up = request_to(target, stream=True, script=script), plan.connections
        quick = request_to(target, stream=True, script={"tokens": 2})
        self.load.ask(do="open", url=target.url, connections=plan.connections)
        self.load.ask(do="run", request=quick, count=warm_up, stream=True, at_once=plan.connections)
        result.streams.append(self._timed(target, asked, plan.streams, stream=True))
        self.load.ask(do="close")
        result.sent += warm_up + plan.streams

    def work(self, target: Target, asked: str, count: int, warm_up: int, *, stream: bool, different: int) -> Sample:
        """Any requests, so many of them `different` (see load.py). How long each took to its first byte is told too."""
        at_once = self.plan.connections
        self.load.ask(do="open", url=target.url, connections=at_once)
        self.load.ask(do="run", request=asked, count=warm_up, stream=stream, at_once=at_once, different=different)
        sample = self._timed(target, asked, count, stream=stream, different=different, waits=True)
        self.load.ask(do="close")
        return sample

    def _timed(self, target: Target, asked: str, count: int, **how: int) -> Sample:
        before = _cpu(target)
        told = self.load.ask(do="run", request=asked, count=count, at_once=self.plan.connections, **how)
        after = _cpu(target)
        spent = {role: after[role].since(before[role]) / 1000 / max(told["completed"], 1) for role in after}
        return Sample(cpu_us=spent, **told)

    def footprint(self, target: Target, result: Result) -> None:
        """Memory at rest after some work, with idle connections that were in use, and with open streams."""
        plan, asked = self.plan, request_to(target)
        self.load.ask(do="open", url=target.url, connections=plan.connections)
        self.load.ask(do="run", request=asked, count=plan.warm_up, stream=False, at_once=plan.connections)
        self.load.ask(do="close")
        rest = self._memory(target)
        self.load.ask(do="open", url=target.url, connections=plan.idle)
        self.load.ask(do="touch", request=asked)
        idle = self._memory(target)
        self.load.ask(do="close")
        held_request = request_to(target, stream=True, script={"tokens": 64, "hang_after_events": 8})
        self.load.ask(do="open", url=target.url, connections=plan.held)
        self.load.ask(do="hold", request=held_request, events=8)
        held = self._memory(target)
        self.load.ask(do="close")
        result.sent += plan.warm_up + plan.idle + plan.held
        result.footprint = Footprint(rest=rest, idle=idle, held=held, connections=plan.idle, streams=plan.held)

    def _memory(self, target: Target) -> Memory:
        return memory(target.pids().get("worker", ()))


@contextlib.contextmanager
def rig(plan: Plan) -> Iterator[Rig]:
    raise_file_limit()
    script = msgspec.json.encode({"body_bytes": _ANSWER_BYTES}).decode()
    arguments = ("--exit-with-stdin", "--keep-alive", "60", "--script", script)
    with JsonProcess("tests.support.scripted_vllm", *arguments) as upstream, JsonProcess("tests.bench.load") as load:
        yield Rig(plan, upstream, load, upstream.hear()["url"])


def measure(targets: Sequence[Target], plan: Plan) -> list[Result]:
    """Everything, over targets that are started here and left running: the caller stops them."""
    results = [Result(name=target.name) for target in targets]
    pairs = list(zip(targets, results, strict=True))
    with rig(plan) as bench:
        for target, result in pairs:
            bench.start(target)
            if target.pids():
                bench.footprint(target, result)
        for _ in range(plan.rounds):
            for target, result in pairs:
                bench.requests(target, result)
            for target, result in pairs:
                bench.streams(target, result)
    return results


def measure_requests(targets: Sequence[Target], plan: Plan) -> list[Result]:
    """Whole answers alone, in the same interleaved rounds; the caller stops the targets."""
    results = [Result(name=target.name) for target in targets]
    with rig(plan) as bench:
        for target in targets:
            bench.start(target)
        for _ in range(plan.rounds):
            for target, result in zip(targets, results, strict=True):
                bench.requests(target, result)
    return results


def least(samples: Sequence[Sample]) -> float:
    """Worker CPU per request in the quietest round, µs: what disturbs a round only ever adds to it."""
    return min(sample.worker_us for sample in samples)


def ratio(samples: Sequence[Sample], baseline: Sequence[Sample]) -> float:
    """The median over the rounds of worker CPU per request, against the baseline's in the same round."""
    return statistics.median(sample.worker_us / base.worker_us for sample, base in zip(samples, baseline, strict=True))


def _cpu(target: Target) -> dict[str, Cpu]:
    return {role: cpu(pids) for role, pids in target.pids().items()}


def request_to(target: Target, **more: Any) -> str:
    """About 300 bytes of body."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "word " * 40}], "max_tokens": 256, **more}
    return request(_PATH, body, key=target.key).decode("latin-1")
