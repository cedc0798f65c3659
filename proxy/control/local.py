"""Answering on the Unix socket in the state directory, where nobody has to say who he is.

The directory is its owner's alone (0700) and so is the socket (0600): who may open it could as well open the database beside it.
A request is marked as local by us, in its ASGI scope, which nothing that a client sends gets into.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.control.access import LOCAL

_BACKLOG = 128


class Local:
    """ASGI middleware: whatever comes through it is local."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, LOCAL: True}, receive, send)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """The listening socket, in the place of one that a process before us left. Raises OSError.

    The kernel has room for 107 bytes of an address, and paths may be longer: the directory is opened, and the socket named by
    that.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=directory)
            before = os.umask(0o177)
            try:
                listener.bind(f"/proc/self/fd/{directory}/{path.name}")
            finally:
                os.umask(before)
            listener.listen(_BACKLOG)
            mine = os.stat(path.name, dir_fd=directory).st_ino
            yield listener
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path.name, dir_fd=directory).st_ino == mine:
                    os.unlink(path.name, dir_fd=directory)
    finally:
        os.close(directory)
