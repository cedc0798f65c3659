"""Having a text embedded, for the proxy's own use: a request like any other, on the way of all that go to engines.

What it took is booked to the key `system`, and it is part of the trace of the request that wants it. That one waits meanwhile, so
it isn't waited for long; and a model that has failed is left alone for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic_ns
from typing import Final

import msgspec

from proxy.errors import ClientGone, EngineRefused, InternalError, ProxyError
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.relay.probe import SYSTEM, Nowhere
from proxy.relay.relay import Relay
from proxy.reply import Reply
from proxy.snapshot import Model, Snapshot
from proxy.wire.adapt import adapt
from proxy.wire.body import Request
from proxy.wire.embeddings import OPERATION
from proxy.wire.operation import JSON

log = logging.getLogger(__name__)

LONGEST_NS: Final = 1_000_000_000
"""That one is waited for, as precisely as the sweep looks."""
REST_NS: Final = 2_000_000_000
"""For so long a model isn't asked after it has failed."""

Done = Callable[[list[float] | None], None]


class _Embedding(msgspec.Struct, gc=False):
    embedding: list[float]


class _Answer(msgspec.Struct, gc=False):
    data: list[_Embedding]


_answer = msgspec.json.Decoder(_Answer)


class Embedder:
    """`closing` is called at the end of each request of its own."""

    def __init__(self, relay: Relay, closing: Callable[[Exchange, Reply], None]) -> None:
        self._relay = relay
        self._closing = closing
        self._asking: dict[_Asking, None] = {}
        """Those that are under way, the oldest first."""
        self._rests_until: dict[str, int] = {}
        """Model → ns."""

    def embed(self, text: str, model: Model, snapshot: Snapshot, wanted_by: Exchange, done: Done) -> Callable[[], None]:
        """`done` is called once, maybe at once: with None if there is no embedding. Not if what is returned here was called
        before: nobody wants it any more."""
        now_ns = monotonic_ns()
        if self._rests_until.get(model.name, 0) > now_ns:
            done(None)
            return _nothing
        asking = _Asking(text, model, wanted_by, now_ns, done)
        self._asking[asking] = None
        asking.flow.start(self._ask(asking, snapshot))
        return asking.withdraw

    async def _ask(self, asking: _Asking, snapshot: Snapshot) -> None:
        exchange, reply = asking.exchange, asking.reply
        try:
            request = asking.read()
            await self._relay.relay(OPERATION, exchange, request, asking.model, snapshot, reply)
        except ProxyError as error:
            exchange.fail(error)
        except Exception:
            log.exception("a bug in having a text embedded", extra={"request_id": exchange.record.hex_id})
            exchange.fail(InternalError("The proxy failed to have a text embedded."))
        finally:
            self._closing(exchange, reply)
        self._ended(asking)

    def _ended(self, asking: _Asking) -> None:
        del self._asking[asking]
        numbers = asking.numbers()
        if numbers is None and not asking.withdrawn and not isinstance(asking.exchange.error, EngineRefused):
            self._rests_until[asking.model.name] = monotonic_ns() + REST_NS
        if not asking.withdrawn:
            asking.done(numbers)

    def sweep(self, now_ns: int) -> None:
        """Give up those that take too long."""
        for asking in list(self._asking):
            if now_ns - asking.exchange.origin_ns < LONGEST_NS:
                break
            asking.flow.interrupt(ClientGone("The embedding took too long: the request goes on without.", code="embedding_late"))


class _Asking:
    """One of them. It runs in a flow of its own."""

    withdrawn = False
    """Nobody wants it any more."""

    def __init__(self, text: str, model: Model, wanted_by: Exchange, now_ns: int, done: Done) -> None:
        self.model = model
        self.done = done
        self.flow = Flow(_nothing)
        self.reply = Reply(Nowhere(), b"", False, False, 0)
        body = msgspec.json.encode({"model": model.name, "input": text, "encoding_format": "float"})
        exchange = self.exchange = Exchange(now_ns, OPERATION.method, OPERATION.path, {}, body, Remembered(), self.flow)
        exchange.operation, exchange.principal, exchange.model = OPERATION, SYSTEM, model
        exchange.trace, exchange.tracestate = wanted_by.trace, wanted_by.tracestate
        record, parent = exchange.record, wanted_by.record
        record.operation, record.key_id, record.key_name = OPERATION.name, SYSTEM.key_id, SYSTEM.key_name
        record.trace_id, record.parent_span_id, record.trace_flags = parent.trace_id, parent.span_id, parent.trace_flags
        record.read_ns = record.authenticated_ns = record.admitted_ns = exchange.elapsed_ns()

    def read(self) -> Request:
        """With what the model's settings add to every request. Raises InvalidRequest if that makes no sense."""
        exchange, model = self.exchange, self.model
        request = OPERATION.read(exchange.body, exchange.record, JSON)
        exchange.changes = adapt(OPERATION, exchange.body, JSON, request, exchange.record, model.name, model.defaults)
        return request

    def numbers(self) -> list[float] | None:
        """None: that isn't one embedding."""
        reply = self.reply
        if self.exchange.error is not None or reply.status != 200 or reply.sent:
            return None
        try:
            data = _answer.decode(reply.tail).data
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return None
        return data[0].embedding if len(data) == 1 else None

    def withdraw(self) -> None:
        self.withdrawn = True
        self.flow.interrupt(ClientGone("The request that it was for has ended."))


def _nothing() -> None:
    """There is nothing to withdraw, or to say of an end."""
