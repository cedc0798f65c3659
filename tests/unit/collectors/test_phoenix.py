"""The spans' sink: bounded, oldest first out, nothing lost in silence, nobody held up."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTracePartialSuccess, ExportTraceServiceResponse

from collectors.records.captured import Captured
from collectors.records.metrics import SpanCounts
from collectors.records.phoenix import MAX_EXPORT_BYTES, MAX_MARKS, MAX_SPANS_PER_EXPORT, SpansSink, TraceQueue
from collectors.records.spans import count_spans
from proxy.exchange import Record
from proxy.journal import Batch, Checkpoint, Journal, encode_content
from proxy.nouns import ModelSettings
from proxy.settings import PhoenixSettings
from tests.unit.collectors.made import identity, make_record, make_rejected
from tests.unit.collectors.receiver import Receiver, receiving

PER_TRACE = count_spans(make_record())
PATIENCE = 20.0


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


# -- the queue --


def position(number: int) -> Checkpoint:
    return Checkpoint({"segment": number})


def make_records(first: int, count: int) -> list[Record]:
    return [make_record(number) for number in range(first, first + count)]


def test_traces_leave_in_order_about_a_batch_at_a_time() -> None:
    queue = TraceQueue(100)
    queue.put(make_records(0, 30), position(1))
    taken = queue.take(MAX_SPANS_PER_EXPORT)
    assert taken == make_records(0, MAX_SPANS_PER_EXPORT // PER_TRACE)
    assert queue.passed() is None
    queue.settle()
    assert queue.take(1) == make_records(16, 1), "at least one, however many spans it has"


def test_the_oldest_make_room() -> None:
    queue = TraceQueue(3)
    assert queue.put(make_records(0, 2), position(1)) == []
    assert queue.put(make_records(2, 3), position(2)) == make_records(0, 2)
    assert queue.passed() == position(1), "dropped is done with"
    assert queue.take(1000) == make_records(2, 3)


def test_what_is_being_sent_counts_and_goes_first_when_it_comes_back() -> None:
    queue = TraceQueue(3)
    queue.put(make_records(0, 3), position(1))
    assert queue.take(PER_TRACE) == make_records(0, 1)
    assert queue.put(make_records(3, 1), position(2)) == make_records(1, 1)
    assert len(queue) == 3
    assert queue.give_back() == []
    assert queue.put(make_records(4, 1), position(3)) == make_records(0, 1)
    assert queue.take(1000) == make_records(2, 3)


def test_what_does_not_fit_goes_back_and_stays_in_order() -> None:
    queue = TraceQueue(10)
    queue.put(make_records(0, 6), position(1))
    assert len(queue.take(4 * PER_TRACE)) == 4
    assert queue.give_back(keep=1) == []
    queue.settle()
    assert [record.id for record in queue.take(9 * PER_TRACE)] == [identity(number) for number in range(1, 6)]


def test_a_position_waits_for_its_last_trace() -> None:
    queue = TraceQueue(100)
    queue.put([], position(0))
    assert queue.passed() == position(0)
    queue.put(make_records(0, 2), position(1))
    queue.put(make_records(2, 1), position(2))
    queue.take(PER_TRACE)
    queue.settle()
    assert queue.passed() is None
    queue.take(2 * PER_TRACE)
    assert queue.passed() is None
    queue.settle()
    assert queue.passed() == position(2)


@given(st.lists(st.tuples(st.sampled_from(["put", "send", "fail"]), st.integers(0, 5)), max_size=300))
def test_no_trace_is_passed_over(steps: list[tuple[str, int]]) -> None:
    queue = TraceQueue(12)
    given_, sent, dropped = 0, set[bytes](), set[bytes]()
    passed = 0
    for step, number in steps:
        if step == "put":
            dropped |= {record.id for record in queue.put(make_records(given_, number), position(given_ + number))}
            given_ += number
        else:
            taken = queue.take(number * PER_TRACE)
            if step == "send":
                sent |= {record.id for record in taken}
                queue.settle()
            else:
                dropped |= {record.id for record in queue.give_back()}
        if (newest := queue.passed()) is not None:
            passed = newest.positions["segment"]
        assert len(queue) <= 12
        assert len(queue._marks) <= MAX_MARKS
        assert not sent & dropped
        assert all(identity(number) in sent | dropped for number in range(passed))
        assert len(sent) + len(dropped) + len(queue) == given_


# -- the sink --


@pytest.fixture
def phoenix() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def make_sink(tmp_path: Path, phoenix: Receiver) -> Iterator[Callable[..., SpansSink]]:
    made: list[SpansSink] = []

    def make(limit: int = 2000, captured: Captured | None = None, **settings: str) -> SpansSink:
        settings.setdefault("url", phoenix.url)
        models = {"qwen3-8b": ModelSettings()}
        phoenix_settings = PhoenixSettings(**settings)  # type: ignore[arg-type]
        sink = SpansSink(tmp_path / "collector-spans", phoenix_settings, lambda: models, captured, limit, hold_seconds=0.0)
        sink.load()
        made.append(sink)
        return sink

    yield make
    for sink in made:
        sink.close(0.1)


def batch(number: int, *records: Record) -> Batch:
    return Batch(list(records), position(number), False, [])


def ids(*numbers: int) -> list[str]:
    return [identity(number).hex() for number in numbers]


def test_traces_arrive_whole_and_are_counted(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    sink = make_sink()
    sink.write(batch(1, *make_records(0, 40)))
    phoenix.wait(spans=40 * PER_TRACE)
    assert phoenix.traces() == ids(*range(40))
    assert all(spans <= MAX_SPANS_PER_EXPORT for path, _, spans in phoenix.posts if path == "/v1/traces")
    assert phoenix.resources[0]["openinference.project.name"] == "glasshouse"
    wait(lambda: sink.counts() == SpanCounts(40 * PER_TRACE, {}, 0))
    sink.close(5.0)
    assert sink.stored == position(1)


def test_prices_are_there_before_the_first_trace(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    sink = make_sink()
    sink.write(batch(1, make_record(0), make_record(1, model="unpriced"), make_rejected(2)))
    phoenix.wait(spans=2 * PER_TRACE + 1)
    assert {price["name"] for price in phoenix.prices} == {"qwen3-8b (glasshouse)", "unpriced (glasshouse)"}
    paths = [path for path, _, _ in phoenix.posts]
    assert paths.index("/v1/traces") > max(index for index, path in enumerate(paths) if path == "/graphql")


def test_the_key_is_a_bearer_token(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PHOENIX_KEY", "s3cret")
    sink = make_sink(api_key_env="TEST_PHOENIX_KEY")
    sink.write(batch(1, make_record(0)))
    phoenix.wait(spans=PER_TRACE)
    assert {headers["authorization"] for _, headers, _ in phoenix.posts} == {"Bearer s3cret"}


def test_a_missing_key_is_said(make_sink: Callable[..., SpansSink], caplog: pytest.LogCaptureFixture) -> None:
    make_sink(api_key_env="TEST_PHOENIX_NO_KEY")
    assert "no API key for Phoenix" in caplog.text


def test_a_callers_wish_not_to_be_traced_is_counted(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    sink = make_sink()
    sink.write(batch(1, make_record(0, parent_span_id=5, trace_flags=0), make_record(1)))
    phoenix.wait(spans=PER_TRACE)
    assert phoenix.traces() == ids(1)
    assert sink.counts().dropped == {"unsampled": PER_TRACE}


def test_captured_content_goes_along(make_sink: Callable[..., SpansSink], phoenix: Receiver, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "content", 64 * 1024)
    request, answer = b'{"messages":[{"role":"user","content":"hi"}]}', b'{"choices":[{"message":{"content":"ho"}}]}'
    journal.append(encode_content(identity(0), request, answer, 1000))
    sink = make_sink(captured=Captured(tmp_path / "content"))
    sink.write(batch(1, make_record(0), make_record(1)))
    phoenix.wait(spans=2 * PER_TRACE)
    roots = [{each.key: each.value.string_value for each in span.attributes} for span in phoenix.spans if not span.parent_span_id]
    assert [root.get("input.value") for root in roots] == ["hi", None]
    journal.close()


# -- failure 62 --


def test_a_phoenix_that_is_down_holds_nobody_up_and_the_oldest_traces_go(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    phoenix.stop()
    sink = make_sink(limit=10)
    wait(lambda: not sink.up)
    for number in range(25):
        sink.write(batch(number + 1, make_record(number)))
    assert sink.counts() == SpanCounts(0, {"full": 15 * PER_TRACE}, 10)
    sink.tend()
    assert sink.stored == position(15), "what was dropped may be deleted from the journal"
    phoenix.start()
    phoenix.wait(spans=10 * PER_TRACE)
    assert phoenix.traces() == ids(*range(15, 25))
    wait(lambda: sink.counts() == SpanCounts(10 * PER_TRACE, {"full": 15 * PER_TRACE}, 0))
    said = [record.message for record in caplog.records if record.name == "collectors.records.phoenix"]
    assert said == ["Phoenix down; traces wait, the oldest go first", "Phoenix up again"], "once per change"


@pytest.mark.parametrize("status", [500, 503, 429, 401, 404, 302])
def test_errors_that_may_pass_are_waited_out(make_sink: Callable[..., SpansSink], phoenix: Receiver, status: int) -> None:
    phoenix.status = status
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    wait(lambda: not sink.up)
    sink.tend()
    assert sink.stored == Checkpoint(), "not sent, not stored"
    assert phoenix.spans == []
    phoenix.status = 200
    phoenix.wait(spans=PER_TRACE)
    wait(lambda: sink.counts().exported == PER_TRACE)
    wait(lambda: sink.up)


def test_a_phoenix_that_only_answers_for_prices_is_down_until_it_takes_spans(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    phoenix.status = 500
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    with phoenix.changed:
        assert phoenix.changed.wait_for(lambda: sum(path == "/v1/traces" for path, _, _ in phoenix.posts) >= 3, PATIENCE)
    assert not sink.up
    assert [each.message for each in caplog.records if each.name == "collectors.records.phoenix"] == [
        "Phoenix down; traces wait, the oldest go first"
    ]


def test_a_web_page_that_says_200_is_no_delivery(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    phoenix.content_type = "text/html; charset=utf-8"
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    wait(lambda: not sink.up)
    assert sink.counts() == SpanCounts(0, {}, 1)


RUBBISH = {
    "text": ("text/plain", b"hello, this is your router"),
    "bytes": ("application/x-protobuf", b"\xff\xfe\xfd" * 20),
    "half of JSON": ("application/json", b'{"partialSuccess":'),
    "JSON that is no object": ("application/json", b'"ok"'),
}


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_that_says_200_is_no_delivery(make_sink: Callable[..., SpansSink], phoenix: Receiver, rubbish: str) -> None:
    phoenix.content_type, phoenix.body = RUBBISH[rubbish]
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    wait(lambda: not sink.up)
    assert sink.counts() == SpanCounts(0, {}, 1)
    phoenix.content_type, phoenix.body = "application/json", b"{}"
    wait(lambda: sink.counts() == SpanCounts(PER_TRACE, {}, 0))


def test_spans_that_a_receiver_took_and_will_not_keep_are_counted(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    partial = ExportTracePartialSuccess(rejected_spans=3, error_message="no room")
    phoenix.body = ExportTraceServiceResponse(partial_success=partial).SerializeToString()
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    wait(lambda: sink.counts() == SpanCounts(PER_TRACE - 3, {"refused": 3}, 0))


def test_a_tls_error_is_an_outage(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    """What listens there speaks no TLS."""
    sink = make_sink(limit=5, url=phoenix.url.replace("http:", "https:"))
    wait(lambda: not sink.up)
    for number in range(8):
        sink.write(batch(number + 1, make_record(number)))
    assert sink.counts() == SpanCounts(0, {"full": 3 * PER_TRACE}, 5)
    assert phoenix.posts == []


def test_a_slow_phoenix_holds_nobody_up(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    phoenix.hold.clear()
    sink = make_sink(limit=20)
    sink.write(batch(1, make_record(0)))
    wait(lambda: any(path == "/v1/traces" for path, _, _ in phoenix.posts))
    for number in range(1, 50):
        sink.write(batch(number + 1, make_record(number)))
    counts = sink.counts()
    assert counts == SpanCounts(0, {"full": 30 * PER_TRACE}, 20)
    phoenix.hold.set()
    phoenix.wait(spans=20 * PER_TRACE)
    assert phoenix.traces() == ids(0, *range(31, 50)), "the one under way, and the newest"


def test_a_trace_that_is_refused_does_not_take_its_neighbours_with_it(
    make_sink: Callable[..., SpansSink], phoenix: Receiver
) -> None:
    phoenix.refuse = set(ids(2))
    sink = make_sink()
    sink.write(batch(1, *make_records(0, 5)))
    phoenix.wait(spans=4 * PER_TRACE)
    assert sorted(phoenix.traces()) == ids(0, 1, 3, 4)
    wait(lambda: sink.counts() == SpanCounts(4 * PER_TRACE, {"refused": PER_TRACE}, 0))


def test_a_trace_that_cannot_be_encoded_is_refused_too(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = make_sink()
    sink.write(batch(1, make_record(0), make_record(1, operation=b"not text")))
    phoenix.wait(spans=PER_TRACE)
    wait(lambda: sink.counts().waiting == 0)
    assert phoenix.traces() == ids(0)
    assert sink.counts().dropped == {"refused": PER_TRACE}


def test_a_receiver_without_a_price_table_gets_traces(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    phoenix.graphql_status, phoenix.graphql_body = 404, b"<html>not here</html>"
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    phoenix.wait(spans=PER_TRACE)
    assert "no prices in Phoenix" in caplog.text
    assert sink.up


def test_after_an_outage_prices_are_seen_to_again(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    phoenix.wait(spans=PER_TRACE)
    phoenix.stop()
    sink.write(batch(2, make_record(1)))
    wait(lambda: not sink.up)
    phoenix.prices.clear()  # it comes back with an empty database
    phoenix.start()
    phoenix.wait(spans=2 * PER_TRACE)
    assert [price["name"] for price in phoenix.prices] == ["qwen3-8b (glasshouse)"]


def test_a_phoenix_that_comes_and_goes_is_found_each_time(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    """Failure 67: the client and its kept connections outlive what they were connected to."""
    sink = make_sink()
    for turn in range(5):
        sink.write(batch(2 * turn + 1, make_record(2 * turn)))
        phoenix.wait(spans=(2 * turn + 1) * PER_TRACE)
        phoenix.stop()
        sink.write(batch(2 * turn + 2, make_record(2 * turn + 1)))
        wait(lambda: not sink.up)
        phoenix.start()
        phoenix.wait(spans=(2 * turn + 2) * PER_TRACE)
    assert phoenix.traces() == ids(*range(10))
    wait(lambda: sink.counts() == SpanCounts(10 * PER_TRACE, {}, 0))


# -- failure 63 --


def test_a_request_has_a_size_that_receivers_take(make_sink: Callable[..., SpansSink], phoenix: Receiver, tmp_path: Path) -> None:
    """Prompts of 5 MB: each trace is cut to what a receiver takes, and a request holds no more of them than that."""
    journal = Journal(tmp_path / "content", 64 * 1024 * 1024)
    wait(lambda: journal._next is not None)
    request = b'{"messages":[{"role":"user","content":"%b"}]}' % (b"\xc3\xa9" * 2_500_000)
    for number in range(12):
        journal.append(encode_content(identity(number), request, b'{"choices":[{"message":{"content":"ho"}}]}', 6_000_000))
    sink = make_sink(captured=Captured(tmp_path / "content"))
    sink.write(batch(1, *make_records(0, 12)))
    phoenix.wait(spans=12 * PER_TRACE)
    journal.close()
    sizes = [int(headers["content-length"]) for path, headers, _ in phoenix.posts if path == "/v1/traces"]
    assert len(sizes) > 1
    assert max(sizes) <= MAX_EXPORT_BYTES
    assert phoenix.traces() == ids(*range(12))
    wait(lambda: sink.counts() == SpanCounts(12 * PER_TRACE, {}, 0))


def test_a_trace_that_is_larger_than_a_request_should_be_goes_alone(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collectors.records.phoenix.MAX_EXPORT_BYTES", 10)
    sink = make_sink()
    sink.write(batch(1, *make_records(0, 3)))
    phoenix.wait(spans=3 * PER_TRACE)
    assert phoenix.traces() == ids(0, 1, 2)
    assert [spans for path, _, spans in phoenix.posts if path == "/v1/traces"] == [PER_TRACE] * 3


# -- stopping and starting --


def test_a_stop_sends_what_waits(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    sink = make_sink()
    sink.write(batch(1, *make_records(0, 200)))
    sink.close(5.0)
    assert sorted(phoenix.traces()) == sorted(ids(*range(200)))
    assert sink.stored == position(1)


def test_a_stop_while_phoenix_is_down_is_short_and_the_next_start_sends_it(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    phoenix.stop()
    sink = make_sink()
    sink.write(batch(1, make_record(0)))
    wait(lambda: not sink.up)
    sink.close(5.0)
    assert "tried again at the next start" in caplog.text
    again = make_sink()
    assert again.load() == Checkpoint(), "the journal is read again from there"
    phoenix.start()
    again.write(batch(1, make_record(0)))
    phoenix.wait(spans=PER_TRACE)


def test_counts_survive_a_restart(make_sink: Callable[..., SpansSink], phoenix: Receiver) -> None:
    sink = make_sink()
    sink.write(batch(1, make_record(0), make_record(1, parent_span_id=5, trace_flags=0)))
    phoenix.wait(spans=PER_TRACE)
    sink.close(5.0)
    again = make_sink()
    assert again.load() == position(1)
    assert again.counts() == SpanCounts(PER_TRACE, {"unsampled": PER_TRACE}, 0)


def test_a_full_disk_is_the_followers_business_and_traces_go_on(
    make_sink: Callable[..., SpansSink], phoenix: Receiver, tmp_path: Path
) -> None:
    sink = make_sink()
    (tmp_path / f"collector-spans.{os.getpid()}").mkdir()
    sink.write(batch(1, make_record(0)))
    phoenix.wait(spans=PER_TRACE)
    wait(lambda: sink.counts().waiting == 0)
    with pytest.raises(OSError, match="directory"):
        sink.tend()
    assert sink.stored == Checkpoint()
    (tmp_path / f"collector-spans.{os.getpid()}").rmdir()
    sink.close(1.0)
    assert sink.stored == position(1)
