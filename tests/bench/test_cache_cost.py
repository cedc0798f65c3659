"""What the cache costs a worker: an answer that is given again, and one that has to be made because nobody has it, each beside
the same answer where there is no cache. 500 bytes in one piece, and a stream of 64 events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from proxy.cache.entry import Entry
from proxy.cache.memory import Memory
from tests.bench.measure import QUICK, Rig, Sample, least, ratio, request_to, rig
from tests.bench.targets import Glasshouse
from tests.support.plane import KEY, Plane
from tests.support.redis import redis_server
from tests.support.wire_client import request

HIT: Final = 1.0
"""Of what the same answer takes without a cache."""
MISS: Final = {"whole answers": 2.0, "streams": 1.5}
ATTEMPTS: Final = 3
"""A machine that others use too makes everything dearer, and what is in Python more than what is in C."""

PLAN: Final = msgspec.structs.replace(QUICK, requests=4_000, warm_up=500)
GIVEN_AGAIN: Final = 2_000
"""Streams of a round that are there at once."""
QUESTIONS: Final = 256
"""That are asked again and again: more than are asked at once, or some would share an answer that is under way."""
SHORT: Final = 40
"""Words of a prompt."""
_MANY_BYTES: Final = 32 * 1024 * 1024
_MESSAGES: Final = [{"role": "user", "content": "word " * SHORT + "00000000"}]  # load.py makes others of this one
_JOURNAL: Final = {"segment_bytes": 64 * 1024 * 1024}

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]


# -- with sockets --


class Way(NamedTuple):
    """How answers come about. `different`: questions, in turns; 0: none is asked twice."""

    name: str
    target: Glasshouse
    different: int
    cached: bool


def test_what_the_cache_costs_a_worker() -> None:
    costs: list[dict[str, tuple[float, float]]] = []
    while not costs or (len(costs) < ATTEMPTS and not _within(costs[-1])):
        costs.append(_measure())
    assert _within(costs[-1]), costs


def _within(costs: dict[str, tuple[float, float]]) -> bool:
    return all(hit <= HIT and miss <= MISS[kind] for kind, (hit, miss) in costs.items())


def _measure() -> dict[str, tuple[float, float]]:
    """Kind → what a hit and a miss cost, in answers without a cache."""
    costs = {}
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        plain = Glasshouse("no cache")
        cached = Glasshouse("cache", {"cache": {"memory_bytes": _MANY_BYTES}})
        shared = Glasshouse("cache in Redis alone", {"cache": {"memory_bytes": 0}, "redis": {"url": redis.url}})
        bench = stack.enter_context(rig(PLAN))
        for target in (plain, cached, shared):
            stack.callback(target.stop)
            bench.start(target)
        ways = [
            Way("no cache", plain, 0, cached=False),
            Way("hit", cached, QUESTIONS, cached=True),
            Way("hit in Redis", shared, QUESTIONS, cached=True),
            Way("miss", cached, 0, cached=False),
        ]
        for kind, work in (("whole answers", _whole), ("streams", _stream)):
            rounds = [[work(bench, way) for way in ways] for _ in range(PLAN.rounds)]
            without, hit, _, miss = samples = list(zip(*rounds, strict=True))
            print("\n" + _table(kind, [way.name for way in ways], samples))
            assert not any(sample.failed for some in samples for sample in some)
            costs[kind] = ratio(hit, without), ratio(miss, without)
        hits = PLAN.rounds * (PLAN.requests + GIVEN_AGAIN)
        given = [target.given_again(hits) for target in (cached, shared)]
        assert min(given) >= hits, (given, hits)
    return costs


def _whole(bench: Rig, way: Way) -> Sample:
    asked = request_to(way.target, messages=_MESSAGES, temperature=0)
    return bench.work(way.target, asked, PLAN.requests, PLAN.warm_up, stream=False, different=way.different)


def _stream(bench: Rig, way: Way) -> Sample:
    script = {"tokens": PLAN.chunks, "interval": PLAN.interval, "finish": "length"}
    asked = request_to(way.target, messages=_MESSAGES, temperature=0, stream=True, script=script)
    count, warm_up = (GIVEN_AGAIN, QUESTIONS) if way.cached else (PLAN.streams, PLAN.connections)
    return bench.work(way.target, asked, count, warm_up, stream=True, different=way.different)


def _table(kind: str, names: Sequence[str], samples: Sequence[Sequence[Sample]]) -> str:
    """First bytes: of all rounds."""
    title = f"{kind}, {PLAN.connections} at once"
    lines = [f"{title:<34}{'worker us':>11}{'least':>9}{'x no cache':>12}{'first byte, ms: p50':>21}{'p99':>8}"]
    for name, some in zip(names, samples, strict=True):
        worker_us = statistics.median(sample.worker_us for sample in some)
        of_none = ratio(some, samples[0])
        waits = statistics.quantiles((us / 1000 for sample in some for us in sample.waits_us), n=100)
        lines.append(f"  {name:<32}{worker_us:>11,.1f}{least(some):>9,.1f}{of_none:>12.2f}{waits[49]:>21.2f}{waits[98]:>8.2f}")
    return "\n".join(lines)


# -- without --


@pytest.mark.parametrize(("stream", "words"), [(False, SHORT), (False, 800), (True, SHORT)])
def test_what_the_cache_costs_within_a_worker(tmp_path: Path, stream: bool, words: int) -> None:
    """Without sockets, so without the kernel and the neighbours: what the worker's own code takes, in turns. The quietest of many
    short runs counts. A long prompt and the miss are printed, not judged."""
    config: dict[str, dict[str, Any]] = {"no cache": {}, "hit": {"cache": {}}, "miss": {"cache": {"memory_bytes": 4_000_000}}}
    with ExitStack() as stack:
        loops = []
        for name, more in config.items():
            (tmp_path / name).mkdir()
            plane = stack.enter_context(Plane(tmp_path / name, {"journal": _JOURNAL, **more}))
            loops.append(_loop(plane, stream, words, again=name == "hit"))
        shares: list[float] = []
        while not shares or (len(shares) < ATTEMPTS and shares[-1] > HIT and words == SHORT):
            without, hit, miss = map(min, zip(*([loop() for loop in loops] for _ in range(100)), strict=True))
            kind = "a stream" if stream else "an answer"
            print(
                f"\n{kind} to {words} words takes {without:.1f} us of a worker's own code, a hit {hit:.1f}, a miss {miss:.1f}",
                end="",
            )
            shares.append(hit / without)
    assert shares[-1] <= HIT or words != SHORT, shares


def _loop(plane: Plane, stream: bool, words: int, *, again: bool) -> Callable[[], float]:
    """What makes some requests → us of CPU that each took. `again`: always the same one."""
    client, engine = plane.client(), plane.engine()
    messages = [{"role": "user", "content": "word " * words + "00000000"}]
    asked = request("/v1/chat/completions", {"model": "m", "messages": messages, "temperature": 0, "stream": stream}, key=KEY)
    before, _, after = asked.partition(b"00000000")
    answer, number, count = _events() if stream else [_answer()], 0, 10 if stream and not again else 100

    def ask(told: bytes) -> None:
        client.heard = engine.heard = b""
        client.says(told)
        if engine.heard:
            for piece in answer:
                engine.says(piece)

    def loop() -> float:
        nonlocal number
        begun = time.process_time()
        for _ in range(count):
            number += 1
            ask(asked if again else b"%b%08d%b" % (before, number, after))
        assert client.heard.startswith(b"HTTP/1.1 200")
        assert bool(engine.heard) is not again
        return (time.process_time() - begun) * 1e6 / count

    ask(asked)
    loop()
    return loop


_HEAD: Final = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\n"
_CHUNK: Final = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":%b}]}\n\n'
_STOP: Final = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def _answer() -> bytes:
    usage = b'{"prompt_tokens":37,"total_tokens":45,"completion_tokens":8}'
    body = b'{"choices":[{"index":0,"message":{"content":"%b"},"finish_reason":"stop"}],"usage":%b}' % (b"y" * 380, usage)
    return b"%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (_HEAD, len(body), body)


def _events() -> list[bytes]:
    """As they come: the head, then one read each."""
    deltas = [b'{"role":"assistant","content":""}', *(b'{"content":" word%d"}' % number for number in range(62))]
    events = [*(_CHUNK % delta for delta in deltas), _STOP]
    head = b"%bcontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n" % _HEAD
    return [head, *(b"%x\r\n%b\r\n" % (len(event), event) for event in events), b"0\r\n\r\n"]


# -- what is kept --


def test_making_room_takes_no_longer_where_more_is_kept() -> None:
    few, many = _making_room(2_000), _making_room(100_000)
    print(f"\nto keep one more answer where 2,000 are kept takes {few:.2f} us, where 100,000 are {many:.2f}", end="")
    assert many < 8 * few


def _making_room(entries: int) -> float:
    """us of CPU to put one into a full memory, until all that it had are replaced."""
    entry = Entry("chat.completions", "m", 0, b"", True, b"y" * 500, b"", 0, 2**62)
    memory, keys = Memory(entries * entry.size), [b"%033d" % number for number in range(2 * entries)]
    for key in keys[:entries]:
        memory.put(key, entry)
    begun = time.process_time()
    for key in keys[entries:]:
        memory.put(key, entry)
    took = time.process_time() - begun
    assert memory.evictions >= entries
    return took * 1e6 / entries
