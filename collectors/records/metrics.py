"""Every metric, as data: to add one, add a row. `collectors/README.md` shows the table; a test keeps it today's.

Three kinds of rows, by where their values come from:

- `COUNTERS`, `HISTOGRAMS`: from records. They are kept with the sink's position in the journal and survive restarts.
- `WORKER_COUNTERS`: from what a worker says of itself (its heartbeat), as totals of its incarnation; kept in the same way.
- `GAUGES`: how things are now; nothing is kept.

Names follow Prometheus' conventions: base units, `_total` for counters. A row's `write` gets plain integers; `unit` says how many
of them make one of the exposed unit. Labels never hold a request, a session or a person, and are bounded (series.py).
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple

from collectors.records.series import OTHER, LabelBounds, Series
from proxy.engines import EngineLoad
from proxy.errors import Outcome
from proxy.exchange import INTER_TOKEN_BOUNDS_NS, Attempt, EngineTimings, Record
from proxy.journal import BackendBeat, Heartbeat
from proxy.last_reload import LastReload

NANO = 1_000_000_000


def _ns(*seconds: float) -> tuple[int, ...]:
    return tuple(round(value * NANO) for value in seconds)


FIRST_TOKEN_BOUNDS = _ns(
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
    *(0.6, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""A superset of vLLM's for `vllm:time_to_first_token_seconds` (so the two can be laid over each other), no step above 1.5x from
10 ms to 1 s."""

