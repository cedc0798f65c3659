"""What limits cost a worker, and what a second worker brings. Side by side in one run: the same proxy without limits, with twelve
of them (key, team, everyone; requests, input tokens, output tokens, places), and with the same twelve in Redis."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

import msgspec
import pytest

from tests.bench.measure import QUICK, least, measure_requests
from tests.bench.report import requests_table
from tests.bench.targets import Glasshouse, Nginx, Target
from tests.support.redis import redis_server

# 8 and 60 µs, where nginx took 21.6 for a request.
IN_PROCESS: Final = 8 / 21.6
OVER_REDIS: Final = 60 / 21.6
ATTEMPTS: Final = 3
"""A machine that others use too makes everything dearer, and what is in Python more than what is in C."""

_MANY: Final = 1_000_000_000
_FOUR: Final = {
    "requests_per_minute": _MANY,
    "input_tokens_per_minute": _MANY,
    "output_tokens_per_minute": _MANY,
    "concurrent_requests": _MANY,
}
TWELVE: Final[dict[str, Any]] = {"everyone": _FOUR, "teams": {"team": _FOUR}, "keys": {"default": {"team": "team", **_FOUR}}}

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Nginx.installed(), reason="nginx isn't installed"),
]


def test_what_twelve_limits_cost_a_worker() -> None:
    costs: list[tuple[float, float]] = []
    while not costs or (len(costs) < ATTEMPTS and not _within(*costs[-1])):
        costs.append(_measure())
    assert _within(*costs[-1]), costs


def _measure() -> tuple[float, float]:
    """What they cost in one process and in Redis, in requests of nginx."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        targets: list[Target] = [
            Nginx(),
            Glasshouse("no limits"),
            Glasshouse("twelve limits", TWELVE),
            Glasshouse("twelve limits in Redis", {**TWELVE, "redis": {"url": redis.url}}),
        ]
        for target in targets:
            stack.callback(target.stop)
        results = measure_requests(targets, QUICK)
    print(requests_table(results, QUICK))
    assert not any(sample.failed for each in results for sample in each.requests)
    nginx, none, twelve, shared = (least(each.requests) for each in results)
    print(f"in the quietest rounds: twelve limits cost {twelve - none:.1f} us a request, in Redis {shared - none:.1f} us")
    return (twelve - none) / nginx, (shared - none) / nginx


def _within(in_process: float, over_redis: float) -> bool:
    return in_process <= IN_PROCESS and over_redis <= OVER_REDIS


def test_a_second_worker() -> None:
    """Printed, not judged: it says more about the machine, which also runs the engine and the clients, than about the proxy."""
    plan = msgspec.structs.replace(QUICK, pinned=False, rounds=3)
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        config = {**TWELVE, "redis": {"url": redis.url}}
        targets = [Glasshouse("one worker", config), Glasshouse("two workers", {**config, "workers": 2})]
        for target in targets:
            stack.callback(target.stop)
        one, two = measure_requests(targets, plan)
    print(requests_table([one, two], plan))
    assert not any(sample.failed for each in (one, two) for sample in each.requests)
