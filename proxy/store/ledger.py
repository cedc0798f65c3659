"""One row per request, and sums over them.

Writing is idempotent: a row is known by (day, id), and what is already there is left alone. A collector that died between
reading the journal and saving its position may therefore hand in the same records again.

Rows go to the driver as tuples, in one prepared statement, past SQLAlchemy's per-row work: the ledger has to keep up with several
thousand requests a second on a core that it shares.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Column, ColumnElement, Connection, Integer, Select, and_, case, func, literal, select, text, true

from proxy.errors import Outcome
from proxy.exchange import Attempt, EngineTimings, Record, UsageSource
from proxy.store.engine import without_deadline
from proxy.store.tables import checkpoints, requests

# -- rows --

_DAY_NS = 86_400_000_000_000
_MAX_INTEGER = 2**63 - 1
_OUTCOMES = {outcome.value: outcome.label for outcome in Outcome}
_SOURCES = {source.value: source.name.lower() for source in UsageSource}

_SAME_NAME = (
    *("operation", "key_id", "key_name", "trace_flags", "stream", "temperature", "top_p", "request_bytes", "status"),
    *("read_ns", "authenticated_ns", "admitted_ns", "sent_ns", "first_byte_ns", "first_token_ns", "first_content_ns"),
    *("last_token_ns", "upstream_ended_ns", "ended_ns", "chunks", "response_bytes", "unsent_bytes"),
    *("currency", "inter_token_sum_ns", "inter_token_max_ns", "team", "worker", "refused_by", "over_budget"),
)
"""Columns that hold the Record's field of the same name, as it is."""

