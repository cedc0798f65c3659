"""The control process: loops beside an HTTP server, until somebody says stop.

    a loop per backend    asks it what it serves, every `control.discover_every`, and at once when it was started anew
    the engines' loop     sees in the collector's file which engines were started anew
    a loop per issuer     fetches its public keys before what is known of them is old
    the catalogue's loop  looks at the database twice a second: a key works within two seconds of its making
    the publisher's loop  writes the snapshot when one of the others has something new, and now and then as a sign of life
    the sweeper's loop    deletes from Redis what was withdrawn from the cache, where there are both

None of them waits for another: a hanging engine holds up neither keys nor the other engines, a hanging database no engine.
Backends come and go with the catalogue, and their loops with them.

The same application is served to whoever may connect to `control.listen` and, on a Unix socket in the state directory, to whoever
may open that.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import uvicorn

from proxy.control.app import create_app
from proxy.control.database import Database
from proxy.control.discovery import DiscoveryError, ask, ask_version, new_client
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory, KnownBackend
from proxy.control.issuers import Issuers, KnownIssuer, fetch
from proxy.control.local import Local, listening
from proxy.control.publish import Publisher
from proxy.control.restarts import Restarts
from proxy.control.state import State
from proxy.control.sweep import Sweeper
from proxy.engines import read_engines
from proxy.settings import Settings
from proxy.snapshot import SnapshotError, SnapshotFile, read_snapshot

log = logging.getLogger(__name__)

CATALOGUE_EVERY_S = 0.5
PUBLISH_EVERY_S = 1.0
ENGINES_EVERY_S = 1.0
ANSWER_S = 5.0
STOP_S = 3


@dataclass
class Control:
    """Everything of a control process, put together. `changed` wakes the publisher."""

    state: State
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, settings: Settings) -> Control:
        previous = read_previous(settings)
        feed = CatalogueFeed(settings, previous)
        inventory = Inventory(settings.bounds, feed.known.declared.held, previous, time.time_ns())
        issuers = Issuers(settings.issuers, previous)
        publisher = Publisher(settings, inventory, feed, issuers, previous)
        return cls(State(settings, Database(settings.database_url), inventory, feed, issuers, publisher))

    async def run(self, listener: socket.socket) -> None:
        """Until SIGTERM or SIGINT. Raises ExceptionGroup if a loop has a bug: better restarted than half alive; OSError if it
        can't listen in the state directory."""
        state = self.state
        app = create_app(state)
        everybody, local = _Server(app), _Server(Local(app))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _stop, everybody, local)
        with listening(state.settings.control_socket_path) as local_listener:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._work(), name="work")
                log.info("control listens", extra={"address": _text(listener)})
                await asyncio.gather(everybody.serve(sockets=[listener]), local.serve(sockets=[local_listener]))
                work.cancel()
        state.feed.close()
        await state.database.close()
        log.info("control stops")

    async def _work(self) -> None:
        """All loops, until cancelled."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._follow_catalogue(loops), name="catalogue")
            loops.create_task(self._publish(), name="publish")
            loops.create_task(self._watch_engines(), name="engines")
            settings = self.state.settings
            if settings.redis is not None and settings.cache is not None:
                sweeper = Sweeper(settings.redis, self.state.database, self.state.publisher)
                loops.create_task(sweeper.run(), name="sweep")
            for each in self.state.issuers.known:
                loops.create_task(self._fetch(each), name=each.settings.issuer)

    async def _follow_catalogue(self, loops: asyncio.TaskGroup) -> None:
        feed, inventory = self.state.feed, self.state.inventory
        asking: dict[KnownBackend, asyncio.Task[None]] = {}
        while True:
            there = set(inventory.known.values())
            for gone in asking.keys() - there:
                asking.pop(gone).cancel()
            for each in there - asking.keys():
                asking[each] = loops.create_task(self._discover(each), name=each.backend.name)
            if await asyncio.to_thread(feed.poll):
                inventory.follow(feed.known.declared.held)
                self.changed.set()
            else:
                await asyncio.sleep(CATALOGUE_EVERY_S)

    async def _publish(self) -> None:
        publisher = self.state.publisher
        started_ns = time.monotonic_ns()
        while True:
            self.changed.clear()
            file = publisher.due(time.monotonic_ns() - started_ns, time.time_ns())
            if file is not None and await asyncio.to_thread(publisher.write, file):
                log.debug("snapshot written", extra={"revision": file.revision, "models": len(file.models)})
            try:
                async with asyncio.timeout(PUBLISH_EVERY_S):
                    await self.changed.wait()
            except TimeoutError:
                pass

    async def _discover(self, known: KnownBackend) -> None:
        while True:
            was = known.reachable
            known.again.clear()  # before it is asked: what it said of an engine that went meanwhile isn't to stay
            changed = await _ask(known)
            if known.reachable != was:
                _tell(known)
            if changed or was is None:
                self.changed.set()
            try:
                async with asyncio.timeout(self.state.settings.control.discover_every):
                    await known.again.wait()
            except TimeoutError:
                pass

    async def _watch_engines(self) -> None:
        path, restarts = self.state.settings.engines_path, Restarts()
        while True:
            await asyncio.sleep(ENGINES_EVERY_S)
            engines = await asyncio.to_thread(read_engines, path, time.time_ns())
            for name in restarts.look(engines.loads) if engines is not None else ():
                if (known := self.state.inventory.known.get(name)) is not None:
                    log.info("a backend was started anew", extra={"backend": name})
                    known.again.set()

    async def _fetch(self, known: KnownIssuer) -> None:
        while True:
            was = known.error
            changed, again_s = await _fetch_keys(known)
            if known.error and known.error != was:
                facts = {"issuer": known.settings.issuer, "error": known.error}
                log.warning("an issuer's keys can't be fetched; those that were known of it stay", extra=facts)
            elif changed:
                log.info("an issuer's keys are known", extra={"issuer": known.settings.issuer})
            self.changed.set()
            await asyncio.sleep(again_s)


async def _ask(known: KnownBackend) -> bool:
    """Once; True if the answer changes anything for workers."""
    try:
        async with new_client(ANSWER_S, known.backend.ca_file) as client:  # a new one: the file may have changed
            answer = await ask(client, known.backend, ANSWER_S)
            if "vllm" in (answer.kind, known.settings.kind):
                version = await ask_version(client, known.backend, ANSWER_S)
                answer = msgspec.structs.replace(answer, version=version or "")
            return known.answered(answer, time.time_ns())
    except DiscoveryError as error:
        known.failed(str(error), time.time_ns())
    except Exception as bug:  # one odd backend must take neither the keys nor the other backends down
        log.exception("asking a backend failed in a way that nobody thought of", extra={"backend": known.backend.name})
        known.failed(f"{type(bug).__name__}; the log has more", time.time_ns())
    return False


async def _fetch_keys(known: KnownIssuer) -> tuple[bool, float]:
    """Once → whether that changes anything for workers, and after how many seconds to ask again."""
    try:
        fetched = await fetch(known.settings, ANSWER_S)
        return known.answered(fetched, time.time_ns()), fetched.again_s
    except DiscoveryError as error:
        return False, known.failed(str(error), time.time_ns())
    except Exception as bug:  # one odd issuer must take nothing else down
        log.exception("asking an issuer failed in a way that nobody thought of", extra={"issuer": known.settings.issuer})
        return False, known.failed(f"{type(bug).__name__}; the log has more", time.time_ns())


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


def _stop(*servers: _Server) -> None:
    for each in servers:
        each.stop()


def _tell(known: KnownBackend) -> None:
    facts = {"backend": known.backend.name, "models": known.models()}
    if known.reachable:
        log.info("backend answers", extra=facts | {"kind": known.backend.kind})
    else:
        log.warning("backend doesn't answer; what was known of it stays", extra=facts | {"error": known.error})


def _text(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
