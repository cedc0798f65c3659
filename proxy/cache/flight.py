"""Those who want the same at the same time share one answer.

The first of them leads: its request is the one that goes to an engine, and its row has what that took. The others follow: each
gets what has flowed so far, then what comes, in a Reply of its own, as fast as its client takes it; the engine is held up only
when all of them are behind. Whoever leaves leaves the others alone. When the one that leads leaves, its request goes on until the
answer is complete or nobody is left who wants it.

How the answer ends is told when its own record is written: to each of the others in turn, some at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from proxy.errors import InternalError, Outcome, ProxyError
from proxy.exchange import Call, Exchange, Record
from proxy.reply import Head, Reply

log = logging.getLogger(__name__)

_AT_ONCE: Final = 32
"""Requests that are ended in one stretch: other streams' tokens are waiting meanwhile."""
_SAVED: Final = (
    *("source_id", "source_trace_id", "source_span_id", "age_ns", "similarity"),
    *("saved_input_tokens", "saved_output_tokens", "saved_cost_nano", "saved_ns", "currency"),
)
_TIMES: Final = ("first_byte_ns", "first_token_ns", "first_content_ns", "last_token_ns", "upstream_ended_ns")


class Given:
    """An answer that no engine is asked for by this request: a Call, as far as its own steps are concerned."""

    heard = True
    complete = False
    answered = False
    usage = b""

    def __init__(self, reply: Reply, client_write: float) -> None:
        self._reply = reply
        self._client_write = client_write

    def settle(self) -> None:
        """Its tokens were made for another request."""

    def broken(self, error: ProxyError) -> bytes:
        return b""

    def overdue(self, now_ns: int) -> ProxyError | None:
        return self._reply.overdue(now_ns, self._client_write)


class _Follower(Given):
    """One of those who didn't ask first."""

    def __init__(self, flight: Flight, exchange: Exchange, reply: Reply, client_write: float) -> None:
        super().__init__(reply, client_write)
        self._flight = flight
        self.exchange = exchange

    @property
    def answered(self) -> bool:  # type: ignore[override]
        return self._flight.answered

    def broken(self, error: ProxyError) -> bytes:
        return self._flight.broken(error)


