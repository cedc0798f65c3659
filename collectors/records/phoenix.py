"""The spans' sink: a bounded queue of traces, and a thread that sends them to Phoenix (or any OTLP/HTTP receiver).

Telemetry may be lost, but never in silence and never at anybody else's cost: the queue holds so many traces; when more come the
oldest go, counted. The position that is stored is that of the oldest trace still waiting, so a restart sends again rather than
forgets; ids are the record's, and what Phoenix has already it leaves as it is.

Records wait, not spans: what is dropped was never built. Prices are in Phoenix before the first trace of a model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import msgspec
import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from collectors.records.captured import Captured
from collectors.records.metrics import SpanCounts
from collectors.records.phoenix_http import Wire, authorization, base_url
from collectors.records.phoenix_prices import POLL_SECONDS, PhoenixPrices, PricesRefused
from collectors.records.spans import count_spans, is_sampled, resource, spans_of
from collectors.records.state import read_state, write_state
from proxy.exchange import Record
from proxy.journal import Batch, Checkpoint
from proxy.nouns import ModelSettings
from proxy.settings import PhoenixSettings

log = logging.getLogger(__name__)

MAX_TRACES = 2000
MAX_SPANS_PER_EXPORT = 64
MAX_MARKS = 64
SAVE_EVERY = 1.0
FLUSH_SECONDS = 5.0
MAX_SPANS_PER_SECOND = 500
"""Phoenix accepts at once and stores later, about a hundred spans a second on SQLite: sending all we can would only fill its
memory and use up the host's cores. Four times what it stores leaves room for better machines."""

MAX_EXPORT_BYTES = 4 * 1024 * 1024
"""Of spans in one request, unless a single trace is larger: the limit of OTLP receivers over gRPC, and a sensible one for any."""

EXPORT_TIMEOUT = 10.0
FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0


# -- the queue: pure --


class Waiting(NamedTuple):
    number: int
    record: Record


class TraceQueue:
    """Traces that wait, in order, and the positions that they hold back. Not thread-safe.

    Every record gets a number; a position is passed when all that came before it has been sent or dropped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Waiting] = deque()
        self._taken: list[Waiting] = []
        self._numbers = 0
        self._marks: deque[tuple[int, Checkpoint]] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._taken)

    def put(self, records: Sequence[Record], position: Checkpoint) -> list[Record]:
        """→ those that had to make room."""
        for record in records:
            self._numbers += 1
            self._waiting.append(Waiting(self._numbers, record))
        if len(self._marks) >= MAX_MARKS:
            self._marks.pop()  # a coarser position will do
        self._marks.append((self._numbers, position))
        return self._make_room()

    def take(self, spans: int) -> list[Record]:
        """The oldest traces, about `spans` spans of them and at least one; they stay ours until `settle` or `give_back`."""
        while (self._waiting and not self._taken) or self._fits(spans):
            self._taken.append(self._waiting.popleft())
        return [waiting.record for waiting in self._taken]

    def _fits(self, spans: int) -> bool:
        if not self._waiting:
            return False
        return sum(count_spans(waiting.record) for waiting in (*self._taken, self._waiting[0])) <= spans

    def settle(self) -> None:
        """What was taken is done with."""
        self._taken = []

    def give_back(self, keep: int = 0) -> list[Record]:
        """What was taken, but for the first `keep`, waits again → those that have to make room."""
        self._waiting.extendleft(reversed(self._taken[keep:]))
        del self._taken[keep:]
        return self._make_room()

    def _make_room(self) -> list[Record]:
        return [self._waiting.popleft().record for _ in range(max(0, len(self) - self._limit)) if self._waiting]

    def passed(self) -> Checkpoint | None:
        """The newest position that nothing waits before; None if that hasn't moved."""
        oldest = self._taken or self._waiting
        low = oldest[0].number if oldest else self._numbers + 1
        passed = None
        while self._marks and self._marks[0][0] < low:
            passed = self._marks.popleft()[1]
        return passed


def _spans(records: Iterable[Record]) -> int:
    return sum(map(count_spans, records))


# -- the wire --


class _Sent(Enum):
    TAKEN = auto()
    NOT_NOW = auto()
    """Phoenix is down, slow, full or shut to us: later."""
    NEVER = auto()
    """The same bytes would be refused again."""


_REFUSALS = frozenset({400, 413, 422})


