"""One HTTP/1.1 connection to a backend. It parses and passes on; what an answer means is the Call's to know."""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import TYPE_CHECKING

import httptools

from proxy.errors import ProxyError, UpstreamDisconnected, UpstreamMalformed

if TYPE_CHECKING:
    from proxy.relay.call import Call
    from proxy.relay.pool import Pool

MAX_HEADER_BYTES = 64 * 1024

Payload = bytes | tuple[bytes | memoryview, ...]
"""A request's bytes, in as many pieces as they are at hand."""


class UpstreamConnection(asyncio.Protocol):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # for the life of the connection
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self.idle_since_ns = 0
        self.closed = False
        # for one answer
        self.call: Call | None = None
        self.draining = False
        """The answer is complete for us, but the engine hasn't ended it yet: its last bytes are dropped."""
        self._heading = False
        self._head = b""
        """What has come so far of an answer whose head isn't complete, this read included."""
        self._interim = False
        self._now = 0

    def send(self, call: Call, payload: Payload) -> None:
        self.call = call
        self._heading = True
        if isinstance(payload, bytes):
            self._transport.write(payload)
        else:
            self._transport.writelines(payload)

    def leave(self) -> None:
        """The Call needs no more of this answer. What still comes is dropped, and the connection may be used again."""
        if self._pool.closed:
            self.abort()
            return
        self.call = None
        self.draining = True
        self.idle_since_ns = monotonic_ns()
        self._transport.resume_reading()
        self._pool.draining.add(self)

    def abort(self) -> None:
        """Close at once: the engine notices, and stops generating."""
        self.call = None
        self.draining = False
        self.closed = True
        self._transport.abort()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # TCP: a Transport

    def data_received(self, data: bytes) -> None:
        call = self.call
        if call is None and not self.draining:
            self._transport.abort()  # bytes that nobody asked for
            return
        self._now = monotonic_ns()
        if self._heading:
            self._head += data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(UpstreamMalformed(f"The engine's answer isn't valid HTTP: {error}."))
        if call is None:
            return
        if call.pending:
            call.flush()
        if self._heading and len(self._head) > MAX_HEADER_BYTES:
            self._fail(UpstreamMalformed("The engine's answer has too large a head."))

    def connection_lost(self, exc: Exception | None) -> None:
        del self._parser  # they know each other; without this only the garbage collector could free them
        self.closed = True
        self._pool.forget(self)
        call, self.call = self.call, None
        if call is None:
            return
        if exc is None and call.until_close:
            call.end(monotonic_ns())
        else:
            call.lost(UpstreamDisconnected("The engine closed the connection before its answer was complete."))

    def _fail(self, error: BaseException) -> None:
        call, self.call = self.call, None
        self._transport.abort()
        if call is not None:
            known = isinstance(error, ProxyError)
            call.lost(error if known else UpstreamMalformed(f"The engine's answer can't be read: {error}."))  # type: ignore[arg-type]

    # -- httptools --

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        head = self._head.lstrip(b"\r\n")  # the parser passes over empty lines before an answer
        end = head.find(b"\r\n\r\n")
        if end < 0:
            raise UpstreamMalformed("The engine's answer has a head without an end.")
        if status < 200:
            self._interim = True
            self._head = head[end + 4 :]
            return
        self._heading = False
        self._head = b""
        if self.call is not None:
            self.call.head(status, head[:end], self._now)

    def on_body(self, data: bytes) -> None:
        if self.call is not None:
            self.call.body(data, self._now)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            return
        call, self.call = self.call, None
        self.draining = False
        if self._parser.should_keep_alive():
            self._pool.put(self, self._now)
        else:
            self._transport.close()
        if call is not None:
            call.end(self._now)
