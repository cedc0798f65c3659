"""A worker: settings → steps → pipeline → listener. `python -m proxy.worker --settings FILE --fd N`.

It needs the state directory and nothing else: no database, no network but to clients and engines, no lock.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from proxy import logs
from proxy.admission.others import Others
from proxy.cache.cache import Cache
from proxy.errors import ShuttingDown
from proxy.exchange import set_wall_anchor
from proxy.journal import BackendBeat, Heartbeat, HeartbeatFile, Journal
from proxy.listener.probes import READY, Probes
from proxy.listener.server import Server
from proxy.pipeline import Pipeline
from proxy.routing import Standing
from proxy.settings import Settings
from proxy.snapshot import Model, SnapshotFeed
from proxy.spend.host import host_id

if TYPE_CHECKING:
    from proxy.admission.shared import Shared
    from proxy.cache.redis import Remote
    from proxy.cache.vectors import Vectors

log = logging.getLogger(__name__)

SWEEP_S = 0.25
PROGRESS_EVERY = 4
"""Sweeps between progress records: one a second."""
CONNECTIONS_EVERY = 20
"""Sweeps between looks at idle client connections: one in 5 s."""
KEPT_ALIVE_S = 6.0
"""How long a worker whose place has been taken goes on answering on connections that it hasn't announced to close. Clients
give up idle connections too: httpx, and so OpenAI's Python client, after 5 s, Node's fetch after 4."""
CONTENT_SEGMENT_BYTES = 8 * 1024 * 1024
CONTENT_BYTES = 512 * 1024 * 1024
"""Captured content on disk at which capturing pauses. The collector removes it at half of that, and after minutes."""


class Worker:
    """`place`: among this host's workers. `ready_fd`: where it says that it is ready, once. `takes_over`: another serves until
    then."""

    def __init__(self, settings: Settings, ready_fd: int | None = None, *, takes_over: bool = False, place: int = 0) -> None:
        self._settings = settings
        self._place = place
        self._ready_fd = ready_fd
        self._takes_over = takes_over
        self._feed = SnapshotFeed(settings.snapshot_path)
        self._feed.poll()
        self._journal = Journal(settings.journal_path, settings.journal.segment_bytes)
        self._content = None
        if settings.capture.content:  # leaves the disk to records long before they need it
            self._content = Journal(settings.content_path, CONTENT_SEGMENT_BYTES, 4 * settings.journal.segment_bytes)
        self._heartbeat = HeartbeatFile(settings.journal_path, self._journal.incarnation)
        self._pipeline = Pipeline(settings, self._feed, self._journal, self._content)
        self._sharing: dict[Shared | Remote | Vectors, asyncio.Task[None]] = {}
        """What runs for as long as this does."""
        self._remote = self._share_cache()  # the snapshot may want more of that
        self._pipeline.follow()
        pipeline = self._pipeline
        self._others = Others(settings, pipeline.admission, self._models)
        self._shared = self._share()
        self._server = Server(
            settings, pipeline.handle, Probes(self._state), pipeline.count_unaccepted, pipeline.authenticator.identify
        )
        self._stopping = asyncio.Event()
        self._quiet_s = 0.0
        """Idle seconds after which a connection is closed in the drain."""
        self._loop_delay_ns = 0
        self._sweeps = 0

    async def run(self, listening: socket.socket) -> None:
        """Serve until a signal; then drain. SIGTERM and SIGINT: everything ends. SIGUSR1: another has taken our place."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, 0.0)
        loop.add_signal_handler(signal.SIGUSR1, self._stop, KEPT_ALIVE_S)
        self._beat()
        self._others.look()
        sweeping = asyncio.create_task(self._sweep_forever(), name="sweep")
        for each in (self._shared, self._remote):
            if each is not None:
                self._keep_sharing(each)
        if self._takes_over:
            await self._until_ready()
        if not self._stopping.is_set():
            await self._serve(listening)
            await self._until_ready()
            self._say_ready()
            await self._stopping.wait()
            await self._drain()
        sweeping.cancel()
        for shared, task in self._sharing.items():
            await shared.close()
            task.cancel()
        self._close()

    def _keep_sharing(self, shared: Shared | Remote | Vectors) -> None:
        self._sharing[shared] = asyncio.create_task(_keep_sharing(shared), name="redis")

    def _share(self) -> Shared | None:
        """What several workers share, if there is a Redis for it."""
        settings = self._settings
        if settings.redis is None:
            return None
        from proxy.admission.shared import Shared  # Redis' client is no small import

        admission, host = self._pipeline.admission, host_id(settings.state_path)
        admission.shared = Shared(
            settings.redis, admission.incarnation, host, settings.workers, self._others.spend, admission.standings
        )
        return admission.shared

    def _share_cache(self) -> Remote | None:
        """Where workers find each other's answers, if there is a Redis for it."""
        settings, cache = self._settings, self._pipeline.cache
        if settings.redis is None or settings.cache is None or cache is None:
            return None
        from proxy.cache.redis import Remote

        cache.remote = Remote(settings.redis, settings.cache.entry_bytes)
        cache.share_meanings = self._share_meanings
        return cache.remote

    def _share_meanings(self) -> Vectors | None:
        """Where workers find what each other's questions mean, once a model wants to know."""
        if self._settings.redis is None:
            return None
        from proxy.cache.vectors import Vectors

        vectors = Vectors(self._settings.redis)
        self._keep_sharing(vectors)
        return vectors

    def _models(self) -> Mapping[str, Model]:
        return self._feed.current.models if self._feed.current is not None else {}

    async def _serve(self, listening: socket.socket) -> None:
        await self._server.start(listening)
        log.info("serving", extra={"address": "{}:{}".format(*listening.getsockname()[:2]), "journal": self._journal.incarnation})

    def _say_ready(self) -> None:
        if self._ready_fd is not None:
            if self._state() == READY:
                os.write(self._ready_fd, READY.encode())
            os.close(self._ready_fd)

    def _stop(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._stopping.set()

    async def _until_ready(self) -> None:
        """Until a request would be served here as well as anywhere; or until told to end."""
        while self._state() != READY and not self._stopping.is_set():  # noqa: ASYNC110 - no hot path
            await asyncio.sleep(0.02)

    def _state(self) -> str:
        if self._server.draining:
            return "draining"
        if self._feed.current is None:
            return "no snapshot yet"
        if self._journal.full:
            return "journal full"
        return READY

    async def _drain(self) -> None:
        """Not ready, no new connections; answers under way may finish, up to the grace time; then they fail visibly.

        Where another one has taken our place, a client may be sending a request just now on a connection that it kept: it is
        answered, and told that the connection closes. Where everything ends, what is idle is closed at once.
        """
        server, in_flight = self._server, self._pipeline.admission.in_flight
        server.drain(time.monotonic_ns())
        log.info("draining", extra={"in_flight": len(in_flight), "connections": len(server.connections)})
        deadline = time.monotonic() + self._settings.timeouts.drain
        while time.monotonic() < deadline:
            await asyncio.sleep(0.02)  # who was accepted a moment ago is known by then
            server.close_idle(time.monotonic_ns(), int(self._quiet_s * 1e9))
            if not (in_flight or server.unsent or (self._quiet_s and server.expectant)):
                break
        if in_flight:
            log.warning("grace time is over", extra={"in_flight": len(in_flight)})
            self._pipeline.interrupt_all(ShuttingDown("The proxy is shutting down."))
        server.dismiss()
        await asyncio.sleep(0)  # let the last writes reach their sockets

    def _close(self) -> None:
        self._beat()
        self._pipeline.relay.close()
        self._journal.close()
        if self._content is not None:
            self._content.close()
        self._heartbeat.close()

    async def _sweep_forever(self) -> None:
        """One coarse timer for everything that time does: timeouts, expiry, progress, the snapshot, the heartbeat."""
        while True:
            due = time.monotonic_ns() + int(SWEEP_S * 1e9)
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic_ns()
            self._loop_delay_ns = max(0, now - due)
            try:
                self._sweep(now)
            except Exception:
                log.exception("a bug in the sweep")

    def _sweep(self, now_ns: int) -> None:
        self._sweeps += 1
        set_wall_anchor()
        if self._feed.poll():
            self._pipeline.follow()
        self._pipeline.sweep(now_ns)
        if self._sweeps % PROGRESS_EVERY == 0:
            self._pipeline.record_progress()
            self._pipeline.learn()
            self._others.tend(leaving=self._server.draining)
        if self._sweeps % CONNECTIONS_EVERY == 0:
            self._server.sweep(now_ns)
            self._bound_content()
        self._beat()

    def _bound_content(self) -> None:
        """Content is dropped first: with the collector down it must not fill the disk."""
        if self._content is not None:
            kept = sum(_size(path) for path in self._settings.content_path.glob("*.seg"))
            self._pipeline.capturing = kept < CONTENT_BYTES

    def _beat(self) -> None:
        journal, snapshot, certificate = self._journal, self._feed.current, self._server.certificate
        segment, position = journal.position
        backends = {name: _backend_beat(standing) for name, standing in self._pipeline.router.standings.items()}
        self._heartbeat.write(
            Heartbeat(
                incarnation=journal.incarnation,
                worker=self._place,
                unix_ns=time.time_ns(),
                requests=self._pipeline.authenticator.accepted,
                in_flight=len(self._pipeline.admission.in_flight),
                in_flight_by_backend={name: beat.in_flight for name, beat in backends.items()},
                connections=len(self._server.connections),
                loop_delay_ns=self._loop_delay_ns,
                snapshot_unix_ns=snapshot.published_unix_ns if snapshot is not None else 0,
                segment=segment,
                segment_position=position,
                unrecorded=journal.unrecorded,
                journal_full=journal.full,
                draining=self._server.draining,
                unaccepted=self._pipeline.unaccepted,
                certificate_expiry_unix_s=certificate.expires_unix_s if certificate is not None else 0,
                tasks=len(asyncio.all_tasks()),
                reservations=self._pipeline.admission.reservations,
                redis="" if self._shared is None else "up" if self._shared.up else "down",
                redis_failures=0 if self._shared is None else self._shared.failures,
                waiting=self._pipeline.router.waiting,
                backends=backends,
                retries_denied=self._pipeline.relay.retries_denied,
                **_cache_beat(self._pipeline.cache, self._remote),
            )
        )


def _cache_beat(cache: Cache | None, remote: Remote | None) -> dict[str, Any]:
    if cache is None:
        return {}
    beat: dict[str, Any] = {
        "cache_entries": len(cache.memory),
        "cache_bytes": cache.memory.bytes,
        "cache_evictions": cache.memory.evictions,
        "cache_stored": cache.stored,
    }
    if remote is not None:
        beat |= {
            "cache_redis": "up" if remote.up else "down",
            "cache_redis_failures": remote.failures,
            "cache_dropped": remote.dropped,
        }
    return beat


def _backend_beat(standing: Standing) -> BackendBeat:
    health = standing.health
    return BackendBeat(
        state="drained" if standing.drained else health.state.label,
        reason=health.reason,
        in_flight=standing.in_flight,
        tokens=standing.tokens,
        prefilling=standing.prefilling,
        part=standing.part,
        ejections=standing.ejections,
        probes=standing.probes,
        failed_probes=standing.failed_probes,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # the collector was quicker


async def _keep_sharing(shared: Shared | Remote | Vectors) -> None:
    """While it doesn't run, everybody is by himself."""
    while True:
        try:
            await shared.run()
        except Exception:
            log.exception("a bug in what is shared through Redis")
            await asyncio.sleep(1.0)


async def _serve(settings: Settings, given: argparse.Namespace) -> None:
    listening = socket.socket(fileno=given.fd)
    listening.setblocking(False)
    await Worker(settings, given.ready_fd, takes_over=given.take_over, place=given.place).run(listening)


def _raise_file_limit() -> None:
    """A connection is a file descriptor; the soft limit, often 1,024, is meant for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="proxy.worker", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="effective settings, as the supervisor wrote them")
    parser.add_argument("--fd", type=int, required=True, help="an inherited listening socket")
    parser.add_argument("--place", type=int, default=0, help="which of this host's workers it is, from 0 on")
    parser.add_argument("--ready-fd", type=int, help="an inherited descriptor; say there that it is ready, once")
    parser.add_argument("--take-over", action="store_true", help="from another worker, who serves until then")
    arguments = parser.parse_args()
    logs.setup("worker")
    _raise_file_limit()
    # What a request leaves behind is freed by reference counts; what was imported needs no looking through.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    uvloop.run(_serve(Settings.read(arguments.settings), arguments))


if __name__ == "__main__":
    main()
