"""Record → spans: golden traces, and what holds for every record.

After a change that was meant: `python -m tests.unit.collectors.test_spans` writes the golden files anew; read the difference.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace.status import StatusCode

from collectors.records.bounded import MAX_TEXT
from collectors.records.content.loose_json import parse_json
from collectors.records.spans import MAX_DOCUMENTS, count_spans, is_sampled, resource, spans_of, timings_ms
from proxy.errors import Outcome
from proxy.exchange import Attempt, EngineTimings, Record, UsageSource
from proxy.journal import Content
from proxy.wire.operations import OPERATIONS
from tests.unit.collectors.content.said import bodies
from tests.unit.collectors.made import MS, make_coalesced, make_hit, make_queued, make_record, make_rejected, make_retried

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = Path(__file__).parents[2] / "fixtures" / "vllm-0.32.0"


def captured(name: str) -> Content:
    return Content((FIXTURES / f"{name}.request.json").read_bytes(), (FIXTURES / f"{name}.body").read_bytes())


def content(request: object, answer: object) -> Content:
    return Content(json.dumps(request).encode(), json.dumps(answer).encode())


TOOLS = content(
    {
        "input": "How is the weather?",
        "tools": [{"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}}],
    },
    {
        "status": "completed",
        "output": [
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Where?"}]},
            {"type": "function_call", "call_id": "call-1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        ],
    },
)
RANKED = content(
    {"query": "What is the capital of France?", "documents": ["Bread is made of flour.", "Paris is."]},
    {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]},
)
SPOKEN = Content(
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n'
    b'--x\r\nContent-Disposition: form-data; name="language"\r\n\r\nen\r\n--x--\r\n',
    b'{"text":"Hello.","usage":{"type":"duration","seconds":3}}',
)


def made(number: int, operation: str, **facts: Any) -> Record:
    """An answer in one piece, of an engine that says nothing of itself."""
    whole = {"attempts": [Attempt("gpu-0", 90_000, 300_000, 39 * MS, 80 * MS, 200)], "finish_reasons": [], "engine": None}
    return make_retried(number, **{**whole, "sent_ns": 320_000, "operation": operation, **facts})


TRACES: dict[str, tuple[Record, Content | None]] = {
    "stream": (make_record(1), None),
    "stream-with-content": (make_record(2, finish_reasons=["length"]), captured("chat_stream_usage")),
    "retried": (
        make_retried(
            3, parent_span_id=0xB7AD6B7169203331, client_request_id="theirs", user="mallory", client_address="192.0.2.7"
        ),
        None,
    ),
    "rejected": (make_rejected(4), None),
    "client-gone": (
        make_record(
            5, outcome=Outcome.CLIENT_GONE, error_code="client_disconnected", error="The client left.", finish_reasons=[]
        ),
        None,
    ),
    "broken-stream": (
        make_record(
            6,
            outcome=Outcome.UPSTREAM_ERROR,
            error_code="upstream_disconnected",
            error="The engine's stream ended before the answer was complete.",
            attempts=[Attempt("gpu-0", 90_000, 0, 39 * MS, 80 * MS, 200, True, "upstream_disconnected")],
        ),
        None,
    ),
    "embeddings": (
        make_retried(7, operation="embeddings", output_tokens=0, reasoning_tokens=0, finish_reasons=[], engine=None),
        None,
    ),
    "responses": (
        made(8, "responses", finish_reasons=["completed"], max_tokens=50, temperature=0.5, top_p=0.9, choices=2),
        TOOLS,
    ),
    "messages": (make_record(9, operation="messages", finish_reasons=["end_turn"]), captured("messages_stream")),
    "rerank": (made(10, "rerank", cached_tokens=0, output_tokens=0, reasoning_tokens=0), RANKED),
    "transcription": (
        made(
            11,
            "transcriptions",
            usage_source=UsageSource.ESTIMATED,
            audio_seconds=3,
            input_tokens=0,
            cached_tokens=0,
            reasoning_tokens=0,
        ),
        SPOKEN,
    ),
    "limited": (
        make_rejected(
            13,
            model="qwen3-8b",
            status=429,
            outcome=Outcome.REJECTED,
            error_code="insufficient_quota",
            error="Your team has used up its budget.",
            team="research",
            refused_by="team.budget",
        ),
        None,
    ),
    "alias": (make_record(15, team="research", user_name="ann", project="search", requested_model="gpt-4o"), None),
    "queued": (make_queued(16), None),
    "queued-in-vain": (
        make_rejected(
            17,
            model="qwen3-8b",
            status=503,
            outcome=Outcome.REJECTED,
            error_code="queue_timeout",
            error="No engine had room for this request within 60 s.",
            queued_ns=60_000,
            ended_ns=60_000 * MS,
        ),
        None,
    ),
    "fallback": (make_retried(18, fallback_of="qwen3-32b", routed_by="auto.load", scores=[("gpu-1", -32), ("gpu-2", 7)]), None),
    "hit": (make_hit(19), None),
    "similar": (make_hit(20, similarity=0.96875), captured("chat_stream_usage")),
    "coalesced": (make_coalesced(21), None),
    "miss": (make_record(22, cache="miss", looked_up_ns=75_000), None),
    "over_budget": (make_record(14, team="research", over_budget="key"), None),
    "tokenize": (
        made(
            12,
            "tokenize",
            usage_source=UsageSource.NONE,
            input_tokens=0,
            cached_tokens=0,
            output_tokens=0,
            reasoning_tokens=0,
            cost_nano=0,
            currency="",
        ),
        captured("tokenize"),
    ),
}


def as_json(span: ReadableSpan) -> dict[str, Any]:
    """A span as a golden file has it: times as ms after the first."""
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    links = [[f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}"] for link in span.links]
    return {
        "name": span.name,
        "trace": f"{context.trace_id:032x}",
        "span": f"{context.span_id:016x}",
        "parent": f"{parent.span_id:016x}" if parent else None,
        "kind": span.kind.name,
        "status": [span.status.status_code.name, span.status.description],
        "start": span.start_time,
        "end": span.end_time,
        "attributes": dict(sorted((span.attributes or {}).items())),
        "events": [[event.name, event.timestamp, dict(event.attributes or {})] for event in span.events],
        **({"links": links} if links else {}),
    }


def golden(name: str) -> str:
    record, content = TRACES[name]
    return json.dumps([as_json(span) for span in spans_of(record, content)], indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", TRACES)
def test_golden_traces(name: str) -> None:
    assert json.loads(golden(name)) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", TRACES)
def test_the_same_record_makes_the_same_spans(name: str) -> None:
    assert golden(name) == golden(name)


# -- what holds for every record --

offsets = st.integers(0, 10**13)
attempts = st.builds(
    Attempt,
    st.text(max_size=8),
    offsets,
    offsets,
    offsets,
    offsets,
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from(["", "upstream_timeout"]),
)
records = st.builds(
    make_record,
    number=st.integers(0, 1000),
    operation=st.sampled_from([*dict.fromkeys(each.name for each in OPERATIONS), "model", "", "unheard_of"]),
    model=st.text(max_size=20),
    outcome=st.integers(0, 12),
    status=st.integers(0, 999),
    error_code=st.text(max_size=10),
    error=st.text(max_size=10),
    user=st.text(max_size=5),
    parent_span_id=st.sampled_from([0, 1, 2**64 - 1]),
    stream=st.booleans(),
    choices=st.integers(0, 2**70),
    max_tokens=st.none() | st.integers(0, 2**70),
    temperature=st.none() | st.floats(),
    attempts=st.lists(attempts, max_size=4),
    queued_ns=st.just(0) | offsets,
    routed_by=st.text(max_size=10),
    scores=st.lists(st.tuples(st.text(max_size=8), st.integers(-(2**70), 2**70)), max_size=3),
    fallback_of=st.text(max_size=8),
    cache=st.sampled_from(["", "hit", "miss", "coalesced", "bypass"]),
    looked_up_ns=st.just(0) | offsets,
    saved_input_tokens=st.integers(0, 2**70),
    saved_output_tokens=st.integers(0, 2**70),
    saved_cost_nano=st.integers(0, 2**70),
    saved_ns=offsets,
    source_id=st.just(b"") | st.binary(min_size=16, max_size=16),
    source_trace_id=st.just(b"") | st.binary(min_size=16, max_size=16),
    source_span_id=st.integers(0, 2**64 - 1),
    age_ns=offsets,
    similarity=st.none() | st.floats(),
    usage_source=st.integers(0, 4),
    input_tokens=st.integers(0, 2**63 - 1),
    output_tokens=st.integers(0, 2**63 - 1),
    cost_nano=st.integers(0, 2**70),
    read_ns=offsets,
    authenticated_ns=offsets,
    admitted_ns=offsets,
    sent_ns=offsets,
    first_byte_ns=offsets,
    first_token_ns=st.just(0) | offsets,
    last_token_ns=offsets,
    upstream_ended_ns=offsets,
    ended_ns=offsets,
    inter_token_counts=st.just([]) | st.just([0] * 28),
    engine=st.none() | st.just(EngineTimings(queue_ms=1.0)),
)


contents = st.none() | st.builds(Content, bodies, bodies)


@given(records, contents)
def test_any_record_makes_spans_that_can_be_sent(record: Record, content: Content | None) -> None:
    spans = spans_of(record, content, resource("test"))
    assert len(spans) == count_spans(record)
    encode_spans(spans).SerializeToString()
    root, *children = spans
    ids = [span.context.span_id for span in spans]
    assert len(set(ids)) == len(ids)
    assert {span.context.trace_id for span in spans} == {int.from_bytes(record.trace_id)}
    assert all(span.parent is not None and span.parent.span_id in ids for span in children)
    assert (root.parent is None) == (record.parent_span_id == 0)
    assert all(span.start_time <= span.end_time for span in spans if span.start_time is not None and span.end_time is not None)


@given(records)
def test_tokens_are_on_one_span_at_most(record: Record) -> None:
    """What Phoenix adds up is the ledger's sum, whatever was tried in between."""
    prompts = [(span.attributes or {}).get("llm.token_count.prompt") for span in spans_of(record)]
    told = [tokens for tokens in prompts if tokens is not None]
    took = record.usage_source != UsageSource.NONE and SHOWN.get(record.operation, ("", "", "LLM"))[2] != "CHAIN"
    assert told == ([record.input_tokens] if record.attempts and took else [])