DURATION_BOUNDS = _ns(
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
    *(0.6, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)

ADDED_BOUNDS = _ns(
    *(0.00005, 0.000075, 0.0001, 0.00015, 0.0002, 0.0003, 0.0004, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

WAIT_BOUNDS = _ns(
    *(0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 60.0, 120.0, 300.0, 600.0),
)
"""0: most don't wait at all, and a quantile shall say so."""

CONNECT_BOUNDS = _ns(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

LOOKUP_BOUNDS = _ns(
    *(0.000025, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15),
    *(0.25, 0.5, 1.0, 2.5),
)

AGE_BOUNDS = _ns(
    *(1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21_600.0, 43_200.0, 86_400.0, 172_800.0, 604_800.0, 2_592_000.0)
)

ENGINE_BOUNDS = _ns(0.0005, 0.001, 0.0025, 0.005, *(bound / NANO for bound in FIRST_TOKEN_BOUNDS if bound >= NANO // 100))


# -- what a row is --


class Seen(NamedTuple):
    """A record and its labels, bounded once for all rows."""

    record: Record
    bounds: LabelBounds
    operation: str
    model: str
    backend: str
    key: str
    outcome: str


class Counter(NamedTuple):
    name: str
    help: str
    labels: tuple[str, ...]
    write: Callable[[Seen, Series], None]
    unit: int = 1


class Histogram(NamedTuple):
    name: str
    help: str
    labels: tuple[str, ...]
    bounds: tuple[int, ...]
    write: Callable[[Seen, Series], None]
    unit: int = NANO


class WorkerCounter(NamedTuple):
    """`read`: a heartbeat → labels → the total since that worker began."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Heartbeat], dict[tuple[str, ...], int]]
    unit: int = 1


class SinkView(NamedTuple):
    """How a sink does, for its gauges. `lag_bytes` is None while that can't be told."""

    name: str
    up: bool
    lag_bytes: int
    lag_seconds: float


class SpanCounts(NamedTuple):
    """Totals of the spans' sink, and the traces that wait now."""

    exported: int = 0
    dropped: Mapping[str, int] = MappingProxyType({})
    waiting: int = 0


class RetentionView(NamedTuple):
    """Rows that were taken away since this process began, by what they were; days of requests that should be gone by now."""

    removed: Mapping[str, int]
    overdue_days: int


class EngineView(NamedTuple):
    """What an engine says of its load now, None if it doesn't. `computed`: what it has computed since this process first heard of
    it; `scrapes`: how often it was asked, by how that ended."""

    backend: str
    load: EngineLoad | None
    computed: Mapping[str, int]
    scrapes: Mapping[str, int]


class View(NamedTuple):
    """What is known now. `backends`: those of the settings, so that an idle one shows 0."""

    now_unix_ns: int
    version: str
    backends: Sequence[str] = ()
    workers: Sequence[Heartbeat] = ()
    sinks: Sequence[SinkView] = ()
    spans: SpanCounts | None = None
    damaged_segments: int = 0
    set_aside_records: int = 0
    last_reload: LastReload | None = None
    """None: nobody supervises this collector."""
    retention: RetentionView | None = None
    """None: everything is kept."""
    engines: Sequence[EngineView] = ()

    @property
    def living(self) -> list[Heartbeat]:
        return [beat for beat in self.workers if beat.alive]


Samples = Iterable[tuple[tuple[str, ...], float]]


class Gauge(NamedTuple):
    """`counter`: it only goes up, and is exposed as a counter."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[View], Samples]
    counter: bool = False


# -- from records --


class Labeller:
    """Record → Seen. A model's name is a label once a request for it was routed, or the cache was asked for it (or the settings
    name it): before that it is whatever a caller wrote."""

    def __init__(self, bounds: LabelBounds, models: Iterable[str] = ()) -> None:
        self._bounds = bounds
        for model in models:
            bounds.bound("model", model)

    def see(self, record: Record) -> Seen:
        bound = self._bounds.bound
        model = record.model or "none"
        known = record.attempts or record.queued_ns or record.cache or model == "none" or self._bounds.knows("model", model)
        return Seen(
            record,
            self._bounds,
            bound("operation", record.operation or "none"),
            bound("model", model) if known else OTHER,
            bound("backend", record.backend or "none"),
            bound("key", record.key_name or record.key_id or "none"),
            _OUTCOMES.get(record.outcome, OTHER),
        )


_OUTCOMES = {outcome.value: outcome.label for outcome in Outcome}
_STATUSES = {status: str(status) for status in range(100, 600)}
_SUCCESSES = frozenset({Outcome.OK, Outcome.CACHED, Outcome.COALESCED})

FROM_CACHE = ("hit", "coalesced")
"""What `Record.cache` says of an answer that no engine gave for this request: of engines its times say nothing."""

SYSTEM_KEY = "system"
"""Id and name of the key to which is booked what the proxy asks of its own accord: probes of backends that may be broken."""


def _requests(seen: Seen, series: Series) -> None:
    status = _STATUSES.get(seen.record.status, "none")
    series.add((seen.operation, seen.model, seen.backend, seen.key, seen.outcome, status))


def _errors(seen: Seen, series: Series) -> None:
    if seen.record.outcome not in _SUCCESSES and seen.record.key_id != SYSTEM_KEY:
        series.add((seen.operation, seen.outcome, seen.bounds.bound("code", seen.record.error_code or "none")))


def _tokens(seen: Seen, series: Series) -> None:
    record, model, key = seen.record, seen.model, seen.key
    if record.input_tokens:
        series.add((model, key, "input"), record.input_tokens)
    if record.cached_tokens:
        series.add((model, key, "cached_input"), record.cached_tokens)
    if record.output_tokens:
        series.add((model, key, "output"), record.output_tokens)
    if record.reasoning_tokens:
        series.add((model, key, "reasoning"), record.reasoning_tokens)


def _audio(seen: Seen, series: Series) -> None:
    if seen.record.audio_seconds:
        series.add((seen.model, seen.key), seen.record.audio_seconds)


def _cost(seen: Seen, series: Series) -> None:
    if seen.record.cost_nano:
        series.add((seen.model, seen.key, seen.bounds.bound("currency", seen.record.currency or "none")), seen.record.cost_nano)


def _backend_tokens(seen: Seen, series: Series) -> None:
    record, model, backend = seen.record, seen.model, seen.backend
    if record.input_tokens:
        series.add((model, backend, "input"), record.input_tokens)
    if record.cached_tokens:
        series.add((model, backend, "cached_input"), record.cached_tokens)
    if record.output_tokens:
        series.add((model, backend, "output"), record.output_tokens)


def _team_tokens(seen: Seen, series: Series) -> None:
    record = seen.record
    team = seen.bounds.bound("team", record.team or "none")
    if record.input_tokens:
        series.add((team, "input"), record.input_tokens)
    if record.output_tokens:
        series.add((team, "output"), record.output_tokens)


def _team_cost(seen: Seen, series: Series) -> None:
    bound, record = seen.bounds.bound, seen.record
    if record.cost_nano:
        series.add((bound("team", record.team or "none"), bound("currency", record.currency or "none")), record.cost_nano)


def _limit_rejections(seen: Seen, series: Series) -> None:
    if seen.record.refused_by:
        level, _, limit = seen.record.refused_by.partition(".")
        series.add((seen.bounds.bound("level", level), seen.bounds.bound("limit", limit), seen.key))


def _over_budget(seen: Seen, series: Series) -> None:
    if seen.record.over_budget:
        series.add((seen.bounds.bound("level", seen.record.over_budget), seen.key))


def _usage_sources(seen: Seen, series: Series) -> None:
    if seen.record.attempts:
        series.add((seen.model, _SOURCES.get(seen.record.usage_source, OTHER)))


_SOURCES = {0: "none", 1: "engine", 2: "counted", 3: "estimated"}


def _attempts(seen: Seen, series: Series) -> None:
    bound = seen.bounds.bound
    for attempt in seen.record.attempts:
        series.add((bound("backend", attempt.backend), bound("result", attempt_result(attempt))))


def _retries(seen: Seen, series: Series) -> None:
    bound = seen.bounds.bound
    for attempt in seen.record.attempts[:-1]:
        series.add((bound("backend", attempt.backend), bound("result", attempt_result(attempt))))


def _decisions(seen: Seen, series: Series) -> None:
    if seen.record.routed_by:
        series.add((seen.model, seen.backend, seen.bounds.bound("reason", seen.record.routed_by)))


def _queued(seen: Seen, series: Series) -> None:
    if seen.record.queued_ns:
        series.add((seen.model,))


def _fallbacks(seen: Seen, series: Series) -> None:
    if seen.record.fallback_of:
        series.add((seen.model, seen.bounds.bound("model", seen.record.fallback_of)))


def _cache(seen: Seen, series: Series) -> None:
    if seen.record.cache:
        series.add((seen.model, seen.bounds.bound("result", seen.record.cache)))


def _similar(seen: Seen, series: Series) -> None:
    if seen.record.similarity is not None:
        series.add((seen.model,))


def _saved_tokens(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.saved_input_tokens:
        series.add((seen.model, "input"), record.saved_input_tokens)
    if record.saved_output_tokens:
        series.add((seen.model, "output"), record.saved_output_tokens)


def _saved_cost(seen: Seen, series: Series) -> None:
    if cost := seen.record.saved_cost_nano:
        series.add((seen.model, seen.bounds.bound("currency", seen.record.currency or "none")), cost)


def _saved_time(seen: Seen, series: Series) -> None:
    if seen.record.saved_ns:
        series.add((seen.model,), seen.record.saved_ns)


def attempt_result(attempt: Attempt) -> str:
    """How a try on a backend ended: `ok`, an error's code, or the HTTP status that came instead of an answer."""
    if attempt.error:
        return attempt.error
    if attempt.status >= 400:
        return f"http_{attempt.status}"
    return "ok" if attempt.ended_ns else "unfinished"


def _duration(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.outcome != Outcome.CRASHED:
        labels = (seen.operation, seen.model, seen.backend, "true" if record.stream else "false", seen.outcome)
        series.observe(labels, record.ended_ns, record.trace_id, record.received_unix_ns)


def _first_token(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.first_token_ns and record.cache not in FROM_CACHE:
        labels = (seen.operation, seen.model, seen.backend)
        series.observe(labels, record.first_token_ns, record.trace_id, record.received_unix_ns)


def _first_content(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.first_content_ns and record.cache not in FROM_CACHE:
        labels = (seen.operation, seen.model, seen.backend)
        series.observe(labels, record.first_content_ns, record.trace_id, record.received_unix_ns)


def _inter_token(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.inter_token_counts:
        series.merge((seen.model, seen.backend), record.inter_token_counts, record.inter_token_sum_ns)


def _added(seen: Seen, series: Series) -> None:
    if seen.record.sent_ns and seen.record.outcome != Outcome.CRASHED:
        series.observe((seen.operation,), seen.record.proxy_added_ns())


def _wait(seen: Seen, series: Series) -> None:
    record = seen.record
    if (record.queued_ns or record.routed_by) and record.outcome != Outcome.CRASHED:
        series.observe((seen.model,), record.wait_ns, record.trace_id, record.received_unix_ns)


def _connect(seen: Seen, series: Series) -> None:
    for attempt in seen.record.attempts:
        if attempt.connected_ns:
            series.observe((seen.bounds.bound("backend", attempt.backend),), attempt.connected_ns - attempt.started_ns)


def _cached_first_token(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.stream and record.cache in FROM_CACHE and (first := record.first_token_ns or _given(record)):
        series.observe((seen.model, record.cache), first, record.trace_id, record.received_unix_ns)


def _given(record: Record) -> int:
    """When an answer was there that had not to be waited for."""
    return record.looked_up_ns if record.cache == "hit" else 0


def _lookup(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.looked_up_ns:
        result = seen.bounds.bound("result", record.cache or "none")
        series.observe((result,), max(0, record.looked_up_ns - record.admitted_ns), record.trace_id, record.received_unix_ns)


def _age(seen: Seen, series: Series) -> None:
    record = seen.record
    if record.cache == "hit":
        series.observe((seen.model,), record.age_ns, record.trace_id, record.received_unix_ns)


def _engine(read: Callable[[EngineTimings], float | None]) -> Callable[[Seen, Series], None]:
    def write(seen: Seen, series: Series) -> None:
        if (engine := seen.record.engine) is not None and (milliseconds := read(engine)) is not None:
            series.observe((seen.model, seen.backend), round(milliseconds * 1e6))

    return write


COUNTERS: tuple[Counter, ...] = (
    Counter(
        "glasshouse_requests_total",
        "Accepted requests that have ended. status is what the client got; none: nothing.",
        ("operation", "model", "backend", "key", "outcome", "status"),
        _requests,
    ),
    Counter(
        "glasshouse_request_errors_total",
        "Accepted requests that did not end well, by error code; without the proxy's own probes (key: system).",
        ("operation", "outcome", "code"),
        _errors,
    ),
    Counter(
        "glasshouse_tokens_total",
        "Tokens of ended requests. cached_input is part of input, reasoning is part of output: add up input and output only.",
        ("model", "key", "kind"),
        _tokens,
    ),
    Counter(
        "glasshouse_audio_seconds_total",
        "Audio of ended requests that was transcribed or translated, in seconds, where the engine says how long it was.",
        ("model", "key"),
        _audio,
    ),
    Counter(
        "glasshouse_cost_total",
        "What ended requests cost, in units of the currency; exact inside to 1e-9.",
        ("model", "key", "currency"),
        _cost,
        unit=NANO,
    ),
    Counter(
        "glasshouse_team_tokens_total",
        "The same tokens by team; none: of keys in no team.",
        ("team", "kind"),
        _team_tokens,
    ),
    Counter(
        "glasshouse_team_cost_total",
        "The same costs by team; none: of keys in no team.",
        ("team", "currency"),
        _team_cost,
        unit=NANO,
    ),
    Counter(
        "glasshouse_limit_rejections_total",
        "Accepted requests that a limit or a budget refused, by whose it is (key, user, project, team, everyone) and which.",
        ("level", "limit", "key"),
        _limit_rejections,
    ),
    Counter(
        "glasshouse_over_soft_budget_requests_total",
        "Accepted requests that came when a soft budget was used up, by whose it is. They were served.",
        ("level", "key"),
        _over_budget,
    ),
    Counter(
        "glasshouse_requests_by_usage_source_total",
        "Dispatched requests, by where their token counts come from: the engine, counted or estimated by the proxy, none.",
        ("model", "source"),
        _usage_sources,
    ),
    Counter(
        "glasshouse_attempts_total",
        "Tries on backends: ok, the error's code, or http_<status>. Retries are attempts less dispatched requests.",
        ("backend", "result"),
        _attempts,
    ),
    Counter(
        "glasshouse_retries_total",
        "Tries that another one followed, by the backend that could not answer, and why.",
        ("backend", "result"),
        _retries,
    ),
    Counter(
        "glasshouse_routing_decisions_total",
        "Requests by the backend that was chosen last and what spoke for it: policy.why (auto.prefix); only: there was no other.",
        ("model", "backend", "reason"),
        _decisions,
    ),
    Counter(
        "glasshouse_queued_requests_total",
        "Requests that had to wait for a backend with room, whether they got one or not.",
        ("model",),
        _queued,
    ),
    Counter(
        "glasshouse_fallbacks_total",
        "Requests that went to another model, because none of the backends of the one that was asked for could answer.",
        ("model", "instead_of"),
        _fallbacks,
    ),
    Counter(
        "glasshouse_backend_tokens_total",
        "The tokens by backend. cached_input over input: how often a prompt's beginning was where it was sent.",
        ("model", "backend", "kind"),
        _backend_tokens,
    ),
    Counter(
        "glasshouse_cache_requests_total",
        "Requests by what the cache did: hit, it had the answer; coalesced, the request shared one that was under way; miss; "
        "bypass, it was not to be asked. Only where there is a cache.",
        ("model", "result"),
        _cache,
    ),
    Counter(
        "glasshouse_cache_semantic_hits_total",
        "Hits whose prompt was similar to the one that was answered, and not the same.",
        ("model",),
        _similar,
    ),
    Counter(
        "glasshouse_cache_saved_tokens_total",
        "Tokens that engines did not compute, because an answer was in the cache or under way. In no other count of tokens.",
        ("model", "kind"),
        _saved_tokens,
    ),
    Counter(
        "glasshouse_cache_saved_cost_total",
        "What these tokens would have cost, in units of the currency; exact inside to 1e-9.",
        ("model", "currency"),
        _saved_cost,
        unit=NANO,
    ),
    Counter(
        "glasshouse_cache_saved_seconds_total",
        "How much longer their original requests took, from the admission to the engine's last byte.",
        ("model",),
        _saved_time,
        unit=NANO,
    ),
)

HISTOGRAMS: tuple[Histogram, ...] = (
    Histogram(
        "glasshouse_request_duration_seconds",
        "From a request's first byte to the release of the answer's last. Crashed requests aren't in it: their end isn't known.",
        ("operation", "model", "backend", "stream", "outcome"),
        DURATION_BOUNDS,
        _duration,
    ),
    Histogram(
        "glasshouse_time_to_first_token_seconds",
        "From a request's first byte to the first token of its stream, thinking included, role frames not. Of streams that an "
        "engine was asked for; what the cache gave is apart.",
        ("operation", "model", "backend"),
        FIRST_TOKEN_BOUNDS,
        _first_token,
    ),
    Histogram(
        "glasshouse_time_to_first_content_seconds",
        "From a request's first byte to the first token that is answer rather than thinking; of the same streams.",
        ("operation", "model", "backend"),
        FIRST_TOKEN_BOUNDS,
        _first_content,
    ),
    Histogram(
        "glasshouse_inter_token_latency_seconds",
        "Each gap between a stream's tokens, so that a stall of one stream shows; not a mean per request.",
        ("model", "backend"),
        INTER_TOKEN_BOUNDS_NS,
        _inter_token,
    ),
    Histogram(
        "glasshouse_proxy_added_seconds",
        "What the proxy itself added to dispatched requests, before the engine's first byte and after its last.",
        ("operation",),
        ADDED_BOUNDS,
        _added,
    ),
    Histogram(
        "glasshouse_request_wait_seconds",
        "Waiting for a backend with room, before the first try. 0 of those that had not to; le=0 is how many these are.",
        ("model",),
        WAIT_BOUNDS,
        _wait,
    ),
    Histogram(
        "glasshouse_connect_seconds",
        "Opening a connection to a backend, for tries that found none kept alive.",
        ("backend",),
        CONNECT_BOUNDS,
        _connect,
    ),
    Histogram(
        "glasshouse_engine_queue_seconds",
        "Waiting in the engine's queue, as the engine says; only of engines that say.",
        ("model", "backend"),
        ENGINE_BOUNDS,
        _engine(lambda engine: engine.queue_ms),
    ),
    Histogram(
        "glasshouse_engine_prefill_seconds",
        "Reading the prompt, as the engine says; only of engines that say.",
        ("model", "backend"),
        ENGINE_BOUNDS,
        _engine(lambda engine: engine.prefill_ms),
    ),
    Histogram(
        "glasshouse_engine_decode_seconds",
        "Writing the answer, as the engine says; only of engines that say.",
        ("model", "backend"),
        ENGINE_BOUNDS,
        _engine(lambda engine: engine.decode_ms),
    ),
    Histogram(
        "glasshouse_cache_time_to_first_token_seconds",
        "The time to the first token of streams that the cache had (hit) or that shared an answer under way (coalesced).",
        ("model", "result"),
        FIRST_TOKEN_BOUNDS,
        _cached_first_token,
    ),
    Histogram(
        "glasshouse_cache_lookup_seconds",
        "From a request's admission to what the cache had to say.",
        ("result",),
        LOOKUP_BOUNDS,
        _lookup,
    ),
    Histogram(
        "glasshouse_cache_age_seconds",
        "How long ago the answers of hits were made.",
        ("model",),
        AGE_BOUNDS,
        _age,
    ),
)


# -- from heartbeats --

WORKER_COUNTERS: tuple[WorkerCounter, ...] = (
    WorkerCounter(
        "glasshouse_unaccepted_requests_total",
        "Requests that never were accepted (no valid key, unknown path, too large, ...), by error code. They have no record.",
        ("code",),
        lambda beat: {(code,): count for code, count in beat.unaccepted.items()},
    ),
    WorkerCounter(
        "glasshouse_unrecorded_total",
        "Records that could not be written because the journal was full: what the ledger does not know.",
        (),
        lambda beat: {(): beat.unrecorded},
    ),
    WorkerCounter(
        "glasshouse_worker_requests_total",
        "Requests that each worker accepted. Of one that was killed those of its last quarter of a second may be missing.",
        ("worker",),
        lambda beat: {(str(beat.worker),): beat.requests},
    ),
    WorkerCounter(
        "glasshouse_redis_failures_total",
        "Round trips to Redis that failed or took too long, by worker.",
        ("worker",),
        lambda beat: {(str(beat.worker),): beat.redis_failures},
    ),
    WorkerCounter(
        "glasshouse_backend_ejections_total",
        "How often workers put a backend out of service; each does so for itself.",
        ("backend",),
        lambda beat: {(name,): each.ejections for name, each in beat.backends.items()},
    ),
    WorkerCounter(
        "glasshouse_backend_probes_total",
        "Probes of backends that may be broken, of all workers.",
        ("backend",),
        lambda beat: {(name,): each.probes for name, each in beat.backends.items()},
    ),
    WorkerCounter(
        "glasshouse_backend_failed_probes_total",
        "Those of them that failed.",
        ("backend",),
        lambda beat: {(name,): each.failed_probes for name, each in beat.backends.items()},
    ),
    WorkerCounter(
        "glasshouse_retries_denied_total",
        "Answers with an engine's error that went out because enough others had been tried again already.",
        (),
        lambda beat: {(): beat.retries_denied},
    ),
    WorkerCounter(
        "glasshouse_cache_stored_total",
        "Answers that a worker kept for later, by worker.",
        ("worker",),
        lambda beat: {(str(beat.worker),): beat.cache_stored},
    ),
    WorkerCounter(
        "glasshouse_cache_evictions_total",
        "Answers that made room for others in a worker's memory, by worker.",
        ("worker",),
        lambda beat: {(str(beat.worker),): beat.cache_evictions},
    ),
    WorkerCounter(
        "glasshouse_cache_dropped_total",
        "Answers that did not get to Redis, because too many were on their way to it, by worker.",
        ("worker",),
        lambda beat: {(str(beat.worker),): beat.cache_dropped},
    ),
    WorkerCounter(
        "glasshouse_cache_redis_failures_total",
        "What the cache asked of Redis and got no answer to, or too late, by worker. Each is a miss at worst.",
        ("worker",),
        lambda beat: {(str(beat.worker),): beat.cache_redis_failures},
    ),
)


# -- as things are now --


def _in_flight_by_backend(view: View) -> Samples:
    counts = dict.fromkeys(view.backends, 0)
    for beat in view.living:
        for backend, count in beat.in_flight_by_backend.items():
            counts[backend] = counts.get(backend, 0) + count
    return [((backend,), count) for backend, count in counts.items()]


BACKEND_STATES = ("up", "suspect", "out", "drained")


def _backend_states(view: View) -> Samples:
    """Of each backend, how many workers see it in each state."""
    seen = Counts((name, each.state) for beat in view.living for name, each in beat.backends.items())
    names = dict.fromkeys(name for name, _ in seen)
    return [((name, state), seen[name, state]) for name in names for state in BACKEND_STATES]


def _by_backend(view: View, read: Callable[[BackendBeat], float], together: Callable[[Iterable[float]], float] = sum) -> Samples:
    """What living workers say of each backend that they know."""
    found: dict[str, list[float]] = {}
    for beat in view.living:
        for name, each in beat.backends.items():
            found.setdefault(name, []).append(read(each))
    return [((name,), together(values)) for name, values in found.items()]


def _by_worker(
    view: View, read: Callable[[Heartbeat], float | None], together: Callable[[Iterable[float]], float] = sum
) -> Samples:
    """What living workers say, by their places; None: nothing. While one takes over from another two have the same place."""
    found: dict[str, list[float]] = {}
    for beat in view.living:
        if (value := read(beat)) is not None:
            found.setdefault(str(beat.worker), []).append(value)
    return [((worker,), together(values)) for worker, values in sorted(found.items())]


def _longest(values: Iterable[float]) -> Samples:
    return [((), max(values, default=0))]


def _earliest(moments: Iterable[float]) -> Samples:
    """The first of some moments; nothing if none is known."""
    known = [moment for moment in moments if moment]
    return [((), min(known))] if known else []


def _ages(view: View, moments: Iterable[int]) -> Samples:
    """The oldest of some moments that have come, as seconds ago; nothing if none has."""
    ages = [max(0, view.now_unix_ns - moment) / NANO for moment in moments if moment]
    return [((), max(ages))] if ages else []


def _dropped(view: View) -> Samples:
    return [((reason,), count) for reason, count in view.spans.dropped.items()] if view.spans else []


def _engines_say(view: View, read: Callable[[EngineLoad], float]) -> Samples:
    return [((engine.backend,), read(engine.load)) for engine in view.engines if engine.load is not None]


def _engines_computed(view: View, name: str, *labels: str) -> Samples:
    return [((engine.backend, *labels), engine.computed[name]) for engine in view.engines]


def _engine_tokens(view: View) -> Samples:
    return [*_engines_computed(view, "prompt_tokens", "input"), *_engines_computed(view, "generation_tokens", "output")]


def _engine_scrapes(view: View) -> Samples:
    return [((engine.backend, outcome), count) for engine in view.engines for outcome, count in engine.scrapes.items()]


GAUGES: tuple[Gauge, ...] = (
    Gauge("glasshouse_workers", "Workers alive.", (), lambda view: [((), len(view.living))]),
    Gauge(
        "glasshouse_workers_draining",
        "Workers that finish what they have and take no more.",
        (),
        lambda view: [((), sum(beat.draining for beat in view.living))],
    ),
    Gauge(
        "glasshouse_worker_tasks",
        "Asyncio tasks of the workers. Connecting is one, a request is none: it doesn't grow with the load.",
        (),
        lambda view: [((), sum(beat.tasks for beat in view.living))],
    ),
    Gauge(
        "glasshouse_requests_in_flight",
        "Accepted requests that have not ended, by worker.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: beat.in_flight),
    ),
    Gauge(
        "glasshouse_backend_requests_in_flight",
        "Requests that a backend is working on, as the workers see it.",
        ("backend",),
        _in_flight_by_backend,
    ),
    Gauge(
        "glasshouse_backend_tokens_in_flight",
        "Tokens of these requests: prompts as far as they have to be computed, answers as long as they are expected to become.",
        ("backend",),
        lambda view: _by_backend(view, lambda each: each.tokens),
    ),
    Gauge(
        "glasshouse_backend_tokens_prefilling",
        "Of these, the prompts' whose first token has not come.",
        ("backend",),
        lambda view: _by_backend(view, lambda each: each.prefilling),
    ),
    Gauge(
        "glasshouse_backend_state",
        "Workers that see a backend up, suspect (something was odd: it has requests only where nobody else can), out (it has "
        "none) or drained (so has somebody decided).",
        ("backend", "state"),
        _backend_states,
    ),
    Gauge(
        "glasshouse_backend_load_ratio",
        "Of its usual load, what a backend may have: 0 while it is out or drained, below 1 for a while after its return. The "
        "workers' mean.",
        ("backend",),
        lambda view: _by_backend(view, lambda each: 0.0 if each.state in ("out", "drained") else each.part, fmean),
    ),
    Gauge(
        "glasshouse_requests_waiting",
        "Requests that wait for a backend with room, by worker.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: beat.waiting),
    ),
    Gauge(
        "glasshouse_connections",
        "Open client connections, by worker.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: beat.connections),
    ),
    Gauge(
        "glasshouse_reservations",
        "Requests that hold something of a limit or a budget, by worker. 0 when nothing is in flight.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: beat.reservations),
    ),
    Gauge(
        "glasshouse_limits_degraded",
        "1 while a worker can't reach Redis and therefore keeps to its own part of each limit, by worker.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: float(beat.redis == "down"), max),
    ),
    Gauge(
        "glasshouse_redis_up",
        "1 while a worker reaches Redis, by worker. No sample: there is none in the settings.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: float(beat.redis == "up") if beat.redis else None, min),
    ),
    Gauge(
        "glasshouse_cache_entries",
        "Answers that a worker has in memory, by worker.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: beat.cache_entries),
    ),
    Gauge(
        "glasshouse_cache_bytes",
        "What they take of memory, about, by worker.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: beat.cache_bytes),
    ),
    Gauge(
        "glasshouse_cache_redis_up",
        "1 while a worker's cache reaches Redis, by worker. No sample: it keeps nothing there.",
        ("worker",),
        lambda view: _by_worker(view, lambda beat: float(beat.cache_redis == "up") if beat.cache_redis else None, min),
    ),
    Gauge(
        "glasshouse_certificate_expiry_timestamp_seconds",
        "When the listener's certificate ceases to be valid, seconds since 1970; the first to. No sample: it has none.",
        (),
        lambda view: _earliest(beat.certificate_expiry_unix_s for beat in view.living),
    ),
    Gauge(
        "glasshouse_loop_delay_seconds",
        "How late a worker's event loop woke up last; the worst worker.",
        (),
        lambda view: _longest(beat.loop_delay_ns / NANO for beat in view.living),
    ),
    Gauge(
        "glasshouse_heartbeat_age_seconds",
        "Since a living worker last said anything; the worst worker. A few seconds: its event loop hangs.",
        (),
        lambda view: _ages(view, (beat.unix_ns for beat in view.living)),
    ),
    Gauge(
        "glasshouse_snapshot_age_seconds",
        "Since the keys and models that a worker uses were published; the worst worker. No sample: one has none yet.",
        (),
        lambda view: _ages(view, (beat.snapshot_unix_ns for beat in view.living)),
    ),
    Gauge(
        "glasshouse_journal_full",
        "1 if a worker can prepare no further segment: the disk is full.",
        (),
        lambda view: [((), float(any(beat.journal_full for beat in view.living)))],
    ),
    Gauge(
        "glasshouse_journal_damaged_segments",
        "Segments with unreadable bytes that were put aside (journal/*.damaged) for a person to look at.",
        (),
        lambda view: [((), view.damaged_segments)],
    ),
    Gauge(
        "glasshouse_ledger_set_aside_records",
        "Records that the database refuses for good, put aside (unstored/) for a person to look at.",
        (),
        lambda view: [((), view.set_aside_records)],
    ),
    Gauge(
        "glasshouse_journal_lag_bytes",
        "Written by workers and not yet taken by the sink.",
        ("sink",),
        lambda view: [((sink.name,), sink.lag_bytes) for sink in view.sinks],
    ),
    Gauge(
        "glasshouse_journal_lag_seconds",
        "Since the sink last had everything that was written.",
        ("sink",),
        lambda view: [((sink.name,), sink.lag_seconds) for sink in view.sinks],
    ),
    Gauge(
        "glasshouse_sink_up",
        "1 if what the sink did last worked.",
        ("sink",),
        lambda view: [((sink.name,), float(sink.up)) for sink in view.sinks],
    ),
    Gauge(
        "glasshouse_spans_exported_total",
        "Spans that Phoenix took.",
        (),
        lambda view: [((), view.spans.exported)] if view.spans else [],
        counter=True,
    ),
    Gauge(
        "glasshouse_spans_dropped_total",
        "Spans that were not sent. full: the oldest made room; refused: Phoenix would not have them; "
        "unsampled: the caller's trace was not to be recorded.",
        ("reason",),
        _dropped,
        counter=True,
    ),
    Gauge(
        "glasshouse_traces_waiting",
        "Traces that wait to be sent to Phoenix.",
        (),
        lambda view: [((), view.spans.waiting)] if view.spans else [],
    ),
    Gauge(
        "glasshouse_retention_removed_rows_total",
        "Rows that this collector has taken out of the database because of their age: requests, of which sums stay, and audit.",
        ("kind",),
        lambda view: [((kind,), rows) for kind, rows in view.retention.removed.items()] if view.retention else [],
        counter=True,
    ),
    Gauge(
        "glasshouse_retention_overdue_days",
        "Days of requests that are older than they are kept and not gone yet. More than 1 for an hour: something keeps them. "
        "No sample: everything is kept.",
        (),
        lambda view: [((), view.retention.overdue_days)] if view.retention else [],
    ),
    Gauge(
        "glasshouse_config_last_reload_successful",
        "1 if the configuration was taken up when it was last read, at the start or by a reload; 0: it was not.",
        (),
        lambda view: [((), float(view.last_reload.successful))] if view.last_reload else [],
    ),
    Gauge(
        "glasshouse_config_last_reload_success_timestamp_seconds",
        "When the configuration in force was taken up, seconds since 1970.",
        (),
        lambda view: [((), view.last_reload.success_unix_ns / NANO)] if view.last_reload else [],
    ),
    Gauge(
        "glasshouse_engine_requests_running",
        "Requests that an engine says it computes at the moment, whoever sent them. No sample: it says nothing.",
        ("backend",),
        lambda view: _engines_say(view, lambda load: load.running),
    ),
    Gauge(
        "glasshouse_engine_requests_waiting",
        "Requests that wait in an engine's own queue, as it says.",
        ("backend",),
        lambda view: _engines_say(view, lambda load: load.waiting),
    ),
    Gauge(
        "glasshouse_engine_kv_cache_usage_ratio",
        "How much of its KV cache an engine has in use, 0 to 1, as it says; of several behind one address together.",
        ("backend",),
        lambda view: _engines_say(view, lambda load: load.kv_usage),
    ),
    Gauge(
        "glasshouse_engine_start_timestamp_seconds",
        "When an engine was started, seconds since 1970, as it says. No sample: it doesn't.",
        ("backend",),
        lambda view: [each for each in _engines_say(view, lambda load: load.started_unix_s) if each[1]],
    ),
    Gauge(
        "glasshouse_engine_tokens_total",
        "Tokens that an engine says it has read and written since this collector first heard of it, whoever sent the requests.",
        ("backend", "kind"),
        _engine_tokens,
        counter=True,
    ),
    Gauge(
        "glasshouse_engine_prefix_cache_queries_total",
        "Tokens that an engine has looked for in its prefix cache, as it says; since this collector first heard of it.",
        ("backend",),
        lambda view: _engines_computed(view, "prefix_queries"),
        counter=True,
    ),
    Gauge(
        "glasshouse_engine_prefix_cache_hits_total",
        "Those of them that it found there.",
        ("backend",),
        lambda view: _engines_computed(view, "prefix_hits"),
        counter=True,
    ),
    Gauge(
        "glasshouse_engine_scrapes_total",
        "How often this collector asked an engine for its load. unreachable, timeout: no answer; refused: another status than "
        "200; unreadable: an answer that doesn't say it; internal_error: a bug of ours.",
        ("backend", "outcome"),
        _engine_scrapes,
        counter=True,
    ),
    Gauge(
        "glasshouse_build_info",
        "1; the version of this Glasshouse.",
        ("version",),
        lambda view: [((view.version,), 1)],
    ),
)
