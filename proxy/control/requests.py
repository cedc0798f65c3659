"""`/requests`: single requests of the ledger, searched and looked at. Prompts and answers aren't in it.

Every millisecond of a request has a name: `time` adds up to its `total_ms`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query
from sqlalchemy import Connection
from starlette.responses import Response

from proxy import exchange
from proxy.control.access import READERS, allow
from proxy.control.answers import MaybeText, Page, PartOf, answer, documented
from proxy.control.moments import MaybeMoment
from proxy.control.resource import missing
from proxy.control.state import Asking, Given, when
from proxy.store import Order, RequestRow, cursor_of, request_of, requests_found

LOOK_BACK = timedelta(days=7)
_NS = 1_000_000
"""In a millisecond."""

Status = Annotated[int | None, Query(ge=0, le=999)]
Milliseconds = Annotated[float | None, Query(ge=0, le=1e12, allow_inf_nan=False)]

router = APIRouter(tags=["requests"])


class Span(msgspec.Struct, kw_only=True):
    """A named part of a request's time, one after the other."""

    name: str
    from_ms: float
    ms: float


class Attempt(msgspec.Struct, kw_only=True):
    """One try on one backend. Times are ms after the request came; null: not reached."""

    backend: str
    started_ms: float | None
    connected_ms: float | None
    first_byte_ms: float | None
    ended_ms: float | None
    status: int
    reused: bool
    error: str


class Score(msgspec.Struct, kw_only=True):
    """What a backend that could have been chosen had; the lowest was."""

    backend: str
    score: int


class Request(msgspec.Struct, kw_only=True):
    """`model` is what the engine was asked for, `requested_model` the alias that the caller used, if one, and `fallback_of` the
    model that could not answer, if this one did instead. `routed_by`: the policy that chose the last backend, and what spoke for
    it (`auto.prefix`), or `only`: there was no choice. `wait_ms`: for a backend with room; null: it had not to. `cost`: exact
    decimal text. `proxy_added_ms`: what the proxy itself took. The engine's own times are as it says them, null: it doesn't.

    `cache`: `hit`, `miss`, `coalesced` or `bypass`; nothing where there is no cache. `source_id` and `source_trace_id`: the
    request whose answer it was, if it had none of its own; `age_ms`: how long ago that was complete, null: it was still under
    way; `similarity`: of the two prompts, null: they were the same. `saved_*`: what an engine would have taken for it."""

    object: Literal["request"] = "request"
    id: str
    received_at: datetime | None
    trace_id: str
    client_request_id: str
    client_address: str
    key_id: str
    key_name: str
    team: str
    user: str
    project: str
    end_user: str
    operation: str
    model: str
    requested_model: str
    fallback_of: str
    backend: str
    routed_by: str
    scores: list[Score]
    stream: bool
    choices: int
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    status: int
    outcome: str
    error_code: str
    error: str
    refused_by: str
    over_budget: str
    finish_reasons: list[str]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    audio_seconds: int
    usage_source: str
    cost: str
    currency: str
    cache: str
    source_id: str
    source_trace_id: str
    age_ms: float | None
    similarity: float | None
    saved_input_tokens: int
    saved_output_tokens: int
    saved_cost: str
    saved_ms: float | None
    request_bytes: int
    response_bytes: int
    unsent_bytes: int
    chunks: int
    total_ms: float
    wait_ms: float | None
    first_token_ms: float | None
    first_content_ms: float | None
    proxy_added_ms: float
    longest_gap_ms: float | None
    engine_queue_ms: float | None
    engine_time_to_first_token_ms: float | None
    engine_prefill_ms: float | None
    engine_decode_ms: float | None
    engine_mean_inter_token_ms: float | None
    time: list[Span]
    attempts: list[Attempt]


# -- routes --


