"""A client's connection: requests in, in order; one runs at a time.

Reading is never paused while a request runs, or its client's leaving would go unnoticed; what a client sends ahead of its turn is
bounded instead.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from time import monotonic_ns
from typing import TYPE_CHECKING

import httptools

from proxy.errors import BodyTooLarge, ClientGone, HeadersTooLarge, InvalidRequest, ProxyError
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.reply import Reply

if TYPE_CHECKING:
    from proxy.listener.server import Server

_WANTED = frozenset((b"authorization", b"x-request-id", b"traceparent", b"tracestate", b"expect"))
_PROBING = (b"GET", b"HEAD")
_SEND_BUFFER_BYTES = 64 * 1024
"""Small, so that a reader who stopped is felt after kilobytes and not after megabytes."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        # for the life of the connection
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self.remembered = Remembered()
        self.active_ns = monotonic_ns()
        """When a byte last came; 0 after an answer's end, until a sweep starts the idle time."""
        self._http_1_0: bool | None = None
        """Of the first request: who starts with HTTP/1.0 stays with it."""
        self._refused = False
        self._unsent = 0
        """What the client hadn't taken at the last sweep."""
        self._paused = False
        """The client hasn't taken enough of what it got; the transport says so once, whichever answer that was."""
        self._waiting: deque[tuple[Exchange, bool]] = deque()
        self._ahead_bytes = 0
        # for the request being read
        self._reading = False
        self._origin_ns = 0
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body = b""
        self._more_body: list[bytes] = []
        self._more_bytes = 0
        # for the one that runs
        self._exchange: Exchange | None = None
        self._reply: Reply | None = None

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # TCP: a Transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self.active_ns = monotonic_ns()
        if self._refused:
            return
        if self._exchange is not None and not self._may_send_ahead(len(data)):
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # An offer of another protocol (Java's client offers h2c by default): the request was read, the offer is ignored.
            self._parser = httptools.HttpRequestParser(self)
            if rest := data[upgrade.args[0] :]:
                self.data_received(rest)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, ProxyError):
                raise
            self._refuse(cause)
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"The request isn't valid HTTP/1.1: {error}."))
        if self._reading and not self._body:
            self._bound_head(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._waiting.clear()
        if self._reply is not None:
            self._reply.gone = True
        if self._exchange is not None:
            self._exchange.flow.interrupt(ClientGone("The client closed the connection before its answer was complete."))

    def pause_writing(self) -> None:
        self._paused = True
        if self._reply is not None:
            self._reply.pause(monotonic_ns())

    def resume_writing(self) -> None:
        self._paused = False
        if self._reply is not None:
            self._reply.resume()

    # -- httptools --

    def on_url(self, url: bytes) -> None:
        if not self._reading:
            self._reading = True
            self._origin_ns = self.active_ns or monotonic_ns()  # an answer may have ended in this very read
            self._head_bytes = -1
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _WANTED:
            self._headers[name] = value
            if name == b"expect" and value.lower() == b"100-continue" and self._exchange is None:
                self._transport.write(_CONTINUE)

    def on_body(self, data: bytes) -> None:
        if self._body or len(data) > self._server.body_limit:
            self._take_more_body(data)
        else:
            self._body = data  # most bodies come in one piece

    def on_message_complete(self) -> None:
        parser = self._parser
        body = self._body
        if self._more_body:
            body = b"".join([body, *self._more_body])
            self._more_body = []
            self._more_bytes = 0
        origin_ns = self._origin_ns
        flow = Flow(self._ended)
        exchange = Exchange(origin_ns, parser.get_method(), self._target, self._headers, body, self.remembered, flow)
        exchange.record.read_ns = monotonic_ns() - origin_ns
        self._reading = False
        self._target = self._body = b""
        self._headers = {}
        close = not parser.should_keep_alive()
        if self._http_1_0 is None:
            self._http_1_0 = parser.get_http_version() == "1.0"
        if self._exchange is None and not self._waiting:
            self._start(exchange, close)
        else:
            self._waiting.append((exchange, close))

    def _take_more_body(self, data: bytes) -> None:
        if not self._more_body:
            self._server.identify(self._headers.get(b"authorization"), self.remembered)
        self._more_bytes += len(data)
        limit = self._server.body_limit
        if len(self._body) + self._more_bytes > limit:
            raise BodyTooLarge(f"The request body is larger than {limit} bytes.")
        self._more_body.append(data)

    def _bound_head(self, length: int) -> None:
        """A head that wasn't complete after the read that it began in, which may have brought other things before it."""
        self._head_bytes = self._head_bytes + length if self._head_bytes >= 0 else 0
        limit = self._server.settings.limits.header_bytes
        if self._head_bytes > limit and not self._refused:
            self._refuse(HeadersTooLarge(f"The request's head is larger than {limit} bytes."))

    def _may_send_ahead(self, length: int) -> bool:
        self._ahead_bytes += length
        if self._ahead_bytes <= self._server.settings.limits.pipelined_bytes:
            return True
        self._transport.abort()
        return False

    # -- requests --

    def _start(self, exchange: Exchange, close: bool) -> None:
        server = self._server
        http_1_0 = bool(self._http_1_0)
        reply = self._reply = Reply(self._transport, exchange.hex_id, close or server.draining, http_1_0, server.capture)
        if self._paused:
            reply.pause(monotonic_ns())
        method = exchange.method
        if method != b"POST":
            reply.bodiless = method == b"HEAD"
            if method in _PROBING and (probe := server.probes.answer(exchange.target)) is not None:
                reply.whole(*probe)
                reply.release()
                self._ended()
                return
        self._exchange = exchange
        exchange.flow.start(server.handle(exchange, reply))

    def _ended(self) -> None:
        """The answer is sealed and released."""
        reply = self._reply
        self._exchange = self._reply = None
        self.active_ns = 0
        if self._server.draining or reply is None or not reply.keep_alive:
            self._refused = True
            self._waiting.clear()
            self._transport.close()
        elif self._waiting:
            asyncio.get_running_loop().call_soon(self._start_next)
        else:
            self._ahead_bytes = 0

    def _start_next(self) -> None:
        if self._waiting and self._exchange is None and not self._transport.is_closing():
            self._ahead_bytes -= self._ahead_bytes // len(self._waiting)  # it is taken to be as long as the others
            self._start(*self._waiting.popleft())

    def _refuse(self, error: ProxyError) -> None:
        """The bytes that came aren't a request that can be answered in turn: say so, if nothing is under way, and close. What is
        still being sent is taken and dropped: closing at once would reset the connection, and the answer with it."""
        self._refused = True
        self._server.count_unaccepted(error)
        if self._exchange is None:
            reply = Reply(self._transport, b"-", True, False, 0)
            reply.fail(error, b"")
            reply.release()
            self._transport.write_eof()
        else:
            self._transport.abort()

    # -- from the server --

    @property
    def unsent(self) -> bool:
        """The client hasn't taken all of its answer yet."""
        return self._transport.get_write_buffer_size() > 0

    def close_if_idle(self) -> None:
        """No request runs or is being read: close. Otherwise the answer under way will say so and close."""
        if self._exchange is None and not self._reading and not self._waiting:
            self._transport.close()

    def sweep(self, now_ns: int) -> None:
        """Close what has been idle, or has been sending one request, or taking one answer, for too long."""
        if self._exchange is not None:
            return
        if self.active_ns == 0:
            self.active_ns = now_ns
        timeouts = self._server.settings.timeouts
        quiet_s = (now_ns - self.active_ns) / 1e9
        unsent, before = self._transport.get_write_buffer_size(), self._unsent
        self._unsent = unsent
        if self._transport.is_closing() or unsent:
            if unsent < before:
                self.active_ns = now_ns  # it takes its answer, if slowly
            elif quiet_s > timeouts.client_write:
                self._transport.abort()
        elif self._reading:
            if (now_ns - self._origin_ns) / 1e9 > timeouts.client_request:
                self._transport.abort()
        elif quiet_s > timeouts.client_idle:
            self._transport.close()
