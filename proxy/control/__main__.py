"""`python -m proxy.control --settings FILE [--fd N]`: the control process. FILE is the effective settings as JSON."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

import msgspec

from proxy import logs
from proxy.control.server import Control
from proxy.settings import Settings, SettingsError, address

log = logging.getLogger("proxy.control")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m proxy.control")
    parser.add_argument("--settings", type=Path, required=True, help="the effective settings, JSON")
    parser.add_argument("--fd", type=int, help="an inherited listening socket; default: bind `control.listen`")
    arguments = parser.parse_args()
    logs.setup("control")
    for chatty in ("httpx2", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = Settings.read(arguments.settings)
        listener = listen(settings) if arguments.fd is None else socket.socket(fileno=arguments.fd)
    except (OSError, SettingsError, msgspec.MsgspecError) as error:
        log.critical("control can't start", extra={"error": str(error)})
        return 1
    with asyncio.Runner() as runner:
        runner.run(run(settings, listener))
        os._exit(0)  # a thread may still wait for a database that doesn't answer; it only reads, and nobody waits for it


async def run(settings: Settings, listener: socket.socket) -> None:
    await Control.of(settings).run(listener)


def listen(settings: Settings) -> socket.socket:
    """Raises OSError, naming the address."""
    host, port = address(settings.control.listen)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"control.listen {settings.control.listen}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
