"""What chat and completions have in common: the request's facts, and how usage is asked for."""

from __future__ import annotations

from proxy.exchange import Record
from proxy.wire.body import Request, read_request, with_more_stream_options, with_stream_options
from proxy.wire.operation import MAX_TEXT, Upstream
from proxy.wire.stream import Terms

_EVERY_CHUNK = b'{"include_usage":true,"continuous_usage_stats":true}'
_AT_THE_END = b'{"include_usage":true}'
_AS_IT_CAME = Terms()


def read_generation(body: bytes, record: Record) -> Request:
    """The request, its facts written on the record. Raises InvalidRequest."""
    request = read_request(body)
    record.model = request.model[:MAX_TEXT]
    if request.stream:
        record.stream = True
    if request.n is not None:
        record.choices = min(max(1, request.n), 1_000_000)
    record.max_tokens = request.max_completion_tokens or request.max_tokens
    record.temperature = request.temperature
    record.top_p = request.top_p
    if request.user:
        record.user = request.user[:MAX_TEXT]
    return request


def prepare_generation(body: bytes, request: Request, kind: str) -> Upstream:
    """Ask for usage on streams: of a vLLM on every chunk, so that an abort has a count too; of others at the end.

    Source: vLLM's `stream_options` (`include_usage`, `continuous_usage_stats`); OpenAI's has `include_usage` alone.
    """
    if not request.stream:
        return body, _AS_IT_CAME
    options = request.stream_options
    asked = options is not None and bool(options.include_usage)
    asked_every_chunk = asked and options is not None and bool(options.continuous_usage_stats)
    vllm = kind == "vllm"
    n = max(1, request.n or 1)
    if asked_every_chunk or (asked and not vllm):
        return body, Terms(n=n)
    terms = Terms(cut_usage=True, drop_usage_chunk=not asked, move_fingerprint=vllm and not asked, n=n)
    wanted = _EVERY_CHUNK if vllm else _AT_THE_END
    if options is None and b'"stream_options"' not in body:
        return with_stream_options(body, wanted), terms
    rewritten = with_more_stream_options(body, wanted, options)
    return (body, Terms(n=n)) if rewritten is None else (rewritten, terms)
