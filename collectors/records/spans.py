"""Record → OpenTelemetry spans. Pure: the same record gives the same spans, ids and all.

    POST /v1/chat/completions     SERVER, kind CHAIN: the request as its caller sees it
    ├── cache                     INTERNAL, kind CHAIN: an answer that the cache had; linked to the request that it was made for
    ├── coalesce                  the same, of an answer that another request was getting at that moment
    ├── wait                      INTERNAL, kind CHAIN: until a backend had room, if it had to wait
    ├── attempt gpu-0             CLIENT, kind CHAIN, ERROR: a try that failed
    └── chat qwen3-8b             CLIENT, kind LLM (or as _KINDS says): the try that answered, with tokens and cost
        ├── prefill               until the first token
        └── decode                from the first token to the last

Two vocabularies on one span: OpenTelemetry's GenAI semantic conventions (1.41) and OpenInference's, which Phoenix shows. Where
Phoenix would read a thing twice it is sent once: tokens are on one span only, whatever was tried before, so its sums are ours.
More spans would say more, but Phoenix takes about a hundred a second: what happens within a step is an event or an attribute.
An answer that no engine gave for this request has no tokens, of which Phoenix would make a cost; what it saved has other names.
Phoenix drops links, so what they say is in attributes too (`glasshouse.source.*`).

Ids: the trace is the record's, the root is its span id, attempt k (from 1) is `span id + k`, which is what the engine got in its
`traceparent`; so an engine that traces hangs its own spans under the right one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from openinference.semconv.trace import DocumentAttributes, RerankerAttributes
from openinference.semconv.trace import SpanAttributes as OpenInference
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from collectors.records.bounded import MAX_TEXT, bounded_json, cut
from collectors.records.content import Conversation, Document, Ranking, read_content
from collectors.records.metrics import FROM_CACHE, attempt_result
from proxy import __version__
from proxy.errors import Outcome
from proxy.exchange import Attempt, Record, UsageSource, named_times
from proxy.journal import Content
from proxy.wire import models
from proxy.wire.operations import OPERATIONS

SCOPE = InstrumentationScope("glasshouse", __version__, "https://opentelemetry.io/schemas/1.41.0")

PREFILL, DECODE, WAIT, CACHE = 1 << 32, 2 << 32, 3 << 32, 4 << 32
"""What is added to the root's id for them: far from any attempt's number."""

_ID_MASK = 0xFFFFFFFFFFFFFFFF
_MAX_INT = 2**63 - 1
_SUCCESSES = frozenset({Outcome.OK, Outcome.CACHED, Outcome.COALESCED})
_OUTCOMES = {outcome.value: outcome.label for outcome in Outcome}
_SOURCES = {source.value: source.name.lower() for source in UsageSource}

_ROUTES = {
    **{
        each.name: (each.method.decode(), each.path.decode())
        for each in sorted(OPERATIONS, key=lambda each: each.path.startswith(b"/v1/"))
    },
    models.RETRIEVE.name: (models.RETRIEVE.method.decode(), f"{models.PREFIX.decode()}{{model}}"),
}
"""Operation → (method, path). Of several paths that mean the same, which a record doesn't tell apart, the one in /v1."""

_PATHS = Counter(each.name for each in OPERATIONS)
"""How many paths an operation has."""

