"""The writer of one answer.

`tail` are the terminal bytes: they go out in `release`, which the pipeline calls when the record is in the journal, and in no
other way. Whatever breaks before leaves a client with an answer that is visibly incomplete.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple, Protocol

from proxy.errors import ClientGone, ProxyError

if TYPE_CHECKING:
    import asyncio


_COMMENT = b": waiting\n\n"
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Source(Protocol):
    """Where an answer's bytes come from, and can be asked to wait."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Audience(Protocol):
    """All who get one answer: the clients of several requests, each with a Reply of its own."""

    begun: bool
    """Some of the answer has come: from here on it can be nobody else's."""

    @property
    def holds_up(self) -> bool:
        """Everybody is behind: the answer has to wait."""

    def write(self, data: bytes) -> None:
        """Part of the body, for everybody."""

    def keep_waiting(self) -> None:
        """A sign of life, for everybody."""

    def fell_behind(self) -> None:
        """One of them has more than its client takes."""

    def caught_up(self, reply: Reply) -> None:
        """This one's client takes again what there is."""


class Head(NamedTuple):
    """An answer's status line and header lines, as `Reply.head` takes them."""

    status: int
    lines: bytes
    sized: bool
    streaming: bool


class Withdrawn(NamedTuple):
    """An answer that was at hand."""

    status: int
    head: bytes
    chunked: bool
    streaming: bool
    tail: bytes
    served_by: bytes


