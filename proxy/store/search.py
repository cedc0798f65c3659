"""Finding requests in the ledger: by what is known of them, a page at a time.

A search goes through days, the newest first (or, for the slowest, through all of the range), until a page is full: what it costs
is the rows between `since` and `until` that it has to look at, about a microsecond each. Whoever lets others search sets `since`.
A request's own id tells its day, so to find it by that costs nothing.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import date, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from sqlalchemy import BigInteger, ColumnElement, Connection, and_, false, literal, or_, select, tuple_

from proxy.store.audit import storable
from proxy.store.engine import StoreError
from proxy.store.ledger import between
from proxy.store.tables import requests

MOST: Final = 1000
"""Rows of a page."""

Order = Literal["newest", "slowest"]
"""By when they came, the last first; by how long they took, the longest first."""

_ID_DIGITS: Final = 32
_MS_DIGITS: Final = 12
_DAY_MS: Final = 86_400_000
_FIRST: Final = date(1970, 1, 1)
_LAST_DAY: Final = (date.max - _FIRST).days
_MOST_INTEGER: Final = 2**63 - 1


class BadCursor(StoreError):
    """Not a cursor, or one of a search in another order."""


class RequestRow(msgspec.Struct, kw_only=True):
    """One request, as the ledger has it (`tables.requests`): `received_at` is ns since 1970, UTC; what ends in `_ns` is ns after
    that, 0 = not reached, `ended_ns` being how long it took; money is in nano-units of `currency`."""

    id: str
    day: date
    received_at: int
    trace_id: str
    client_request_id: str
    client_address: str
    key_id: str
    key_name: str
    team: str
    user_name: str
    project: str
    end_user: str
    operation: str
    model: str
    requested_model: str
    fallback_of: str
    backend: str
    routed_by: str
    scores: list[dict[str, Any]]
    stream: bool
    choices: int
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    request_bytes: int
    status: int
    outcome: str
    error_code: str
    error: str
    refused_by: str
    over_budget: str
    finish_reasons: list[str]
    read_ns: int
    authenticated_ns: int
    admitted_ns: int
    looked_up_ns: int
    queued_ns: int
    sent_ns: int
    first_byte_ns: int
    first_token_ns: int
    first_content_ns: int
    last_token_ns: int
    upstream_ended_ns: int
    ended_ns: int
    proxy_added_ns: int
    chunks: int
    response_bytes: int
    unsent_bytes: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    usage_source: str
    audio_seconds: int
    gpu_ns: int
    cost_nano: int
    currency: str
    cache: str
    source_id: str
    source_trace_id: str
    age_ns: int
    similarity: float | None
    saved_input_tokens: int
    saved_output_tokens: int
    saved_cost_nano: int
    saved_ns: int
    inter_token_sum_ns: int
    inter_token_max_ns: int
    attempts: list[dict[str, Any]]
    engine_queue_ms: float | None
    engine_time_to_first_token_ms: float | None
    engine_prefill_ms: float | None
    engine_decode_ms: float | None
    engine_mean_inter_token_ms: float | None


_COLUMNS: Final = tuple(requests.c[name] for name in RequestRow.__struct_fields__)


def requests_found(
    connection: Connection,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    key_id: str | None = None,
    key_name: str | None = None,
    team: str | None = None,
    user: str | None = None,
    end_user: str | None = None,
    project: str | None = None,
    model: str | None = None,
    backend: str | None = None,
    operation: str | None = None,
    outcome: str | None = None,
    cache: str | None = None,
    error_code: str | None = None,
    trace_id: str | None = None,
    request_id: str | None = None,
    status_from: int | None = None,
    status_to: int | None = None,
    min_duration_ns: int | None = None,
    min_first_token_ns: int | None = None,
    order: Order = "newest",
    before: str = "",
    limit: int = 100,
) -> list[RequestRow]:
    """Those requests from `since` (included) to `until` (not included), both aware, of which all this is true; at most `limit`,
    and at most `MOST`, of those that come after the row of which `before` is the cursor.

    `user` is whose key it was, `end_user` whom the caller named; `request_id` ours or the client's own; statuses are inclusive.
    Raises BadCursor.
    """
    wanted = {
        "key_id": key_id,
        "key_name": key_name,
        "team": team,
        "user_name": user,
        "end_user": end_user,
        "project": project,
        "model": model,
        "backend": backend,
        "operation": operation,
        "outcome": outcome,
        "cache": cache,
        "error_code": error_code,
        "trace_id": trace_id,
    }
    if not all(storable(text) for text in (*wanted.values(), request_id) if text is not None):
        return []
    row = requests.c
    where = [row[name] == value for name, value in wanted.items() if value is not None]
    for column, least in ((row.status, status_from), (row.ended_ns, min_duration_ns), (row.first_token_ns, min_first_token_ns)):
        if least is not None:
            where.append(column >= literal(max(0, min(least, _MOST_INTEGER)), BigInteger))
    if status_to is not None:
        where.append(row.status <= literal(max(-1, min(status_to, _MOST_INTEGER)), BigInteger))
    if request_id is not None:
        where.append(or_(row.client_request_id == request_id, _has_id(request_id)))
    query = select(*_COLUMNS).where(between(requests, since, until), *where)
    key = (row.day, row.id) if order == "newest" else (row.ended_ns, row.day, row.id)
    if before:
        query = query.where(_after(before, order))
    found = connection.execute(query.order_by(*(column.desc() for column in key)).limit(max(0, min(limit, MOST))))
    return [_row(each) for each in found]


def cursor_of(row: RequestRow, order: Order = "newest") -> str:
    """Where a search in this order goes on after `row`. Opaque, safe in a URL."""
    place = (row.day.isoformat(), row.id) if order == "newest" else (row.ended_ns, row.day.isoformat(), row.id)
    return urlsafe_b64encode(msgspec.json.encode(place)).rstrip(b"=").decode()


def request_of(connection: Connection, request_id: str) -> RequestRow | None:
    """The request of this id (ours), wherever it is."""
    if not storable(request_id):
        return None
    found = connection.execute(select(*_COLUMNS).where(_has_id(request_id))).one_or_none()
    return None if found is None else _row(found)


def _row(found: Any) -> RequestRow:
    return RequestRow(**found._mapping)


def _has_id(request_id: str) -> ColumnElement[bool]:
    """By day first, which is in the id: a UUIDv7 begins with the milliseconds since 1970 in which the request was received."""
    if len(request_id) != _ID_DIGITS or not set(request_id) <= set("0123456789abcdef"):
        return false()
    day = min(int(request_id[:_MS_DIGITS], 16) // _DAY_MS, _LAST_DAY)
    return and_(requests.c.day == _FIRST + timedelta(day), requests.c.id == request_id)


def _after(cursor: str, order: Order) -> ColumnElement[bool]:
    row = requests.c
    try:
        place = msgspec.json.decode(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=_PLACES[order])
    except (msgspec.MsgspecError, UnicodeDecodeError, binascii.Error, ValueError):
        raise BadCursor(f"not a cursor of a search for the {order}; allowed: what the page before said") from None
    *_, day, last = place
    if not storable(last):
        raise BadCursor("not a cursor; allowed: what the page before said")
    if order == "newest":
        return and_(row.day <= day, tuple_(row.day, row.id) < tuple_(day, last))
    return and_(row.ended_ns <= place[0], tuple_(row.ended_ns, row.day, row.id) < tuple_(place[0], day, last))


_PLACES: Final[dict[Order, Any]] = {
    "newest": tuple[date, str],
    "slowest": tuple[Annotated[int, Meta(ge=0, le=_MOST_INTEGER)], date, str],
}
