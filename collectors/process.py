"""The collector process: what runs in it, and how it stops.

A thread follows the journal for each sink, a thread sends traces, one takes old rows away (retention.py), one has the engines
asked for their load (engines/), a few serve `/metrics`; the main thread looks after the rest once a second: heartbeats, segments
that everybody has, captured content that has grown old.

Stopping, on SIGTERM (the workers have stopped before): every sink reads the journal to its end, saves its state, and the process
ends with 0. What a sink can't store within `DRAIN_SECONDS` waits in the journal.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from collectors.claim import claim, identity
from collectors.engines import EngineWatch
from collectors.exposition import Exposition
from collectors.records.captured import Captured
from collectors.records.follow import Follower
from collectors.records.ledger import LedgerSink
from collectors.records.metrics import View
from collectors.records.models import Models
from collectors.records.phoenix import SpansSink
from collectors.records.prometheus import Exposed, MetricsSink
from collectors.records.sinks import Sink
from collectors.retention import Retention
from proxy import __version__
from proxy.journal import Heartbeat, Tail, read_heartbeats, remove_heartbeat
from proxy.last_reload import LastReload
from proxy.settings import Settings, address
from proxy.spend.file import SpendFile, write_spend
from proxy.spend.periods import read_counted
from proxy.spend.reader import COLLECTOR_ID
from proxy.spend.windows import Period, periods_of

log = logging.getLogger(__name__)

CHORES_SECONDS = 1.0
DRAIN_SECONDS = 45.0
LAST_SECONDS = 1.0


def periods(settings: Settings) -> list[Period]:
    """Those for which somebody has a budget just now: the file's, and what control says of those in the database. Raises
    OSError."""
    counted = read_counted(settings.periods_path)
    return sorted({*periods_of(settings), *(() if counted is None else counted.periods)})


class Collector:
    """Everything in one process; `run` from the main thread."""

    def __init__(self, settings: Settings) -> None:
        """Raises InUse, OSError."""
        state = settings.state_path
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.journal_path.mkdir(mode=0o700, exist_ok=True)
        self._lock = claim(state)
        self._settings = settings
        self._tail = Tail(settings.journal_path)
        self._captured = Captured(settings.content_path)
        self._metrics = MetricsSink(state / "collector-metrics", settings.models)
        self._spans = self._make_spans(state)
        self._ledger = self._make_ledger(state)
        sinks: list[Sink] = [self._ledger, self._metrics, *([self._spans] if self._spans is not None else [])]
        self._followers = [Follower(self._tail, sink) for sink in sinks]
        self._retention = Retention(settings.database_url, settings.retention)
        self._engines = EngineWatch(settings.snapshot_path, settings.engines_path)
        self._beats: list[Heartbeat] = []
        self._last_reload: LastReload | None = None
        self._looking = threading.Lock()
        self._stop = threading.Event()
        registry = CollectorRegistry()
        registry.register(Exposed(self._metrics, self.look))
        ProcessCollector(registry=registry)
        self._exposition = Exposition(settings.metrics.listen, registry)

    def _make_spans(self, state: Path) -> SpansSink | None:
        settings = self._settings
        if settings.phoenix.url is None:
            return None
        return SpansSink(state / "collector-spans", settings.phoenix, Models(settings), self._captured)

    def _make_ledger(self, state: Path) -> LedgerSink:
        settings = self._settings
        if not (state / COLLECTOR_ID).exists() and not settings.spend_path.exists():
            write_spend(
                settings.spend_path, SpendFile(currency=settings.currency)
            )  # the journal is whole, and nothing is stored yet
        spend = settings.spend_path, lambda: periods(settings), settings.currency
        return LedgerSink(settings.database_url, identity(state), self._unstored, *spend)

    @property
    def _unstored(self) -> Path:
        return self._settings.state_path / "unstored"

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self._guard(self._load_counts)
        self._exposition.start()
        for follower in self._followers:
            follower.start()
        self._engines.start()
        host, _ = address(self._settings.metrics.listen)
        log.info(
            "collecting", extra={"metrics": f"{host}:{self._exposition.port}", "sinks": [f.sink.name for f in self._followers]}
        )
        while not self._stop.wait(CHORES_SECONDS):
            self._guard(self._chores)
        self._drain()

    def _load_counts(self) -> None:
        """Before the first scrape: a counter that begins at zero and then jumps would be counted anew."""
        self._metrics.load()
        if self._spans is not None:
            self._spans.load()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        """Also a second time: a service manager signals the whole group, the supervisor each of us. Who is impatient kills."""
        self._stop.set()

    def _drain(self) -> None:
        log.info("draining")
        self._guard(self._look_at_workers)
        deadline = time.monotonic() + DRAIN_SECONDS
        for follower in self._followers:
            follower.stop(deadline)
        self._retention.stop(LAST_SECONDS)
        self._engines.stop(LAST_SECONDS)
        waiting = list(self._followers)
        while waiting and time.monotonic() < deadline + LAST_SECONDS:
            waiting = [follower for follower in waiting if not follower.join(0.05)]
        for follower in waiting:
            log.error("sink did not end in time", extra={"sink": follower.sink.name})
        self._guard(self._chores)
        self._guard(self._metrics.save)
        self._exposition.close()
        log.info("ended")

    # -- once a second --

    def _guard(self, chore: Callable[[], None]) -> None:
        try:
            chore()
        except OSError as error:
            log.error("a chore failed", extra={"error": str(error)})
        except Exception:
            log.exception("a bug in a chore")

    def _chores(self) -> None:
        self._look_at_workers()
        self._remove_what_is_stored()
        self._captured.tidy(time.time())
        if self._ledger.stored is not None:  # the database is there, and up to date
            self._retention.start()

    def _look_at_workers(self) -> None:
        with self._looking:  # an older look must not be counted after a newer one
            self._beats = read_heartbeats(self._settings.journal_path)
            self._metrics.observe_workers(self._beats)

    def _remove_what_is_stored(self) -> None:
        stored = [follower.sink.stored for follower in self._followers]
        known = [checkpoint for checkpoint in stored if checkpoint is not None]
        if len(known) == len(stored):
            self._tail.remove(known)
        gone = [beat for beat in self._beats if not beat.alive]
        if gone:
            self._metrics.save()  # what they said last is counted for good
            needed = {name.incarnation for name in self._tail.segments()}
            for beat in gone:
                if beat.incarnation not in needed:
                    remove_heartbeat(self._settings.journal_path, beat.incarnation)

    # -- for a scrape --

    def _look_at_last_reload(self) -> None:
        path = self._settings.last_reload_path
        self._last_reload = LastReload.read(path) if path.exists() else None

    def look(self) -> View:
        self._guard(self._look_at_workers)
        self._guard(self._look_at_last_reload)
        beats = self._beats
        written = {beat.incarnation: (beat.segment, beat.segment_position) for beat in beats}
        now = time.monotonic()
        return View(
            now_unix_ns=time.time_ns(),
            version=__version__,
            backends=[self._settings.backend_name(index) for index in range(len(self._settings.backends))],
            workers=beats,
            sinks=[follower.view(written, now) for follower in self._followers],
            spans=self._spans.counts() if self._spans is not None else None,
            damaged_segments=len(self._tail.damaged()),
            set_aside_records=sum(1 for _ in self._unstored.glob("*.record")),
            last_reload=self._last_reload,
            retention=self._retention.view(),
            engines=self._engines.view(),
        )