# -- what each operation is --

SHOWN = {
    "chat": ("POST /v1/chat/completions", "chat", "LLM"),
    "completions": ("POST /v1/completions", "text_completion", "LLM"),
    "responses": ("POST /v1/responses", "chat", "LLM"),
    "messages": ("POST /v1/messages", "chat", "LLM"),
    "count_tokens": ("POST /v1/messages/count_tokens", None, "CHAIN"),
    "embeddings": ("POST /v1/embeddings", "embeddings", "EMBEDDING"),
    "rerank": ("POST /v1/rerank", "rerank", "RERANKER"),
    "score": ("POST /v1/score", "score", "RERANKER"),
    "transcriptions": ("POST /v1/audio/transcriptions", "transcriptions", "LLM"),
    "translations": ("POST /v1/audio/translations", "translations", "LLM"),
    "tokenize": ("POST /tokenize", None, "CHAIN"),
    "detokenize": ("POST /detokenize", None, "CHAIN"),
    "models": ("GET /v1/models", None, None),
    "model": ("GET /v1/models/{model}", None, None),
    "usage": ("GET /v1/usage", None, "CHAIN"),
}
"""Operation → its root's name, what the conventions call it, and the kind of the span that a model's answer is (none: no engine
has a part in it). For a new operation this is decided here, not forgotten."""


