"""Record → spans: golden traces, and what holds for every record.

After a change that was meant: `python -m tests.unit.collectors.test_spans` writes the golden files anew; read the difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace.status import StatusCode

from collectors.records.spans import count_spans, is_sampled, resource, spans_of, timings_ms
from proxy.errors import Outcome
from proxy.exchange import Attempt, EngineTimings, Record, UsageSource
from proxy.journal import Content
from tests.unit.collectors.made import MS, make_record, make_rejected, make_retried

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = Path(__file__).parents[2] / "fixtures" / "vllm-0.32.0"


def captured(name: str) -> Content:
    return Content((FIXTURES / f"{name}.request.json").read_bytes(), (FIXTURES / f"{name}.body").read_bytes())


TRACES: dict[str, tuple[Record, Content | None]] = {
    "stream": (make_record(1), None),
    "stream-with-content": (make_record(2, finish_reasons=["length"]), captured("chat_stream_usage")),
    "retried": (make_retried(3, parent_span_id=0xB7AD6B7169203331, client_request_id="theirs", user="mallory"), None),
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
}


def as_json(span: ReadableSpan) -> dict[str, Any]:
    """A span as a golden file has it: times as ms after the first."""
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    assert span.start_time is not None
    assert span.end_time is not None
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
    operation=st.sampled_from(["chat", "completions", "embeddings", "models", "model", "", "unheard_of"]),
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


@given(records, st.none() | st.builds(Content, st.binary(max_size=60), st.binary(max_size=60)))
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
    for key in (key for span in spans for key in span.attributes or {}):
        assert key.replace("_", "").replace(".", "").isascii()


@given(records)
def test_tokens_are_on_one_span_at_most(record: Record) -> None:
    """What Phoenix adds up is the ledger's sum, whatever was tried in between."""
    prompts = [(span.attributes or {}).get("llm.token_count.prompt") for span in spans_of(record)]
    told = [tokens for tokens in prompts if tokens is not None]
    expected = [record.input_tokens] if record.attempts and record.usage_source != UsageSource.NONE else []
    assert told == expected


@given(st.lists(st.integers(0, 10**10), min_size=9, max_size=9).map(sorted))
def test_the_parts_of_the_time_sum_up_to_the_whole(marks: list[int]) -> None:
    read, authenticated, admitted, started, connected, sent, first, engine, ended = marks
    record = make_record(
        read_ns=read,
        authenticated_ns=authenticated,
        admitted_ns=admitted,
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
