"""One row per request, and sums over them.

Writing is idempotent: a row is known by (day, id), and what is already there is left alone. A collector that died between
reading the journal and saving its position may therefore hand in the same records again.

Rows go to the driver as tuples, in one prepared statement, past SQLAlchemy's per-row work: the ledger has to keep up with several
thousand requests a second on a core that it shares.

Of rows that retention has taken away there are sums by day (retention.py). What is summed here is summed over both, so that it is
the same before and after; only percentiles know nothing of rows that are gone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Integer, Select, Table, and_, case, func, literal, select, text, true

from proxy.errors import Outcome
from proxy.exchange import Attempt, EngineTimings, Record, UsageSource
from proxy.store.engine import without_deadline
from proxy.store.partitions import prepare
from proxy.store.tables import checkpoints, request_sums, requests

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
    *("user_name", "project", "queued_ns", "routed_by", "cache", "looked_up_ns", "age_ns", "similarity"),
)
"""Columns that hold the Record's field of the same name, as it is."""

_TEXTS = ("client_request_id", "client_address", "model", "requested_model", "fallback_of", "error_code", "error")
_COUNTS = (
    *("choices", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds", "cost_nano", "gpu_ns"),
    *("saved_input_tokens", "saved_output_tokens", "saved_cost_nano", "saved_ns"),
)
_DERIVED = (
    "collector",
    *("day", "id", "received_at", "trace_id", "span_id", "parent_span_id", "source_id", "source_trace_id"),
    *("backend", "end_user", "max_tokens", "outcome"),
    *("usage_source", "finish_reasons", "inter_token_counts", "attempts", "scores", "proxy_added_ns"),
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
    if connection.dialect.name == "postgresql":
        prepare(connection.engine, {day_of(record) for record in records})
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
        record.source_id.hex(),
        record.source_trace_id.hex(),
        record.backend,
        _storable(record.user),
        None if record.max_tokens is None else min(record.max_tokens, _MAX_INTEGER),
        _OUTCOMES.get(record.outcome, str(record.outcome)),
        _SOURCES.get(record.usage_source, str(record.usage_source)),
        _json(record.finish_reasons).decode(),
        _json(record.inter_token_counts).decode(),
        _attempts(record.attempts),
        _scores(record.scores),
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
    return _date(number).isoformat()


def day_of(record: Record) -> date:
    """The UTC day under which it is kept."""
    return _date(record.received_unix_ns // _DAY_NS)


def _date(number: int) -> date:
    return date(1970, 1, 1) + timedelta(number)


def _storable(text: str) -> str:
    return text.replace("\0", "\ufffd") if "\0" in text else text


def _attempts(attempts: list[Attempt]) -> str:
    """A JSON list of objects: in the journal an attempt is an array, in SQL its fields have names."""
    return _json([msgspec.structs.asdict(attempt) for attempt in attempts]).decode()


def _scores(scores: list[tuple[str, int]]) -> str:
    return _json([{"backend": backend, "score": score} for backend, score in scores]).decode() if scores else "[]"


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

By = Literal["key", "team", "user", "project", "model", "backend", "operation", "outcome", "cache", "day"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NOON = timedelta(hours=12)
_OK = (Outcome.OK.label, Outcome.CACHED.label, Outcome.COALESCED.label)
_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ok": ("outcome", _OK),
    "client_gone": ("outcome", (Outcome.CLIENT_GONE.label,)),
    "crashed": ("outcome", (Outcome.CRASHED.label,)),
    "cache_hits": ("cache", ("hit",)),
    "cache_misses": ("cache", ("miss",)),
    "coalesced": ("cache", ("coalesced",)),
}
"""What is counted apart, by what a column says. The outcomes have no request in common."""
_SUMMED = (
    *("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds"),
    *("saved_input_tokens", "saved_output_tokens", "saved_ns"),
)
_MONEY = ("cost_nano", "saved_cost_nano")
_GROUPS: dict[By, tuple[str, str]] = {
    "key": ("key_id", "key_name"),
    "team": ("team", "team"),
    "user": ("user_name", "user_name"),
    "project": ("project", "project"),
    "model": ("model", "model"),
    "backend": ("backend", "backend"),
    "operation": ("operation", "operation"),
    "outcome": ("outcome", "outcome"),
    "cache": ("cache", "cache"),
    "day": ("day", "day"),
}
"""The column that rows are grouped by, and the one whose value is shown for a group."""


class UsageRow(msgspec.Struct, kw_only=True):
    """Sums over one group's requests: exact integers. `errors` is whatever is neither ok, client_gone nor crashed.

    `group` is the key's id, the UTC day, or what the requests were grouped by; `label` is what people call it. The first-token
    times are nearest-rank percentiles (a time that some request really had) over those that got a token; None if none did.

    Answers that the cache had (`cache_hits`) and that were shared (`coalesced`) are requests like others, and took nothing. What
    an engine would have taken for them is `saved_*`. A hit rate is over these two and `cache_misses`.
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
    cache_hits: int = 0
    cache_misses: int = 0
    coalesced: int = 0
    saved_input_tokens: int = 0
    saved_output_tokens: int = 0
    saved_ns: int = 0
    saved_cost_nano: dict[str, int] = {}
    first_token_p50_ns: int | None = None
    first_token_p95_ns: int | None = None


def usage(
    connection: Connection,
    by: By = "key",
    since: datetime | None = None,
    until: datetime | None = None,
    *,
    team: str | None = None,
    user: str | None = None,
    project: str | None = None,
    key_id: str | None = None,
    key_ids: Collection[str] | None = None,
    model: str | None = None,
    backend: str | None = None,
) -> list[UsageRow]:
    """What was used from `since` (included) to `until` (not included), both aware; ordered by group. Of all that, only what has
    these values. A few scans of the range.

    A day of which only sums are left counts wholly or not at all: by where its noon (UTC) is. First-token times are those of rows
    that are still there.
    """
    without_deadline(connection)
    steady(connection)
    wanted = {"team": team, "user_name": user, "project": project, "key_id": key_id, "model": model, "backend": backend}

    def span(table: Table) -> ColumnElement[bool]:
        conditions = [table.c[name] == value for name, value in wanted.items() if value is not None]
        if key_ids is not None:
            conditions.append(table.c.key_id.in_(key_ids))
        return and_(between(table, since, until), *conditions)

    rows: dict[str, UsageRow] = {}
    for table in (requests, request_sums):
        for group, label, currency, *sums in connection.execute(_sums(by, table, span(table))):
            row = rows.setdefault(str(group), UsageRow(group=str(group), label=str(label)))
            row.label = max(row.label, str(label))
            _add(row, currency, sums)
    for group, half, most in connection.execute(_percentiles(by, span(requests))):
        rows[str(group)].first_token_p50_ns, rows[str(group)].first_token_p95_ns = half, most
    return [rows[group] for group in sorted(rows)]


def steady(connection: Connection) -> None:
    """Until the transaction ends no day is taken away. On PostgreSQL that needs a lock, and before the transaction first looks at
    anything: what it sees is of that moment, and a day that went a moment later would neither be there nor among the sums."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"LOCK TABLE ONLY {requests.name} IN ACCESS SHARE MODE")


def between(table: Table, since: datetime | None, until: datetime | None) -> ColumnElement[bool]:
    """The rows of [since, until): by day first, because that is what the tables are ordered by."""
    conditions: list[ColumnElement[bool]] = [true()]
    if since is not None:
        conditions += [table.c.day >= since.astimezone(UTC).date(), _at_or_after(table, _unix_ns(since))]
    if until is not None:
        conditions += [table.c.day <= until.astimezone(UTC).date(), ~_at_or_after(table, _unix_ns(until))]
    return and_(*conditions)


def _at_or_after(table: Table, unix_ns: int) -> ColumnElement[bool]:
    if table is requests:
        return table.c.received_at >= unix_ns
    return table.c.day >= _first_noon(unix_ns)


def _first_noon(unix_ns: int) -> date:
    """The day of the first noon then or later."""
    return _date(-((_NOON // timedelta(microseconds=1) * 1000 - unix_ns) // _DAY_NS))


def _unix_ns(when: datetime) -> int:
    if when.tzinfo is None:
        raise ValueError("a time without a time zone")
    return (when - _EPOCH) // timedelta(microseconds=1) * 1000


def _sums(by: By, table: Table, where: ColumnElement[bool]) -> Select[Any]:
    group, label = (table.c[name] for name in _GROUPS[by])
    many: ColumnElement[int] = literal(1, Integer) if table is requests else table.c.requests
    counted = [many, *(case((table.c[name].in_(values), many), else_=0) for name, values in _CLASSES.values())]
    summed = [table.c[name] for name in (*_SUMMED, *_MONEY)]
    query = select(group, func.max(label), table.c.currency, *map(func.sum, counted), *sums_of_halves(*summed))
    return query.where(where).group_by(group, table.c.currency)


def _add(row: UsageRow, currency: str, sums: Sequence[Any]) -> None:
    """`sums` in the order of `_sums`: requests, `_CLASSES`, halves of `_SUMMED` and of `_MONEY`."""
    classes = len(_CLASSES)
    count, *classed = map(int, sums[: 1 + classes])
    summed = whole_sums(sums[1 + classes :])
    row.requests += count
    row.errors += count - sum(value for value, (name, _) in zip(classed, _CLASSES.values(), strict=True) if name == "outcome")
    for name, value in zip((*_CLASSES, *_SUMMED), (*classed, *summed[: len(_SUMMED)]), strict=True):
        setattr(row, name, getattr(row, name) + value)
    for name, value in zip(_MONEY, summed[len(_SUMMED) :], strict=True):
        if value:
            had = getattr(row, name)
            setattr(row, name, {**had, currency: had.get(currency, 0) + value})


def _percentiles(by: By, where: ColumnElement[bool]) -> Select[Any]:
    """Nearest rank: of n values in order, the ⌈n·p⌉-th."""
    group = requests.c[_GROUPS[by][0]].label("grouped")
    value = requests.c.first_token_ns
    rank = func.row_number().over(partition_by=group, order_by=value).label("rank")
    count = func.count().over(partition_by=group).label("count")
    ranked = select(group, value, rank, count).where(where, value > 0).subquery()
    at = [func.max(case((ranked.c.rank == (ranked.c.count * p + 99) // 100, ranked.c.first_token_ns))) for p in (50, 95)]
    return select(ranked.c.grouped, *at).group_by(ranked.c.grouped)


_HALF = 32


def sums_of_halves(*amounts: ColumnElement[int]) -> list[ColumnElement[int]]:
    """Sums of upper and lower halves: a sum of what engines claim may have more than 63 bits, which SQLite refuses."""
    both = ((amount.bitwise_rshift(literal(_HALF, Integer)), amount.bitwise_and((1 << _HALF) - 1)) for amount in amounts)
    return [func.sum(half) for halves in both for half in halves]


def whole_sums(halves: Sequence[Any]) -> list[int]:
    """What `sums_of_halves` found; 0 where there was nothing."""
    pairs = zip(halves[::2], halves[1::2], strict=True)
    return [(int(high or 0) << _HALF) + int(low or 0) for high, low in pairs]


# -- what was spent --


class SpentRow(NamedTuple):
    """Sums over one collector's requests of one worker, key, team, user and project: exact integers."""

    worker: str
    key_id: str
    team: str
    user_name: str
    project: str
    cost_nano: int
    tokens: int
    gpu_ns: int


def spent(connection: Connection, collector: str, currency: str, since_ns: int, until_ns: int) -> Iterator[SpentRow]:
    """What `collector` has stored of requests received from `since_ns` (included) to `until_ns` (not included): money in
    `currency`, tokens (input and output), ns of a GPU's time. A scan of the range.

    Rows of before it was known who stored them are everybody's, as those of the worker "". A day of which only sums are left
    counts by where its noon (UTC) is.
    """
    without_deadline(connection)
    steady(connection)
    found: dict[tuple[str, ...], list[int]] = {}
    for table in (requests, request_sums):
        cost = case((table.c.currency == currency, table.c.cost_nano), else_=0)
        who = [table.c[name] for name in ("worker", "key_id", "team", "user_name", "project")]
        amounts = sums_of_halves(cost, table.c.input_tokens, table.c.output_tokens, table.c.gpu_ns)
        query = select(*who, *amounts).where(_stored_by(table, collector, since_ns, until_ns)).group_by(*who)
        for row in connection.execute(query):
            money, read, written, gpu_ns = whole_sums(row[len(who) :])
            sums = found.setdefault(tuple(row[: len(who)]), [0, 0, 0])
            for index, more in enumerate((money, read + written, gpu_ns)):
                sums[index] += more
    for (worker, key_id, team, user_name, project), amounts_ in found.items():
        yield SpentRow(worker, key_id, team, user_name, project, *amounts_)


def first_since(connection: Connection, collector: str, since_ns: int) -> int | None:
    """When the first of those requests was received that came at `since_ns` or later; None if there is none. For a day of which
    only sums are left, its noon (UTC)."""
    row, sums = requests.c, request_sums.c
    received = connection.execute(select(func.min(row.received_at)).where(_stored_by(requests, collector, since_ns))).scalar_one()
    day = connection.execute(select(func.min(sums.day)).where(_stored_by(request_sums, collector, since_ns))).scalar_one()
    found = [] if received is None else [received]
    if day is not None:
        found.append(_unix_ns(datetime(day.year, day.month, day.day, tzinfo=UTC) + _NOON))
    return min(found, default=None)


def _stored_by(table: Table, collector: str, since_ns: int, until_ns: int = _MAX_INTEGER) -> ColumnElement[bool]:
    """By day first, because that is what the tables are ordered by."""
    first, last = (_date(ns // _DAY_NS) for ns in (since_ns, until_ns))
    within = and_(table.c.day >= first, _at_or_after(table, since_ns), table.c.day <= last, ~_at_or_after(table, until_ns))
    return and_(within, table.c.collector.in_((collector, "")))
