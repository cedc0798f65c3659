"""Accepting where TLS is spoken. The event loop's own listener tells of a connection when its handshake is done; here it counts
from its first packet on, has not long to get there, and is shown the certificate of the moment."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from proxy.addresses import plain_address
from proxy.errors import InvalidRequest, TooManyConnections
from proxy.listener.certificate import Certificate
from proxy.listener.connection import ClientConnection

if TYPE_CHECKING:
    from proxy.listener.server import Server

HANDSHAKE_S = 10.0
SHUTDOWN_S = 5.0
"""For a client to say that it has heard that the connection closes."""
AT_ONCE = 64
"""Connections that are accepted before others get their turn."""
RETRY_S = 1.0
"""When no connection can be accepted: without file descriptors, say."""


class SecureListener:
    def __init__(self, server: Server, certificate: Certificate, listening: socket.socket) -> None:
        self._server = server
        self._certificate = certificate
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listening)
        self._listening.close()

    def _resume(self) -> None:
        if self._listening.fileno() >= 0:
            self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # the sweep says so (server.py)
                self._loop.remove_reader(self._listening)
                self._loop.call_later(RETRY_S, self._resume)
                return
            self._begin(sock, plain_address(address[0]))

    def _begin(self, sock: socket.socket, peer: str) -> None:
        connection = ClientConnection(self._server)
        try:
            self._server.crowd.enter(connection, self._server.client_of(peer))
        except TooManyConnections as error:
            self._server.count_unaccepted(error)
            sock.close()
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._secure(connection, sock), name="TLS handshake")
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _secure(self, connection: ClientConnection, sock: socket.socket) -> None:
        # OSError, also ssl.SSLError: a scanner, an old client, one that doesn't trust our certificate.
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=self._certificate.context,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        if not connection.begun:
            self._server.crowd.leave(connection)
            self._server.count_unaccepted(InvalidRequest("No TLS handshake.", code="tls_handshake_failed"))
