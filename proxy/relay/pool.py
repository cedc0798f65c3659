"""A backend's connections: kept alive, newest first, given up before the engine gives them up (vLLM's uvicorn closes idle ones
after 5 s, and a request sent into that moment is lost)."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque

from proxy.errors import UpstreamUnreachable
from proxy.exchange import Exchange
from proxy.relay.backends import KINDS
from proxy.relay.connection import Payload, UpstreamConnection
from proxy.settings import TimeoutSettings
from proxy.snapshot import Backend
from proxy.tls import said, upstream_context
from proxy.wire.operation import Operation, Upstream

LARGE_BODY_BYTES = 64 * 1024
"""From here on writing twice is cheaper than copying."""
DRAIN_NS = 2_000_000_000
"""How long an engine may take to end an answer that was complete for us."""


class Pool:
    """Idle connections to one backend, and what is remembered of it."""

    def __init__(self, backend: Backend, timeouts: TimeoutSettings) -> None:
        self.backend = backend
        self.kind = KINDS[backend.kind]
        self.timeouts = timeouts
        self.served_by = b"\r\nx-glasshouse-backend: " + backend.name.encode()
        """A line of the answers' heads."""
        self.fingerprint = b""
        """The engine's `system_fingerprint` as it last wrote it (wire/stream.py)."""
        self.closed = False
        """Nobody takes a connection from here any more: none is kept."""
        self.draining: set[UpstreamConnection] = set()
        self._idle: deque[UpstreamConnection] = deque()
        self._idle_ns = int(timeouts.upstream_idle * 1e9)
        self._heads: dict[bytes, bytes] = {}

    def take(self, now_ns: int) -> UpstreamConnection | None:
        """The connection that was used last; None if there is none that can be trusted."""
        idle = self._idle
        if not idle:
            return None
        oldest_ns = now_ns - self._idle_ns
        while idle:
            connection = idle.pop()
            if connection.idle_since_ns >= oldest_ns and not connection.closed:
                return connection
            connection.abort()
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises UpstreamUnreachable."""
        backend = self.backend
        loop = asyncio.get_running_loop()
        timeout_s = self.timeouts.connect
        try:
            async with asyncio.timeout(timeout_s):
                context = await self._context() if backend.tls else None
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), backend.host, backend.port, ssl=context
                )
        except TimeoutError:
            raise UpstreamUnreachable(f"No connection to the model's engine within {timeout_s:g} s.") from None
        except ssl.SSLCertVerificationError as error:
            raise UpstreamUnreachable(f"The certificate of the model's engine isn't accepted: {said(error)}.") from None
        except ssl.SSLError as error:
            raise UpstreamUnreachable(f"No TLS connection to the model's engine: {said(error)}.") from None
        except OSError as error:
            reason = "unknown address" if isinstance(error, socket.gaierror) else said(error)
            raise UpstreamUnreachable(f"No connection to the model's engine: {reason}.") from None
        return connection

    async def _context(self) -> ssl.SSLContext:
        """Whom the engine's certificate must be from. Reading that takes a while: not here."""
        try:
            return await asyncio.to_thread(upstream_context, self.backend.ca_file)
        except OSError as error:
            raise UpstreamUnreachable(f"The ca_file of the model's engine can't be used: {said(error)}.") from None

    def put(self, connection: UpstreamConnection, now_ns: int) -> None:
        if self.closed:
            connection.abort()
            return
        if self.draining:
            self.draining.discard(connection)
        connection.idle_since_ns = now_ns
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        self.draining.discard(connection)
        try:
            self._idle.remove(connection)
        except ValueError:
            return  # it was in use

    def sweep(self, now_ns: int) -> None:
        """Close what has been idle, or not ended, for too long."""
        idle = self._idle
        while idle and idle[0].idle_since_ns < now_ns - self._idle_ns:
            idle.popleft().abort()
        for connection in [c for c in self.draining if c.idle_since_ns < now_ns - DRAIN_NS]:
            self.draining.discard(connection)
            connection.abort()

    def close(self) -> None:
        self.closed = True
        while self._idle:
            self._idle.popleft().abort()
        for connection in list(self.draining):
            connection.abort()

    def payload(self, operation: Operation, exchange: Exchange, upstream: Upstream, attempt: int) -> Payload:
        """The request as it goes to the engine. Only these headers are ever sent; the id is ours, since vLLM takes the header for
        its own request id and two equal ones mix up answers. A large body isn't copied."""
        record = exchange.record
        before, body = upstream.before, upstream.body
        length = len(before) + len(body)
        pieces: tuple[bytes | memoryview, ...] = ()
        if upstream.changes:
            before, pieces = b"", upstream.pieces
            length = sum(map(len, pieces))
        elif len(body) > LARGE_BODY_BYTES:
            pieces = (body,)
        head = self._heads.get(operation.path)
        if head is None:
            head = self._heads[operation.path] = self._head(operation)
        payload = (
            b"%bcontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b-%d\r\ntraceparent: 00-%b-%016x-%02x\r\n%b\r\n%b%b"
            % (
                head,
                upstream.content_type,
                length,
                exchange.hex_id,
                attempt,
                exchange.trace,
                (record.span_id + attempt) & 0xFFFFFFFFFFFFFFFF,
                record.trace_flags,
                exchange.tracestate,
                before,
                b"" if pieces else bytes(body),
            )
        )
        return (payload, *pieces) if pieces else payload

    def _head(self, operation: Operation) -> bytes:
        backend = self.backend
        key = os.environ.get(backend.api_key_env, "") if backend.api_key_env else ""
        lines = [
            b"%b %b%b HTTP/1.1" % (operation.method, backend.base_path.encode(), operation.path),
            b"host: %b:%d" % ((f"[{backend.host}]" if ":" in backend.host else backend.host).encode(), backend.port),
            b"accept-encoding: identity",
        ]
        if key:
            lines.append(b"authorization: Bearer " + key.encode())
        return b"\r\n".join(lines) + b"\r\n"
