"""Trying one backend after the other. Once anything of an answer has gone to the client there is no other try."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator
from time import monotonic_ns
from typing import Any, Final, NamedTuple

from proxy.errors import (
    BackendLost,
    MethodNotAllowed,
    NotReady,
    Overloaded,
    ProxyError,
    RateLimited,
    ShuttingDown,
    UpstreamDisconnected,
    UpstreamFault,
    UpstreamTimeout,
)
from proxy.exchange import Attempt, Exchange, Record, UsageSource
from proxy.relay.backends import Verdict
from proxy.relay.call import Call
from proxy.relay.connection import UpstreamConnection
from proxy.relay.control import MOST, ControlPool
from proxy.relay.pool import Pool
from proxy.relay.probe import HEALTH, Probe
from proxy.reply import Reply, Withdrawn
from proxy.routing import Route, Router, Standing, State
from proxy.settings import Settings
from proxy.snapshot import Backend, Model, Snapshot
from proxy.wire.body import Request
from proxy.wire.operation import EngineOperation, RelayedOperation
from proxy.wire.report import check_query

log = logging.getLogger(__name__)

Fallbacks = Iterator[tuple[Model, Request]]
"""Models that are asked instead, each with the request as it goes there, made when it is its turn."""

_ASK_OTHERS = (Verdict.BUSY, Verdict.FAILING)
"""They live and say no: each one more that is asked may be one too many."""
_GONE = (Verdict.DEAD, Verdict.GAVE_UP, Verdict.ELSEWHERE, Verdict.STRANGER)
_ILL = (Verdict.FAILING, Verdict.GAVE_UP, Verdict.BROKEN, Verdict.DEAD)
PREFILL_RATE: Final = 500
"""Tokens a second that even a slow engine computes: so much longer it may be silent over long prompts."""


class _Refusal(NamedTuple):
    """What an engine that lives said, for when nobody does better."""

    withdrawn: Withdrawn
    call: Call
    attempt: Attempt
    model: Model | None
    name: str
    fallback_of: str


class Relay:
    """The pools of all backends. `opening` is called once per request, before anything goes to an engine; `closing` at the end of
    one of our own."""

    def __init__(
        self,
        router: Router,
        settings: Settings,
        opening: Callable[[Exchange], None],
        closing: Callable[[Exchange, Reply], None],
    ) -> None:
        self._router = router
        self._settings = settings
        self._opening = opening
        self._closing = closing
        self._calls: set[Call] = set()
        """Tries of requests that are under way."""
        self._pools: dict[str, Pool] = {}
        self._control = ControlPool(settings)
        self._silence_ns = int(settings.health.silence * 1e9)
        self._probes: list[Probe] = []
        self.retries_denied = 0
        """Refusals that went out since enough others had been tried again."""

    async def relay(
        self,
        operation: EngineOperation[Any],
        exchange: Exchange,
        request: Request,
        model: Model,
        snapshot: Snapshot,
        reply: Reply,
        fallbacks: Fallbacks | None = None,
    ) -> None:
        """Have one backend answer, each asked until it fails. Raises what the last one failed with.

        Who couldn't be asked, or died over it, is replaced by another one, whatever that costs: no work is done twice. Where one
        said no although it lives, asking others is rationed, and its own words go out if nobody does better.
        """
        router, record = self._router, exchange.record
        route = router.route(exchange, operation, request, model, snapshot)
        failed: ProxyError | None = None
        refused: _Refusal | None = None
        while True:
            try:
                now_ns = monotonic_ns()
                standing = router.enter(route, now_ns)
                if standing is None:
                    route.reply = reply if record.stream else None
                    standing = await router.wait(route, now_ns)
                    now_ns = monotonic_ns()
            except (NotReady, Overloaded, RateLimited) as error:
                failed = failed or error
                if fallbacks is not None and (other := next(fallbacks, None)) is not None:
                    model, request = other
                    route = router.route(exchange, operation, request, model, snapshot)
                    continue
                if refused is None:
                    raise failed from None
                _remember_answer(exchange, refused)
                reply.restore(refused.withdrawn)
                _book(reply, exchange, refused.call)
                return
            pool = self._pool(standing.backend)
            connection = pool.take(now_ns)
            attempt = self._new_attempt(standing.name, exchange, reused=connection is not None)
            if len(record.attempts) == 1:
                self._opening(exchange)
            reply.served_by = pool.served_by
            try:
                try:
                    call = await self._attempt(pool, connection, attempt, operation, exchange, request, reply, route)
                except UpstreamDisconnected:
                    if connection is None or exchange.call is None or exchange.call.heard:
                        raise
                    # It was kept, and the engine had given it up meanwhile.
                    attempt = self._new_attempt(standing.name, exchange)
                    call = await self._attempt(pool, None, attempt, operation, exchange, request, reply, route)
            except UpstreamFault as error:
                if not self._fell(route, standing, error) or reply.begun:
                    raise
                failed = error
                if not isinstance(error, BackendLost):  # who was taken away from it may come again, if it is well again
                    route.tried += (standing.name,)
            else:
                self._answered(route, standing, operation, call, reply)
                if call.failure is None:
                    return
                if not self._others_may(route, call, reply, fallbacks):
                    _book(reply, exchange, call)
                    return
                refused = _Refusal(reply.withdraw(), call, attempt, exchange.model, record.model, record.fallback_of)
                route.tried += (standing.name,)
            finally:
                router.let_go(route, record.output_tokens, record.input_tokens - record.cached_tokens)
            exchange.call = None
            reply.served_by = b""
            _forget_answer(record)

    def _others_may(self, route: Route, call: Call, reply: Reply, fallbacks: Fallbacks | None) -> bool:
        """Somebody else may answer instead."""
        verdict = call.verdict
        if verdict is Verdict.FINE or reply.begun:
            return False
        if fallbacks is None and not self._router.others_for(route):
            return False
        if verdict in _GONE:
            return True
        if verdict not in _ASK_OTHERS:
            return False
        if self._router.budget.take(monotonic_ns()):
            return True
        self.retries_denied += 1
        return False

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
            attempt = self._new_attempt(control.backend.name, exchange)
            self._opening(exchange)
            call = await self._attempt(control, None, attempt, operation, exchange, Request(), reply)
        except UpstreamFault:
            raise NotReady("What was used can't be told right now; try again in a moment.", code="usage_unavailable") from None
        finally:
            control.asking -= 1
        _book(reply, exchange, call)

    def _new_attempt(self, backend: str, exchange: Exchange, *, reused: bool = False) -> Attempt:
        attempt = Attempt(backend, monotonic_ns() - exchange.origin_ns, reused=reused)
        exchange.record.attempts.append(attempt)
        return attempt

    async def _attempt(
        self,
        pool: Pool,
        connection: UpstreamConnection | None,
        attempt: Attempt,
        operation: RelayedOperation,
        exchange: Exchange,
        request: Request,
        reply: Reply,
        route: Route | None = None,
    ) -> Call:
        """One try on one backend: on `connection`, or on a new one."""
        backend = pool.backend
        upstream = operation.prepare(exchange.body, request, backend.kind)
        if exchange.changes:
            upstream = upstream.changed(exchange.changes)
        if exchange.salted and backend.kind == "vllm":
            upstream = upstream.changed(exchange.salted)
        call = exchange.call = Call(exchange, reply, operation, upstream.terms, pool, self._settings, attempt, route)
        if route is not None:
            self._calls.add(call)
        try:
            if connection is None:
                connection = await self._connect(pool, exchange)
                attempt.connected_ns = exchange.elapsed_ns()
            # The bytes have no name here: it would keep them for as long as the answer takes.
            call.begin(connection, pool.payload(operation, exchange, upstream, len(exchange.record.attempts)), monotonic_ns())
            await exchange.flow.wait()
        except ProxyError as error:
            attempt.error = error.error_code or error.type
            raise
        finally:
            self._calls.discard(call)
            call.close()
        if call.failure is not None and attempt.status < 400:  # else that says it
            attempt.error = call.failure.error_code or call.failure.type
        return call

    async def _connect(self, pool: Pool, exchange: Exchange) -> UpstreamConnection:
        connecting = asyncio.ensure_future(pool.connect())
        try:
            return await exchange.flow.until(connecting)
        except ProxyError:
            connecting.add_done_callback(_let_go)  # it may be there already, with nobody to take it
            raise

    # -- how backends do --

    def _answered(self, route: Route, standing: Standing, operation: EngineOperation[Any], call: Call, reply: Reply) -> None:
        """An answer that is complete: what it says of its backend."""
        health = standing.health
        standing.last_byte_ns = now = call.last_ns
        if call.failure is None:
            standing.served = operation.name, route.lane.model.name
            if operation.answer_id is not None and (answer := operation.answer_id(reply.tail)):
                self._router.gave(route, answer)
            if health.succeeded(now):
                self._changed(standing)
            return
        verdict = call.verdict
        if verdict is Verdict.FINE or verdict is Verdict.BUSY or verdict is Verdict.STRANGER:
            changed = health.succeeded(now)
        elif verdict is Verdict.ELSEWHERE:
            self._router.misrouted(route)
            return
        else:
            code = call.failure.error_code or call.failure.type
            if verdict is Verdict.BROKEN:
                changed = health.suspect(now, code)
            else:
                changed = health.failed(now, code, certain=verdict is Verdict.DEAD)
        if changed:
            self._changed(standing)

    def _fell(self, route: Route, standing: Standing, error: UpstreamFault) -> bool:
        """It didn't answer, or not to the end. True if others shall be asked: not where a backend that answers others let this
        one's time pass, which another one would do too."""
        if isinstance(error, BackendLost):
            return True  # that is how it was told
        now = monotonic_ns()
        late = isinstance(error, UpstreamTimeout)
        # It may have hung just after it was sent this one: what it said in the first half of the time is no sign of life.
        hangs = late and 2 * (now - standing.last_byte_ns) >= now - route.sent_ns
        if standing.health.failed(now, error.error_code or error.type, certain=hangs):
            self._changed(standing)
        return hangs or not late

    def _changed(self, standing: Standing) -> None:
        health = standing.health
        log.warning("backend is %s", health.state.label, extra={"backend": standing.name, "reason": health.reason})
        self._router.changed()
        if health.state is State.OUT:
            standing.ejections += 1
            self._router.restarted(standing)
            self._evacuate(standing)

    def _evacuate(self, standing: Standing) -> None:
        """What waits for its first token there goes elsewhere, if there is an elsewhere."""
        for call in list(self._calls):
            route = call.route
            if route is not None and route.standing is standing and not call.begun and self._router.others_for(route):
                route.exchange.flow.interrupt(BackendLost("The model's engine doesn't answer any more."))

    def _listen(self, now_ns: int) -> None:
        """Who owes answers and says nothing at all is suspect. (A long answer in one piece is like that too: a probe tells.)"""
        owed: dict[Standing, int] = {}
        for call in self._calls:
            standing = None if call.route is None else call.route.standing
            if standing is None or call.complete or not call.last_ns or call.held_up:
                continue
            if call.heard and call.last_ns > standing.last_byte_ns:
                standing.last_byte_ns = call.last_ns
            owed[standing] = min(owed.get(standing, call.last_ns), call.last_ns)
        for standing, since_ns in owed.items():
            silent_ns = now_ns - max(since_ns, standing.last_byte_ns)
            allowed_ns = self._silence_ns + standing.prefilling * 1_000_000_000 // PREFILL_RATE
            if silent_ns > allowed_ns and standing.health.suspect(now_ns, "silent"):
                self._changed(standing)

    def _probe(self, now_ns: int) -> None:
        """Ask those that may be asked, and give up those that don't answer."""
        for probe in [each for each in self._probes if now_ns >= each.deadline_ns]:
            probe.give_up(UpstreamTimeout("The engine didn't answer a probe.", code="probe_timeout"))
        for standing in self._router.standings.values():
            if standing.health.probe_due(now_ns) and not standing.drained:
                standing.health.probing = True
                standing.probes += 1
                probe = Probe(standing, self._router.model_of(standing), now_ns + int(self._settings.health.probe * 1e9))
                self._probes.append(probe)
                probe.start(self._ask(probe))

    async def _ask(self, probe: Probe) -> None:
        """Whether it is well, and whether it makes a token: an engine that hangs still says that it is well."""
        standing = probe.standing
        pool = self._pool(standing.backend)
        reason: str | None = "internal_error"
        try:
            for exchange, operation in probe.questions(pool.kind):
                reason = await self._answer_to(probe, pool, exchange, operation)
                if reason is not None:
                    break
            else:
                reason = None
        finally:
            self._probes.remove(probe)
            self._probed(standing, reason)

    async def _answer_to(self, probe: Probe, pool: Pool, exchange: Exchange, operation: RelayedOperation) -> str | None:
        """What is wrong with it; None: nothing."""
        reply = probe.reply()
        attempt = self._new_attempt(pool.backend.name, exchange)
        if exchange.accepted:
            self._opening(exchange)
        try:
            call = await self._attempt(pool, None, attempt, operation, exchange, probe.request, reply)
        except ProxyError as error:
            exchange.fail(error)
            return error.error_code or error.type
        else:
            _book(reply, exchange, call)
            bad = call.verdict in _ILL or (operation is HEALTH and call.failure is not None)
            return (attempt.error or f"http_{attempt.status}") if bad else None
        finally:
            if exchange.accepted:
                self._closing(exchange, reply)

    def _probed(self, standing: Standing, reason: str | None) -> None:
        now = monotonic_ns()
        if reason is None:
            standing.last_byte_ns = now
        else:
            standing.failed_probes += 1
        if standing.health.probed(now, reason):
            self._changed(standing)

    def _pool(self, backend: Backend) -> Pool:
        pool = self._pools.get(backend.name)
        return pool if pool is not None and pool.backend is backend else self._new_pool(backend, pool)

    def _new_pool(self, backend: Backend, former: Pool | None) -> Pool:
        """The pool of a backend that is new, or that a new snapshot describes; it stays if nothing but the object changed."""
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
        self._listen(now_ns)
        self._probe(now_ns)

    def keep_only(self, names: Collection[str]) -> None:
        """Close the idle connections of backends that the catalogue no longer has."""
        for name in [name for name in self._pools if name not in names]:
            self._pools.pop(name).close()

    def close(self) -> None:
        for probe in list(self._probes):
            probe.give_up(ShuttingDown("The proxy is shutting down."))
        for pool in self._pools.values():
            pool.close()


