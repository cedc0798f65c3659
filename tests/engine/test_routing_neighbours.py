"""One key that sends long prompts, fifty at a time, beside one that chats: the chats' first tokens must come nearly as soon as
if it were alone.

The engine computes some 40000 tokens of a prompt in a second: 25 ms for a long one, where a chat's first token takes 8. It takes
128 tokens in a step, and 64 of a prompt if there are others; with `prefill_tokens` there is one long prompt in it at a time. (As
vLLM comes it computes a long one in a single step, for which a chat waits that arrives in it: 2.0 to 2.1 times.)
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Final

import pytest

from tests.bench.processes import pin
from tests.conftest import Start
from tests.engine.environment import Say
from tests.engine.talks import Heard, ask, percentile, text
from tests.engine.vllm import NAME, PATIENCE, TINY, Engines
from tests.support.glasshouse import Glasshouse
from tests.support.wire_client import WireClient

SAMPLES: Final = 600
"""Chats each way, one after the other."""
PROMPTS: Final = 50
"""At once, all the time."""
PROMPT_WORDS: Final = 850
CHUNKED: Final = dataclasses.replace(
    TINY, arguments=(*TINY.arguments, "--max-num-batched-tokens=128", "--long-prefill-token-threshold=64")
)
SLOWER: Final = 2.0
ATTEMPTS: Final = 3
"""What else the machine has to do only ever adds to it."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_a_noisy_neighbour(glasshouse: Start, engines: Engines, say: Say, rounds: int) -> None:
    engine = engines.get("chunked", CHUNKED)
    # One CPU is its own. On two of two it would have everybody else wait, its own server too, while it looks for work.
    pin(engine.generating, {min(os.sched_getaffinity(0))})
    proxy = glasshouse([{"url": engine.url, "depth": engine.kind.requests, "prefill_tokens": 1024}])
    noisy = proxy.command("keys", "create", "noisy").stdout.strip()
    chat(proxy, 0, 10)
    ratios: list[float] = []
    while not ratios or (len(ratios) < ATTEMPTS and ratios[-1] > SLOWER):
        ratios.append(compared(proxy, noisy, rounds, say))
    assert ratios[-1] <= SLOWER, ratios


def compared(proxy: Glasshouse, noisy: str, rounds: int, say: Say) -> float:
    """The quiet key's 99th percentile beside the noisy one, over that of the quiet one alone, in turns."""
    alone: list[Heard] = []
    beside: list[Heard] = []
    chats = math.ceil(SAMPLES / rounds)
    for number in range(rounds):
        alone += chat(proxy, number, chats)
        with noise(proxy, noisy, number) as done:
            beside += chat(proxy, number, chats)
        say(f"round {number}: {done.value} long prompts beside {chats} chats")
        assert done.value
    for name, heard in (("alone", alone), ("beside the noisy one", beside)):
        times = ", ".join(f"p{100 * part:g} {percentile(heard, part) * 1e3:.0f} ms" for part in (0.5, 0.9, 0.99, 1))
        say(f"{len(heard)} chats {name}: first token after {times}")
    ratio = percentile(beside, 0.99) / percentile(alone, 0.99)
    say(f"p99 is {ratio:.2f} of what it is alone")
    return ratio


def chat(proxy: Glasshouse, seed: int, chats: int) -> list[Heard]:
    dice = random.Random(seed)
    with WireClient(proxy.url, timeout=PATIENCE) as client:
        return [
            ask(client, proxy.key, NAME, [{"role": "user", "content": text(dice, 20)}], session="quiet") for _ in range(chats)
        ]


@contextmanager
def noise(proxy: Glasshouse, key: str, seed: int) -> Iterator[Synchronized[int]]:
    """Until the end of the block there are always so many long prompts, each a new one; gives how many were answered. They come
    from another process: here they would get in the way of who measures."""
    spawn = multiprocessing.get_context("spawn")
    enough, done = spawn.Event(), spawn.Value("i", 0)
    asking = spawn.Process(target=make_noise, args=(proxy.url, key, seed, enough, done))
    asking.start()
    try:
        proxy.until_in_flight(PROMPTS)
        yield done
    finally:
        enough.set()
        asking.join(PATIENCE)
    assert asking.exitcode == 0


def make_noise(url: str, key: str, seed: int, enough: Event, done: Synchronized[int]) -> None:
    os.nice(19)  # the engine's server has a low priority, and this would take its time

    def ask_on(number: int) -> None:
        words = text(random.Random(seed * PROMPTS + number), PROMPT_WORDS)
        with WireClient(url, timeout=PATIENCE) as client:
            while not enough.is_set():
                said = {"role": "user", "content": f"{seed} {number} {done.value}: {words}"}
                ask(client, key, NAME, [said], session="noisy")
                with done:
                    done.value += 1

    with ThreadPoolExecutor(PROMPTS) as clients:
        for each in [clients.submit(ask_on, number) for number in range(PROMPTS)]:
            each.result()