class Exporter:
    """Spans to one OTLP/HTTP endpoint."""

    def __init__(self, settings: PhoenixSettings, wire: Wire) -> None:
        self.wire = wire
        self.rejected = 0
        """Of the spans that were taken last, those that the receiver says it will not keep."""
        self._resource = resource(settings.project)
        self._otlp = OTLPSpanExporter(endpoint=f"{base_url(settings)}/v1/traces", timeout=EXPORT_TIMEOUT, session=wire)

    def build(self, record: Record, captured: Captured | None) -> list[ReadableSpan]:
        content = captured.find(record.id) if captured is not None else None
        return spans_of(record, content, self._resource)

    def send(self, spans: Sequence[ReadableSpan]) -> _Sent:
        self.wire.forget()
        if self._otlp.export(spans) is SpanExportResult.SUCCESS:
            rejected = self.wire.rejected_spans()
            self.rejected = rejected or 0
            return _Sent.TAKEN if rejected is not None else _Sent.NOT_NOW
        refused = self.wire.status in _REFUSALS or self.wire.status is None  # None: it couldn't even be encoded
        return _Sent.NEVER if refused else _Sent.NOT_NOW

    def close(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]


def _size(span: ReadableSpan) -> int:
    """About how many bytes it is on the wire."""
    return sum(_FIELD_BYTES + len(str(value).encode(errors="replace")) for value in (span.attributes or {}).values())


_FIELD_BYTES = 64


# -- the sink --


class SavedSpans(msgspec.Struct, array_like=True):
    """The file."""

    checkpoint: Checkpoint = msgspec.field(default_factory=Checkpoint)
    exported: int = 0
    dropped: dict[str, int] = {}


