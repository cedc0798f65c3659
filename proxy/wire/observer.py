"""Watching a stream go by: what all of them have in common. `stream.py` watches chunks as chat and completions have them,
`events.py` typed events as responses and messages have them.

`feed` takes the bytes of an answer's body as they come and returns the bytes that may go to the client now; on the way facts are
written on the record. The terminal bytes are held back: they are `tail`, released when the record is written.
"""

from __future__ import annotations

from proxy.errors import ProxyError
from proxy.exchange import Record, UsageSource
from proxy.wire.sse import Framer

MAX_WITHHELD_BYTES = 256 * 1024


class Observer:
    """One answer's events. `now` is ns after the request's first byte, like all times on the record."""

    fingerprint = b""
    """`,"system_fingerprint":"..."` as this engine last wrote it; only chunks have one."""
    tail = b""
    usage = b""
    """What the engine has said last of all of it (JSON), if it has."""
    done = False
    """The stream has said that it is over: what follows is nobody's."""
    first_error: bytes | None = None
    """The stream began with an error: the body of a proper error answer instead, in this API's shape."""
    error_event: bytes | None = None
    """An error came later, and passed: its object, with `message` and `code` or `type`."""

    def __init__(self, record: Record, limit: int) -> None:
        self._record = record
        self._framer = Framer(limit)
        self._started = False
        self._withholding = False
        self._tokens = 0
        """Events that brought any."""

    # -- what an API fills in --

    @property
    def answered(self) -> bool:
        """Every choice has ended: nothing that a client waits for is still to come."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """The stream may end here; one that stops before is broken."""
        raise NotImplementedError

    def broken(self, error: ProxyError) -> bytes:
        """The event with which this API says that its stream has failed."""
        raise NotImplementedError

    def settle(self) -> None:
        """Write the token counts known so far on the record."""
        raise NotImplementedError

    def _event(self, event: bytes, now: int) -> bytes:
        """One event in, what the client gets of it out."""
        raise NotImplementedError

    # -- what they share --

    def feed(self, data: bytes, now: int) -> bytes:
        """Bytes of the body in, bytes for the client out. Raises OversizedEvent."""
        # Most reads are exactly one event.
        if data.endswith(b"\n\n") and self._framer.empty and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            out = self._event(data, now)
            return self._withhold(out) if self._withholding else out
        return b"".join([self._hand_on(event, now) for event in self._framer.feed(data)])

    def end(self, now: int) -> None:
        """The body has ended: what is left unended counts as an event and joins the tail."""
        if rest := self._framer.rest():
            out = self._event(rest, now)  # which may add to the tail itself
            self.tail += out

    def _hand_on(self, event: bytes, now: int) -> bytes:
        out = self._event(event, now)
        return self._withhold(out) if self._withholding else out

    def _withhold(self, out: bytes) -> bytes:
        self.tail += out
        if len(self.tail) > MAX_WITHHELD_BYTES and not self.done:
            out, self.tail = self.tail, b""
            return out
        return b""

    def _token(self, content: bool, now: int) -> None:
        """An event that brought tokens; `content`: of the answer rather than of thinking."""
        record = self._record
        self._tokens += 1
        if not record.first_token_ns:
            record.first_token_ns = record.last_token_ns = now
        else:
            record.gap(now)
        if content and not record.first_content_ns:
            record.first_content_ns = now

    def _estimate(self) -> None:
        """The engine said nothing: an event is a token or a few, and four bytes a token is the usual guess."""
        record = self._record
        if record.usage_source in (UsageSource.NONE, UsageSource.ESTIMATED) and record.first_token_ns:
            record.output_tokens = self._tokens
            record.input_tokens = record.request_bytes // 4
            record.usage_source = UsageSource.ESTIMATED
