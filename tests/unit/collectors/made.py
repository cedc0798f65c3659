"""Records as a worker makes them."""

from __future__ import annotations

from typing import Any, Final

from proxy.errors import Outcome
from proxy.exchange import Attempt, EngineTimings, Record, UsageSource

MS: Final = 1_000_000
DAY: Final = 1_795_132_800_000_000_000
"""2026-11-20, 00:00 UTC."""


def identity(number: int) -> bytes:
    return (0x01A1F78608E5_7F8D_ACF3_000000000000 + number).to_bytes(16)


def make_record(number: int = 0, **facts: Any) -> Record:
    """A chat that streamed well: 5 tokens, 10 ms apart, the first after 40 ms."""
    record = Record(identity(number), identity(number), 2 * number + 0x1191BD66F985EABD, DAY + number * 1000 * MS)
    record.operation, record.model, record.stream = "chat", "qwen3-8b", True
    record.key_id, record.key_name = "key_1", "search"
    record.request_bytes, record.status = 300, 200
    record.read_ns, record.authenticated_ns, record.admitted_ns = 50_000, 60_000, 70_000
    record.attempts = [Attempt("gpu-0", 90_000, 300_000, 39 * MS, 80 * MS + 10_000, 200)]
    record.routed_by, record.scores = "auto.prefix", [("gpu-0", 200), ("gpu-1", 640)]
    record.sent_ns, record.first_byte_ns, record.first_token_ns, record.first_content_ns = 320_000, 39 * MS, 40 * MS, 40 * MS
    record.last_token_ns = record.first_token_ns
    for token in range(1, 5):
        record.gap((40 + 10 * token) * MS)
    record.upstream_ended_ns, record.ended_ns = 80 * MS + 10_000, 80 * MS + 60_000
    record.chunks, record.response_bytes = 6, 1800
    record.input_tokens, record.cached_tokens, record.output_tokens, record.reasoning_tokens = 600, 400, 5, 2
    record.usage_source, record.cost_nano, record.currency = UsageSource.ENGINE, 30_000, "USD"
    record.finish_reasons = ["stop"]
    for name, value in facts.items():
        setattr(record, name, value)
    return record


def make_queued(number: int = 0, ms: int = 3, **facts: Any) -> Record:
    """The same, but that it had to wait so long for a backend with room; the rest came sooner."""
    made = make_record(number, **facts)
    made.queued_ns = 80_000
    made.attempts[0].started_ns = made.queued_ns + ms * MS
    made.attempts[0].connected_ns, made.sent_ns = made.attempts[0].started_ns + 210_000, made.attempts[0].started_ns + 230_000
    return made


def make_rejected(number: int = 0, **facts: Any) -> Record:
    """A request that reached no engine."""
    made = Record(identity(number), identity(number), 2 * number + 1, DAY + number * 1000 * MS)
    made.operation, made.model, made.key_id, made.key_name = "chat", "no-such-model", "key_1", "search"
    made.status, made.outcome, made.error_code, made.error = 404, Outcome.CLIENT_ERROR, "model_not_found", "No such model."
    made.request_bytes, made.read_ns, made.authenticated_ns, made.admitted_ns = 200, 40_000, 50_000, 55_000
    made.ended_ns = 90_000
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def make_retried(number: int = 0, **facts: Any) -> Record:
    """The first backend was unreachable, the second answered in one piece."""
    made = make_record(number, stream=False, first_token_ns=0, first_content_ns=0, last_token_ns=0)
    made.inter_token_counts, made.inter_token_sum_ns, made.inter_token_max_ns, made.chunks = [], 0, 0, 0
    failed = Attempt("gpu-0", 90_000, 0, 0, 2 * MS, 0, False, "upstream_unreachable")
    made.routed_by, made.scores = "only", []
    made.attempts = [failed, Attempt("gpu-1", 2 * MS, 2 * MS + 200_000, 70 * MS, 80 * MS, 200)]
    made.sent_ns, made.first_byte_ns, made.upstream_ended_ns = 2 * MS + 250_000, 70 * MS, 80 * MS
    made.engine = EngineTimings(1.5, 30.0, 28.5, 40.0, 8.0)
    for name, value in facts.items():
        setattr(made, name, value)
    return made


SAVED: Final = {"saved_input_tokens": 600, "saved_output_tokens": 5, "saved_cost_nano": 30_000, "saved_ns": 80 * MS}
SOURCE: Final = {"source_id": identity(900), "source_trace_id": bytes(range(16)), "source_span_id": 0x00F067AA0BA902B7}


def make_hit(number: int = 0, **facts: Any) -> Record:
    """A stream that the cache had, 90 s old: all of it at once, and from no engine."""
    taken = {"input_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0, "cost_nano": 0}
    engines = {"attempts": [], "routed_by": "", "scores": [], "inter_token_counts": [], "usage_source": UsageSource.NONE}
    times = ("sent_ns", "first_byte_ns", "first_token_ns", "first_content_ns", "last_token_ns", "upstream_ended_ns")
    gaps = ("inter_token_sum_ns", "inter_token_max_ns")
    found = {"outcome": Outcome.CACHED, "cache": "hit", "looked_up_ns": 95_000, "age_ns": 90_000 * MS, "ended_ns": 150_000}
    return make_record(number, **{**taken, **engines, **dict.fromkeys((*times, *gaps), 0), **found, **SAVED, **SOURCE, **facts})


def make_coalesced(number: int = 0, **facts: Any) -> Record:
    """A stream that was under way when it was asked for, and so was shared: its times are its own, what came is another's."""
    times = {"first_byte_ns": 20 * MS, "first_token_ns": 21 * MS, "first_content_ns": 21 * MS, "last_token_ns": 60 * MS}
    ended = {"upstream_ended_ns": 61 * MS, "ended_ns": 61 * MS + 40_000, "age_ns": 0, "saved_ns": 0}
    return make_hit(number, **{"outcome": Outcome.COALESCED, "cache": "coalesced", **times, **ended, **facts})
