"""One question to one engine. A connection of its own each time: it proves that the engine takes some, and costs little.

It blocks, for as long as it is told to at most; two things are not in that: a resolver that hangs, and a host with several
addresses, each of which may take as long. So every engine is asked in a thread of its own.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

import httptools

from proxy.snapshot import Backend
from proxy.tls import said, upstream_context

MOST_BYTES: Final = 4 * 1024 * 1024
"""vLLM's metrics have 64 KiB, and some 45 more for each further engine behind the same address."""
_PIECE: Final = 64 * 1024


class ScrapeError(Exception):
    """No answer that says anything. `outcome`: unreachable, timeout, refused or unreadable."""

    def __init__(self, outcome: str, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


def get(backend: Backend, path: str, seconds: float) -> bytes:
    """The body of a 200. Raises ScrapeError."""
    try:
        return _get(backend, path, time.monotonic() + seconds)
    except TimeoutError:
        raise ScrapeError("timeout", f"no complete answer within {seconds:g} s") from None
    except OSError as error:
        raise ScrapeError("unreachable", said(error)) from None
    except UnicodeError as error:  # a name that can't be one of a host
        raise ScrapeError("unreachable", str(error)) from None
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        raise ScrapeError("unreadable", f"not valid HTTP: {error}") from None


def _get(backend: Backend, path: str, deadline: float) -> bytes:
    answer = _Answer()
    with _connected(backend, deadline) as connection:
        connection.settimeout(_left(deadline))
        connection.sendall(_request(backend, path))
        received = 0
        while not answer.complete:
            connection.settimeout(_left(deadline))
            data = connection.recv(_PIECE)
            if not data:
                answer.end()
                break
            received += len(data)
            if received > MOST_BYTES:
                raise ScrapeError("unreadable", f"an answer of more than {MOST_BYTES} bytes")
            answer.feed(data)
    if answer.status != 200:
        raise ScrapeError("refused", f"HTTP {answer.status}")
    return bytes(answer.body)


def _connected(backend: Backend, deadline: float) -> socket.socket:
    context = upstream_context(backend.ca_file) if backend.tls else None
    connection = socket.create_connection((backend.host, backend.port), timeout=_left(deadline))
    if context is None:
        return connection
    with connection:  # wrapping takes the descriptor along; what is left of it is closed, and of a failure all
        connection.settimeout(_left(deadline))
        return context.wrap_socket(connection, server_hostname=backend.host)


def _left(deadline: float) -> float:
    """Seconds. Raises TimeoutError."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _request(backend: Backend, path: str) -> bytes:
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    lines = [
        f"GET {backend.base_path}{path} HTTP/1.1",
        f"host: {host}:{backend.port}",
        "accept: text/plain",
        "accept-encoding: identity",
        "connection: close",
    ]
    if key := os.environ.get(backend.api_key_env, "").strip():
        lines.append(f"authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode()


class _Answer:
    """What has come of an answer."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._sized = False
        self.status = 0
        self.body = bytearray()
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Raises HttpParserError, HttpParserUpgrade."""
        self._parser.feed_data(data)

    def end(self) -> None:
        """The connection has been closed. Raises ScrapeError where that isn't how this answer ends (RFC 9112 §6.3)."""
        if self.status < 200 or self._sized:
            raise ScrapeError("unreachable", "the connection was closed before the answer was complete")

    # -- httptools --

    def on_header(self, name: bytes, value: bytes) -> None:
        self._sized = self._sized or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = self.status >= 200  # before that: an interim answer
