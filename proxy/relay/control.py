"""Control, as a backend that is in no catalogue: it knows what was used. Each request has one try, on a connection of its own."""

from __future__ import annotations

import msgspec

from proxy.exchange import Exchange
from proxy.relay.connection import Payload, UpstreamConnection
from proxy.relay.pool import Pool
from proxy.settings import Settings, address
from proxy.snapshot import Backend
from proxy.wire.operation import Operation, Upstream

NAME = "control"
TIMEOUT_S = 5.0
"""To connect, and then for each piece of the answer."""
MOST = 16
"""Requests at the same time: control has other work, and each costs its database something."""
_CREDENTIALS = (b"authorization", b"x-api-key")
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (where it listens everywhere it can be asked here)


class ControlPool(Pool):
    """No connection is kept: there is nobody who would look after it."""

    def __init__(self, settings: Settings) -> None:
        host, port = address(settings.control.listen)
        timeouts = msgspec.structs.replace(settings.timeouts, connect=TIMEOUT_S, first_byte=TIMEOUT_S, between_chunks=TIMEOUT_S)
        super().__init__(Backend(NAME, _LOOPBACK.get(host, host), port, "openai"), timeouts)
        self.asking = 0
        """Requests under way."""

    def put(self, connection: UpstreamConnection, now_ns: int) -> None:
        connection.abort()

    def payload(self, operation: Operation, exchange: Exchange, upstream: Upstream, attempt: int) -> Payload:
        """The caller's target, and of his headers those that say who he is."""
        backend = self.backend
        host = f"[{backend.host}]" if ":" in backend.host else backend.host
        lines = [
            b"GET %b HTTP/1.1" % exchange.target,
            b"host: %b:%d" % (host.encode(), backend.port),
            b"accept-encoding: identity",
            b"connection: close",
            b"x-request-id: %b-%d" % (exchange.hex_id, attempt),
        ]
        lines += [b"%b: %b" % (name, exchange.headers[name]) for name in _CREDENTIALS if name in exchange.headers]
        return b"\r\n".join([*lines, b"", b""])
