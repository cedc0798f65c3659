"""A client's connection: requests in, in order; one runs at a time.

Reading is never paused while a request runs, or its client's leaving would go unnoticed; what a client sends ahead of its turn is
bounded instead. What is refused before it is a request is answered in its turn too, and is the last on its connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from fcntl import ioctl
from functools import partial
from io import BytesIO
from termios import FIONREAD
from time import monotonic_ns
from typing import TYPE_CHECKING

import httptools

from proxy.addresses import plain_address
from proxy.errors import (
    BodyTooLarge,
    ClientGone,
    ExpectationFailed,
    HeadersTooLarge,
    InvalidRequest,
    ProxyError,
    RequestTimeout,
)
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.listener.compressed import Decompressor
from proxy.listener.head import ONCE, check_host, check_transfer_encoding, origin_form
from proxy.listener.repeated import LESSONS, Repeated, learn
from proxy.reply import Reply
from proxy.wire.operations import find_operation

if TYPE_CHECKING:
    from proxy.listener.server import Server

_ODD = frozenset((b"expect", b"content-encoding", b"transfer-encoding", b"upgrade"))
"""With one of these a head is looked at more closely."""
_KEPT = _ODD.union(
    (b"authorization", b"x-api-key", b"host", b"content-type", b"content-length"),
    (b"x-request-id", b"traceparent", b"tracestate", b"x-forwarded-for", b"cache-control"),
    (b"origin", b"access-control-request-method", b"access-control-request-headers"),
)
_VERSIONS = ("1.1", "1.0")
_PROBING = (b"GET", b"HEAD")
_SLASH = ord("/")
_MOST_WAITING = 100
"""Requests that may be sent ahead of their turn; each costs many times its bytes."""
_SEND_BUFFER_BYTES = 64 * 1024
"""Small, so that a reader who stopped is felt after kilobytes and not after megabytes."""
_SLOWEST_BYTES_S = 8 * 1024
"""A body that comes faster than this never comes too late."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_UNCHECKED = b"/"
"""No Host is like this."""