def _book(reply: Reply, exchange: Exchange, call: Call) -> None:
    """An engine's own error, which the client has; raised where it can't be told as the engine did: the head has gone."""
    if call.failure is None:
        return
    if reply.kept_waiting and not call.begun:
        raise call.failure
    exchange.fail(call.failure)


def _remember_answer(exchange: Exchange, refused: _Refusal) -> None:
    """Of the answer that goes out after all."""
    record, attempt = exchange.record, refused.attempt
    exchange.call, exchange.model = refused.call, refused.model
    record.model, record.fallback_of = refused.name, refused.fallback_of
    record.sent_ns = attempt.connected_ns or attempt.started_ns
    record.first_byte_ns, record.upstream_ended_ns = attempt.first_byte_ns, attempt.ended_ns


def _forget_answer(record: Record) -> None:
    """Of the answer that nobody will see; its try keeps what there was to say of it."""
    record.first_byte_ns = record.first_token_ns = record.first_content_ns = record.last_token_ns = 0
    record.upstream_ended_ns = record.sent_ns = record.chunks = 0
    record.input_tokens = record.cached_tokens = record.output_tokens = record.reasoning_tokens = 0
    record.usage_source = UsageSource.NONE
    record.finish_reasons = []
    record.inter_token_counts = []
    record.inter_token_sum_ns = record.inter_token_max_ns = 0
    record.engine = None


def _let_go(connecting: asyncio.Future[UpstreamConnection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().abort()