@router.get("/requests", summary="Search requests", **documented(Page[Request]))
@allow(*READERS)
async def several(
    given: Given,
    caller: Asking,
    part: PartOf,
    since: MaybeMoment = None,
    until: MaybeMoment = None,
    key: MaybeText = None,
    key_name: MaybeText = None,
    team: MaybeText = None,
    user: MaybeText = None,
    end_user: MaybeText = None,
    project: MaybeText = None,
    model: MaybeText = None,
    backend: MaybeText = None,
    operation: MaybeText = None,
    outcome: MaybeText = None,
    cache: MaybeText = None,
    error_code: MaybeText = None,
    trace_id: MaybeText = None,
    request_id: MaybeText = None,
    status_from: Status = None,
    status_to: Status = None,
    min_duration_ms: Milliseconds = None,
    min_first_token_ms: Milliseconds = None,
    order: Order = "newest",
) -> Response:
    """Of the last seven days, if `since` isn't said. `user` is whose key it was, `end_user` whom the caller named; `request_id`
    is ours or the client's own."""
    filters: dict[str, Any] = {
        "since": since or (until or datetime.now(UTC)) - LOOK_BACK,
        "until": until,
        "key_id": key,
        "key_name": key_name,
        "team": caller.team or team,
        "user": user,
        "end_user": end_user,
        "project": project,
        "model": model,
        "backend": backend,
        "operation": operation,
        "outcome": outcome,
        "cache": cache,
        "error_code": error_code,
        "trace_id": trace_id,
        "request_id": request_id,
        "status_from": status_from,
        "status_to": status_to,
        "min_duration_ns": _ns(min_duration_ms),
        "min_first_token_ns": _ns(min_first_token_ms),
    }

    def look(connection: Connection) -> list[RequestRow]:
        if caller.team is not None and team not in (None, caller.team):
            return []
        return requests_found(connection, **filters, order=order, before=part.after, limit=part.most)

    return answer(part.page(await given.database.read(look), _show, lambda row: cursor_of(row, order)))


@router.get("/requests/{request_id}", summary="One request", **documented(Request))
@allow(*READERS)
async def one(
    given: Given, caller: Asking, request_id: Annotated[str, Path(description="As `x-request-id` had it.")]
) -> Response:
    row = await given.database.read(request_of, request_id)
    if row is None or not caller.sees(row.team or None):
        raise missing("request", request_id)
    return answer(_show(row))


# -- answers --


def _show(row: RequestRow) -> Request:
    attempts = [exchange.Attempt(**each) for each in row.attempts]
    same = {name: getattr(row, name) for name in _SAME}
    time = [
        Span(name=name, from_ms=since / _NS, ms=(to - since) / _NS) for name, since, to in exchange.named_times(row, attempts)
    ]
    return Request(
        **same,
        received_at=when(row.received_at),
        user=row.user_name,
        cost=f"{Decimal(row.cost_nano).scaleb(-9):f}",
        age_ms=_reached(row.age_ns),
        saved_cost=f"{Decimal(row.saved_cost_nano).scaleb(-9):f}",
        saved_ms=_reached(row.saved_ns),
        scores=[Score(**each) for each in row.scores],
        total_ms=row.ended_ns / _NS,
        wait_ms=next((span.ms for span in time if span.name == "wait"), None),
        first_token_ms=_reached(row.first_token_ns),
        first_content_ms=_reached(row.first_content_ns),
        proxy_added_ms=row.proxy_added_ns / _NS,
        longest_gap_ms=_reached(row.inter_token_max_ns),
        time=time,
        attempts=[
            Attempt(
                backend=each.backend,
                started_ms=_reached(each.started_ns),
                connected_ms=_reached(each.connected_ns),
                first_byte_ms=_reached(each.first_byte_ns),
                ended_ms=_reached(each.ended_ns),
                status=each.status,
                reused=each.reused,
                error=each.error,
            )
            for each in attempts
        ],
    )


_SAME = set(Request.__struct_fields__) & set(RequestRow.__struct_fields__) - {"received_at", "attempts", "scores"}


def _reached(ns: int) -> float | None:
    return ns / _NS if ns else None


def _ns(ms: float | None) -> int | None:
    return None if ms is None else round(ms * _NS)
