"""Token counts, finish reasons and engine timings, as engines write them.

Source: OpenAI's `usage` object; vLLM adds `prompt_tokens_details.cached_tokens` (with `--enable-prompt-tokens-details`) and
`completion_tokens_details.reasoning_tokens` (with a reasoning parser). Cached input is part of input, reasoning part of output.

An explicit 0 is 0. A count that is missing, null or no whole number is unknown, and what is unknown is never written as 0.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from proxy.exchange import EngineTimings, Record, UsageSource

MAX_COUNT = 2**63 - 1
"""What a record, and a ledger, can hold."""
MAX_REASON = 64
"""Characters of a finish reason."""
Count = Annotated[int, msgspec.Meta(le=MAX_COUNT)]
_ENGINE: Final = UsageSource.ENGINE


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _ResponseUsage(msgspec.Struct, gc=False):
    """The same by other names, as `/v1/responses` has it."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: _PromptDetails | None = None
    output_tokens_details: _CompletionDetails | None = None


class _MessageUsage(msgspec.Struct, gc=False):
    """Anthropic's. Its input leaves out what was read from a cache or written to one."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None


class _Metrics(msgspec.Struct, gc=False):
    """vLLM's `metrics` block."""

    time_to_first_token_ms: float | None = None
    generation_time_ms: float | None = None
    queue_time_ms: float | None = None
    mean_itl_ms: float | None = None


class _Timings(msgspec.Struct, gc=False):
    """llama.cpp's `timings` block."""

    prompt_ms: float | None = None
    predicted_ms: float | None = None
    predicted_per_token_ms: float | None = None


_usage = msgspec.json.Decoder(Usage)
_response_usage = msgspec.json.Decoder(_ResponseUsage)
_message_usage = msgspec.json.Decoder(_MessageUsage)
_metrics = msgspec.json.Decoder(_Metrics)
_timings = msgspec.json.Decoder(_Timings)
_anything = msgspec.json.Decoder()
_unreadable = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def read_usage(raw: bytes) -> Usage | None:
    """What a `usage` object says; None if it says nothing that can be used."""
    usage: Usage | None
    try:
        usage = _usage.decode(raw)
    except _unreadable:
        usage = _forgiving(raw)
    if usage is None or (usage.prompt_tokens is None and usage.completion_tokens is None):
        return None
    negative = any(count is not None and count < 0 for count in (usage.prompt_tokens, usage.completion_tokens))
    return None if negative else usage


def read_response_usage(raw: bytes) -> Usage | None:
    """What a `usage` object of `/v1/responses` says; None if it says nothing that can be used."""
    try:
        said = _response_usage.decode(raw)
    except _unreadable:
        return None
    if said.input_tokens is None or said.output_tokens is None or min(said.input_tokens, said.output_tokens) < 0:
        return None
    return Usage(said.input_tokens, said.output_tokens, said.input_tokens_details, said.output_tokens_details)


def read_message_usage(raw: bytes) -> Usage | None:
    """What a `usage` object of `/v1/messages` says, its input with what was cached; None if it says nothing that can be used."""
    try:
        said = _message_usage.decode(raw)
    except _unreadable:
        return None
    read, created = said.cache_read_input_tokens or 0, said.cache_creation_input_tokens or 0
    if min(said.input_tokens or 0, said.output_tokens or 0, read, created) < 0:
        return None
    if said.input_tokens is None:
        return None if said.output_tokens is None else Usage(None, said.output_tokens)
    return Usage(min(said.input_tokens + read + created, MAX_COUNT), said.output_tokens, _PromptDetails(read))


def write_usage(usage: Usage, record: Record) -> None:
    """Put the engine's counts on the record. Later counts replace earlier ones: an engine counts upwards."""
    if usage.prompt_tokens is not None:
        record.input_tokens = usage.prompt_tokens
    if usage.completion_tokens is not None:
        record.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        record.cached_tokens = max(0, usage.prompt_tokens_details.cached_tokens or 0)
    if usage.completion_tokens_details is not None:
        record.reasoning_tokens = max(0, usage.completion_tokens_details.reasoning_tokens or 0)
    if record.cached_tokens > record.input_tokens:
        record.cached_tokens = record.input_tokens
    if record.reasoning_tokens > record.output_tokens:
        record.reasoning_tokens = record.output_tokens
    record.usage_source = _ENGINE


ABORTED = "abort"
"""vLLM's word for a choice that it gave up. Where an API has none, it says no reason at all."""


def write_finish_reason(reason: str | None, record: Record) -> None:
    """Why a choice has ended, once for each: an engine that goes on saying so makes no record that is too long to be kept."""
    if reason and len(record.finish_reasons) < record.choices:
        record.finish_reasons.append(reason[:MAX_REASON])


def read_engine_timings(metrics: bytes | None, timings: bytes | None) -> EngineTimings | None:
    """vLLM's `metrics` or llama.cpp's `timings` (JSON) as EngineTimings; None where neither can be read."""
    try:
        if metrics and metrics != b"null":
            said = _metrics.decode(metrics)
            return EngineTimings(
                queue_ms=said.queue_time_ms,
                time_to_first_token_ms=said.time_to_first_token_ms,
                prefill_ms=said.time_to_first_token_ms,  # vLLM counts it from the scheduling on, not from the arrival
                decode_ms=said.generation_time_ms,
                mean_inter_token_ms=said.mean_itl_ms,
            )
        if timings and timings != b"null":
            own = _timings.decode(timings)
            return EngineTimings(
                prefill_ms=own.prompt_ms, decode_ms=own.predicted_ms, mean_inter_token_ms=own.predicted_per_token_ms
            )
    except _unreadable:
        return None
    return None


def _forgiving(raw: bytes) -> Usage | None:
    """Field by field, for a `usage` whose shape isn't the usual one: what is a whole number counts, the rest is unknown."""
    try:
        said = _anything.decode(raw)
    except _unreadable:
        return None
    if not isinstance(said, dict):
        return None
    cached = _whole(_field(said, "prompt_tokens_details", "cached_tokens"))
    reasoning = _whole(_field(said, "completion_tokens_details", "reasoning_tokens"))
    return Usage(
        prompt_tokens=_whole(said.get("prompt_tokens")),
        completion_tokens=_whole(said.get("completion_tokens")),
        prompt_tokens_details=_PromptDetails(cached) if cached is not None else None,
        completion_tokens_details=_CompletionDetails(reasoning) if reasoning is not None else None,
    )


def _field(said: dict[str, Any], outer: str, inner: str) -> Any:
    value = said.get(outer)
    return value.get(inner) if isinstance(value, dict) else None


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if 0 <= value <= MAX_COUNT else None
    if isinstance(value, float) and value.is_integer() and 0 <= value <= MAX_COUNT:
        return int(value)
    return None
