"""One answer of one engine, on its way to the client's reply. Driven by the connection's callbacks; wakes the request's flow when
the answer is complete, and interrupts it when the answer fails."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from proxy.errors import (
    EngineFailed,
    EngineRefused,
    ProxyError,
    UpstreamDisconnected,
    UpstreamMalformed,
    UpstreamTimeout,
)
from proxy.exchange import Attempt, Exchange, Record
from proxy.relay.backends import Verdict
from proxy.relay.head import shape_of, without_hop_by_hop, without_length
from proxy.wire.observer import Observer
from proxy.wire.operation import RelayedOperation, observe_end_of_answer
from proxy.wire.sse import OversizedEvent
from proxy.wire.stream import Terms
from proxy.wire.usage import ABORTED

if TYPE_CHECKING:
    from proxy.relay.connection import Payload, UpstreamConnection
    from proxy.relay.pool import Pool
    from proxy.reply import Reply
    from proxy.routing import Route
    from proxy.settings import Settings

KEPT_END_BYTES = 64 * 1024
"""Of a body too large to be held whole, this much of its end is kept: usage stands there."""


class _ErrorBody(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    code: int | str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody | None = None


_IDENTIFIER = re.compile(r"[A-Za-z0-9_]{1,64}")
"""A code or a type as programs have them; anything else may be anything."""
_error_answer = msgspec.json.Decoder(_ErrorAnswer)


class Call:
    """Attributes start as the class has them: most answers never set most of them."""

    observer: Observer | None = None
    status = 0
    heard = False
    """A byte of the answer has come: from here on there is no other try."""
    complete = False
    until_close = False
    """The end of the connection is the end of the answer."""
    last_ns = 0
    """Since when the engine owes a byte: its last one, or the sending (monotonic time); 0 before that."""
    _connection: UpstreamConnection | None = None
    pending = b""
    """What may go out when this read is parsed."""
    _readable = True
    """The body should be JSON, and can be looked into."""
    _body = b""
    """The body so far, or its last piece once it is `_passing`."""
    _passing = False
    """The body is too large to be held and goes out as it comes, but for its last piece."""
    _prefilling = True
    """Its first token hasn't come."""
    failure: EngineFailed | EngineRefused | None = None
    """The answer is complete, and an error: what the record keeps of it."""
    verdict = Verdict.FINE
    """What it says of its engine."""
    _end_kept = b""

    def __init__(
        self,
        exchange: Exchange,
        reply: Reply,
        operation: RelayedOperation,
        terms: Terms,
        pool: Pool,
        settings: Settings,
        attempt: Attempt,
        route: Route | None = None,
    ) -> None:
        self.route = route
        self._exchange = exchange
        self._origin_ns = exchange.origin_ns
        self._reply = reply
        self._operation = operation
        self._terms = terms
        self._pool = pool
        self._settings = settings
        self._attempt = attempt

    def begin(self, connection: UpstreamConnection, payload: Payload, now_ns: int) -> None:
        self._connection = connection
        self.last_ns = now_ns
        self._exchange.record.sent_ns = now_ns - self._origin_ns
        reply = self._reply
        reply.upstream = connection
        if reply.holds_up:
            connection.pause_reading()
        connection.send(self, payload)

    def close(self) -> None:
        """Let go of the connection: at once if the answer is still under way, so that the engine stops."""
        if self.complete:
            return
        self._attempt.ended_ns = self._exchange.elapsed_ns()
        connection, self._connection = self._connection, None
        if connection is not None and connection.call is self:
            connection.abort()

    # -- from the pipeline --

    @property
    def begun(self) -> bool:
        """Some of the answer has gone to the client: from here on it can be nobody else's."""
        return self._reply.begun

    @property
    def held_up(self) -> bool:
        """By its client, who takes nothing: the engine can't say anything."""
        return self._reply.holds_up

    @property
    def answered(self) -> bool:
        return self.observer is not None and self.observer.answered

    @property
    def usage(self) -> bytes:
        return b"" if self.observer is None else self.observer.usage

    def settle(self) -> None:
        if self.observer is not None:
            self.observer.settle()

    def broken(self, error: ProxyError) -> bytes:
        return b"" if self.observer is None else self.observer.broken(error)

    # -- from the connection --

    def head(self, status: int, head: bytes, now_ns: int) -> None:
        """`head`: the engine's own bytes, which the parser has found to be well-formed, without the empty line."""
        self.heard = True
        self.last_ns = now_ns
        attempt = self._attempt
        attempt.status = self.status = status
        attempt.first_byte_ns = self._exchange.record.first_byte_ns = now_ns - self._origin_ns
        shape = shape_of(head)
        if not head.startswith(b"HTTP/1.1"):
            head = b"HTTP/1.1" + head[len("HTTP/1.1") :]  # the version of a hop is its own
        self.until_close = shape.until_close
        streaming = shape.event_stream and status == 200
        if 300 <= status < 400:
            raise UpstreamMalformed(f"The engine answered with a redirect ({status}), which isn't followed.")
        if shape.encoded or shape.text:
            if streaming and shape.encoded:
                raise UpstreamMalformed("The engine compressed its stream, which it was asked not to do.")
            self._readable = not shape.encoded and not self._operation.text
        if shape.hop_by_hop:
            head = without_hop_by_hop(head)
        if self._reply.kept_waiting and status == 200 and not streaming:
            raise UpstreamMalformed("The engine answered with something else than the stream that was asked for.")
        if streaming:
            self._observe()
            if shape.sized:
                head = without_length(head)
        self._reply.head(status, head, shape.sized and not streaming, streaming)

    def _observe(self) -> None:
        record = self._exchange.record
        self.observer = self._operation.watch(
            record, self._terms, limit=self._settings.limits.event_bytes, fingerprint=self._pool.fingerprint
        )

    def body(self, data: bytes, now_ns: int) -> None:
        self.last_ns = now_ns
        observer = self.observer
        if observer is None:
            if self._body or len(data) > self._settings.limits.held_body_bytes:
                self._hold(data)
            else:
                self._body = data  # most bodies come in one piece
            return
        try:
            self.pending += observer.feed(data, now_ns - self._origin_ns)
        except OversizedEvent as error:
            raise UpstreamMalformed(f"The engine sent {error}.") from None
        if self._prefilling and self._exchange.record.first_token_ns:
            self._prefilling = False
            if self.route is not None:
                self.route.first_token(now_ns)
        if observer.done:
            self._finish_stream(now_ns)

    def flush(self) -> None:
        """The read is parsed: what may go out goes out in one write."""
        pending, self.pending = self.pending, b""
        if pending and not self.complete:
            self._reply.write(pending)

    def end(self, now_ns: int) -> None:
        """The engine has ended its answer."""
        self._connection = None
        if self.observer is not None:
            self.observer.end(now_ns - self._origin_ns)
            self._finish_stream(now_ns)
            return
        self._finish_body(now_ns)

    def lost(self, error: ProxyError) -> None:
        """The connection is gone, or its bytes make no sense."""
        self._connection = None
        if self.complete:
            return
        if self.observer is not None:
            self.pending += self.observer.tail  # events that came whole are the client's, whatever follows
        self.flush()
        self._exchange.flow.interrupt(error)

    # -- completing --

    def _finish_stream(self, now_ns: int) -> None:
        observer = self.observer
        if observer is None or self.complete:
            return
        self._exchange.record.upstream_ended_ns = now_ns - self._origin_ns
        self._pool.fingerprint = observer.fingerprint
        if observer.first_error is not None:
            self._finish_first_error(observer.first_error)
            return
        if observer.error_event is not None:
            self._fail(b'{"error":%b}' % observer.error_event)
        elif not observer.whole:
            self._leave()
            self.flush()
            self._exchange.flow.interrupt(UpstreamDisconnected("The engine's stream ended before the answer was complete."))
            return
        self._notice_abort()
        self._complete(self.pending + observer.tail)

    def _finish_first_error(self, body: bytes) -> None:
        """A 200 whose first event is an error: nothing has gone out yet, so the client gets a proper status."""
        self.status = 0
        self.status = _status_of(self._fail(body).error_code or "")
        self._fail(body)
        if self.verdict is Verdict.BROKEN:
            self.verdict = Verdict.FAILING  # it had taken the request up: no fault of that one's
        if not self._reply.started:
            self._reply.replace_head(self.status)
        self._complete(body)

    def _finish_body(self, now_ns: int) -> None:
        record = self._exchange.record
        record.upstream_ended_ns = now_ns - self._origin_ns
        body = self._body
        if self.status >= 400:
            self._fail(body)
        else:
            if self._passing:
                observe_end_of_answer(self._end_kept + body, record, self._operation.usage)
            elif self._readable:
                try:
                    self._operation.observe(body, record)
                except UpstreamMalformed as error:
                    self._exchange.flow.interrupt(error)
                    return
            if not record.usage_source:
                self._estimate(record, body)
            self._notice_abort()
        self._complete(self.pending + body)

    def _notice_abort(self) -> None:
        """vLLM, told to stop, ends every answer where it is, in all form. That is no answer."""
        if ABORTED in self._exchange.record.finish_reasons:
            self.failure = EngineFailed("The engine aborted the answer.", code="engine_aborted")
            self.verdict = Verdict.GAVE_UP

    def _fail(self, body: bytes) -> EngineFailed | EngineRefused:
        """What the record keeps of an engine's error: whose fault it says it was, and which. Its words only where content is
        captured: engines quote what they were asked."""
        status = self.status
        try:
            said = _error_answer.decode(body).error or _ErrorBody()
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            said = _ErrorBody()
        words = said.message if self._settings.capture.content else None
        named = (str(name) for name in (said.code, said.type) if name is not None)
        code = next((name for name in named if _IDENTIFIER.fullmatch(name)), str(status))
        refused = 400 <= status < 500 and status != 429
        judged = status if status >= 400 else _status_of(code)  # an error in a stream that went well so far
        self.verdict = self._pool.kind.judge(judged, said.type or "", said.message or "")
        self.failure = (EngineRefused if refused else EngineFailed)(
            words or f"The engine answered with status {status}.", code=code
        )
        return self.failure

    def _estimate(self, record: Record, body: bytes) -> None:
        self._operation.estimate(record, self._reply.sent + len(self.pending) + len(body))

    def _complete(self, tail: bytes) -> None:
        self.complete = True
        self._attempt.ended_ns = self._exchange.record.upstream_ended_ns
        self.pending = b""
        self._reply.tail = tail
        if self._connection is not None:
            self._leave()
        self._exchange.flow.wake()

    def _leave(self) -> None:
        """The connection, if it is still ours, may drop what is left of this answer."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.call is self:
            connection.leave()

    def _hold(self, data: bytes) -> None:
        if self._passing:
            # Everything but the last piece goes out; the last is what a client must not have before the record is written.
            self.pending += self._body
            self._end_kept = (self._end_kept + self._body)[-KEPT_END_BYTES:]
            self._body = data
            return
        self._body += data
        self._passing = len(self._body) > self._settings.limits.held_body_bytes

    # -- from the sweep --

    def overdue(self, now_ns: int) -> ProxyError | None:
        """The timeout that has passed, if one has. A client that reads slowly stops the clock."""
        if not self.last_ns:
            return None  # still connecting, which has its own timeout
        timeouts = self._pool.timeouts
        reply = self._reply
        if (error := reply.overdue(now_ns, timeouts.client_write)) is not None:
            return error
        if reply.holds_up:
            self.last_ns = now_ns
            return None
        silent_s = (now_ns - self.last_ns) / 1e9
        # The head of a stream says nothing: vLLM sends it before the prefill.
        if not self.heard or (self.observer is not None and not self._exchange.record.first_token_ns):
            if silent_s > timeouts.first_byte:
                return UpstreamTimeout(f"The engine sent nothing within {timeouts.first_byte:g} s.", code="first_byte_timeout")
        elif silent_s > timeouts.between_chunks:
            return UpstreamTimeout(f"The engine fell silent for {timeouts.between_chunks:g} s.", code="idle_timeout")
        return None


def _status_of(code: str) -> int:
    """As the engine would have answered, had it known in time."""
    return int(code) if code.isdecimal() and 400 <= int(code) <= 599 else 502