class ClientConnection(asyncio.Protocol):
    """Attributes start as the class has them: most connections never set most of them."""

    # for the life of the connection
    _transport: asyncio.Transport
    begun = False
    """False during a TLS handshake."""
    _secure = False
    _peer = ""
    _forwarding = False
    """The peer is a proxy that says for whom it asks."""
    _http_1_0: bool | None = None
    """Of the first request: who starts with HTTP/1.0 stays with it."""
    _host = _UNCHECKED
    """The last one that was checked."""
    _refused = False
    """No more requests: what still comes is dropped."""
    _afterwards: Callable[[], None] | None = None
    """What is due when the requests that are under way are answered."""
    _unsent = 0
    """What the client hadn't taken at the last sweep."""
    _paused = False
    """The client hasn't taken enough of what it got; the transport says so once, whichever answer that was."""
    _ahead_bytes = 0
    _repeated: Repeated | None = None
    """A head that may come again."""
    _lessons = LESSONS
    # for the request being read
    _reading = False
    _origin_ns = 0
    _barren_bytes = 0
    """How much came in reads without any of the body, since it began or last grew: the head, chunks' sizes, trailers."""
    _target = b""
    _odd = False
    _head: dict[bytes, bytes] | None = None
    """The headers, once all of them are there."""
    _method = b""
    _head_again = b""
    """The head of a request that has to be read again."""
    _body: bytes | BytesIO | None = None
    _body_bytes = 0
    """Of a body that doesn't come in one piece."""
    _decompressor: Decompressor | None = None
    _lesson = b""
    """The read that it began in, if there was nothing before it."""
    _held = b""
    """Its head, the same as another before: the parser is asked only if its body doesn't come in one read."""
    _owed = 0
    """Bytes of that body."""
    # for the one that runs
    _exchange: Exchange | None = None
    _reply: Reply | None = None

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self.remembered = Remembered()
        self._idle_since_ns = self._read_ns = monotonic_ns()
        """The former is 0 after an answer's end, until a sweep starts the idle time; the latter is when a byte last came."""
        self._waiting: deque[tuple[Exchange, bool]] = deque()
        self._headers: dict[bytes, bytes] = {}

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = self._server
        self.begun = True
        self._transport = transport  # type: ignore[assignment]  # TCP or TLS: a Transport
        self._secure = transport.get_extra_info("sslcontext") is not None
        if self._secure:
            self._transport.set_write_buffer_limits(high=_SEND_BUFFER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._peer = _peer_of(transport)
            self._forwarding = self._peer in server.trusted
        server.connections.add(self)
        if (error := server.welcome(self, self._peer)) is None:
            return
        if server.patient:
            self._refuse(error)
        else:
            server.count_unaccepted(error)
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._read_ns = monotonic_ns()
        if self._refused:
            return
        if self._exchange is not None and not self._may_send_ahead(len(data)):
            return
        if self._repeated is not None and self._comes_again(self._repeated, data):
            return
        limit = self._server.head_limit
        if len(data) > limit and self._head is None:
            # In one read there may be a head that is too large and nevertheless complete.
            for at in range(0, len(data), limit):
                self._feed(data[at : at + limit])
        elif self._lessons and not self._reading:
            self._lesson = data
            self._feed(data)
        else:
            self._feed(data)

    def _comes_again(self, repeated: Repeated, data: bytes) -> bool:
        """True if the parser needn't see these bytes: the head of one of the requests before, with all of its body or none."""
        if self._held:
            held, self._held = self._held, b""
            if len(data) == self._owed:
                self._begin(repeated.method, repeated.target, repeated.head, data, close=False)
                return True
            self._head, self._target = None, b""
            self._feed(held)
            return False
        if self._reading:
            return False
        body = repeated.body_in(data, self._server.long_length - 1)
        if body is None:
            return False
        at, length = body
        if len(data) == at + length:
            self._origin_ns = self._read_ns
            self._begin(repeated.method, repeated.target, repeated.head, data[at:], close=False)
            return True
        if len(data) > at:
            return False
        self._held, self._owed = data, length
        self._reading, self._origin_ns, self._barren_bytes = True, self._read_ns, -1
        self._method, self._target, self._head = repeated.method, repeated.target, repeated.head
        return True

    def _feed(self, data: bytes) -> None:
        if self._refused:
            return
        offered = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            offered = upgrade.args[0]
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, ProxyError):
                raise
            self._refuse(cause)
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"The request isn't valid HTTP/1.1: {error}."))
        if offered is not None:  # here, because what is raised above has that exception for its context, and not its cause
            self._read_again(data[offered:])
        if self._reading:
            self._bound_barren(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        del self._parser  # they know each other; without this only the garbage collector could free them
        self._server.left(self)
        self._waiting.clear()
        if self._reply is not None:
            self._reply.gone = True
        if self._exchange is not None:
            self._exchange.leave(ClientGone("The client closed the connection before its answer was complete."))

    def pause_writing(self) -> None:
        self._paused = True
        if self._reply is not None:
            self._reply.pause(monotonic_ns())

    def resume_writing(self) -> None:
        self._paused = False
        if self._reply is not None:
            self._reply.resume()

    # -- httptools --

    def on_message_begin(self) -> None:
        """With the first byte of its method: from here on the parser has something of it."""
        if not self._reading:
            self._reading = True
            self._origin_ns = self._read_ns
            self._barren_bytes = -1

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _KEPT:
            headers = self._headers
            if name in headers:
                self._again(name, value)
            else:
                headers[name] = value
                if name in _ODD:
                    self._odd = True

    def on_headers_complete(self) -> None:
        headers = self._head = self._headers
        self._headers = {}  # what is added now are trailers, which nobody reads
        self._method = self._parser.get_method()
        server = self._server
        length = headers.get(b"content-length")
        if length is not None and len(length) >= server.long_length:
            digits = length.strip().lstrip(b"0")
            if len(digits) > server.long_length or int(digits or b"0") > server.body_limit:
                raise _too_large(server.body_limit)
        if self._odd or headers.get(b"host") != self._host:
            self._check_head(headers)

    def on_body(self, data: bytes) -> None:
        self._barren_bytes = -1
        if self._body is None:
            self._body = data  # most bodies come in one piece
        else:
            self._take_more_body(self._body, data)

    def on_message_complete(self) -> None:
        if self._head_again:
            return  # it only seems to be
        body = self._body
        if body is None:
            body = b""
        elif not isinstance(body, bytes):
            body = self._end_body(body)
        head = self._head or {}
        target = self._target
        if target[0] != _SLASH:
            target = origin_form(target)
        if self._headers:
            self._headers = {}
        close = not self._parser.should_keep_alive()
        if self._lesson:
            lesson, self._lesson = self._lesson, b""
            if not close and _ODD.isdisjoint(head):
                self._lessons -= 1
                self._repeated = learn(lesson, self._method, target, head, body) or self._repeated
        self._begin(self._method, target, head, body, close)

    def _begin(self, method: bytes, target: bytes, head: dict[bytes, bytes], body: bytes, close: bool) -> None:
        """A request is there, whole."""
        origin_ns = self._origin_ns
        exchange = Exchange(origin_ns, method, target, head, body, self.remembered, Flow(self._ended))
        record = exchange.record
        record.read_ns = monotonic_ns() - origin_ns
        record.client_address = self._peer if not self._forwarding else self._client(head)
        self._reading = False
        self._target = b""
        self._body = self._head = None
        if self._exchange is None and not self._waiting:
            self._start(exchange, close)
        else:
            self._afterwards = None  # nobody waits to be asked for this body any more
            self._waiting.append((exchange, close))
            if len(self._waiting) > _MOST_WAITING:
                self._transport.abort()

    # -- a head --

    def _again(self, name: bytes, value: bytes) -> None:
        """A field that was there already. Lists are joined; a second `traceparent` makes both void (W3C Trace Context §2.2.2)."""
        if self._head is not None:
            return  # a trailer
        if name in ONCE:
            raise InvalidRequest(f"The header {name.decode()} stands twice.", param=name.decode(), code="duplicate_header")
        self._headers[name] = b"" if name == b"traceparent" else b"%b,%b" % (self._headers[name], value)

    def _check_head(self, headers: dict[bytes, bytes]) -> None:
        """What need not be looked at for most requests: the first one's head, another Host, a field that is odd."""
        self._odd = False
        if b"upgrade" in headers and self._parser.should_upgrade():
            self._head_again = self._without_offer(headers)
            return
        version = self._parser.get_http_version()
        if version not in _VERSIONS:
            raise InvalidRequest(f"HTTP/{version} isn't spoken here; HTTP/1.1 and HTTP/1.0 are.")
        if self._http_1_0 is None:
            self._http_1_0 = version == "1.0"
        host = headers.get(b"host")
        if host is not None:
            check_host(host)
        elif version == "1.1":
            raise InvalidRequest("The request names no host: HTTP/1.1 has a Host header.", param="Host")
        self._host = host or _UNCHECKED
        coding, encoding = headers.get(b"transfer-encoding"), headers.get(b"content-encoding", b"identity")
        if coding is not None:
            check_transfer_encoding(coding, version)
        if encoding.lower() != b"identity":
            self._decompressor = Decompressor(encoding, self._server.settings.limits.decompressed_body_bytes)
        if coding is not None or self._decompressor is not None:
            self._vouch()
            self._body = BytesIO()
        if b"expect" in headers and version != "1.0":
            self._meet(headers[b"expect"])

    def _vouch(self) -> None:
        """Raise what the request would be refused with anyway, before more of its body is taken."""
        find_operation(b"GET" if self._method == b"HEAD" else self._method, origin_form(self._target))
        head = self._head or {}
        self._server.identify(head, self.remembered, self._peer if not self._forwarding else self._client(head))

    def _meet(self, expectation: bytes) -> None:
        """RFC 9110 §10.1.1: who waits to be asked for a body is asked, in its turn, unless it would be refused."""
        if expectation.lower() != b"100-continue":
            raise ExpectationFailed("The Expect header can be met only if it is `100-continue`.", param="Expect")
        self._vouch()
        if self._exchange is None and not self._waiting:
            self._transport.write(_CONTINUE)
        else:
            self._afterwards = partial(self._transport.write, _CONTINUE)

    def _without_offer(self, headers: dict[bytes, bytes]) -> bytes:
        """The head of a request that offers to speak another protocol (Java's client offers h2c by default), without the offer,
        which is passed over: the parser ends such a request with its head, whatever that says of a body."""
        parser = self._parser
        lines = [b"%b %b HTTP/%b" % (self._method, self._target, parser.get_http_version().encode())]
        lines += [b"%b: %b" % field for field in headers.items() if field[0] != b"upgrade"]
        lines.append(b"connection: keep-alive" if parser.should_keep_alive() else b"connection: close")
        return b"\r\n".join([*lines, b"\r\n"])

    def _read_again(self, rest: bytes) -> None:
        self._parser = httptools.HttpRequestParser(self)
        head, self._head_again = self._head_again, b""
        if not head:  # it was a CONNECT, and what comes now is meant for somebody else
            self._refused = True
            if self._exchange is None:
                self._transport.close()
            return
        self._target, self._headers, self._head = b"", {}, None
        self._feed(head)
        if rest:
            self._feed(rest)

    def _client(self, head: dict[bytes, bytes]) -> str:
        """Whom a trusted proxy asks for."""
        forwarded = head.get(b"x-forwarded-for")
        return self._peer if forwarded is None else self._server.trusted.client(self._peer, forwarded)

    # -- a body --

    def _take_more_body(self, body: bytes | BytesIO, data: bytes) -> None:
        if isinstance(body, bytes):  # this is its second piece
            self._vouch()
            self._body_bytes = len(body)
            first, body = body, BytesIO()  # which gives its bytes away in the end without a copy
            body.write(first)
            self._body = body
        self._body_bytes += len(data)
        limit = self._server.body_limit
        if self._body_bytes > limit:
            raise _too_large(limit)
        body.write(data if self._decompressor is None else self._decompressor.feed(data))

    def _end_body(self, body: BytesIO) -> bytes:
        self._body_bytes = 0
        decompressor, self._decompressor = self._decompressor, None
        if decompressor is not None:
            decompressor.end()
        return body.getvalue()

    # -- bounds --

    def _bound_barren(self, length: int) -> None:
        """A head that wasn't complete after the read that it began in, which may have brought other things before it; and what
        frames a body."""
        self._barren_bytes = self._barren_bytes + length if self._barren_bytes >= 0 else 0
        limit = self._server.head_limit
        if self._barren_bytes > limit:
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
        close = close or (server.draining and not self._waiting)
        reply = self._reply = Reply(self._transport, exchange.hex_id, close, http_1_0, server.capture)
        if self._paused:
            reply.pause(monotonic_ns())
        if b"origin" in exchange.headers:
            reply.lines = server.cors.lines(exchange.headers[b"origin"])
        if exchange.method != b"POST" and self._answer(exchange, reply):
            reply.release()
            self._ended()
            return
        self._exchange = exchange
        exchange.flow.start(server.handle(exchange, reply))

    def _answer(self, exchange: Exchange, reply: Reply) -> bool:
        """True if it has its answer, without the pipeline: probes and what browsers ask before they ask."""
        method, server = exchange.method, self._server
        if method == b"HEAD":
            reply.bodiless = True
            exchange.method = b"GET"
        if method in _PROBING and (probe := server.probes.answer(exchange.target)) is not None:
            reply.whole(*probe)
            return True
        if method == b"OPTIONS" and (preflight := server.cors.preflight(exchange.headers)) is not None:
            status, text, reply.lines = preflight
            reply.whole(status, text, b"text/plain; charset=utf-8")
            return True
        return False

    def _ended(self) -> None:
        """The answer is sealed and released."""
        reply = self._reply
        self._exchange = self._reply = None
        self._idle_since_ns = 0
        if reply is None or not reply.keep_alive:
            self._refused = True
            self._waiting.clear()
            self._transport.close()
        elif self._waiting:
            asyncio.get_running_loop().call_soon(self._start_next)
        else:
            self._ahead_bytes = 0
            if self._afterwards is not None:
                self._afterwards()
                self._afterwards = None

    def _start_next(self) -> None:
        if self._waiting and self._exchange is None and not self._transport.is_closing():
            self._ahead_bytes -= self._ahead_bytes // len(self._waiting)  # it is taken to be as long as the others
            self._start(*self._waiting.popleft())

    def _refuse(self, error: ProxyError) -> None:
        """The bytes that came are no request, or none that is let in: say so when it is their turn, and close."""
        if self._refused:
            return
        self._refused = True
        self._server.count_unaccepted(error)
        if self._exchange is None and not self._waiting:
            self._say_no(error)
        else:
            self._afterwards = partial(self._say_no, error)

    def _say_no(self, error: ProxyError) -> None:
        """What is still being sent is taken and dropped: closing at once would reset the connection, and the answer with it."""
        self._idle_since_ns = self._read_ns
        reply = Reply(self._transport, b"-", True, False, 0)
        if origin := (self._head or {}).get(b"origin"):
            reply.lines = self._server.cors.lines(origin)
        reply.fail(error, self._worded(error), b"")
        reply.release()
        if self._secure:
            self._transport.close()  # it waits for the client to agree
        else:
            self._transport.write_eof()

    def _worded(self, error: ProxyError) -> bytes:
        """In the shape of the API that was asked, if that is known."""
        if self._head is not None:
            try:
                return find_operation(self._method, origin_form(self._target)).error(error)
            except ProxyError:
                pass  # it is none of ours
        return error.body()

    # -- from the server --

    @property
    def idle_since_ns(self) -> int | None:
        """None until it begins, and while a request runs, is being read or waits, or an answer is being taken."""
        if not self.begun or self._exchange is not None or self._reading or self._waiting or self.unsent:
            return None
        return max(self._idle_since_ns, self._read_ns)

    def make_room(self) -> None:
        self._refused = True
        self._transport.abort()

    @property
    def unsent(self) -> bool:
        """The client hasn't taken all of its answer yet. What TLS has encrypted is in nobody's count, but until it is sent the
        connection isn't lost."""
        transport = self._transport
        return transport.get_write_buffer_size() > 0 or (self._secure and transport.is_closing())

    @property
    def expectant(self) -> bool:
        """A request is being read or may come."""
        return not (self._refused or self._transport.is_closing())

    def announce_close(self) -> None:
        """If the answer under way has no head yet, its head will say that the connection closes."""
        if self._reply is not None and not self._waiting:
            self._reply.announce_close()

    def close_if_idle(self, now_ns: int, quiet_ns: int) -> None:
        """Close, if no request runs, is being read or lies in the socket, and nothing has happened for `quiet_ns`."""
        if self._exchange is not None or self._reading or self._waiting or not self.expectant:
            return
        if self._idle_since_ns == 0:
            self._idle_since_ns = now_ns
        active_ns = max(self._idle_since_ns, self._read_ns, self._server.draining_since_ns)
        if now_ns - active_ns >= quiet_ns and not self._has_unread():
            self._transport.close()

    def dismiss(self) -> None:
        self._refused = True
        self._transport.close()

    def _has_unread(self) -> bool:
        """Bytes have come that the event loop hasn't got to yet."""
        sock = self._transport.get_extra_info("socket")
        return sock is not None and ioctl(sock.fileno(), FIONREAD, b"\0\0\0\0") != b"\0\0\0\0"

    def sweep(self, now_ns: int) -> None:
        """Close what has been idle, or has been sending one request, or taking one answer, for too long."""
        if self._exchange is not None:
            return
        if self._idle_since_ns == 0:
            self._idle_since_ns = now_ns
        timeouts = self._server.settings.timeouts
        quiet_s = (now_ns - self._idle_since_ns) / 1e9
        unsent, before = self._transport.get_write_buffer_size(), self._unsent
        self._unsent = unsent
        if self._transport.is_closing() or unsent:
            if unsent < before:
                self._idle_since_ns = now_ns  # it takes its answer, if slowly
            elif quiet_s > timeouts.client_write:
                self._transport.abort()
        elif self._refused:
            if quiet_s > timeouts.client_request:
                self._transport.abort()
        elif self._reading:
            received = len(self._body) if isinstance(self._body, bytes) else self._body_bytes
            if (now_ns - self._origin_ns) / 1e9 > timeouts.client_request + received / _SLOWEST_BYTES_S:
                self._refuse(RequestTimeout(f"The request wasn't complete within {timeouts.client_request:g} s."))
                self._transport.close()
        elif quiet_s > timeouts.client_idle:
            self._transport.close()


def _peer_of(transport: asyncio.BaseTransport) -> str:
    """The address at the other end; "" if it has none."""
    peer = transport.get_extra_info("peername")
    return plain_address(peer[0]) if isinstance(peer, tuple) else ""


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes.")
