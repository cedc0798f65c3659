"""Where a request's time went inside the engine: on its row, as the engine's own histograms have it, and as the engine's own span
in the request's trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Final

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.engine.environment import Say
from tests.engine.operations import GENERATING, STORY, Generating
from tests.engine.vllm import NAME, PATIENCE, Engine, wait_until
from tests.support.glasshouse import Glasshouse
from tests.support.wire_client import WireClient, request
from tests.unit.collectors.receiver import Receiver

CALLERS_TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLERS_SPAN: Final = "00f067aa0ba902b7"
PHASES: Final = {"engine_queue_ms": "queue", "engine_prefill_ms": "prefill", "engine_decode_ms": "decode"}
"""A row's columns, and what the engine's histograms of them are called."""
TIMED: Final = [operation for operation in GENERATING if operation.name != "messages"]
"""Where vLLM tells its times."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
_names = count(1)


def ask(proxy: Glasshouse, operation: Generating, *, stream: bool, headers: dict[str, str] | None = None) -> str:
    """One request to its end → the name under which its row can be found."""
    name = f"timed-{next(_names)}"
    body = {"model": NAME, "temperature": 0, **operation.body(STORY, 40), "stream": stream}
    with WireClient(proxy.url, timeout=PATIENCE) as client:
        client.send(request(operation.path, body, key=proxy.key, headers={"X-Request-Id": name, **(headers or {})}))
        reply = client.read()
    assert (reply.status, reply.ending) == (200, "complete")
    return name


def rows_of(proxy: Glasshouse, names: list[str]) -> list[dict[str, Any]]:
    def found() -> list[dict[str, Any]]:
        return [row for row in proxy.rows() if row["client_request_id"] in names]

    wait_until(lambda: len(found()) == len(names), f"{len(names)} rows")
    return found()


def histograms(engine: Engine) -> dict[str, float]:
    """Seconds in all."""
    engine.wait_quiet()
    samples = engine.metrics()
    return {name: samples.total(f"vllm:request_{name}_time_seconds_sum") for name in PHASES.values()}


def test_the_engine_s_times_are_on_the_row(proxy: Glasshouse, tiny: Engine, say: Say) -> None:
    """Three times as many requests at once as the engine takes: they wait, so that no phase is nothing."""
    requests = [(TIMED[i % len(TIMED)], i % 3 > 0) for i in range(3 * tiny.kind.requests)]
    before = histograms(tiny)
    with ThreadPoolExecutor(len(requests)) as clients:
        names = list(clients.map(lambda each: ask(proxy, each[0], stream=each[1]), requests))
    after = histograms(tiny)
    rows = rows_of(proxy, names)
    for column, name in PHASES.items():
        ours, theirs = sum(row[column] for row in rows) / 1000, after[name] - before[name]
        say(f"{name}: {len(rows)} rows {ours:.6f} s, the engine's histogram {theirs:.6f} s")
        assert theirs > 0
        assert ours == pytest.approx(theirs, rel=1e-3)
    for row in rows:
        inside = sum(row[column] for column in PHASES) * 1e6
        assert inside <= row["upstream_ended_ns"] - row["sent_ns"]
        if row["stream"]:
            assert (row["engine_queue_ms"] + row["engine_prefill_ms"]) * 1e6 <= row["first_token_ns"] - row["sent_ns"]


def spans_in(spans: Receiver, trace: str) -> list[Span]:
    with spans.changed:
        return [span for span in spans.spans if span.trace_id.hex() == trace and span.name == "llm_request"]


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in span.attributes}


@pytest.mark.parametrize("operation", GENERATING, ids=lambda operation: operation.name)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_the_engine_s_span_is_in_the_request_s_trace(
    proxy: Glasshouse, spans: Receiver, operation: Generating, stream: bool
) -> None:
    (row,) = rows_of(proxy, [ask(proxy, operation, stream=stream)])
    assert row["trace_id"] == row["id"]
    check_span(spans, operation, row, row["id"])


@pytest.mark.parametrize("operation", GENERATING, ids=lambda operation: operation.name)
def test_the_engine_s_span_is_in_the_caller_s_trace(proxy: Glasshouse, spans: Receiver, operation: Generating) -> None:
    trace = f"{int(CALLERS_TRACE, 16) + next(_names):032x}"
    headers = {"traceparent": f"00-{trace}-{CALLERS_SPAN}-01"}
    (row,) = rows_of(proxy, [ask(proxy, operation, stream=True, headers=headers)])
    assert (row["trace_id"], row["parent_span_id"]) == (trace, CALLERS_SPAN)
    check_span(spans, operation, row, trace)


def check_span(spans: Receiver, operation: Generating, row: dict[str, Any], trace: str) -> None:
    """It hangs under the try that answered, whose id is also the engine's name for the request, and has the row's tokens."""
    wait_until(lambda: spans_in(spans, trace), "the engine's span")
    (span,) = spans_in(spans, trace)
    assert span.parent_span_id.hex() == f"{int(row['span_id'], 16) + len(row['attempts']):016x}"
    said = attributes(span)
    if operation.named:
        assert f"{row['id']}-{len(row['attempts'])}" in said["gen_ai.request.id"]
    assert said["gen_ai.usage.prompt_tokens"] == row["input_tokens"]
    assert said["gen_ai.usage.completion_tokens"] == row["output_tokens"]
