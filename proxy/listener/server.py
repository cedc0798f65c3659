"""All client connections of a worker."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from proxy.addresses import household
from proxy.errors import ProxyError, TooManyConnections
from proxy.exchange import Exchange, Remembered
from proxy.listener.certificate import Certificate
from proxy.listener.connection import ClientConnection
from proxy.listener.cors import Cors
from proxy.listener.crowd import Crowd
from proxy.listener.head import TrustedProxies
from proxy.listener.probes import Probes
from proxy.listener.secure import SecureListener
from proxy.reply import Reply
from proxy.settings import Settings

log = logging.getLogger(__name__)

BACKLOG = 4096
RESERVED_FILES = 128
"""File descriptors for what isn't a connection of a client, or the one to an engine that it may need."""
MOST_TURNED_AWAY = 64
"""Connections that are being told that there is no place; more are closed without a word."""


class Handler(Protocol):
    def __call__(self, exchange: Exchange, reply: Reply) -> Coroutine[Any, Any, None]: ...


class Server:
    """Accepts on an inherited socket until `drain`. Raises OSError if the settings name a certificate that can't be used."""

    def __init__(
        self,
        settings: Settings,
        handle: Handler,
        probes: Probes,
        count_unaccepted: Callable[[ProxyError], None],
        identify: Callable[[Mapping[bytes, bytes], Remembered, str], object],
    ) -> None:
        self.settings = settings
        self.body_limit = settings.limits.body_bytes
        self.long_length = len(str(self.body_limit))
        """A Content-Length of fewer digits can't be over the limit."""
        self.head_limit = settings.limits.header_bytes
        self.capture = settings.capture.max_bytes if settings.capture.content else 0
        self.handle = handle
        self.probes = probes
        self.count_unaccepted = count_unaccepted
        self.identify = identify
        """Raises if the headers, which came from that address, hold nobody's key: a body of several reads is held for callers
        alone."""
        self.cors = Cors(settings.cors.origins)
        self.trusted = TrustedProxies(settings.trusted_proxies)
        self.certificate = Certificate(settings.tls) if settings.tls is not None else None
        self.crowd = Crowd(_affordable(settings.limits.connections), settings.limits.connections_per_client)
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self.draining_since_ns = 0
        self._turned_away: set[ClientConnection] = set()
        self._listener: asyncio.Server | SecureListener | None = None
        self._out_of_files = False

    async def start(self, listening: socket.socket) -> None:
        listening.listen(BACKLOG)  # it may have been taken off its address while nobody came up to serve
        if self.certificate is not None:
            self._listener = SecureListener(self, self.certificate, listening)
        else:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(lambda: ClientConnection(self), sock=listening, backlog=BACKLOG)

    # -- from the connections --

    def client_of(self, peer: str) -> str:
        """Whose connection it is, for the limit of each: "" for a trusted proxy, who comes for many."""
        return "" if not peer or peer in self.trusted else household(peer)

    def welcome(self, connection: ClientConnection, peer: str) -> ProxyError | None:
        """Count a new connection in, if it isn't counted yet; otherwise why not."""
        try:
            if connection not in self.crowd:
                self.crowd.enter(connection, self.client_of(peer))
        except TooManyConnections as error:
            self._turned_away.add(connection)
            return error
        return None

    @property
    def patient(self) -> bool:
        """There is time to say no."""
        return len(self._turned_away) <= MOST_TURNED_AWAY

    def left(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        self._turned_away.discard(connection)
        self.crowd.leave(connection)

    # -- from the worker --

    def drain(self, now_ns: int) -> None:
        """Accept no more. Every answer that hasn't begun says that it is the last of its connection."""
        self.draining = True
        self.draining_since_ns = now_ns
        if self._listener is not None:
            self._listener.close()
        for connection in self.connections:
            connection.announce_close()

    def close_idle(self, now_ns: int, quiet_ns: int) -> None:
        """Of a draining server: close the connections on which nothing has happened for `quiet_ns` since the drain began."""
        for connection in list(self.connections):
            connection.close_if_idle(now_ns, quiet_ns)

    def dismiss(self) -> None:
        """Nobody is waited for any more."""
        for connection in list(self.connections):
            connection.dismiss()

    @property
    def expectant(self) -> bool:
        """Some client may still be sending a request: it hasn't been told that its connection closes."""
        handshakes = len(self.crowd) + len(self._turned_away) - len(self.connections)
        return handshakes > 0 or any(connection.expectant for connection in self.connections)

    @property
    def unsent(self) -> bool:
        """Some client hasn't taken all of its answer yet."""
        return any(connection.unsent for connection in self.connections)

    def sweep(self, now_ns: int) -> None:
        for connection in list(self.connections):
            connection.sweep(now_ns)
        if self.certificate is not None:
            self.certificate.poll()
        self._watch_files()

    def _watch_files(self) -> None:
        """Without file descriptors newcomers are closed by the event loop, without a word to them or to us, or wait."""
        try:
            os.close(os.dup(0))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and not self._out_of_files:
                self._out_of_files = True
                log.error("no file descriptors left: no new connections", extra={"connections": len(self.crowd)})
        else:
            if self._out_of_files:
                log.info("file descriptors are to be had again")
            self._out_of_files = False


def _affordable(connections: int) -> int:
    """As many as are wanted, if each may open a file for an engine too."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, (files - RESERVED_FILES) // 2) if files != resource.RLIM_INFINITY else connections
    if most < connections:
        log.info("fewer connections than wanted", extra={"connections": most, "wanted": connections, "files": files})
    return min(connections, most)
