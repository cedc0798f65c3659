"""The way of a request: receive → authenticate → admit → cache → route → relay → account → record. Read this first.

`handle` is one request from its complete reading to its sealed answer. A Flow drives it (flow.py), so it runs without a Task
and may wait only through `exchange.flow`. Errors are raised where they are found and answered here, in one place.
"""

from __future__ import annotations

import logging
import re
from binascii import unhexlify
from time import monotonic_ns, time_ns
from typing import Any

from proxy.accounting import cost_of, price
from proxy.admission import Admission
from proxy.auth import Authenticator
from proxy.cache.cache import Cache
from proxy.cache.key import tenant_of
from proxy.engines import read_engines
from proxy.errors import ClientGone, InternalError, InvalidRequest, NotReady, ProxyError, UnsupportedMedia
from proxy.exchange import CLOSING, OPENING, Exchange, Phase, encode_record
from proxy.journal import Journal, JournalFull, encode_content
from proxy.relay import Embedder, Fallbacks, Relay
from proxy.reply import Reply
from proxy.routing import Router
from proxy.settings import Settings
from proxy.snapshot import Model, Principal, Snapshot, SnapshotFeed
from proxy.wire import models
from proxy.wire.adapt import adapt, salt, salted
from proxy.wire.body import Change, Request
from proxy.wire.bounds import check_bounds
from proxy.wire.media import Media
from proxy.wire.operation import MAX_TEXT, EngineOperation, Operation, RelayedOperation
from proxy.wire.operations import find_operation
from proxy.wire.stream import Terms

log = logging.getLogger(__name__)

_TRACEPARENT = re.compile(rb"^(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$")
_CORRELATING = (b"x-request-id", b"traceparent")
_TRACESTATE = re.compile(rb"^[\x20-\x7e]{1,512}$")


