"""The metrics' sink: counts records, and tells prometheus_client.

Counts and position are one state, saved in one file, so that a restart neither forgets nor counts twice. A scrape saves first:
what Prometheus has seen is on disk, so no counter ever goes back, whenever this process is killed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as ExposedExemplar
from prometheus_client.utils import floatToGoString

from collectors.records.metrics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    NANO,
    WORKER_COUNTERS,
    Counter,
    Histogram,
    Labeller,
    View,
    WorkerCounter,
)
from collectors.records.series import Exemplar, LabelBounds, Series
from collectors.records.state import read_state, write_state
from proxy.journal import Batch, Checkpoint, Heartbeat

log = logging.getLogger(__name__)

SAVE_EVERY = 1.0
SAVE_SHARE = 0.05
"""At most this part of the time goes into saving, however large the state grows."""


class SavedSeries(msgspec.Struct, array_like=True):
    labels: list[str]
    bounds: list[int]
    rows: list[tuple[list[str], list[int]]]


class SavedMetrics(msgspec.Struct, array_like=True):
    """The file. `workers`: incarnation → metric → labels and the total that was counted of that worker."""

    checkpoint: Checkpoint = msgspec.field(default_factory=Checkpoint)
    series: dict[str, SavedSeries] = {}
    values: dict[str, list[str]] = {}
    workers: dict[str, dict[str, list[tuple[list[str], int]]]] = {}


class MetricsSink:
    """Its lock makes counts and position change together; the exposition takes it too."""

    name = "metrics"
    failures: tuple[type[Exception], ...] = (OSError,)
    up = True

    def __init__(self, path: Path, models: Iterable[str] = ()) -> None:
        self._path = path
        self._models = list(models)
        self._lock = threading.RLock()
        self._bounds = LabelBounds()
        self._labeller = Labeller(self._bounds, self._models)
        self._series: dict[str, Series] = {
            **{row.name: Series(row.labels) for row in COUNTERS},
            **{row.name: Series(row.labels) for row in WORKER_COUNTERS},
            **{row.name: Series(row.labels, row.bounds) for row in HISTOGRAMS},
        }
        self._writes = [
            *((row.write, self._series[row.name]) for row in COUNTERS),
            *((row.write, self._series[row.name]) for row in HISTOGRAMS),
        ]
        self._workers: dict[str, dict[str, dict[tuple[str, ...], int]]] = {}
        self._position: Checkpoint | None = None
        self._stored: Checkpoint | None = None
        self._dirty = False
        self._save_after = 0.0

    @property
    def stored(self) -> Checkpoint | None:
        return self._stored

    # -- a sink --

    def load(self) -> Checkpoint:
        with self._lock:
            if self._position is None:
                saved = read_state(self._path, SavedMetrics) or SavedMetrics()
                self._restore(saved)
                self._position = self._stored = saved.checkpoint
            return self._position

    def write(self, batch: Batch) -> None:
        with self._lock:
            for record in batch.records:
                seen = self._labeller.see(record)
                for write, series in self._writes:
                    write(seen, series)
            self._position = batch.checkpoint
            self._dirty = True

    def tend(self) -> None:
        if self._dirty and time.monotonic() >= self._save_after:
            self.save()

    def close(self, seconds: float) -> None:
        self.save()

    def save(self) -> None:
        """Raises OSError."""
        with self._lock:
            if not self._dirty or self._position is None:
                return
            began = time.monotonic()
            write_state(self._path, self._saved(self._position))
            self._dirty = False
            self._stored = self._position
            took = time.monotonic() - began
            self._save_after = began + max(SAVE_EVERY, took / SAVE_SHARE)

    # -- workers --

    def observe_workers(self, beats: list[Heartbeat]) -> None:
        """Count what has come since the last look; forget the workers whose heartbeats have gone."""
        with self._lock:
            if self._position is None:
                return  # before the state is loaded a total would be counted twice
            self._workers = {beat.incarnation: self._workers.get(beat.incarnation, {}) for beat in beats}
            for beat in beats:
                for row in WORKER_COUNTERS:
                    counted = self._workers[beat.incarnation].setdefault(row.name, {})
                    for labels, total in row.read(beat).items():
                        self._count(row.name, row.labels, labels, total - counted.get(labels, 0))
                        counted[labels] = max(total, counted.get(labels, 0))

    def _count(self, metric: str, names: tuple[str, ...], values: tuple[str, ...], more: int) -> None:
        if more > 0:
            labels = tuple(self._bounds.bound(name, value) for name, value in zip(names, values, strict=True))
            self._series[metric].add(labels, more)
            self._dirty = True

    # -- the file --

    def _saved(self, position: Checkpoint) -> SavedMetrics:
        return SavedMetrics(
            position,
            {name: SavedSeries(list(series.names), list(series.bounds), series.saved()) for name, series in self._series.items()},
            self._bounds.saved(),
            {
                incarnation: {
                    name: [(list(labels), total) for labels, total in counted.items()] for name, counted in names.items()
                }
                for incarnation, names in self._workers.items()
            },
        )

    def _restore(self, saved: SavedMetrics) -> None:
        self._bounds.restore(saved.values)
        self._labeller = Labeller(self._bounds, self._models)
        for name, kept in saved.series.items():
            series = self._series.get(name)
            if series is None or series.names != tuple(kept.labels) or series.bounds != tuple(kept.bounds):
                log.warning("a metric has changed its shape; it begins at zero", extra={"metric": name})
                continue
            series.restore(kept.rows)
        self._workers = {
            incarnation: {name: {tuple(labels): total for labels, total in rows} for name, rows in names.items()}
            for incarnation, names in saved.workers.items()
        }

    # -- for the exposition --

    def snapshot(self) -> dict[str, Series]:
        """A copy of what is on disk. Raises OSError if that isn't known: counts that begin at zero would be believed."""
        with self._lock:
            self.load()
            try:
                self.save()
            except OSError as error:
                log.error("metrics not saved", extra={"error": str(error)})
            return {name: series.copy() for name, series in self._series.items()}