_GEN_AI_OPERATIONS = {
    "chat": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
"""What the conventions have a name for; what they haven't goes by its own."""

_KINDS = {
    "embeddings": "EMBEDDING",
    "rerank": "RERANKER",
    "score": "RERANKER",
    "count_tokens": "CHAIN",
    "tokenize": "CHAIN",
    "detokenize": "CHAIN",
    "usage": "CHAIN",
}
"""Whatever isn't here generates: LLM, the only kind whose tokens Phoenix counts and prices. No model is at work in a CHAIN."""

MAX_DOCUMENTS = 100
"""That a ranking's span shows: each is attributes of its own."""

Attributes = dict[str, Any]


def resource(project: str) -> Resource:
    """Who speaks, and the Phoenix project that it belongs to."""
    return Resource.create(
        {"service.name": "glasshouse", "service.version": __version__, "openinference.project.name": project},
    )


def spans_of(record: Record, content: Content | None = None, source: Resource | None = None) -> list[ReadableSpan]:
    """The trace of a request that has ended, root first. `content` is what was captured of its bodies."""
    return _Trace(record, content, source or Resource({})).spans()


def count_spans(record: Record) -> int:
    """How many `spans_of` would make."""
    return 1 + _from_cache(record) + bool(record.wait_ns) + len(record.attempts) + 2 * _has_phases(record)


def is_sampled(record: Record) -> bool:
    """False if the request belongs to a caller's trace that was not to be recorded (W3C Trace Context, sampled flag)."""
    return not record.parent_span_id or bool(record.trace_flags & 1)


def timings_ms(record: Record) -> dict[str, float]:
    """Where the time went, as `named_times` has it; the parts sum up to `total` (but for rounding)."""
    parts = {name: _ms(to - since) for name, since, to in named_times(record, record.attempts)}
    parts["total"] = _ms(record.ended_ns)
    return parts


class _Trace:
    """The spans of one record, while they are made."""

    def __init__(self, record: Record, content: Content | None, source: Resource) -> None:
        self._record = record
        self._source = source
        self._said = read_content(record.operation, content) if content is not None else None
        self._trace_id = int.from_bytes(record.trace_id)
        self._model_attempt = _model_attempt(record)

    def spans(self) -> list[ReadableSpan]:
        record = self._record
        made = [self._root()]
        if _from_cache(record):
            made.append(self._cache())
        if record.wait_ns:
            made.append(self._wait())
        for number, attempt in enumerate(record.attempts, 1):
            if attempt is self._model_attempt:
                made.append(self._model(number, attempt))
                if _has_phases(record):
                    made += self._phases(number, attempt)
            else:
                made.append(self._failed(number, attempt))
        return made

    # -- the spans --

    def _root(self) -> ReadableSpan:
        record = self._record
        method, path = _ROUTES.get(record.operation, ("POST", ""))
        attributes = {
            OpenInference.OPENINFERENCE_SPAN_KIND: "CHAIN",
            "http.request.method": method,
            "http.route": path,
            "url.path": path if _PATHS[record.operation] == 1 else None,
            "http.response.status_code": record.status,
            "client.address": record.client_address or None,
            "http.request.body.size": record.request_bytes,
            "http.response.body.size": record.response_bytes,
            "glasshouse.team": record.team or None,
            "glasshouse.user": record.user_name or None,
            "glasshouse.project": record.project or None,
            "glasshouse.refused_by": record.refused_by or None,
            "glasshouse.over_budget": record.over_budget or None,
            "glasshouse.routed_by": record.routed_by or None,
            "glasshouse.routing.scores": _scores(record) or None,
            "glasshouse.fallback_of": record.fallback_of or None,
            "glasshouse.cache": record.cache or None,
            OpenInference.METADATA: json.dumps(_metadata(record)),
            OpenInference.TAG_TAGS: _tags(record),
            **_who(record),
            **self._texts(),
            **_error_attributes(record),
        }
        name = f"{method} {path}" if path else record.operation or "request"
        parent = self._context(record.parent_span_id, remote=True) if record.parent_span_id else None
        return self._span(
            name,
            record.span_id,
            parent,
            SpanKind.SERVER,
            0,
            record.ended_ns,
            attributes,
            _status(record),
            [*self._moments(), *self._exception()],
        )

    def _cache(self) -> ReadableSpan:
        """From the look-up on: a hit is over with it, a shared answer with its engine's last byte."""
        record = self._record
        shared = record.cache == "coalesced"
        end = (record.upstream_ended_ns or record.ended_ns) if shared else record.looked_up_ns
        attributes = {
            OpenInference.OPENINFERENCE_SPAN_KIND: "CHAIN",
            "glasshouse.cache": record.cache,
            **_saved(record),
            **_source(record),
            **self._texts(),
            **_error_attributes(record),
        }
        name, parent = "coalesce" if shared else "cache", self._context(record.span_id)
        kind, status, at = SpanKind.INTERNAL, _status(record), record.admitted_ns
        return self._span(name, record.span_id + CACHE, parent, kind, at, end, attributes, status, links=_links(record))

    def _wait(self) -> ReadableSpan:
        record = self._record
        end = record.queued_ns + record.wait_ns
        status = Status(StatusCode.OK) if record.attempts else _status(record)
        attributes = {OpenInference.OPENINFERENCE_SPAN_KIND: "CHAIN", "glasshouse.wait_ms": _ms(record.wait_ns)}
        parent = self._context(record.span_id)
        return self._span("wait", record.span_id + WAIT, parent, SpanKind.INTERNAL, record.queued_ns, end, attributes, status)

    def _failed(self, number: int, attempt: Attempt) -> ReadableSpan:
        """A try without tokens: what it cost, if anything, is not known, and must not be counted twice."""
        attributes = {
            OpenInference.OPENINFERENCE_SPAN_KIND: "CHAIN",
            **_attempt_attributes(number, attempt),
            "error.type": attempt_result(attempt),
        }
        status = Status(StatusCode.ERROR, attempt_result(attempt))
        return self._child(f"attempt {attempt.backend}", number, SpanKind.CLIENT, attempt, attributes, status)

    def _model(self, number: int, attempt: Attempt) -> ReadableSpan:
        record = self._record
        operation = _GEN_AI_OPERATIONS.get(record.operation, record.operation)
        kind = _KINDS.get(record.operation, "LLM")
        attributes = {
            OpenInference.OPENINFERENCE_SPAN_KIND: kind,
            **(self._inference(operation, kind, attempt) if kind != "CHAIN" else {}),
            **_attempt_attributes(number, attempt),
            **_who(record),
            **self._texts(),
            **_error_attributes(record),
        }
        name = f"{operation} {_asked_for(record)}".rstrip()
        return self._child(name, number, SpanKind.CLIENT, attempt, attributes, _status(record))

    def _inference(self, operation: str, kind: str, attempt: Attempt) -> Attributes:
        """What a model was asked, said and took."""
        record = self._record
        return {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "openai_compatible",
            "gen_ai.request.model": _asked_for(record),
            "gen_ai.response.model": record.model,
            RerankerAttributes.RERANKER_MODEL_NAME: record.model if kind == "RERANKER" else None,
            **_request_attributes(record),
            **_response_attributes(record, attempt),
            **_usage_attributes(record),
            **_engine_attributes(record),
            **self._messages(),
        }

    def _phases(self, number: int, attempt: Attempt) -> list[ReadableSpan]:
        record = self._record
        parent = self._context(record.span_id + number)
        sent = max(attempt.started_ns, record.sent_ns)
        gaps = max(0, sum(record.inter_token_counts))
        decode = {
            OpenInference.OPENINFERENCE_SPAN_KIND: "CHAIN",
            "glasshouse.decode.chunks": record.chunks,
            "glasshouse.decode.longest_gap_ms": _ms(record.inter_token_max_ns),
            **({"glasshouse.decode.mean_gap_ms": _ms(record.inter_token_sum_ns / gaps)} if gaps else {}),
        }
        prefill = {OpenInference.OPENINFERENCE_SPAN_KIND: "CHAIN", "glasshouse.prefill.input_tokens": _int(record.input_tokens)}
        ok, first, last = Status(StatusCode.OK), record.first_token_ns, max(record.first_token_ns, record.last_token_ns)
        return [
            self._span("prefill", record.span_id + PREFILL, parent, SpanKind.INTERNAL, sent, first, prefill, ok),
            self._span("decode", record.span_id + DECODE, parent, SpanKind.INTERNAL, first, last, decode, ok),
        ]

    # -- their parts --

    def _child(
        self, name: str, number: int, kind: SpanKind, attempt: Attempt, attributes: Attributes, status: Status
    ) -> ReadableSpan:
        record = self._record
        parent = self._context(record.span_id)
        end = attempt.ended_ns or record.ended_ns
        return self._span(name, record.span_id + number, parent, kind, attempt.started_ns, end, attributes, status)

    def _span(
        self,
        name: str,
        span_id: int,
        parent: SpanContext | None,
        kind: SpanKind,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        status: Status,
        events: list[Event] | None = None,
        links: Sequence[Link] = (),
    ) -> ReadableSpan:
        origin = self._record.received_unix_ns
        return ReadableSpan(
            name=name,
            context=self._context(span_id),
            parent=parent,
            resource=self._source,
            attributes={key: value for key, value in attributes.items() if value is not None},
            events=events or [],
            links=links,
            kind=kind,
            status=status,
            start_time=origin + start_ns,
            end_time=origin + max(start_ns, end_ns),
            instrumentation_scope=SCOPE,
        )

    def _context(self, span_id: int, *, remote: bool = False) -> SpanContext:
        return SpanContext(self._trace_id, span_id & _ID_MASK, remote, TraceFlags(TraceFlags.SAMPLED))

    def _moments(self) -> list[Event]:
        """The request's way, step by step."""
        record = self._record
        moments = (
            ("request read", record.read_ns),
            ("authenticated", record.authenticated_ns),
            ("admitted", record.admitted_ns),
            ("looked up", record.looked_up_ns),
            ("queued", record.queued_ns),
            ("sent", record.sent_ns),
            ("first byte", record.first_byte_ns),
            ("first token", record.first_token_ns),
            ("first content", record.first_content_ns),
            ("last token", record.last_token_ns),
            ("engine done", record.upstream_ended_ns),
        )
        return [Event(name, {"after_ms": _ms(at)}, record.received_unix_ns + at) for name, at in moments if at]

    def _exception(self) -> list[Event]:
        record = self._record
        if record.outcome in _SUCCESSES:
            return []
        attributes = {"exception.type": _error_type(record), "exception.message": record.error}
        name = "client gone" if record.outcome == Outcome.CLIENT_GONE else "exception"
        return [Event(name, attributes, record.received_unix_ns + record.ended_ns)]

    def _texts(self) -> Attributes:
        if self._said is None:
            return {}
        return {
            OpenInference.INPUT_VALUE: cut(self._said.input_text),
            OpenInference.INPUT_MIME_TYPE: "text/plain",
            OpenInference.OUTPUT_VALUE: cut(self._said.output_text),
            OpenInference.OUTPUT_MIME_TYPE: "text/plain",
        }

    def _messages(self) -> Attributes:
        said = self._said
        if said is None:
            return {}
        return {**_messages(said), **(_ranking(said.ranking) if said.ranking is not None else {})}


def _messages(said: Conversation) -> Attributes:
    named = (
        ("gen_ai.input.messages", said.input_messages),
        ("gen_ai.output.messages", said.output_messages),
        ("gen_ai.tool.definitions", said.tools),
    )
    return {key: bounded_json(value) for key, value in named if value}


def _ranking(ranking: Ranking) -> Attributes:
    return {
        RerankerAttributes.RERANKER_QUERY: cut(ranking.query),
        **_documents(RerankerAttributes.RERANKER_INPUT_DOCUMENTS, ranking.documents[:MAX_DOCUMENTS]),
        **_documents(RerankerAttributes.RERANKER_OUTPUT_DOCUMENTS, ranking.ranked[:MAX_DOCUMENTS]),
    }


def _documents(name: str, documents: Sequence[Document]) -> Attributes:
    attributes: Attributes = {}
    for position, document in enumerate(documents):
        attributes[f"{name}.{position}.{DocumentAttributes.DOCUMENT_CONTENT}"] = cut(document.text, MAX_TEXT // len(documents))
        attributes[f"{name}.{position}.{DocumentAttributes.DOCUMENT_SCORE}"] = document.score
    return attributes


# -- facts --


def _model_attempt(record: Record) -> Attempt | None:
    """The try that answered, wholly or in part: the last, if it did well or left tokens behind."""
    if not record.attempts:
        return None
    last = record.attempts[-1]
    return last if record.usage_source != UsageSource.NONE or attempt_result(last) == "ok" else None


def _from_cache(record: Record) -> bool:
    """Its answer was not made for it."""
    return record.cache in FROM_CACHE


def _has_phases(record: Record) -> bool:
    return bool(record.first_token_ns) and _model_attempt(record) is not None


def _asked_for(record: Record) -> str:
    """The model as the caller called it."""
    return record.requested_model or record.fallback_of or record.model


def _status(record: Record) -> Status:
    """OK where all went well; unset where the caller left: nobody's error, and no success either."""
    if record.outcome in _SUCCESSES:
        return Status(StatusCode.OK)
    if record.outcome == Outcome.CLIENT_GONE:
        return Status(StatusCode.UNSET)
    return Status(StatusCode.ERROR, record.error or _error_type(record))


def _error_type(record: Record) -> str:
    return record.error_code or _OUTCOMES.get(record.outcome, "error")


def _error_attributes(record: Record) -> Attributes:
    failed = record.outcome not in _SUCCESSES and record.outcome != Outcome.CLIENT_GONE
    return {"error.type": _error_type(record)} if failed else {}


def _who(record: Record) -> Attributes:
    return {OpenInference.USER_ID: record.user or record.key_name or None}


def _tags(record: Record) -> list[str]:
    return [
        tag
        for tag in (
            record.operation,
            record.model,
            record.backend,
            _OUTCOMES.get(record.outcome, ""),
            "stream" if record.stream else "",
            "retried" if len(record.attempts) > 1 else "",
            "queued" if record.queued_ns else "",
            "fallback" if record.fallback_of else "",
            f"cache {record.cache}" if record.cache else "",
        )
        if tag
    ]


def _metadata(record: Record) -> Mapping[str, Any]:
    """What can be filtered by in Phoenix, as `metadata["key"] == "search"`."""
    facts: dict[str, Any] = {
        "request_id": record.hex_id,
        "client_request_id": record.client_request_id,
        "operation": record.operation,
        "key": record.key_name,
        "key_id": record.key_id,
        "team": record.team,
        "user": record.user_name,
        "project": record.project,
        "requested_model": record.requested_model,
        "model": record.model,
        "backend": record.backend,
        "routed_by": record.routed_by,
        "scores": _scores(record),
        "fallback_of": record.fallback_of,
        "cache": record.cache,
        **({"saved": _saved_facts(record), "source": _source_facts(record)} if _from_cache(record) else {}),
        "outcome": _OUTCOMES.get(record.outcome, str(record.outcome)),
        "status": record.status,
        "error_code": record.error_code,
        "refused_by": record.refused_by,
        "over_budget": record.over_budget,
        "usage_source": _SOURCES.get(record.usage_source, ""),
        "cost": record.cost_nano / 1e9,
        "currency": record.currency,
        "proxy_added_ms": _ms(record.proxy_added_ns()),
        "timings_ms": timings_ms(record),
        "attempts": [_attempt_facts(attempt) for attempt in record.attempts],
        "unsent_bytes": record.unsent_bytes,
    }
    return {name: value for name, value in facts.items() if value not in ("", [], None)}


def _scores(record: Record) -> list[str]:
    return [f"{backend}: {score}" for backend, score in record.scores]


def _saved_facts(record: Record) -> dict[str, Any]:
    """What an engine would have taken for it; cost in the record's currency."""
    return {
        "input_tokens": _int(record.saved_input_tokens),
        "output_tokens": _int(record.saved_output_tokens),
        "cost": record.saved_cost_nano / 1e9,
        "ms": _ms(record.saved_ns),
    }


def _source_facts(record: Record) -> dict[str, Any]:
    """Whose answer it is."""
    facts = {
        "request_id": record.source_id.hex(),
        "trace_id": record.source_trace_id.hex(),
        "age_ms": _ms(record.age_ns),
        "similarity": record.similarity,
    }
    return {name: value for name, value in facts.items() if value}


def _saved(record: Record) -> Attributes:
    saved = {f"glasshouse.saved.{name}": value for name, value in _saved_facts(record).items()}
    return {**saved, "glasshouse.currency": record.currency or None}


def _source(record: Record) -> Attributes:
    return {f"glasshouse.source.{name}": value for name, value in _source_facts(record).items()}


def _links(record: Record) -> list[Link]:
    """To the root of the request whose answer it is."""
    trace, span = int.from_bytes(record.source_trace_id), record.source_span_id
    if not trace or not span:
        return []
    return [Link(SpanContext(trace, span & _ID_MASK, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)))]


def _attempt_facts(attempt: Attempt) -> dict[str, Any]:
    return {
        "backend": attempt.backend,
        "result": attempt_result(attempt),
        "status": attempt.status,
        "started_ms": _ms(attempt.started_ns),
        "ended_ms": _ms(attempt.ended_ns),
        "reused": attempt.reused,
    }


def _attempt_attributes(number: int, attempt: Attempt) -> Attributes:
    connect = attempt.connected_ns - attempt.started_ns if attempt.connected_ns else None
    return {
        "glasshouse.attempt": number,
        "glasshouse.backend": attempt.backend,
        "glasshouse.connection.reused": attempt.reused,
        "glasshouse.connect_ms": None if connect is None else _ms(connect),
        "http.response.status_code": attempt.status or None,
    }


def _request_attributes(record: Record) -> Attributes:
    parameters = {
        "max_tokens": None if record.max_tokens is None else _int(record.max_tokens),
        "temperature": record.temperature,
        "top_p": record.top_p,
        "n": _int(record.choices) if record.choices != 1 else None,
        "stream": record.stream,
    }
    known = {name: value for name, value in parameters.items() if value is not None}
    return {
        OpenInference.LLM_MODEL_NAME: record.model,
        OpenInference.LLM_INVOCATION_PARAMETERS: json.dumps(known),
        "gen_ai.request.max_tokens": parameters["max_tokens"],
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.top_p": record.top_p,
        "gen_ai.request.choice.count": parameters["n"],
        "gen_ai.request.stream": record.stream,
    }


def _response_attributes(record: Record, attempt: Attempt) -> Attributes:
    sent = max(attempt.started_ns, record.sent_ns)
    first = record.first_token_ns
    return {
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        OpenInference.LLM_FINISH_REASON: ",".join(record.finish_reasons) or None,
        "gen_ai.response.time_to_first_chunk": max(0, first - sent) / 1e9 if first else None,
        "glasshouse.time_to_first_token_ms": _ms(first) if first else None,
        "glasshouse.time_to_first_content_ms": _ms(record.first_content_ns) if record.first_content_ns else None,
        "glasshouse.longest_gap_ms": _ms(record.inter_token_max_ns) if record.inter_token_max_ns else None,
        "glasshouse.output_tokens_per_second": _rate(record),
    }


def _rate(record: Record) -> float | None:
    took = record.last_token_ns - record.first_token_ns
    return round((record.output_tokens - 1) * 1e9 / took, 3) if took > 0 and record.output_tokens > 1 else None


def _usage_attributes(record: Record) -> Attributes:
    if record.usage_source == UsageSource.NONE:
        return {}
    prompt, cached = _int(record.input_tokens), _int(record.cached_tokens)
    completion, reasoning = _int(record.output_tokens), _int(record.reasoning_tokens)
    return {
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": completion,
        "gen_ai.usage.cache_read.input_tokens": cached,
        "gen_ai.usage.reasoning.output_tokens": reasoning,
        OpenInference.LLM_TOKEN_COUNT_PROMPT: prompt,
        OpenInference.LLM_TOKEN_COUNT_COMPLETION: completion,
        OpenInference.LLM_TOKEN_COUNT_TOTAL: _int(prompt + completion),
        OpenInference.LLM_TOKEN_COUNT_PROMPT_DETAILS_CACHE_READ: cached,
        OpenInference.LLM_TOKEN_COUNT_COMPLETION_DETAILS_REASONING: reasoning,
        OpenInference.LLM_COST_TOTAL: record.cost_nano / 1e9,
        "glasshouse.usage_source": _SOURCES.get(record.usage_source, ""),
        "glasshouse.cost": record.cost_nano / 1e9,
        "glasshouse.currency": record.currency or None,
        "glasshouse.audio_seconds": _int(record.audio_seconds) or None,
    }


def _engine_attributes(record: Record) -> Attributes:
    """The engine's own word on this request."""
    engine = record.engine
    if engine is None:
        return {}
    return {
        "glasshouse.engine.queue_ms": engine.queue_ms,
        "glasshouse.engine.time_to_first_token_ms": engine.time_to_first_token_ms,
        "glasshouse.engine.prefill_ms": engine.prefill_ms,
        "glasshouse.engine.decode_ms": engine.decode_ms,
        "glasshouse.engine.mean_inter_token_ms": engine.mean_inter_token_ms,
    }


def _ms(ns: float) -> float:
    return round(ns / 1e6, 3)


def _int(value: int) -> int:
    """OTLP has 64 bits; callers and engines may write more."""
    return min(value, _MAX_INT)