class Pipeline:
    """The steps of one worker, composed. Everything it touches is in this process's memory or its journal."""

    def __init__(self, settings: Settings, feed: SnapshotFeed, journal: Journal, content: Journal | None = None) -> None:
        self._settings = settings
        self._feed = feed
        self._journal = journal
        self._content = content
        self.capturing = True
        """False while there is too much captured content about; without a content journal nothing is captured anyway."""
        self._refuse_unrecorded = settings.journal.on_full == "refuse"
        self.authenticator = Authenticator(feed)
        self._media = Media(settings.media.hosts)
        self.admission = Admission(journal.incarnation)
        self.router = Router(settings, self._open)
        self.relay = Relay(self.router, settings, self._open, self._seal)
        self.embedder = Embedder(self.relay, self._seal)
        self.cache = None
        if settings.cache is not None:
            self.cache = Cache(settings.cache, settings.timeouts.client_write, self._open, cost_of, self.embedder.embed)
        self.unaccepted: dict[str, int] = {}
        """Requests that never were accepted, by error code."""

    async def handle(self, exchange: Exchange, reply: Reply) -> None:
        try:
            operation = exchange.operation = find_operation(exchange.method, exchange.target)
            exchange.record.operation = operation.name
            principal = self.authenticator.authenticate(exchange)  # accepted from here on
            if not exchange.headers.keys().isdisjoint(_CORRELATING):
                self._correlate(exchange)
            if self._refuse_unrecorded:
                self._refuse_if_full()
            if isinstance(operation, EngineOperation):
                content_type = exchange.content_type
                if content_type != operation.media:
                    _check_media(operation, content_type)
                request = operation.read(exchange.body, exchange.record, content_type)
                snapshot, model = self._route(request.model, principal)
                if request.internal:
                    self.admission.check_parameters(request, principal, snapshot)
                check_bounds(request, model.bounds)
                if operation.lists:
                    self._media.check(exchange.body, operation.lists)
                exchange.model = model
                if request.model != model.name or model.defaults:
                    exchange.changes = adapt(
                        operation, exchange.body, content_type, request, exchange.record, model.name, model.defaults
                    )
                if model.prefix_isolation:
                    exchange.salted = _salted(operation, exchange, request, model, principal, snapshot)
                permit = self.admission.admit(exchange, principal, operation, model, snapshot, reply)  # held to the last byte
                if permit is not None and permit.waits:
                    self._open(exchange)
                    await permit.decided()
                cache = self.cache
                if cache is not None and await cache.answer(exchange, operation, request, model, principal, snapshot, reply):
                    return
                fallbacks = self._fallbacks(exchange, operation, principal, snapshot) if model.fallbacks else None
                await self.relay.relay(operation, exchange, request, model, snapshot, reply, fallbacks)
                if exchange.flight is not None:
                    exchange.flight.arrived()
            elif isinstance(operation, RelayedOperation):
                self.admission.in_flight.add(exchange)  # nothing limits it: who has used up a budget wants to know
                await self.relay.ask_control(operation, exchange, reply)
            else:
                self._answer(exchange, principal, operation, reply)
        except ProxyError as error:
            self._fail(exchange, reply, error)
        except Exception:
            log.exception("a bug ended a request", extra={"request_id": exchange.record.hex_id})
            self._fail(exchange, reply, InternalError("The proxy failed to handle this request."))
        finally:
            self._seal(exchange, reply)

    # -- the steps --

    def _correlate(self, exchange: Exchange) -> None:
        """Join the caller's trace (W3C Trace Context), and keep its request id as an attribute: ids that count are ours."""
        record, headers = exchange.record, exchange.headers
        if theirs := headers.get(b"x-request-id"):
            record.client_request_id = theirs[:128].decode("ascii", "replace")
        if (parent := headers.get(b"traceparent")) and (match := _TRACEPARENT.match(parent)):
            exchange.trace = match[1]
            record.trace_id = unhexlify(match[1])
            record.parent_span_id = int(match[2], 16)
            record.trace_flags = int(match[3], 16) & 1
            state = headers.get(b"tracestate", b"")
            if _TRACESTATE.match(state):
                exchange.tracestate = b"tracestate: %b\r\n" % state

    def _refuse_if_full(self) -> None:
        if self._journal.full:
            raise NotReady("The proxy can't record requests right now.", code="journal_full")

    def _answer(self, exchange: Exchange, principal: Principal, operation: Operation, reply: Reply) -> None:
        """What the snapshot alone can answer: the models."""
        snapshot = self._snapshot()
        if operation is models.RETRIEVE:
            record, name = exchange.record, models.model_name(exchange.target)
            record.model = name[:256]
            model = snapshot.model(principal, name)
            if model is None:
                raise models.unknown_model(name)
            if model.name != name:
                record.model, record.requested_model = model.name[:256], record.model
            reply.whole(200, model.card)
        else:
            reply.whole(200, snapshot.models_json(principal))

    def _route(self, name: str | None, principal: Principal) -> tuple[Snapshot, Model]:
        """The model that is asked for, or the only one. Its backend is bound by the relay, when the request is to be sent."""
        snapshot = self._feed.current or self._snapshot()
        model = snapshot.model(principal, name) if name else _only_model(snapshot.allowed_models(principal))
        if model is None:
            raise models.unknown_model(name) if name else models.unnamed_model()
        return snapshot, model

    def _fallbacks(
        self, exchange: Exchange, operation: EngineOperation[Any], principal: Principal, snapshot: Snapshot
    ) -> Fallbacks:
        """Other models that may answer instead, each with the request as it goes to it. One that the key may not use, or that
        doesn't allow as much as is asked for, is passed over."""
        record, asked = exchange.record, exchange.model
        body, content_type = exchange.body, exchange.content_type
        for name in asked.fallbacks if asked is not None else ():
            model = snapshot.model(principal, name)
            if model is None or asked is None:
                continue
            request, requested = operation.read(body, record, content_type), record.requested_model
            try:
                check_bounds(request, model.bounds)
                exchange.changes = adapt(operation, body, content_type, request, record, model.name, model.defaults)
            except InvalidRequest:
                record.model = asked.name[:MAX_TEXT]
                continue
            finally:
                record.requested_model = requested
            exchange.salted = _salted(operation, exchange, request, model, principal, snapshot)
            exchange.model, record.fallback_of = model, asked.name[:MAX_TEXT]
            yield model, request

    # -- ends --

    def _fail(self, exchange: Exchange, reply: Reply, error: ProxyError) -> None:
        # An error knows the frames that it passed, and those know the exchange that keeps it: only the garbage collector could
        # free them, and what is old when it becomes garbage is looked at about once a day.
        error.__traceback__ = error.__context__ = None
        call = exchange.call
        if isinstance(error, ClientGone) and call is not None and call.answered:
            reply.broken = True  # every choice had ended: the client has what it wanted
            return
        exchange.fail(error)
        operation = exchange.operation
        body = error.body() if operation is None else operation.error(error)
        broken = b"" if call is None else call.broken(error)
        if not broken and reply.kept_waiting and isinstance(operation, RelayedOperation):
            broken = operation.watch(exchange.record, Terms(), limit=0).broken(error)
        reply.fail(error, body, broken)

    def _seal(self, exchange: Exchange, reply: Reply) -> None:
        """Account, record, release: one synchronous stretch, so that nothing comes between the record and the last bytes."""
        flight, exchange.flight = exchange.flight, None
        try:
            if flight is not None:
                flight.let_go()
        except Exception:
            log.exception("a bug kept a client from the rest of its answer", extra={"request_id": exchange.record.hex_id})
        try:
            if exchange.principal is not None:  # accepted
                self._record(exchange, reply)
            elif exchange.error is not None:
                self.count_unaccepted(exchange.error)
        except JournalFull:
            pass  # counted by the journal; `journal.on_full: serve` means that the answer goes out all the same
        except Exception:
            log.exception("a bug kept a request from being recorded", extra={"request_id": exchange.record.hex_id})
        try:
            self.admission.release(exchange)
        except Exception:
            log.exception("a bug kept limits from being let go", extra={"request_id": exchange.record.hex_id})
        exchange.call = None  # they know each other; without this only the garbage collector could free them
        reply.release()
        if flight is not None:
            flight.land()

    def _record(self, exchange: Exchange, reply: Reply) -> None:
        record = exchange.record
        self._settle(exchange)
        if self._content is not None and self.capturing:
            self._keep_content(self._content, exchange, reply)
        record.status = reply.status or (exchange.error.status if exchange.error is not None else 0)
        record.response_bytes = reply.sent
        if not reply.gone:
            record.response_bytes += len(reply.tail)
            if reply.started:
                record.unsent_bytes = reply.unsent_bytes()
        record.ended_ns = monotonic_ns() - exchange.origin_ns
        self._journal.append(encode_record(CLOSING, record), exchange.opened)

    def _keep_content(self, content: Journal, exchange: Exchange, reply: Reply) -> None:
        """Prompt and answer, raw, beside the record and before it; the collector reads them. Losing them is allowed."""
        limit = self._settings.capture.max_bytes
        answer = reply.captured + reply.tail
        content.offer(encode_content(exchange.record.id, exchange.body, answer, limit))

    def _settle(self, exchange: Exchange) -> None:
        """Tokens as far as they are known, and what they cost."""
        if exchange.call is not None:
            exchange.call.settle()
        record, snapshot = exchange.record, self._feed.current
        if record.usage_source and exchange.model is not None and snapshot is not None:
            price(record, exchange.model, snapshot.currency)

    def _open(self, exchange: Exchange) -> None:
        """The opening record: from here on a crash leaves a trace. (If there is no room for it, `journal.full` tells.) Of a
        request that has waited for something before it is sent, another one says where it goes."""
        if exchange.opened:
            self._journal.offer(encode_record(Phase.PROGRESS, exchange.record))
        else:
            exchange.opened = self._journal.offer(encode_record(OPENING, exchange.record))

    def _snapshot(self) -> Snapshot:
        snapshot = self._feed.current
        if snapshot is None:
            raise NotReady("The proxy has no keys and models yet; try again in a moment.")
        return snapshot

    def count_unaccepted(self, error: ProxyError) -> None:
        code = error.error_code or error.type
        self.unaccepted[code] = self.unaccepted.get(code, 0) + 1

    # -- from the worker's sweep --

    def follow(self) -> None:
        """The snapshot has changed."""
        if (snapshot := self._feed.current) is not None:
            self.relay.keep_only(snapshot.backends)
            self.router.follow(snapshot)
            if self.cache is not None:
                self.cache.follow(snapshot)

    def learn(self) -> None:
        """What engines say of their load. Hints, once a second."""
        engines = read_engines(self._settings.engines_path, time_ns())
        self.router.learn(engines.loads if engines is not None else {}, monotonic_ns())

    def sweep(self, now_ns: int) -> None:
        """Timeouts of what is in flight."""
        for exchange in list(self.admission.in_flight):
            call = exchange.call
            if call is not None and not call.complete and (error := call.overdue(now_ns)) is not None:
                if isinstance(error, ClientGone):
                    exchange.leave(error)
                else:
                    exchange.flow.interrupt(error)
        self.relay.sweep(now_ns)
        self.router.sweep(now_ns)
        self.embedder.sweep(now_ns)
        if self.cache is not None:
            self.cache.sweep()

    def record_progress(self) -> None:
        """A progress record of every stream that has moved since its last: what a crash would otherwise lose."""
        for exchange in self.admission.in_flight:
            record = exchange.record
            if record.chunks != exchange.progress_chunks:
                exchange.progress_chunks = record.chunks
                self._settle(exchange)
                record.ended_ns = exchange.elapsed_ns()
                if not self._journal.offer(encode_record(Phase.PROGRESS, record)):
                    return

    def interrupt_all(self, error: ProxyError) -> None:
        """End everything that is still in flight."""
        for exchange in list(self.admission.in_flight):
            exchange.flow.interrupt(error)


def _salted(
    operation: EngineOperation[Any], exchange: Exchange, request: Request, model: Model, principal: Principal, snapshot: Snapshot
) -> tuple[Change, ...]:
    """With what a vLLM keeps the prompt from being of use to other tenants."""
    if not model.prefix_isolation:
        return ()
    value = salt(snapshot.cache_secret, tenant_of(principal, model.prefix_isolation))
    return salted(operation, request, exchange.body, model.defaults, value)


def _check_media(operation: EngineOperation[Any], content_type: bytes) -> None:
    media = content_type.partition(b";")[0].strip().lower()
    if media != operation.media:
        shown = f"`{media[:100].decode('ascii', 'replace')}`" if media else "missing"
        raise UnsupportedMedia(f"The Content-Type must be `{operation.media.decode()}`; it is {shown}.", param="Content-Type")


def _only_model(models: dict[str, Model]) -> Model | None:
    """By however many names it goes."""
    first = next(iter(models.values()), None)
    return first if first is not None and all(each.name == first.name for each in models.values()) else None