def test_every_operation_is_shown_as_something() -> None:
    assert {each.name for each in OPERATIONS} | {"model"} == SHOWN.keys()


@pytest.mark.parametrize("operation", SHOWN)
def test_what_an_operation_is_shown_as(operation: str) -> None:
    name, gen_ai, kind = SHOWN[operation]
    root, *others = spans_of(made(1, operation) if kind else make_record(operation=operation, attempts=[], usage_source=0))
    method, route = name.split()
    attributes = dict(root.attributes or {})
    assert (root.name, attributes["http.request.method"], attributes["http.route"]) == (name, method, route)
    several = operation in ("rerank", "score", "model")
    assert attributes.get("url.path") == (None if several else route), "never one that it perhaps wasn't"
    assert [span.name for span in others] == ([f"{gen_ai or operation} qwen3-8b"] if kind else [])
    for span in others:
        said = dict(span.attributes or {})
        assert (said["openinference.span.kind"], said.get("gen_ai.operation.name")) == (kind, gen_ai)
        if kind == "CHAIN":
            assert not any(key.startswith(("gen_ai.", "llm.", "glasshouse.cost")) for key in said), "no model, no price"


def test_control_is_asked_for_no_model() -> None:
    _, asked = spans_of(made(1, "usage", model="", usage_source=UsageSource.NONE))
    assert asked.name == "usage"


