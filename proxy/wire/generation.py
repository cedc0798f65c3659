"""What chat and completions have in common: the request's facts, and how usage is asked for."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Raw

from proxy.exchange import Record
from proxy.wire.body import Integer, Request, more_stream_options, read_stream_options, with_stream_options
from proxy.wire.caching import Caching
from proxy.wire.operation import MAX_TEXT, Upstream
from proxy.wire.stream import Terms

_EVERY_CHUNK = b'{"include_usage":true,"continuous_usage_stats":true}'
_AT_THE_END = b'{"include_usage":true}'


class GenerationRequest(Request, kw_only=True):
    """What the proxy reads of either. Source: OpenAI's API reference; vLLM's additions are `prompt_logprobs` and
    `structured_outputs`."""

    stream_options: Raw = Raw(b"")
    n: Integer | None = None
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    logprobs: bool | Integer | None = None
    top_logprobs: Integer | None = None
    prompt_logprobs: Integer | None = None
    stop: Raw = Raw(b"")
    tools: Raw = Raw(b"")
    response_format: Raw = Raw(b"")
    structured_outputs: Raw = Raw(b"")
    seed: Integer | None = None


R = TypeVar("R", bound=GenerationRequest)

CACHING = Caching(
    # How an answer is sent is a matter of its own (`Form`). Who asks, and how OpenAI groups and keeps prompts, no answer shows.
    # Engines take the id in our header instead of `request_id`.
    ignored=frozenset(
        (
            *("stream", "stream_options", "user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention"),
            *("request_id", "priority"),
        )
    ),
    # A stored completion can be asked for later. What is transferred is another engine's. What was found in the web changes, and
    # llama.cpp's progress is of one moment.
    never=frozenset(("store", "kv_transfer_params", "ec_transfer_params", "web_search_options", "return_progress")),
    drawn=True,
)


def write_facts(request: R, record: Record) -> R:
    """What a request asks for, on its record."""
    record.model = (request.model or "")[:MAX_TEXT]
    if request.stream:
        record.stream = True
    if request.n is not None:
        record.choices = choices_of(request)
    record.max_tokens = request.max_completion_tokens or request.max_tokens
    record.temperature = request.temperature
    record.top_p = request.top_p
    if request.user:
        record.user = request.user[:MAX_TEXT]
    return request


def choices_of(request: GenerationRequest) -> int:
    """For each prompt."""
    return 1 if request.n is None else min(max(1, request.n), 1_000_000)


def prepare_generation(body: bytes, request: GenerationRequest, kind: str) -> Upstream:
    """Ask for usage on streams: of a vLLM on every chunk, so that an abort has a count too; of others at the end.

    Source: vLLM's `stream_options` (`include_usage`, `continuous_usage_stats`); OpenAI's has `include_usage` alone.
    """
    if not request.stream:
        return Upstream(body)
    said = request.stream_options
    options = read_stream_options(said) if len(said) else None
    asked = options is not None and bool(options.include_usage)
    asked_every_chunk = asked and options is not None and bool(options.continuous_usage_stats)
    vllm = kind == "vllm"
    n = max(1, request.n or 1)
    if asked_every_chunk or (asked and not vllm):
        return Upstream(body, Terms(n=n))
    terms = Terms(cut_usage=True, drop_usage_chunk=not asked, move_fingerprint=vllm and not asked, n=n)
    wanted = _EVERY_CHUNK if vllm else _AT_THE_END
    if not len(said):
        before, rest = with_stream_options(body, wanted)
        return Upstream(rest, terms, before=before)
    more = more_stream_options(body, wanted, options)
    return Upstream(body, Terms(n=n)) if more is None else Upstream(body, terms, changes=(more,))