class SpansSink:
    """`write` only queues, so it never fails and never waits."""

    name = "spans"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(
        self,
        path: Path,
        settings: PhoenixSettings,
        models: Callable[[], Mapping[str, ModelSettings]],
        captured: Captured | None = None,
        limit: int = MAX_TRACES,
        hold_seconds: float = POLL_SECONDS,
    ) -> None:
        wire = Wire(authorization(settings))
        self.up = True
        self._path = path
        self._captured = captured
        self._exporter = Exporter(settings, wire)
        self._models = models
        self._prices = PhoenixPrices(base_url(settings), wire, models)
        self._priced: set[str] | None = None
        """Models whose prices Phoenix has; None: not asked yet, or perhaps another Phoenix since."""
        self._priced_as: Mapping[str, ModelSettings] = {}
        """What models cost when Phoenix was told."""
        self._hold_seconds = hold_seconds
        self._hold_until = 0.0
        self._paced_until = 0.0
        self._delay = 0.0
        self._shut = False
        """It took no spans the last time: that its price table answers doesn't make it up."""
        self._condition = threading.Condition()
        self._queue = TraceQueue(limit)
        self._saved = SavedSpans()
        self._loaded = False
        self._dirty = False
        self._save_after = 0.0
        self._stored: Checkpoint | None = None
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="spans export", daemon=True)

    @property
    def stored(self) -> Checkpoint | None:
        return self._stored

    def counts(self) -> SpanCounts:
        with self._condition:
            return SpanCounts(self._saved.exported, dict(self._saved.dropped), len(self._queue))

    # -- a sink --

    def load(self) -> Checkpoint:
        if not self._loaded:
            self._saved = read_state(self._path, SavedSpans) or SavedSpans()
            self._stored = self._saved.checkpoint
            self._loaded = True
            self._thread.start()
        return self._saved.checkpoint

    def write(self, batch: Batch) -> None:
        with self._condition:
            sampled = [record for record in batch.records if is_sampled(record)]
            if len(sampled) < len(batch.records):
                self._drop("unsampled", _spans(record for record in batch.records if not is_sampled(record)))
            self._drop("full", _spans(self._queue.put(sampled, batch.checkpoint)))
            self._pass()
            self._condition.notify()

    def tend(self) -> None:
        if self._dirty and time.monotonic() >= self._save_after:
            self._save()

    def close(self, seconds: float) -> None:
        with self._condition:
            self._deadline = time.monotonic() + min(seconds, FLUSH_SECONDS)
            self._condition.notify()
        self._thread.join(max(0.0, min(seconds, FLUSH_SECONDS)))
        self._exporter.close()
        if left := self.counts().waiting:
            log.warning("traces not sent; they will be tried again at the next start", extra={"traces": left})
        self._save()

    def _save(self) -> None:
        with self._condition:
            saved = msgspec.structs.replace(self._saved, dropped=dict(self._saved.dropped))
            self._dirty = False
        self._save_after = time.monotonic() + SAVE_EVERY
        try:
            write_state(self._path, saved)
        except OSError:
            self._dirty = True
            raise
        self._stored = saved.checkpoint

    # -- under the lock --

    def _drop(self, reason: str, spans: int) -> None:
        if spans:
            self._saved.dropped[reason] = self._saved.dropped.get(reason, 0) + spans
            self._dirty = True

    def _pass(self) -> None:
        if (position := self._queue.passed()) is not None:
            self._saved.checkpoint = position
            self._dirty = True

    # -- the thread --

    def _run(self) -> None:
        while not self._is_over():
            try:
                wait = self._turn()
            except Exception:
                log.exception("a bug kept traces from being sent")
                wait = LONGEST_DELAY
            if wait:
                self._rest(wait)

    def _is_over(self) -> bool:
        """After `close`: sent, given up, or out of time."""
        if self._deadline is None:
            return False
        return not len(self._queue) or not self.up or time.monotonic() >= self._deadline

    def _rest(self, seconds: float) -> None:
        """Wait; work that comes in ends the wait unless the wait is one for Phoenix."""
        with self._condition:
            until = time.monotonic() + seconds
            idle = self.up and time.monotonic() >= max(self._hold_until, self._paced_until)
            while (left := min(until, self._deadline or until) - time.monotonic()) > 0:
                if self._is_over() or (idle and len(self._queue)):
                    return
                self._condition.wait(left)

    def _turn(self) -> float:
        """One export, or what must precede it → seconds to wait."""
        if self._priced is None and not self._sync(set()):
            return self._later()
        paced_until = self._paced_until if self._deadline is None else 0.0
        if (left := max(self._hold_until, paced_until) - time.monotonic()) > 0:
            return left
        with self._condition:
            records = self._queue.take(MAX_SPANS_PER_EXPORT)
        if not records:
            return LONGEST_DELAY
        if not self._sync({record.model for record in records if record.attempts}):
            self._give_back()
            return self._later()
        if self._hold_until > time.monotonic():
            self._give_back()
            return 0.0
        return self._export(records)

    def _export(self, records: list[Record]) -> float:
        spans, records = self._load(records)
        sent = self._exporter.send(spans) if spans else _Sent.TAKEN
        if sent is _Sent.NEVER and len(records) > 1:
            sent = self._one_by_one(records)
        elif sent is _Sent.NEVER:
            self._refused(records)
        elif sent is _Sent.TAKEN:
            self._count(len(spans))
        self._shut = sent is _Sent.NOT_NOW
        if self._shut:
            self._give_back()
            return self._later()
        with self._condition:
            self._queue.settle()
            self._pass()
        self._reached()
        self._paced_until = time.monotonic() + len(spans) / MAX_SPANS_PER_SECOND
        return 0.0

    def _load(self, records: list[Record]) -> tuple[list[ReadableSpan], list[Record]]:
        """As many traces as go into one request → their spans, and they; the others wait again."""
        spans: list[ReadableSpan] = []
        size = 0
        for number, record in enumerate(records):
            built = self._build(record)
            size += sum(map(_size, built))
            if spans and size > MAX_EXPORT_BYTES:
                self._give_back(number)
                return spans, records[:number]
            spans += built
        return spans, records

    def _one_by_one(self, records: list[Record]) -> _Sent:
        """One trace that is refused must not take its neighbours with it."""
        for record in records:
            spans = self._build(record)
            sent = self._exporter.send(spans) if spans else _Sent.TAKEN
            if sent is _Sent.NOT_NOW:
                return sent  # those that went already go again, and are the same spans
            if sent is _Sent.NEVER:
                self._refused([record])
            else:
                self._count(len(spans))
        return _Sent.TAKEN

    def _build(self, record: Record) -> list[ReadableSpan]:
        try:
            return self._exporter.build(record, self._captured)
        except Exception:
            log.exception("a bug kept a trace from being built", extra={"request_id": record.hex_id})
            self._refused([record])
            return []

    def _sync(self, models: set[str]) -> bool:
        """See to the prices of `models`; False if Phoenix can't be reached."""
        wanted = self._models()
        if self._priced is not None and models <= self._priced and wanted == self._priced_as:
            return True
        try:
            if self._prices.sync(models | (self._priced or set())):
                self._hold_until = time.monotonic() + self._hold_seconds
        except PricesRefused as error:
            log.warning("no prices in Phoenix; its costs will not be the ledger's", extra={"error": str(error)})
        except requests.RequestException:
            return False
        self._priced, self._priced_as = models | (self._priced or set()), wanted
        if not self._shut:
            self._reached()
        return True

    def _give_back(self, keep: int = 0) -> None:
        with self._condition:
            self._drop("full", _spans(self._queue.give_back(keep)))
            self._pass()

    def _count(self, spans: int) -> None:
        with self._condition:
            self._saved.exported += spans - self._exporter.rejected
            self._drop("refused", self._exporter.rejected)
            self._dirty = True

    def _refused(self, records: Sequence[Record]) -> None:
        with self._condition:
            self._drop("refused", _spans(records))
        ids = [record.hex_id for record in records]
        log.error("a trace was refused", extra={"request_ids": ids, "error": self._exporter.wire.said})

    def _later(self) -> float:
        if self.up:
            log.error("Phoenix down; traces wait, the oldest go first", extra={"error": self._exporter.wire.said})
        self.up = False
        self._priced = None  # what comes back may be another Phoenix
        self._delay = min(LONGEST_DELAY, self._delay * 2 or FIRST_DELAY)
        return self._delay

    def _reached(self) -> None:
        if not self.up:
            log.info("Phoenix up again")
        self.up = True
        self._delay = 0.0
