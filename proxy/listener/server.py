"""All client connections of a worker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from proxy.errors import ProxyError
from proxy.exchange import Exchange, Remembered
from proxy.listener.connection import ClientConnection
from proxy.listener.probes import Probes
from proxy.reply import Reply
from proxy.settings import Settings


class Handler(Protocol):
    def __call__(self, exchange: Exchange, reply: Reply) -> Coroutine[Any, Any, None]: ...


class Server:
    """Accepts on an inherited socket until `drain`."""

    def __init__(
        self,
        settings: Settings,
        handle: Handler,
        probes: Probes,
        count_unaccepted: Callable[[ProxyError], None],
        identify: Callable[[bytes | None, Remembered], object],
    ) -> None:
        self.settings = settings
        self.body_limit = settings.limits.body_bytes
        self.capture = settings.capture.max_bytes if settings.capture.content else 0
        self.handle = handle
        self.probes = probes
        self.count_unaccepted = count_unaccepted
        self.identify = identify
        """Raises if the `Authorization` is nobody's: a body of several reads is held for callers alone."""
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self._server: asyncio.Server | None = None

    async def start(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self), sock=listening, backlog=4096)

    def drain(self) -> None:
        """Accept no more; close what is idle. Answers under way are the last of their connection."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_if_idle()

    @property
    def unsent(self) -> bool:
        """Some client hasn't taken all of its answer yet."""
        return any(connection.unsent for connection in self.connections)

    def sweep(self, now_ns: int) -> None:
        for connection in list(self.connections):
            connection.sweep(now_ns)
