"""Two engines, and one of them hangs, is killed and is started again, while clients ask on: what had not begun to be answered is
answered by the other one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import pytest

from tests.conftest import Start
from tests.engine.answers import events_of, piece_of
from tests.engine.environment import Say
from tests.engine.vllm import NAME, PATIENCE, TINY, Engine, Engines, wait_until
from tests.support.glasshouse import Glasshouse
from tests.support.wire_client import Reply, WireClient, request

CLIENTS: Final = 6
PAUSE: Final = 0.2
"""Seconds between a client's requests: an engine starts on the same cores meanwhile."""
TOKENS: Final = 60
LONG: Final = 900
QUICK: Final = {
    "health": {"silence": 2.0, "probe": 2.0, "ejection": 1.0, "slow_start": 3.0},
    "timeouts": {"first_byte": 40.0, "between_chunks": 10.0},
    "models": {NAME: {"policy": "round_robin"}},
}
"""In turns, so that an engine that fails is asked by every second request until it is known to."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture
def pair(engines: Engines) -> tuple[Engine, Engine]:
    """(the one that stays, the one that fails)."""
    with ThreadPoolExecutor(2) as starting:
        stays, fails = starting.map(lambda name: engines.get(name, TINY), ("tiny", "second"))
    return stays, fails


@pytest.fixture
def proxy(glasshouse: Start, pair: tuple[Engine, Engine]) -> Glasshouse:
    return glasshouse([{"url": engine.url, "name": engine.name} for engine in pair], QUICK)


class Answer(NamedTuple):
    asked: float
    """When, by time.monotonic."""
    stream: bool
    reply: Reply


class Traffic:
    """Clients that ask on and on, each for a stream and a whole answer in turn. All that they got."""

    def __init__(self, proxy: Glasshouse) -> None:
        self._proxy = proxy
        self._enough = threading.Event()
        self.answers: list[Answer] = []

    def ask_on(self, number: int) -> None:
        for turn in itertools.count(number):
            if self._enough.wait(PAUSE):
                return
            self.ask(stream=turn % 2 == 0, tokens=TOKENS)

    def ask(self, *, stream: bool, tokens: int) -> None:
        with self.asking(stream=stream, tokens=tokens) as (asked, client):
            self.answers.append(Answer(asked, stream, client.read()))

    @contextmanager
    def asking(self, *, stream: bool, tokens: int) -> Iterator[tuple[float, WireClient]]:
        """(when it asked, who waits for the answer)."""
        messages = [{"role": "user", "content": f"Tell story number {len(self.answers)}."}]
        body = {"model": NAME, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
        with WireClient(self._proxy.url, timeout=2 * PATIENCE) as client:
            asked = time.monotonic()
            client.send(request("/v1/chat/completions", body, key=self._proxy.key))
            yield asked, client

    def listen(self, began: threading.Semaphore, engine: Engine) -> None:
        """To a long stream. `began` is told when it has, if it is this engine's."""
        with self.asking(stream=True, tokens=LONG) as (asked, client):
            if client.read(events=8).header("x-glasshouse-backend") == engine.name:
                began.release()
            self.answers.append(Answer(asked, True, client.read()))

    def stop(self) -> None:
        self._enough.set()

    def since(self, moment: float) -> list[str]:
        """Who answered what was asked after this moment, as far as it was."""
        return [each.reply.header("x-glasshouse-backend") or "" for each in self.answers if each.asked > moment]

    def broken(self) -> int:
        """How many were broken off in the middle. All others must be whole."""
        broken = 0
        for _, stream, reply in self.answers:
            assert reply.status == 200, (stream, reply)
            if not stream:
                assert reply.ending == "complete"
                assert reply.json()["choices"][0]["finish_reason"] == "length", reply
                continue
            told = [data for _, data in events_of(reply) if data != "[DONE]"]
            if finish_of(told[-1]) != "length":
                assert any(piece_of(data) for data in told), reply  # it had begun
                broken += 1
        return broken


def finish_of(data: Any) -> Any:
    choices = data.get("choices")
    return choices[0]["finish_reason"] if choices else None


@contextmanager
def traffic(proxy: Glasshouse, engine: Engine) -> Iterator[Traffic]:
    """While it goes on; `engine` has also some long streams in the middle of their answers when it begins."""
    made, began = Traffic(proxy), threading.Semaphore(0)
    with ThreadPoolExecutor(2 * CLIENTS) as clients:
        asking = [clients.submit(made.listen, began, engine) for _ in range(CLIENTS)]
        for _ in range(CLIENTS // 2):
            assert began.acquire(timeout=PATIENCE)
        asking += [clients.submit(made.ask_on, number) for number in range(CLIENTS)]
        try:
            wait_until(lambda: engine.name in made.since(0), f"an answer of {engine.name}")
            yield made
        finally:
            made.stop()
        for each in asking:
            each.result()


def until_it_is(proxy: Glasshouse, engine: Engine, state: str) -> None:
    proxy.until_beats(
        lambda beats: all(beat.backends[engine.name].state == state for beat in beats), f"{engine.name} to be {state}"
    )


def others_serve(asking: Traffic, engine: Engine) -> None:
    """What is asked from now on is answered, and not by this one."""
    now = time.monotonic()
    wait_until(lambda: len(asking.since(now)) >= 30, "the other one to serve")
    assert engine.name not in asking.since(now)


def it_serves_again(asking: Traffic, engine: Engine) -> None:
    now = time.monotonic()
    wait_until(lambda: asking.since(now).count(engine.name) >= 3, f"{engine.name} to serve again")


def test_one_of_two_hangs(  # failures 11, 51, 53
    proxy: Glasshouse, pair: tuple[Engine, Engine], say: Say
) -> None:
    _, hung = pair
    with traffic(proxy, hung) as asking:
        with hung.hanging():
            until_it_is(proxy, hung, "out")
            others_serve(asking, hung)
        until_it_is(proxy, hung, "up")
        it_serves_again(asking, hung)
    tell(say, "hangs", asking)


def test_one_of_two_is_killed(  # failure 51
    proxy: Glasshouse, pair: tuple[Engine, Engine], say: Say
) -> None:
    _, killed = pair
    with traffic(proxy, killed) as asking:
        killed.kill()
        until_it_is(proxy, killed, "out")
        others_serve(asking, killed)
    tell(say, "is killed", asking)


def test_one_of_two_loses_its_core_and_is_started_again(  # failures 4, 51
    proxy: Glasshouse, pair: tuple[Engine, Engine], say: Say
) -> None:
    _, killed = pair
    with traffic(proxy, killed) as asking:
        killed.kill_core()
        until_it_is(proxy, killed, "out")
        others_serve(asking, killed)
        killed.stop()
        killed.start()
        until_it_is(proxy, killed, "up")
        it_serves_again(asking, killed)
    tell(say, "loses its core", asking)


def tell(say: Say, what: str, asking: Traffic) -> None:
    broken = asking.broken()
    say(f"one of two {what}: {len(asking.answers)} requests, {broken} broken off in mid-stream, none that had not begun")