class Exposed(Collector):
    """What prometheus_client asks at every scrape."""

    def __init__(self, sink: MetricsSink, look: Callable[[], View]) -> None:
        self._sink = sink
        self._look = look

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        view = self._look()
        series = self._sink.snapshot()
        for counter in COUNTERS:
            yield _counter(counter, series[counter.name])
        for worker_counter in WORKER_COUNTERS:
            yield _counter(worker_counter, series[worker_counter.name])
        for histogram in HISTOGRAMS:
            yield _histogram(histogram, series[histogram.name])
        for gauge in GAUGES:
            kind = CounterMetricFamily if gauge.counter else GaugeMetricFamily
            now = kind(gauge.name, gauge.help, labels=gauge.labels)
            for labels, value in gauge.read(view):
                now.add_metric(labels, value)
            yield now


def _counter(row: Counter | WorkerCounter, series: Series) -> Metric:
    family = CounterMetricFamily(row.name, row.help, labels=row.labels)
    rows = series.rows if row.labels else {(): [0], **series.rows}
    for labels, (total,) in rows.items():
        family.add_metric(labels, total / row.unit)
    return family


def _histogram(row: Histogram, series: Series) -> Metric:
    family = HistogramMetricFamily(row.name, row.help, labels=row.labels)
    for labels, counts in series.rows.items():
        exemplars = series.exemplars.get(labels, {})
        running = 0
        buckets: list[tuple[str, float] | tuple[str, float, ExposedExemplar]] = []
        for index, bound in enumerate((*row.bounds, math.inf)):
            running += counts[index]
            le = str(floatToGoString(bound / row.unit))  # type: ignore[no-untyped-call]
            exemplar = exemplars.get(index)
            buckets.append((le, running, _exposed(exemplar, row.unit)) if exemplar else (le, running))
        family.add_metric(labels, buckets, counts[-1] / row.unit)
    return family


def _exposed(exemplar: Exemplar, unit: int) -> ExposedExemplar:
    return ExposedExemplar({"trace_id": exemplar.trace_id.hex()}, exemplar.value / unit, exemplar.unix_ns / NANO)
