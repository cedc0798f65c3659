"""A client that sees bytes: for comparing an answer straight and through a proxy, and for misbehaving on purpose.

Blocking sockets, one request at a time. HTTP framing is taken off by llhttp; what a body read brought, and when, is kept.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httptools
import msgspec

_IDENTITY: Final = re.compile(
    rb'"(id|item_id|created|created_at|signature)": ?'
    rb'("(?:(?:chatcmpl(?!-tool)|cmpl|embd|modelperm|score|transcribe|translate)-|(?:resp|msg|rs|fc)_)[^"]*"|"[0-9a-f]{32}"|[\d.]+)'
)
_EVENT_END: Final = re.compile(rb"(?<=\r\n\r\n)|(?<=\n\n)|(?<=\r\r)")


class Reply(msgspec.Struct):
    """What came back, as far as it came."""

    status: int = 0
    headers: list[tuple[str, str]] = []
    """Names in lower case."""
    parts: list[tuple[float, bytes]] = []
    """The body as it arrived, without HTTP framing: (time.monotonic(), bytes)."""
    ending: str = "open"
    """complete, closed (before its end), reset, timeout, or open while it goes on."""

    @property
    def body(self) -> bytes:
        return b"".join([data for _, data in self.parts])

    @property
    def events(self) -> list[bytes]:
        """The SSE events and comments that are complete, each with the blank line that ends it."""
        blocks = _EVENT_END.split(self.body)
        return [block for block in blocks[:-1] if block]

    @property
    def anonymous(self) -> bytes:
        return anonymous(self.body)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def anonymous(body: bytes) -> bytes:
    """The body without what is different in each answer: ids and the time of creation."""
    return _IDENTITY.sub(rb'"\1":*', body)


def request(
    path: str,
    body: object = None,
    *,
    method: str | None = None,
    key: str | None = None,
    headers: dict[str, str] | None = None,
    host: str = "localhost",
) -> bytes:
    """A request's bytes. A body that isn't bytes already is written as JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": host}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    line = f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1\r\n"
    return (line + head + "\r\n").encode("latin-1") + data


class WireClient:
    """One TCP connection, with TLS on it where the URL says so; `tls` then says whom to trust. `timeout` is for each wait on the
    socket."""

    def __init__(
        self, url: str, *, timeout: float = 10.0, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        self.socket = socket.socket()
        if receive_buffer is not None:  # must be set before connecting, or the window is agreed on already
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        try:
            self.socket.connect((parts.hostname, parts.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if parts.scheme == "https":
                context = tls or ssl.create_default_context()
                self.socket = context.wrap_socket(self.socket, server_hostname=parts.hostname)
        except OSError:
            self.socket.close()
            raise
        self._parser = _Parser()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, path: str, body: object = None, *, key: str | None = None, headers: dict[str, str] | None = None) -> Reply:
        """Send a request and read its whole answer."""
        self.send(request(path, body, key=key, headers=headers))
        return self.read()

    def read(self, *, events: int | None = None, size: int = 65536) -> Reply:
        """The answer to its end, or until so many SSE events are there: then call again for more of the same answer."""
        return self._receive(lambda reply: events is not None and len(reply.events) >= events, size)

    def read_head(self) -> Reply:
        """The answer as far as it came with its head."""
        return self._receive(lambda reply: reply.status > 0, 65536)

    def _receive(self, enough: Callable[[Reply], bool], size: int) -> Reply:
        parser = self._parser
        while not parser.done:
            reply = parser.replies[0]
            if enough(reply):
                return reply
            try:
                data = self.socket.recv(size)
            except TimeoutError:
                reply.ending = "timeout"
                return reply
            except ConnectionResetError:
                reply.ending = "reset"
                return reply
            if not data:
                parser.close()
                return reply
            parser.feed(data)
        parser.done -= 1
        return parser.replies.popleft()

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close with a TCP reset, as a killed process may."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def ask(url: str, path: str, body: object = None, *, key: str | None = None, headers: dict[str, str] | None = None) -> Reply:
    """One request on a connection of its own."""
    with WireClient(url) as client:
        return client.ask(path, body, key=key, headers=headers)


class _Parser:
    """Replies as they come in; the last one is the one that is being read, or not even begun."""

    def __init__(self) -> None:
        self.replies = deque([Reply()])
        self.done = 0
        self._sized = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def close(self) -> None:
        """The server closed: the proper end only of a body that has no other."""
        reply = self.replies[-1]
        reply.ending = "closed" if self._sized or not reply.status else "complete"

    def on_header(self, name: bytes, value: bytes) -> None:
        self.replies[-1].headers.append((name.lower().decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        reply = self.replies[-1]
        reply.status = self._parser.get_status_code()
        self._sized = any(name in ("content-length", "transfer-encoding") for name, _ in reply.headers)

    def on_body(self, data: bytes) -> None:
        self.replies[-1].parts.append((time.monotonic(), data))

    def on_message_complete(self) -> None:
        reply = self.replies[-1]
        if reply.status < 200:  # 100 Continue: the answer itself is still to come
            reply.headers.clear()
            return
        reply.ending = "complete"
        self.replies.append(Reply())
        self.done += 1