_TEXTS = ("client_request_id", "client_address", "model", "error_code", "error")
_COUNTS = (
    *("choices", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds", "cost_nano", "gpu_ns"),
)
_DERIVED = (
    "collector",
    *("day", "id", "received_at", "trace_id", "span_id", "parent_span_id", "backend", "end_user", "max_tokens", "outcome"),
    *("usage_source", "finish_reasons", "inter_token_counts", "attempts", "proxy_added_ns"),
    *("engine_queue_ms", "engine_time_to_first_token_ms", "engine_prefill_ms", "engine_decode_ms"),
    "engine_mean_inter_token_ms",
)
_COLUMNS = (*_DERIVED, *_TEXTS, *_COUNTS, *_SAME_NAME)

_same_name = attrgetter(*_SAME_NAME)
_texts = attrgetter(*_TEXTS)
_counts = attrgetter(*_COUNTS)
_json = msgspec.json.Encoder().encode
_NO_TIMINGS = EngineTimings()


def insert_records(connection: Connection, records: Sequence[Record], collector: str = "") -> int:
    """Store what ended → how many weren't there before. One statement; the caller's transaction commits it. `collector` is who
    stores them."""
    if not records:
        return 0
    rows: Any = [_row(record, collector) for record in records]
    sql = _insert_sql("?" if connection.dialect.paramstyle == "qmark" else "%s")
    return connection.exec_driver_sql(sql, rows, execution_options={"preserve_rowcount": True}).rowcount


@lru_cache(maxsize=2)
def _insert_sql(marker: str) -> str:
    """ON CONFLICT is the same in SQLite and PostgreSQL; only the drivers' parameter markers differ."""
    columns, markers = ", ".join(_COLUMNS), ", ".join([marker] * len(_COLUMNS))
    return f"INSERT INTO {requests.name} ({columns}) VALUES ({markers}) ON CONFLICT (day, id) DO NOTHING"  # noqa: S608 (ours)


def _row(record: Record, collector: str) -> tuple[object, ...]:
    """In the order of `_COLUMNS`. Text and counts that others chose are made storable: no NUL (PostgreSQL), at most 63 bits."""
    engine = record.engine or _NO_TIMINGS
    return (
        collector,
        _day(record.received_unix_ns // _DAY_NS),
        record.id.hex(),
        record.received_unix_ns,
        record.trace_id.hex(),
        f"{record.span_id:016x}",
        f"{record.parent_span_id:016x}" if record.parent_span_id else "",
        record.backend,
        _storable(record.user),
        None if record.max_tokens is None else min(record.max_tokens, _MAX_INTEGER),
        _OUTCOMES.get(record.outcome, str(record.outcome)),
        _SOURCES.get(record.usage_source, str(record.usage_source)),
        _json(record.finish_reasons).decode(),
        _json(record.inter_token_counts).decode(),
        _attempts(record.attempts),
        record.proxy_added_ns(),
        engine.queue_ms,
        engine.time_to_first_token_ms,
        engine.prefill_ms,
        engine.decode_ms,
        engine.mean_inter_token_ms,
        *map(_storable, _texts(record)),
        *[count if count <= _MAX_INTEGER else _MAX_INTEGER for count in _counts(record)],
        *_same_name(record),
    )


@lru_cache(maxsize=16)
def _day(number: int) -> str:
    """Days since 1970 → ISO."""
    return (date(1970, 1, 1) + timedelta(number)).isoformat()


def _storable(text: str) -> str:
    return text.replace("\0", "\ufffd") if "\0" in text else text


def _attempts(attempts: list[Attempt]) -> str:
    """A JSON list of objects: in the journal an attempt is an array, in SQL its fields have names."""
    return _json([msgspec.structs.asdict(attempt) for attempt in attempts]).decode()


# -- checkpoints --

_SAVE = text(
    "INSERT INTO checkpoints (collector, sink, position, saved_at) VALUES (:collector, :sink, :position, :saved_at) "
    "ON CONFLICT (collector, sink) DO UPDATE SET position = excluded.position, saved_at = excluded.saved_at"
)


def load_checkpoint(connection: Connection, collector: str, sink: str) -> bytes | None:
    """What the sink saved last; None if it never did."""
    query = select(checkpoints.c.position).filter_by(collector=collector, sink=sink)
    position = connection.execute(query).scalar_one_or_none()
    return None if position is None else bytes(position)


def save_checkpoint(connection: Connection, collector: str, sink: str, position: bytes) -> None:
    """In the transaction of the rows that it stands for, so that both are there or neither."""
    values = {"collector": collector, "sink": sink, "position": position, "saved_at": time.time_ns()}
    connection.execute(_SAVE, values)


# -- sums --

By = Literal["key", "team", "model", "backend", "day"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OK = (Outcome.OK.label, Outcome.CACHED.label, Outcome.COALESCED.label)
_COUNTED: dict[str, ColumnElement[bool]] = {
    "ok": requests.c.outcome.in_(_OK),
    "client_gone": requests.c.outcome == Outcome.CLIENT_GONE.label,
    "crashed": requests.c.outcome == Outcome.CRASHED.label,
}
_SUMMED = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds")
_GROUPS: dict[By, tuple[Column[Any], Column[Any]]] = {
    "key": (requests.c.key_id, requests.c.key_name),
    "team": (requests.c.team, requests.c.team),
    "model": (requests.c.model, requests.c.model),
    "backend": (requests.c.backend, requests.c.backend),
    "day": (requests.c.day, requests.c.day),
}
"""What rows are grouped by, and the column whose value is shown for a group."""


class UsageRow(msgspec.Struct, kw_only=True):
    """Sums over one group's requests: exact integers. `errors` is whatever is neither ok, client_gone nor crashed.

    `group` is the key's id, the team, the model, the backend or the UTC day; `label` is what people call it. The first-token
    times are nearest-rank percentiles (a time that some request really had) over those that got a token; None if none did.
    """

    group: str
    label: str
    requests: int = 0
    ok: int = 0
    errors: int = 0
    client_gone: int = 0
    crashed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    audio_seconds: int = 0
    cost_nano: dict[str, int] = {}
    """Currency → nano-units. A currency in which nothing was charged is left out."""
    first_token_p50_ns: int | None = None
    first_token_p95_ns: int | None = None


def usage(connection: Connection, by: By = "key", since: datetime | None = None, until: datetime | None = None) -> list[UsageRow]:
    """What was used from `since` (included) to `until` (not included), both aware; ordered by group. A few scans of the range."""
    without_deadline(connection)
    span = _span(since, until)
    rows: dict[str, UsageRow] = {}
    for group, label, currency, *sums in connection.execute(_sums(by, span)):
        row = rows.setdefault(str(group), UsageRow(group=str(group), label=str(label)))
        _add(row, currency, [int(value or 0) for value in sums])
    for group, half, most in connection.execute(_percentiles(by, span)):
        rows[str(group)].first_token_p50_ns, rows[str(group)].first_token_p95_ns = half, most
    return [rows[group] for group in sorted(rows)]


def _span(since: datetime | None, until: datetime | None) -> ColumnElement[bool]:
    """The rows of [since, until): by day first, because that is what the table is ordered by."""
    conditions: list[ColumnElement[bool]] = [true()]
    if since is not None:
        conditions += [requests.c.day >= since.astimezone(UTC).date(), requests.c.received_at >= _unix_ns(since)]
    if until is not None:
        conditions += [requests.c.day <= until.astimezone(UTC).date(), requests.c.received_at < _unix_ns(until)]
    return and_(*conditions)


def _unix_ns(when: datetime) -> int:
    if when.tzinfo is None:
        raise ValueError("a time without a time zone")
    return (when - _EPOCH) // timedelta(microseconds=1) * 1000


def _sums(by: By, span: ColumnElement[bool]) -> Select[Any]:
    group, label = _GROUPS[by]
    counted = [func.sum(case((condition, 1), else_=0)) for condition in _COUNTED.values()]
    summed = [func.sum(requests.c[name]) for name in (*_SUMMED, "cost_nano")]
    query = select(group, func.max(label), requests.c.currency, func.count(), *counted, *summed)
    return query.where(span).group_by(group, requests.c.currency)


def _add(row: UsageRow, currency: str, sums: list[int]) -> None:
    """`sums` in the order of `_sums`: requests, `_COUNTED`, `_SUMMED`, cost."""
    count, *rest = sums
    cost = rest.pop()
    row.requests += count
    row.errors += count - sum(rest[: len(_COUNTED)])
    for name, value in zip((*_COUNTED, *_SUMMED), rest, strict=True):
        setattr(row, name, getattr(row, name) + value)
    if cost:
        row.cost_nano = {**row.cost_nano, currency: row.cost_nano.get(currency, 0) + cost}


def _percentiles(by: By, span: ColumnElement[bool]) -> Select[Any]:
    """Nearest rank: of n values in order, the ⌈n·p⌉-th."""
    group = _GROUPS[by][0].label("grouped")
    value = requests.c.first_token_ns
    rank = func.row_number().over(partition_by=group, order_by=value).label("rank")
    count = func.count().over(partition_by=group).label("count")
    ranked = select(group, value, rank, count).where(span, value > 0).subquery()
    at = [func.max(case((ranked.c.rank == (ranked.c.count * p + 99) // 100, ranked.c.first_token_ns))) for p in (50, 95)]
    return select(ranked.c.grouped, *at).group_by(ranked.c.grouped)


# -- what was spent --

_HALF = 32
"""Sums are made of upper and lower halves: a sum of what engines claim may have more than 63 bits, which SQLite refuses."""


class SpentRow(NamedTuple):
    """Sums over one collector's requests of one worker, key and team: exact integers."""

    worker: str
    key_id: str
    team: str
    cost_nano: int
    tokens: int
    gpu_ns: int


def spent(connection: Connection, collector: str, currency: str, since_ns: int, until_ns: int) -> Iterator[SpentRow]:
    """What `collector` has stored of requests received from `since_ns` (included) to `until_ns` (not included): money in
    `currency`, tokens (input and output), ns of a GPU's time. A scan of the range.

    Rows of before it was known who stored them are everybody's, as those of the worker "".
    """
    without_deadline(connection)
    row = requests.c
    cost = case((row.currency == currency, row.cost_nano), else_=0)
    halves = [half for amount in (cost, row.input_tokens, row.output_tokens, row.gpu_ns) for half in _halves(amount)]
    who = (row.worker, row.key_id, row.team)
    query = select(*who, *halves).where(_stored_by(collector, since_ns, until_ns)).group_by(*who)
    for worker, key_id, team, *sums in connection.execute(query):
        money, read, written, gpu_ns = ((int(high) << _HALF) + int(low) for high, low in zip(sums[::2], sums[1::2], strict=True))
        yield SpentRow(worker, key_id, team, money, read + written, gpu_ns)


def first_since(connection: Connection, collector: str, since_ns: int) -> int | None:
    """When the first of those requests was received that came at `since_ns` or later; None if there is none."""
    query = select(func.min(requests.c.received_at)).where(_stored_by(collector, since_ns, _MAX_INTEGER))
    received_at: int | None = connection.execute(query).scalar_one()
    return received_at


def _halves(amount: ColumnElement[int]) -> tuple[ColumnElement[int], ColumnElement[int]]:
    return func.sum(amount.bitwise_rshift(literal(_HALF, Integer))), func.sum(amount.bitwise_and((1 << _HALF) - 1))


def _stored_by(collector: str, since_ns: int, until_ns: int) -> ColumnElement[bool]:
    """By day first, because that is what the table is ordered by."""
    first, last = (date(1970, 1, 1) + timedelta(ns // _DAY_NS) for ns in (since_ns, until_ns))
    row = requests.c
    within = and_(row.day >= first, row.received_at >= since_ns, row.day <= last, row.received_at < until_ns)
    return and_(within, row.collector.in_((collector, "")))
