"""Choosing a backend and trying again. Once a byte of an answer has come there is no other try."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from time import monotonic_ns
from typing import Any

from proxy.errors import MethodNotAllowed, NotReady, ProxyError, UpstreamDisconnected, UpstreamFault, UpstreamUnreachable
from proxy.exchange import Attempt, Exchange
from proxy.relay.call import Call
from proxy.relay.connection import UpstreamConnection
from proxy.relay.control import MOST, ControlPool
from proxy.relay.pool import Pool
from proxy.reply import Reply
from proxy.routing import Router
from proxy.settings import Settings
from proxy.snapshot import Backend, Model, Snapshot
from proxy.wire.body import Request
from proxy.wire.operation import EngineOperation, RelayedOperation
from proxy.wire.report import check_query


class Relay:
    """The pools of all backends. `opening` is called once per request, before anything goes to an engine."""

    def __init__(self, router: Router, settings: Settings, opening: Callable[[Exchange], None]) -> None:
        self._router = router
        self._settings = settings
        self._opening = opening
        self._pools: dict[str, Pool] = {}
        self._control = ControlPool(settings)

    async def relay(
        self,
        operation: EngineOperation[Any],
        exchange: Exchange,
        request: Request,
        model: Model,
        snapshot: Snapshot,
        reply: Reply,
    ) -> None:
        """Have one backend answer: the best that can be reached. Raises what the last one failed with."""
        in_flight = self._router.in_flight
        failed: UpstreamUnreachable | None = None
        for name in self._router.candidates(model):
            backend = snapshot.backends.get(name)
            if backend is None:
                continue
            pool = self._pools.get(name)
            if pool is None or pool.backend is not backend:
                pool = self._new_pool(backend)
            connection = pool.take(monotonic_ns())
            in_flight[name] += 1
            try:
                try:
                    await self._attempt(pool, connection, operation, exchange, request, reply)
                except UpstreamDisconnected:
                    # A kept-alive connection that the engine had given up meanwhile: one more try, on a fresh one.
                    if connection is None or exchange.call is None or exchange.call.heard:
                        raise
                    await self._attempt(pool, None, operation, exchange, request, reply)
            except UpstreamUnreachable as error:
                failed = error
            else:
                return
            finally:
                in_flight[name] -= 1
        raise failed or NotReady(f"No backend serves the model `{model.name}` right now.", code="no_backend")

    async def ask_control(self, operation: RelayedOperation, exchange: Exchange, reply: Reply) -> None:
        """Have control answer. Raises NotReady if it doesn't, whatever the reason; InvalidRequest."""
        control = self._control
        check_query(exchange.target)
        if reply.bodiless:  # what is too large to be held would go out
            raise MethodNotAllowed("HEAD isn't allowed here; allowed: GET.", allow=b"GET")
        if control.asking >= MOST:
            raise NotReady("Too many ask for what they used right now; try again in a moment.", code="usage_unavailable")
        control.asking += 1
        try:
            await self._attempt(control, None, operation, exchange, Request(), reply)
        except UpstreamFault:
            raise NotReady("What was used can't be told right now; try again in a moment.", code="usage_unavailable") from None
        finally:
            control.asking -= 1

    async def _attempt(
        self,
        pool: Pool,
        connection: UpstreamConnection | None,
        operation: RelayedOperation,
        exchange: Exchange,
        request: Request,
        reply: Reply,
    ) -> None:
        """One try on one backend: on `connection`, or on a new one."""
        backend = pool.backend
        attempt = Attempt(backend.name, monotonic_ns() - exchange.origin_ns, reused=connection is not None)
        attempts = exchange.record.attempts
        attempts.append(attempt)
        if len(attempts) == 1:
            self._opening(exchange)
        upstream = operation.prepare(exchange.body, request, backend.kind)
        if exchange.changes:
            upstream = upstream.changed(exchange.changes)
        call = exchange.call = Call(exchange, reply, operation, upstream.terms, pool, self._settings, attempt)
        try:
            if connection is None:
                connection = await self._connect(pool, exchange)
                attempt.connected_ns = exchange.elapsed_ns()
            call.begin(connection, pool.payload(operation, exchange, upstream, len(attempts)), monotonic_ns())
            await exchange.flow.wait()
        except ProxyError as error:
            attempt.error = error.error_code or error.type
            raise
        finally:
            call.close()

    async def _connect(self, pool: Pool, exchange: Exchange) -> UpstreamConnection:
        connecting = asyncio.ensure_future(pool.connect())
        try:
            return await exchange.flow.until(connecting)
        except ProxyError:
            connecting.add_done_callback(_let_go)  # it may be there already, with nobody to take it
            raise

    def _new_pool(self, backend: Backend) -> Pool:
        """The pool of a backend that is new, or that a new snapshot describes; it stays if nothing but the object changed."""
        former = self._pools.get(backend.name)
        if former is not None and former.backend == backend:
            former.backend = backend
            return former
        if former is not None:
            former.close()
        pool = self._pools[backend.name] = Pool(backend, self._settings.timeouts)
        return pool

    def sweep(self, now_ns: int) -> None:
        for pool in self._pools.values():
            pool.sweep(now_ns)

    def keep_only(self, names: Collection[str]) -> None:
        """Close the idle connections of backends that the catalogue no longer has."""
        for name in [name for name in self._pools if name not in names]:
            self._pools.pop(name).close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _let_go(connecting: asyncio.Future[UpstreamConnection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().abort()