def test_phoenix_counts_what_is_generated() -> None:
    """Its rule: tokens of spans whose kind is LLM, priced if they name a model. What is left out, only input is known of."""
    for operation, (_, _, kind) in SHOWN.items():
        if kind is None:
            continue
        spans = [dict(span.attributes or {}) for span in spans_of(make_record(operation=operation))]
        counted = [said for said in spans if said["openinference.span.kind"] == "LLM" and said["llm.model_name"]]
        tokens = [(said["llm.token_count.prompt"], said["llm.token_count.completion"]) for said in counted]
        assert tokens == ([(600, 5)] if kind == "LLM" else [])


@pytest.mark.parametrize("operation", SHOWN)
@pytest.mark.parametrize("make", [make_hit, make_coalesced])
def test_what_no_engine_did_costs_nothing_in_phoenix(make: Callable[..., Record], operation: str) -> None:
    """No span of it has tokens or is of a kind whose tokens Phoenix prices; what was saved has names of its own."""
    root, child = spans_of(make(operation=operation))
    for span in (root, child):
        said = dict(span.attributes or {})
        assert said["openinference.span.kind"] == "CHAIN"
        assert not any(key.startswith(("gen_ai.", "llm.", "glasshouse.cost")) for key in said)
    assert child.attributes is not None
    saved = [child.attributes[f"glasshouse.saved.{name}"] for name in ("input_tokens", "output_tokens", "cost")]
    assert saved == [600, 5, 30_000 / 1e9]


@pytest.mark.parametrize("make", [make_hit, make_coalesced])
def test_an_answer_leads_to_the_request_that_it_was_made_for(make: Callable[..., Record]) -> None:
    """By a link, as it goes over the wire; and by attributes, for who drops links."""
    _, child = spans_of(make())
    [sent] = encode_spans([child]).resource_spans[0].scope_spans[0].spans
    [link] = sent.links
    assert (link.trace_id, link.span_id) == (bytes(range(16)), bytes.fromhex("00f067aa0ba902b7"))
    said = dict(child.attributes or {})
    assert said["glasshouse.source.trace_id"] == bytes(range(16)).hex()
    assert said["glasshouse.source.request_id"] == make().source_id.hex()


def test_what_was_saved_fits_into_64_bits() -> None:
    _, child = spans_of(make_hit(saved_input_tokens=2**70, saved_output_tokens=2**63))
    said = dict(child.attributes or {})
    assert {said[f"glasshouse.saved.{name}_tokens"] for name in ("input", "output")} == {2**63 - 1}


