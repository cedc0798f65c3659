"""The control process: three kinds of loops beside an HTTP server, until somebody says stop.

    a loop per backend    asks it what it serves, every `control.discover_every`
    the catalogue's loop  looks at the database twice a second: a key works within two seconds of its making
    the publisher's loop  writes the snapshot when one of the others has something new, and now and then as a sign of life

None of them waits for another: a hanging engine holds up neither keys nor the other engines, a hanging database no engine.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from proxy.control.app import create_app
from proxy.control.declared import Declared
from proxy.control.discovery import DiscoveryError, ask, new_client
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory, KnownBackend
from proxy.control.publish import Publisher
from proxy.settings import Settings
from proxy.snapshot import SnapshotError, SnapshotFile, read_snapshot

log = logging.getLogger(__name__)

CATALOGUE_EVERY_S = 0.5
PUBLISH_EVERY_S = 1.0
ANSWER_S = 5.0
STOP_S = 3


@dataclass
class Control:
    """Everything of a control process, put together. `changed` wakes the publisher."""

    settings: Settings
    inventory: Inventory
    feed: CatalogueFeed
    publisher: Publisher
    changed: asyncio.Event

    @classmethod
    def of(cls, settings: Settings) -> Control:
        previous = read_previous(settings)
        inventory = Inventory(settings, previous, time.time_ns())
        declared = Declared(settings)
        feed = CatalogueFeed(settings.database_url, declared, previous)
        publisher = Publisher(settings, declared, inventory, feed, previous)
        return cls(settings, inventory, feed, publisher, asyncio.Event())

    async def run(self, listener: socket.socket) -> None:
        """Until SIGTERM or SIGINT. Raises ExceptionGroup if a loop has a bug: better restarted than half alive."""
        app = create_app(self.settings, self.inventory, self.feed, self.publisher)
        server = _Server(app)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(self._follow_catalogue(), name="catalogue"),
                tasks.create_task(self._publish(), name="publish"),
                *(tasks.create_task(self._discover(each), name=name) for name, each in self.inventory.known.items()),
            ]
            log.info("control listens", extra={"address": _text(listener)})
            await server.serve(sockets=[listener])
            for each in loops:
                each.cancel()
        self.feed.close()
        log.info("control stops")

    async def _follow_catalogue(self) -> None:
        while True:
            if await asyncio.to_thread(self.feed.poll):
                self.changed.set()
            await asyncio.sleep(CATALOGUE_EVERY_S)

    async def _publish(self) -> None:
        started_ns = time.monotonic_ns()
        while True:
            self.changed.clear()
            if (file := self.publisher.due(time.monotonic_ns() - started_ns)) is not None and await asyncio.to_thread(
                self.publisher.write, file
            ):
                log.debug("snapshot written", extra={"revision": file.revision, "models": len(file.models)})
            try:
                async with asyncio.timeout(PUBLISH_EVERY_S):
                    await self.changed.wait()
            except TimeoutError:
                pass

    async def _discover(self, known: KnownBackend) -> None:
        while True:
            was = known.reachable
            changed = await _ask(known)
            if known.reachable != was:
                _tell(known)
            if changed or was is None:
                self.changed.set()
            await asyncio.sleep(self.settings.control.discover_every)


async def _ask(known: KnownBackend) -> bool:
    """Once; True if the answer changes anything for workers."""
    try:
        async with new_client(ANSWER_S, known.backend.ca_file) as client:  # a new one: the file may have changed
            return known.answered(await ask(client, known.backend, ANSWER_S), time.time_ns())
    except DiscoveryError as error:
        known.failed(str(error), time.time_ns())
    except Exception as bug:  # one odd backend must take neither the keys nor the other backends down
        log.exception("asking a backend failed in a way that nobody thought of", extra={"backend": known.backend.name})
        known.failed(f"{type(bug).__name__}; the log has more", time.time_ns())
    return False


def read_previous(settings: Settings) -> SnapshotFile | None:
    """The snapshot of the process before us, if there is one that can be read."""
    try:
        return read_snapshot(settings.snapshot_path)
    except FileNotFoundError:
        return None
    except (OSError, SnapshotError) as error:
        log.warning("the previous snapshot can't be read; starting without", extra={"error": str(error)})
        return None


class _Server(uvicorn.Server):
    """uvicorn, for one process: signals are ours, and stopping because of one is no failure."""

    def __init__(self, app: object) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=STOP_S,
            )
        )

    def stop(self) -> None:
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _tell(known: KnownBackend) -> None:
    facts = {"backend": known.backend.name, "models": known.models()}
    if known.reachable:
        log.info("backend answers", extra=facts | {"kind": known.backend.kind})
    else:
        log.warning("backend doesn't answer; what was known of it stays", extra=facts | {"error": known.error})


def _text(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
