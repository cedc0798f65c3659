"""What choosing a backend costs a worker: a request's way through the router, from its prompt's marks to letting go, in one
process and without sockets, over what the same way takes where there is only one backend. What the machine's other users take
away only ever adds to it, so the quietest of many short runs counts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import pytest

from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.routing import Route, Router
from proxy.routing.policies import POLICIES
from proxy.settings import Settings
from proxy.snapshot import Backend, Model, Principal, Snapshot, SnapshotFile
from proxy.wire import chat
from proxy.wire.body import Request

LIMITS_US: Final = {2: 5.0, 64: 30.0}
"""Backends to choose from → us that it may take for a chat of `TYPICAL` bytes."""
TYPICAL: Final = 500
LONG: Final = 4096
"""Printed, not judged: its prompt is longer to read."""
RUNS: Final = 100
TALKS: Final = 64
IN_FLIGHT: Final = 4
"""Requests that each backend has while another one chooses."""
ATTEMPTS: Final = 5

pytestmark = [pytest.mark.bench, pytest.mark.timeout(300)]


class Asked(NamedTuple):
    """A request as it comes to the router."""

    exchange: Exchange
    request: Request


@pytest.mark.parametrize("backends", LIMITS_US)
def test_what_choosing_costs(backends: int) -> None:
    quietest = _measured(backends, TYPICAL)
    for _ in range(ATTEMPTS - 1):
        if max(quietest.values()) > LIMITS_US[backends]:
            quietest = {policy: min(quietest[policy], us) for policy, us in _measured(backends, TYPICAL).items()}
    _measured(backends, LONG)
    assert max(quietest.values()) <= LIMITS_US[backends], quietest


def _measured(backends: int, size: int) -> dict[str, float]:
    """Policy → us of CPU that choosing takes a request."""
    costs = {}
    for policy in POLICIES:
        only, several = _loop(policy, 1, size), _loop(policy, backends, size)
        without, with_it = map(min, zip(*((only(), several()) for _ in range(RUNS)), strict=True))
        costs[policy] = with_it - without
    told = ", ".join(f"{policy} {us:.1f}" for policy, us in costs.items())
    print(f"\nus to choose among {backends} backends for a body of {size} bytes: {told}", end="")
    return costs


def _loop(policy: str, backends: int, size: int, count: int = 200) -> Callable[[], float]:
    names = [f"backend-{number}" for number in range(backends)]
    model = Model("m", tuple(names))
    snapshot = Snapshot(
        SnapshotFile(
            models={"m": model},
            backends={name: Backend(name, "127.0.0.1", 8000 + at) for at, name in enumerate(names)},
        )
    )
    router = Router(Settings.of({"routing": {"policy": policy}}))
    asked = [_asked(talk, size) for talk in range(TALKS)]
    under_way = [_enter(router, asked[at % TALKS], model, snapshot) for at in range(IN_FLIGHT * backends)]
    at = 0

    def loop() -> float:
        nonlocal at
        begun = time.process_time()
        for _ in range(count):
            place = at % len(under_way)
            former = under_way[place]
            router.first_token(former, time.monotonic_ns())
            router.let_go(former, 100, 100)
            under_way[place] = _enter(router, asked[at * 7 % TALKS], model, snapshot)
            at += 1
        return (time.process_time() - begun) * 1e6 / count

    return loop


def _enter(router: Router, asked: Asked, model: Model, snapshot: Snapshot) -> Route:
    route = router.route(asked.exchange, chat.OPERATION, asked.request, model, snapshot)
    assert router.enter(route, time.monotonic_ns()) is not None, "it waits"
    return route


def _asked(talk: int, size: int) -> Asked:
    """Eight system prompts; what comes after them is each talk's own."""
    shared, own = random.Random(talk % 8), random.Random(talk)
    half = (size - 200) // 2
    messages = [
        {"role": "system", "content": "".join(shared.choices("abcdefgh ", k=half))},
        {"role": "user", "content": "".join(own.choices("abcdefgh ", k=half))},
    ]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": 256, "stream": True, "user": f"user-{talk}"}).encode()
    exchange = Exchange(time.monotonic_ns(), b"POST", chat.OPERATION.path, {}, body, Remembered(), Flow(lambda: None))
    exchange.principal = Principal(f"key_{talk % 8}", f"key {talk % 8}")
    return Asked(exchange, chat.OPERATION.read(body, exchange.record, b""))