@pytest.mark.parametrize("unknown", [{"source_trace_id": b""}, {"source_trace_id": bytes(16)}, {"source_span_id": 0}])
def test_a_link_to_nowhere_is_none(unknown: dict[str, Any]) -> None:
    assert [span.links for span in spans_of(make_hit(**unknown))] == [(), ()]


def test_a_shared_answer_that_never_came_lasted_to_the_end() -> None:
    """Its client left, or its worker died: the trace says how long it had waited."""
    nothing = dict.fromkeys(("first_byte_ns", "first_token_ns", "first_content_ns", "last_token_ns", "upstream_ended_ns"), 0)
    for outcome, status in ((Outcome.CLIENT_GONE, StatusCode.UNSET), (Outcome.CRASHED, StatusCode.ERROR)):
        root, child = spans_of(make_coalesced(outcome=outcome, error_code="x", **nothing))
        assert (child.name, child.end_time, child.status.status_code) == ("coalesce", root.end_time, status)


def test_a_long_ranking_is_shown_in_part() -> None:
    many = MAX_DOCUMENTS + 50
    results = [{"index": number, "relevance_score": 1 / (number + 1)} for number in range(many)]
    ranking = content({"query": "x", "documents": [f"number {number}" for number in range(many)]}, {"results": results})
    attributes = dict(spans_of(made(1, "rerank"), ranking)[1].attributes or {})
    for name in ("input", "output"):
        shown = [key for key in attributes if re.fullmatch(rf"reranker\.{name}_documents\.\d+\.document\.content", key)]
        assert len(shown) == MAX_DOCUMENTS
    assert attributes["reranker.output_documents.1.document.score"] == 0.5


def test_a_ranking_of_long_documents_is_bounded() -> None:  # failure 63
    ranking = content({"query": "q" * 10**6, "documents": ["x" * 10**6] * 3}, {"results": [{"index": 0}] * 3})
    shown = [str(value) for value in dict(spans_of(made(1, "rerank"), ranking)[1].attributes or {}).values()]
    assert sum(map(len, shown)) < 6 * MAX_TEXT


def test_tools_that_can_just_be_read_are_no_bug() -> None:
    """Reading and writing have the same limit, and what is written is written with a higher stack."""

    def tools(depth: int) -> bytes:
        return f'{{"tools":[{{"name":"x","input_schema":{{"a":{"[" * depth}{"]" * depth}}}}}]}}'.encode()

    deepest = next(depth for depth in range(sys.getrecursionlimit(), 0, -1) if parse_json(tools(depth)) is not None)
    for depth in range(deepest - 15, deepest + 2):
        assert spans_of(make_record(), Content(tools(depth), b""))


# -- names are ours --


def keys_of(spans: list[ReadableSpan]) -> Iterator[str]:
    """Of all attributes, those within the ones that Phoenix takes apart too; numbers of a list's entries as N."""
    for span in spans:
        said = dict(span.attributes or {})
        yield from (re.sub(r"\.\d+\.", ".N.", key) for key in said)
        for name in ("metadata", "llm.invocation_parameters"):
            yield from (f"{name}: {key}" for key in names_in(json.loads(str(said.get(name, "{}")))))
        for event in span.events:
            yield from (f"event: {key}" for key in event.attributes or {})


def names_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from names_in(inner)


OURS = {key for record, said in TRACES.values() for key in keys_of(spans_of(record, said))}
"""Every name there is: the golden files show each at least once."""


@given(records, contents)
def test_a_caller_has_no_say_in_the_names_of_attributes(record: Record, said: Content | None) -> None:  # failure 80
    assert set(keys_of(spans_of(record, said))) <= OURS