class Reply:
    """Attributes start as the class has them: most answers never set most of them."""

    _head = b""
    _chunked = False
    _streaming = False
    upstream: Source | None = None
    audience: Audience | None = None
    """Who gets this answer too, and this one with them."""
    captured = b""
    """The body so far, where capture is on; no more than tells that it was longer than wanted."""
    status = 0
    served_by = b""
    """The header line that tells which backend it is from."""
    lines = b""
    """Header lines of ours, besides the usual ones, each with CR LF before it."""
    tail = b""
    sent = 0
    """Bytes of the body handed to the client's socket so far."""
    started = False
    kept_waiting = False
    """The head has gone out before an engine had answered, to keep a client that waits."""
    gone = False
    """The client has left, or was dropped."""
    bodiless = False
    """The answer to a HEAD."""
    broken = False
    """The answer can't be completed: the connection closes without a proper end."""
    paused = False
    _stalled_since_ns = 0
    _unsent = 0

    def __init__(self, transport: asyncio.Transport, request_id: bytes, close: bool, http_1_0: bool, capture: int) -> None:
        self._transport = transport
        self._id = request_id
        self._close = close
        self._http_1_0 = http_1_0
        self._capture = capture
        """Bytes of the body to keep, 0 for none."""

    @property
    def keep_alive(self) -> bool:
        return not self._close and not self.broken

    @property
    def begun(self) -> bool:
        """Some of it has gone to the client, more than that there will be something."""
        return self.sent > 0 if self.audience is None else self.audience.begun

    @property
    def as_begun(self) -> Head:
        """What `head` was told."""
        return Head(self.status, self._head, not self._chunked, self._streaming)

    @property
    def holds_up(self) -> bool:
        """The client doesn't take what there is: the engine has to wait."""
        return self.paused if self.audience is None else self.audience.holds_up

    # -- the answer --

    def announce_close(self) -> None:
        """The connection closes after this answer, and its head says so; too late for one that has started."""
        if not self.started:
            self._close = True

    def head(self, status: int, lines: bytes, sized: bool, streaming: bool) -> None:
        """The engine's status line and header lines, without those of a single hop and without the last line's end.
        `sized`: content-length is among them."""
        if self.started:
            return  # `keep_waiting` has said what there will be
        self.status = status
        self._head = lines
        self._chunked = not sized
        self._streaming = streaming

    def replace_head(self, status: int) -> None:
        """Another status for an answer that hasn't started: it becomes a JSON error."""
        self.head(status, _status_line(status) + b"content-type: application/json", False, False)

    def keep_waiting(self) -> None:
        """There will be a stream; a comment keeps it alive. Clients pass over it, and it is no part of the answer."""
        if self.audience is not None:
            self.audience.keep_waiting()
        else:
            self.comment()

    def comment(self) -> None:
        """The same, for this client alone."""
        if not self.started:
            self.head(200, _status_line(200) + b"content-type: text/event-stream; charset=utf-8", False, True)
            self.kept_waiting = True
        self._put(self._frame(_COMMENT) if self._chunked and not self._http_1_0 else _COMMENT)

    def withdraw(self) -> Withdrawn:
        """Take back an answer of which nothing has gone out yet: another one may come instead, or none, and then this one may be
        `restore`d."""
        withdrawn = Withdrawn(self.status, self._head, self._chunked, self._streaming, self.tail, self.served_by)
        if self.started:
            self.tail = b""
            return withdrawn
        self.status, self._head, self._chunked, self._streaming, self.tail, self.served_by = 0, b"", False, False, b"", b""
        return withdrawn

    def restore(self, withdrawn: Withdrawn) -> None:
        if self.started:
            self.tail = withdrawn.tail
            return
        self.status, self._head, self._chunked, self._streaming, self.tail, self.served_by = withdrawn

    def write(self, data: bytes) -> None:
        """Part of the body, as it comes."""
        if not data:
            return
        if self.audience is not None:
            self.audience.write(data)
        else:
            self.hand_on(data)

    def hand_on(self, data: bytes) -> None:
        """The same, to this client alone."""
        self.sent += len(data)
        if self._capture and len(self.captured) <= self._capture:
            self.captured += data
        self._put(self._frame(data) if self._chunked and not self._http_1_0 else data)

    def whole(self, status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"") -> None:
        """An answer of our own, held back until `release`."""
        self.status = status
        self._head = _status_line(status) + b"content-type: " + content_type + extra
        self._chunked = True
        self._streaming = False
        self.tail = body

    def fail(self, error: ProxyError, body: bytes, broken_stream: bytes) -> None:
        """An error of ours: the answer `body` if none has started, otherwise `broken_stream` (the API's own error event, or
        nothing), and the connection closes with neither an end of the stream nor an end of the body."""
        if isinstance(error, ClientGone) or self.gone:
            self.broken = True
            return
        if self.started:
            self.tail = broken_stream
            self.broken = True
            return
        retry = b"\r\nretry-after: %d" % error.retry_after_s if error.retry_after_s is not None else b""
        self.whole(error.status, body, extra=error.lines + retry)

    def release(self) -> None:
        """Let the terminal bytes go. Closing the connection, if it isn't to be kept, is left to its owner."""
        self.upstream = None
        if self.gone:
            return
        if self.broken:
            if self.started and self.tail:
                self._put(self._frame(self.tail) if self._chunked and not self._http_1_0 else self.tail)
            return
        tail = self.tail
        opening = b""
        if not self.started:
            if self._chunked and not self._streaming:
                # The whole body is at hand: it gets a length and needs no chunks.
                self._head += b"\r\ncontent-length: %d" % len(tail)
                self._chunked = False
            opening = self._opening()
        if self._chunked and not self._http_1_0:
            tail = self._frame(tail) + b"0\r\n\r\n" if tail else b"0\r\n\r\n"
        tail = opening + tail
        self._transport.write(opening if self.bodiless else tail)

    def abort(self) -> None:
        """Drop the client, and what it hasn't taken."""
        self.gone = True
        self._transport.abort()

    def unsent_bytes(self) -> int:
        """What the client hasn't taken from us yet."""
        return self._transport.get_write_buffer_size()

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data)

    def _put(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            data = self._opening() + data
        self._transport.write(data)  # into a closed transport this is nothing

    def _opening(self) -> bytes:
        lines = self._head
        if self._chunked:
            if self._http_1_0:
                self._close = True
            else:
                lines += b"\r\ntransfer-encoding: chunked"
        if self._close:
            lines += b"\r\nconnection: close"
        lines += self.served_by + self.lines
        return b"%b\r\nx-request-id: %b\r\n\r\n" % (lines, self._id)

    # -- flow control: a client that reads slowly slows its engine down --

    def pause(self, now_ns: int) -> None:
        self.paused = True
        self._stalled_since_ns = now_ns
        if self.audience is not None:
            self.audience.fell_behind()
        elif self.upstream is not None:
            self.upstream.pause_reading()

    def stalled_ns(self, now_ns: int) -> int:
        """How long the client, which is behind, has taken nothing at all; it has to be asked now and then."""
        unsent = self.unsent_bytes()
        if unsent < self._unsent:
            self._stalled_since_ns = now_ns
        self._unsent = unsent
        return now_ns - self._stalled_since_ns

    def overdue(self, now_ns: int, limit_s: float) -> ClientGone | None:
        """Drop a client that has taken nothing for too long; the error then."""
        if not self.paused or self.gone or self.stalled_ns(now_ns) / 1e9 <= limit_s:
            return None
        self.abort()
        return ClientGone(f"The client took none of its answer for {limit_s:g} s.", code="client_stopped_reading")

    def resume(self) -> None:
        self.paused = False
        if self.audience is not None:
            self.audience.caught_up(self)
        elif self.upstream is not None:
            self.upstream.resume_reading()


def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Error"))