class Flight:
    """`most`: bytes of an answer beyond which one that has it alone shares it with nobody. `landed` is called when the one that
    leads is done, before the others are.

    open      others may join
    begun     some of the answer has come
    ended     the one that leads is done: `failure` says how, None: well
    at_hand   the answer is complete, be it one that says no
    head, tail, usage   of an answer that is at hand: `usage` as the engine said it, also where its client wasn't told
    """

    begun = False
    ended = False
    at_hand = False
    failure: ProxyError | None = None
    head = Head(0, b"", False, False)
    tail = b""
    usage = b""
    _call: Call | None = None
    """The last try at it."""
    _left: ProxyError | None = None
    """The client that asked first has."""

    def __init__(self, leader: Exchange, reply: Reply, client_write: float, most: int, landed: Callable[[Flight], None]) -> None:
        self.leader = leader
        self.open = True
        self._reply = reply
        self._client_write = client_write
        self._most = most
        self._landed = landed
        self._pieces: list[bytes] = []
        self._length = 0
        self._seen: dict[Reply, int] = {reply: 0}
        """How many of the pieces each has."""
        self._followers: dict[_Follower, None] = {}
        leader.flight, reply.audience = self, self

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces) + self.tail

    @property
    def length(self) -> int:
        return self._length + len(self.tail)

    @property
    def well(self) -> bool:
        """It is an answer that can be given to anybody, its head included."""
        return self.at_hand and self.failure is None and self.head.status == 200 and not self._reply.kept_waiting

    @property
    def served_by(self) -> bytes:
        return self._reply.served_by

    @property
    def answered(self) -> bool:
        """Nothing that a client waits for is still to come."""
        call = self.leader.call
        return call is not None and call.answered

    def broken(self, error: ProxyError) -> bytes:
        """How a stream of this kind says that it has failed; nothing for an answer that is none."""
        return b"" if self._call is None else self._call.broken(error)

    # -- those who follow --

    async def follow(self, exchange: Exchange, reply: Reply) -> None:
        """Be given the answer. Raises what it failed with."""
        follower = exchange.call = _Follower(self, exchange, reply, self._client_write)
        exchange.record.outcome = Outcome.COALESCED
        self._join(follower, reply)
        try:
            await exchange.flow.wait()
        finally:
            self._leave(follower, reply)
        self._give_rest(exchange, reply)

    def _join(self, follower: _Follower, reply: Reply) -> None:
        self._followers[follower] = None
        self._seen[reply] = 0
        reply.audience = self
        if self._pieces:
            self._begin(reply)
            self._show(reply)
        if not self.holds_up and self._reply.upstream is not None:
            self._reply.upstream.resume_reading()

    def _leave(self, follower: _Follower, reply: Reply) -> None:
        reply.audience = None
        self._followers.pop(follower, None)
        if self.ended:
            return
        del self._seen[reply]
        if self._left is not None and not self._followers:
            self.leader.flow.interrupt(self._left)  # nobody is left
        elif self.holds_up:
            self.fell_behind()

    def _give_rest(self, exchange: Exchange, reply: Reply) -> None:
        """What hasn't been handed on yet. The engine's own words of an error are an answer too; of ours each makes its own."""
        failure = self.failure
        if self.at_hand:
            self._begin(reply)
        self._hand_on_rest(reply)
        if not self.at_hand:
            raise failure or InternalError("The request whose answer was to be shared has failed.")
        reply.tail = self.tail
        self._tell(exchange)
        if failure is not None:
            exchange.fail(failure)

    def _tell(self, exchange: Exchange) -> None:
        """What a record says of an answer that it shares."""
        record, source = exchange.record, self.leader.record
        shift = self.leader.origin_ns - exchange.origin_ns
        for name in _TIMES:
            if at := getattr(source, name):
                setattr(record, name, max(at + shift, record.looked_up_ns))
        record.chunks = source.chunks
        record.finish_reasons = list(source.finish_reasons)
        if self.failure is None:
            save(record, source)

    # -- Audience: what the answer's first Reply is told --

    @property
    def holds_up(self) -> bool:
        for reply in self._seen:  # noqa: SIM110 (most are alone: a generator would take longer than all of this)
            if not reply.paused:
                return False
        return True

    def write(self, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            for reply in self._seen:
                self._begin(reply)
        before = len(self._pieces)
        self._pieces.append(data)
        self._length += len(data)
        for reply, at in self._seen.items():
            if at == before and not reply.paused:  # as nearly always
                self._seen[reply] = before + 1
                reply.hand_on(data)
            else:
                self._show(reply)
        if self._length > self._most and not self._followers:
            self._go_alone()

    def keep_waiting(self) -> None:
        for reply in self._seen:
            reply.comment()

    def fell_behind(self) -> None:
        if self.holds_up and self._reply.upstream is not None:
            self._reply.upstream.pause_reading()

    def caught_up(self, reply: Reply) -> None:
        self._show(reply)
        if not reply.paused and self._reply.upstream is not None:
            self._reply.upstream.resume_reading()

    def _begin(self, reply: Reply) -> None:
        first = self._reply
        if reply is not first:
            reply.head(*(self.head if self.at_hand else first.as_begun))
            reply.served_by = first.served_by

    def _show(self, reply: Reply) -> None:
        """Everything that there is and that it hasn't got, unless its client is behind."""
        pieces, at = self._pieces, self._seen[reply]
        if reply.paused or at == len(pieces):
            return
        self._seen[reply] = len(pieces)
        reply.hand_on(pieces[at] if at == len(pieces) - 1 else b"".join(pieces[at:]))

    def _go_alone(self) -> None:
        """It is too long to be kept, and nobody else has it: its client gets the rest as any other."""
        self.open = False
        self.let_go()

    def _hand_on_rest(self, reply: Reply) -> None:
        """However far behind its client is: nothing more will come."""
        if rest := self._pieces[self._seen.pop(reply) :]:
            reply.hand_on(b"".join(rest))

    # -- the one that leads --

    def goes_on_without(self, error: ProxyError) -> bool:
        if self._left is None:
            if not self._followers:
                return False
            self._left = error
            del self._seen[self._reply]
            self.fell_behind()
        return bool(self._followers)

    def arrived(self) -> None:
        """The answer is complete, and at hand in the first one's reply."""
        self.at_hand = True
        self.head = self._reply.as_begun
        self.failure = self.leader.error
        call, record = self.leader.call, self.leader.record
        if call is not None and record.engine is None:  # else what it says of its times would be missing beside it
            self.usage = call.usage
        if self._left is not None:
            self.leader.fail(self._left)

    def let_go(self) -> None:
        """The first one's reply is by itself from here on."""
        reply, self._call = self._reply, self.leader.call
        reply.audience = None
        if reply in self._seen:
            self._hand_on_rest(reply)

    def land(self) -> None:
        """The first one's record is written: it is the others' turn."""
        self.ended = True
        self.tail = self._reply.tail
        if not self.at_hand:
            self.failure = self.leader.error
        try:
            self._landed(self)
        except Exception:
            log.exception("a bug kept an answer from being kept")
        if self._followers:
            self._wake_some(deque(self._followers))

    def _wake_some(self, followers: deque[_Follower]) -> None:
        for _ in range(min(_AT_ONCE, len(followers))):
            try:
                followers.popleft().exchange.flow.wake()
            except Exception:
                log.exception("a bug in a request that shared an answer")
        if followers:
            asyncio.get_running_loop().call_soon(self._wake_some, followers)


def save(record: Record, source: Record) -> None:
    """What the answer that `source` is about would have taken, had it been made for `record`."""
    if source.source_id:  # it was kept, and its first one's facts are there already
        for name in _SAVED:
            setattr(record, name, getattr(source, name))
        return
    record.source_id, record.source_trace_id, record.source_span_id = source.id, source.trace_id, source.span_id
    record.saved_input_tokens, record.saved_output_tokens = source.input_tokens, source.output_tokens
    record.saved_cost_nano, record.currency = source.cost_nano, source.currency
    took, waited = source.upstream_ended_ns - source.admitted_ns, record.upstream_ended_ns - record.looked_up_ns
    record.saved_ns = took - waited
