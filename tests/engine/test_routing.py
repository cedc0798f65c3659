"""Two engines behind one Glasshouse: what each policy makes of their caches and of its clients' patience.

An engine has one core, and a prefix cache of 245 blocks of 32 tokens. The talks of a round have some 430 blocks in all: they fit
if each is kept by one engine, and not if both are to keep all of them. That is the case of two GPUs with a model that leaves
little of their memory free. An engine answers to one name for each policy, so that all policies are those of one Glasshouse, in
turns.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Final, NamedTuple

import pytest

from tests.bench.processes import pin
from tests.conftest import Start
from tests.engine.environment import Say
from tests.engine.talks import Heard, Talk, hold, percentile, shared, unlike
from tests.engine.vllm import Engine, Engines, Kind
from tests.support.endpoints import Endpoint

SINGLE: Final = ("least_loaded", "prefix_affinity", "round_robin", "session")
"""Policies, beside `auto`. With equal weights `weighted` is `round_robin`."""
POLICIES: Final = ("auto", *SINGLE)
CACHED: Final = 1.5
SLOWER: Final = 1.1

BLOCKS: Final = 245
_SIZES: Final = {
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "intermediate_size": 2048,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
"""Large enough for a prompt to take much longer than a cached one: some 5000 tokens a second of one core."""
SMALL: Final = Kind(
    "tiny",
    1,
    ("--load-format=dummy", "--dtype=float32", f"--num-gpu-blocks-override={BLOCKS}", f"--hf-overrides={json.dumps(_SIZES)}"),
    requests=16,
    names=POLICIES,
    context=2048,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


class Round(NamedTuple):
    """What a policy made of one round."""

    heard: list[Heard]
    seconds: float

    @property
    def slowest(self) -> float:
        """The 99th percentile of a round, which has fewer than a hundred requests."""
        return percentile(self.heard, 0.99)


Rounds = dict[str, list[Round]]
"""Policy -> its rounds, in order."""


@pytest.fixture(scope="module")
def two(engines: Engines) -> list[Engine]:
    """Started together, each on a core of its own where there are two."""
    with ThreadPoolExecutor(2) as starting:
        made = list(starting.map(lambda name: engines.get(name, SMALL), ("left", "right")))
    for engine, cpu in zip(made, sorted(os.sched_getaffinity(0)), strict=False):
        pin(engine.pids, {cpu})
    return made


@pytest.fixture(scope="module")
def in_front(shared_glasshouse: Start, two: list[Engine]) -> Endpoint:
    config = {"models": {name: {"policy": name} for name in POLICIES}}
    proxy = shared_glasshouse([{"url": engine.url, "name": engine.name} for engine in two], config)
    return Endpoint(proxy.url, proxy.key)


def test_talks_with_shared_beginnings(in_front: Endpoint, say: Say, rounds: int) -> None:
    """Whom round robin takes is chance to what engines have cached, and in few rounds that can be lucky: then there are more."""
    if not _pays(in_front, say, range(rounds)):
        assert _pays(in_front, say, range(rounds, 3 * rounds))


def _pays(in_front: Endpoint, say: Say, numbers: range) -> bool:
    measured = in_turns(
        numbers,
        in_front,
        POLICIES,
        lambda mark, seed: shared(mark, seed, openings=8, users=2, turns=4, opening_words=1150, turn_words=40, within=2.5),
    )
    say(table("8 system prompts of 1200 tokens, 2 talks of 4 turns each", measured))
    cached = {policy: cached_share(measured[policy]) for policy in POLICIES}
    ratios = {policy: paired(measured, "auto", policy) for policy in SINGLE}
    say(f"cached: {cached['auto'] / cached['round_robin']:.2f} of round_robin's; slowest: {told(ratios)}")
    return cached["auto"] >= CACHED * cached["round_robin"] and max(ratios.values()) <= SLOWER


def test_requests_that_have_nothing_in_common(in_front: Endpoint, say: Say, rounds: int) -> None:
    measured = in_turns(
        range(rounds),
        in_front,
        ("auto", "least_loaded"),
        lambda mark, seed: unlike(mark, seed, requests=48, words=(30, 900), within=4.5),
    )
    say(table("48 requests of 30 to 900 words", measured))
    ratio = paired(measured, "auto", "least_loaded")
    say(f"slowest: {told({'least_loaded': ratio})}")
    assert ratio <= SLOWER


def in_turns(numbers: range, endpoint: Endpoint, policies: Sequence[str], talks: Callable[[str, int], list[Talk]]) -> Rounds:
    """Each round the same for all policies but for a mark in its texts, and each time another policy begins."""
    rounds: Rounds = {policy: [] for policy in policies}
    for number in numbers:
        for place in range(len(policies)):
            policy = policies[(number + place) % len(policies)]
            begun = time.monotonic()
            heard = hold(endpoint, policy, talks(f"{policy} {number}", number))
            rounds[policy].append(Round(heard, time.monotonic() - begun))
    return rounds


def cached_share(rounds: Sequence[Round]) -> float:
    """Of the prompts' tokens, those that the engines had in their caches."""
    heard = all_heard(rounds)
    return sum(each.cached for each in heard) / sum(each.prompt for each in heard)


def all_heard(rounds: Sequence[Round]) -> list[Heard]:
    return list(chain.from_iterable(each.heard for each in rounds))


def paired(rounds: Rounds, ours: str, other: str) -> float:
    """The median over the rounds of the slowest against the other's in the same round: what disturbs a round by chance counts
    once."""
    return statistics.median(a.slowest / b.slowest for a, b in zip(rounds[ours], rounds[other], strict=True))


def told(ratios: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.2f} of {policy}'s" for policy, ratio in ratios.items()) + " (medians of the rounds)"


def table(title: str, rounds: Rounds) -> str:
    count = len(rounds["auto"])
    lines = [
        f"{title}, {count} rounds\n  {'':<18}{'requests':>9}{'left':>6}{'cached':>8}{'p50 ms':>8}{'p99 ms':>8}{'rounds, s':>11}"
    ]
    for policy, its in rounds.items():
        heard = all_heard(its)
        left = sum(each.backend == "left" for each in heard)
        lines.append(
            f"  {policy:<18}{len(heard):>9}{left / len(heard):>6.0%}{cached_share(its):>8.1%}"
            f"{percentile(heard, 0.5) * 1e3:>8.0f}{percentile(heard, 0.99) * 1e3:>8.0f}{sum(each.seconds for each in its):>11.0f}"
        )
    return "\n".join(lines)
