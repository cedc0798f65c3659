"""Requests that go to a router as the relay takes them there: exchanges, flows and bodies are real. Engines and time aren't."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import msgspec

from proxy.engines import EngineLoad
from proxy.errors import ClientGone, ProxyError
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.routing import Route, Router, Standing
from proxy.routing import router as module
from proxy.settings import Settings
from proxy.snapshot import Allowance, Backend, Model, Principal, Snapshot, SnapshotFile
from proxy.wire import chat
from proxy.wire.operation import JSON

S = 1_000_000_000
START_NS = 1_000 * S


def backend(name: str, **fields: Any) -> Backend:
    return Backend(name, f"{name}.test", 8000, **fields)


def catalogue(backends: Iterable[Backend], models: Mapping[str, Any] | None = None, **fields: Any) -> Snapshot:
    """`models`: name → names of its backends; without it there is `m`, which has them all. `fields`: every model's."""
    there = {each.name: each for each in backends}
    models = {"m": tuple(there)} if models is None else models
    return Snapshot(
        SnapshotFile(models={name: Model(name, tuple(names), **fields) for name, names in models.items()}, backends=there)
    )


class Asked:
    """One request; its flow ends when it has a backend, or won't get one."""

    def __init__(self, world: World, exchange: Exchange, model: str, request: chat.ChatRequest) -> None:
        self.world = world
        self.exchange = exchange
        self.error: ProxyError | None = None
        self.ended = False
        snapshot = world.snapshot
        self.route: Route = world.router.route(exchange, chat.OPERATION, request, snapshot.models[model], snapshot)

    @property
    def standing(self) -> Standing | None:
        return self.route.standing

    @property
    def backend(self) -> str:
        """That it has; "" while it has none."""
        return self.route.standing.name if self.route.standing is not None else ""

    @property
    def routed_by(self) -> str:
        return self.exchange.record.routed_by

    def enter(self) -> Asked:
        self.ended = False
        self.exchange.flow.start(self._enter())
        return self

    def again(self) -> Asked:
        """Its backend has failed: to another one."""
        self.route.tried += (self.backend,)
        self.world.router.let_go(self.route)
        return self.enter()

    def leave(self) -> None:
        """Its client hangs up."""
        self.exchange.flow.interrupt(ClientGone("The client has gone."))

    def done(self, output_tokens: int = 0, computed_tokens: int = 0) -> None:
        self.world.router.let_go(self.route, output_tokens, computed_tokens)

    def first_token(self) -> None:
        self.route.first_token(self.world.now_ns)

    async def _enter(self) -> None:
        try:
            router, now_ns = self.world.router, self.world.now_ns
            standing = router.enter(self.route, now_ns) or await router.wait(self.route, now_ns)
            assert standing is self.route.standing
        except ProxyError as error:
            self.error = error
        self.ended = True


class World:
    """A router and its catalogue; `now_ns` is its time. See `world_of`."""

    def __init__(self, snapshot: Snapshot, **settings: Any) -> None:
        self.now_ns = START_NS
        self.router = Router(Settings.of(settings))
        self.snapshot = snapshot

    def __getitem__(self, name: str) -> Standing:
        return self.router.standings[name]

    def follow(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.router.follow(snapshot)

    def request(
        self, key: str = "k", text: str = "hello", *, model: str = "m", priority: int = 1, session: str = "", **fields: Any
    ) -> Asked:
        """One that hasn't been to a backend yet. Whoever has no `stream` in the fields streams."""
        fields = {"model": model, "stream": True, "messages": [{"role": "user", "content": text}], **fields}
        body = msgspec.json.encode(fields)
        headers = {b"x-session-id": session.encode()} if session else {}
        exchange = Exchange(self.now_ns, b"POST", b"/v1/chat/completions", headers, body, Remembered(), Flow(_nothing))
        exchange.principal = Principal(key, key, allowance=Allowance(priority=priority))
        request = chat.OPERATION.read(body, exchange.record, JSON)
        return Asked(self, exchange, model, request)

    def ask(self, key: str = "k", text: str = "hello", **fields: Any) -> Asked:
        return self.request(key, text, **fields).enter()

    async def pass_s(self, seconds: float, step_s: float = 0.1) -> None:
        """Time, with the worker's sweeps."""
        for _ in range(round(seconds / step_s)):
            self.now_ns += int(step_s * S)
            self.router.sweep(self.now_ns)
            await asyncio.sleep(0)

    def learn(self, loads: Mapping[str, EngineLoad]) -> None:
        self.router.learn(loads, self.now_ns)

    def eject(self, *names: str) -> None:
        for name in names:
            self[name].health.failed(self.now_ns, "engine_dead", certain=True)
        self.router.changed()

    def bring_back(self, name: str) -> None:
        """It begins anew: with a part of what it had."""
        self.now_ns = max(self.now_ns, self[name].health.until_ns)
        assert self[name].health.probed(self.now_ns, None)
        self.router.changed()
        self.router.sweep(self.now_ns)

    def assert_idle(self) -> None:
        """Nothing is left of anything."""
        assert self.router.waiting == len(self.router.in_line()) == 0
        for standing in self.router.standings.values():
            assert (standing.in_flight, standing.tokens, standing.prefilling, standing.keys) == (0, 0, 0, {}), standing.name


def _nothing() -> None:
    """Nobody waits for a flow's end here."""


@contextmanager
def world_of(snapshot: Snapshot, **settings: Any) -> Iterator[World]:
    """A world in which time goes on only when it is told to."""
    world = World(snapshot, **settings)
    with patch.object(module, "monotonic_ns", lambda: world.now_ns):
        world.follow(snapshot)
        yield world