@pytest.mark.parametrize("operation", SHOWN)
def test_names_that_a_caller_chose_are_nobodys(operation: str) -> None:  # failure 80
    theirs = "__proto__"
    inner = {theirs: {theirs: 1}, "type": theirs, "name": theirs, "role": theirs, "text": "x", "content": "x"}
    tools = [{"name": theirs, "input_schema": inner}, {"function": {"name": theirs, "parameters": inner}}]
    asked = {name: [inner] for name in ("messages", "input", "documents", "text_2", theirs)}
    answered = {name: [inner] for name in ("choices", "output", "content", "results", "data", theirs)}
    form = f'--x\r\nContent-Disposition: form-data; name="{theirs}"\r\n\r\n{theirs}\r\n--x--\r\n'.encode()
    for said in (content({**asked, "tools": tools, "text_1": "x"}, {**answered, "type": "message"}), Content(form, form)):
        record = make_record(operation=operation, model=theirs, user=theirs, client_request_id=theirs, error_code=theirs)
        assert set(keys_of(spans_of(record, said))) <= OURS


# -- the rest --


@given(st.lists(st.integers(0, 10**10), min_size=10, max_size=10).map(sorted))
def test_the_parts_of_the_time_sum_up_to_the_whole(marks: list[int]) -> None:
    read, authenticated, admitted, queued, started, connected, sent, first, engine, ended = marks
    record = make_record(
        read_ns=read,
        authenticated_ns=authenticated,
        admitted_ns=admitted,
        queued_ns=queued,
        attempts=[Attempt("gpu-0", started, connected, first, engine, 200)],
        sent_ns=sent,
        first_byte_ns=first,
        first_token_ns=first,
        upstream_ended_ns=engine,
        ended_ns=ended,
    )
    parts = timings_ms(record)
    whole = parts.pop("total")
    assert abs(sum(parts.values()) - whole) < 0.01


def test_every_step_of_a_retried_request_has_its_time() -> None:
    assert timings_ms(make_retried()) == {
        "read": 0.05,
        "authenticate": 0.01,
        "admit": 0.01,
        "route": 0.02,
        "retries": 1.91,
        "connect": 0.2,
        "send": 0.05,
        "engine": 67.75,
        "receive": 10.0,
        "release": 0.06,
        "total": 80.06,
    }


def test_attempts_have_the_ids_that_went_upstream() -> None:
    record = make_retried(3)
    first, second = (span for span in spans_of(record)[1:] if span.parent and span.parent.span_id == record.span_id)
    assert [first.context.span_id, second.context.span_id] == [record.span_id + 1, record.span_id + 2]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome.OK, StatusCode.OK),
        (Outcome.CACHED, StatusCode.OK),
        (Outcome.CLIENT_GONE, StatusCode.UNSET),
        (Outcome.REJECTED, StatusCode.ERROR),
        (Outcome.CLIENT_ERROR, StatusCode.ERROR),
        (Outcome.TIMEOUT, StatusCode.ERROR),
        (Outcome.CRASHED, StatusCode.ERROR),
    ],
)
def test_the_status_says_whether_it_went_well(outcome: Outcome, status: StatusCode) -> None:
    root = spans_of(make_record(outcome=outcome))[0]
    assert root.status.status_code == status
    assert ("error.type" in (root.attributes or {})) == (status == StatusCode.ERROR)


@pytest.mark.parametrize(("parent", "flags", "sampled"), [(0, 1, True), (0, 0, True), (5, 1, True), (5, 0, False), (5, 2, False)])
def test_a_callers_wish_not_to_be_traced_is_honoured(parent: int, flags: int, sampled: bool) -> None:
    assert is_sampled(make_record(parent_span_id=parent, trace_flags=flags)) == sampled


def test_the_resource_names_service_and_project() -> None:
    attributes = resource("mine").attributes
    assert attributes["service.name"] == "glasshouse"
    assert attributes["openinference.project.name"] == "mine"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in TRACES:
        (GOLDEN / f"{each}.json").write_text(golden(each))
