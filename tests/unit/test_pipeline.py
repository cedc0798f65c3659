"""The way of a request as a transcript: what each side says, in which order, and what is on record by then."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic_ns
from typing import Any

import httptools
import pytest

from proxy.errors import Outcome, ShuttingDown
from proxy.exchange import Exchange, UsageSource
from proxy.flow import Flow
from proxy.journal import JournalFull
from proxy.relay.call import Call
from proxy.relay.connection import UpstreamConnection
from proxy.relay.pool import Pool
from proxy.reply import Reply
from tests.support.plane import KEY, Engine, Plane
from tests.support.scripted_vllm import captured
from tests.support.wire_client import request

CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, getattr(request, "param", None)) as made:
        yield made


def ask(**more: Any) -> bytes:
    return request(CHAT, {"model": "m", "messages": [], **more}, key=KEY)


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def text(content: str = "x", finish: str | None = None, count: int = 1) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": count}
    delta = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"choices": [delta], "usage": usage}, separators=(",", ":")).encode()


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


# --- the seal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_the_record_is_there_before_the_last_byte_goes(plane: Plane, stream: bool) -> None:
    client, engine = plane.client(), plane.engine()
    recorded: list[int] = []
    client.on_write = lambda data: recorded.append(len(plane.records()))
    client.says(ask(stream=stream))
    if stream:
        engine.says(HEAD + chunk(text()))
        engine.says(chunk(text("", "stop", 2)))
        engine.says(chunk(DONE) + b"0\r\n\r\n")
        assert recorded == [0, 1]
    else:
        engine.says(whole(captured.load("chat").body))
        assert recorded == [1]
    assert [record.outcome for record in plane.records()] == [Outcome.OK]


def _usage(count: int) -> bytes:
    return b',"usage":{"prompt_tokens":7,"completion_tokens":%d}' % count


@pytest.mark.parametrize("before", [b"\r\n", b"\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n\r\n\r\n"])
def test_empty_lines_before_an_answer_are_none_of_its_head(plane: Plane, before: bytes) -> None:  # failure 24
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    engine.says(before + whole(b"{}"))
    assert client.heard.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")


def test_the_end_of_a_stream_waits_for_done(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()) + chunk(text("", "stop", 2)))
    before = client.heard
    assert before.endswith(chunk(text().replace(_usage(1), b"")))
    engine.says(chunk(DONE))
    end = text("", "stop", 2).replace(_usage(2), b"") + DONE
    assert client.heard == before + chunk(end) + b"0\r\n\r\n"
    assert engine.closed == "", "the engine's own end is still to come"
    engine.says(b"0\r\n\r\n")
    client.says(ask(stream=True))
    assert engine.heard.count(b"POST ") == 2, "the connection is used again"


def test_an_answer_without_a_record_is_served_all_the_same(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(payload: bytes, owed: bool = False) -> None:
        raise JournalFull

    monkeypatch.setattr(plane.journal, "append", full)
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    engine.says(whole(captured.load("chat").body))
    assert client.heard.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("plane", [{"journal": {"on_full": "refuse"}}], indirect=True)
def test_a_full_journal_may_be_a_reason_to_refuse(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(plane.journal), "full", True)
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    assert client.heard.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"journal_full"' in client.heard
    assert engine.heard == b""


def test_a_bug_is_a_500_and_is_on_record(plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def bug(*arguments: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(plane.pipeline, "_route", bug)
    client = plane.client()
    client.says(ask())
    assert client.heard.startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in client.heard
    [record] = plane.records()
    assert (record.outcome, record.status, record.error_code) == (Outcome.INTERNAL_ERROR, 500, "internal_error")
    assert "a bug ended a request" in caplog.text
    assert not plane.pipeline.admission.in_flight


# --- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", [{"limits": {"header_bytes": 1000}}], indirect=True)
@pytest.mark.parametrize("first", [{"user": "x" * 5000}, {"model": "none", "user": "x" * 5000}], ids=["runs", "answered at once"])
def test_what_came_before_a_head_in_the_same_read_is_no_part_of_it(plane: Plane, first: dict[str, Any]) -> None:
    async def run() -> None:
        client, engine = plane.client(), plane.engine()
        second = ask()
        at = second.index(b"\r\n\r\n") + 4
        client.says(ask(**first) + second[:at])
        client.says(second[at:])
        if "model" not in first:
            engine.says(whole(b"{}"))
        await asyncio.sleep(0)
        engine.says(whole(b"{}"))
        assert client.heard.count(b"HTTP/1.1 ") == 2

    asyncio.run(run())


@pytest.mark.parametrize("plane", [{"limits": {"header_bytes": 1000}}], indirect=True)
def test_a_head_is_bounded_from_its_second_read_on(plane: Plane) -> None:
    client = plane.client()
    client.says(b"GET /v1/models HTTP/1.1\r\n")
    for _ in range(10):
        client.says(b"x: %b\r\n" % (b"y" * 95))
    assert client.heard == b""
    client.says(b"x: y\r\n")
    assert client.heard.startswith(b"HTTP/1.1 431 ")
    assert client.half_closed
    client.says(b"x: y\r\n" * 1000)
    assert plane.pipeline.unaccepted == {"headers_too_large": 1}


# --- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + chunk(text())])
def test_when_the_client_leaves_everything_has_ended_before_the_callback_returns(plane: Plane, said: bytes) -> None:
    # failures 1, 2, 3
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    if said:
        engine.says(said)
    client.leaves()
    assert engine.closed == "aborted"
    [record] = plane.records()
    assert (record.outcome, record.output_tokens) == (Outcome.CLIENT_GONE, 1 if said.endswith(b"}\n\n\r\n") else 0)
    assert not plane.pipeline.admission.in_flight
    assert plane.pipeline.router.standings["b0"].in_flight == 0


def test_a_connection_that_came_too_late_is_closed(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []

    async def connect(pool: Pool) -> UpstreamConnection:
        engines.append(Engine(UpstreamConnection(pool)))
        return engines[0].connection

    async def run() -> None:
        client = plane.client()
        client.says(ask())
        await asyncio.sleep(0)  # the connection is there; the request hasn't heard of it yet
        assert engines
        client.leaves()
        await asyncio.sleep(0)

    monkeypatch.setattr(Pool, "connect", connect)
    asyncio.run(run())
    assert engines[0].closed == "aborted"
    assert [record.outcome for record in plane.records()] == [Outcome.CLIENT_GONE]


# --- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", [{"timeouts": {"first_byte": 100, "between_chunks": 10}}], indirect=True)
def test_the_first_byte_may_take_longer_than_the_next(plane: Plane) -> None:  # failures 11, 12
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    plane.sweep(later_s=99)
    engine.says(HEAD)
    plane.sweep(later_s=99)
    engine.says(chunk(b": keep-alive\n\n"))
    plane.sweep(later_s=99)
    engine.says(chunk(text("")))  # the role
    plane.sweep(later_s=99)
    engine.says(chunk(text("x", count=2)))
    plane.sweep(later_s=9)
    assert plane.records() == []
    plane.sweep(later_s=11)
    [record] = plane.records()
    assert (record.outcome, record.error_code, engine.closed) == (Outcome.TIMEOUT, "idle_timeout", "aborted")
    assert client.heard.rstrip().endswith(b'"code":"idle_timeout"}}')


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("plane", [{"timeouts": {"first_byte": 100}}], indirect=True)
def test_an_engine_that_says_nothing(plane: Plane, stream: bool) -> None:  # failure 11
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=stream))
    if stream:
        engine.says(HEAD)
    plane.sweep(later_s=101)
    assert client.heard.startswith(b"HTTP/1.1 504 ")
    assert b"content-length: " in client.heard
    assert engine.closed == "aborted"


@pytest.mark.parametrize("plane", [{"timeouts": {"between_chunks": 10, "client_write": 100}}], indirect=True)
def test_a_client_that_reads_slowly_stops_the_engines_clock(plane: Plane) -> None:  # failure 20
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()))
    client.connection.pause_writing()
    assert not engine.reading
    plane.sweep(later_s=50)
    client.connection.resume_writing()
    assert engine.reading
    plane.sweep(later_s=55)
    assert plane.records() == [], "the engine had five seconds so far, not 55"
    plane.sweep(later_s=61)
    assert [record.error_code for record in plane.records()] == ["idle_timeout"]


@pytest.mark.parametrize("plane", [{"timeouts": {"between_chunks": 10, "client_write": 100}}], indirect=True)
def test_a_client_that_stopped_reading_is_let_go(plane: Plane) -> None:  # failure 20
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()))
    client.connection.pause_writing()
    plane.sweep(later_s=99)
    assert plane.records() == []
    plane.sweep(later_s=101)
    assert (client.closed, engine.closed) == ("aborted", "aborted")
    [record] = plane.records()
    assert (record.outcome, record.error_code, record.output_tokens) == (Outcome.CLIENT_GONE, "client_stopped_reading", 1)


@pytest.mark.parametrize("plane", [{"timeouts": {"between_chunks": 10, "client_write": 100}}], indirect=True)
def test_a_client_that_takes_a_little_now_and_then_may_take_its_time(plane: Plane) -> None:  # failure 20
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()))
    client.connection.pause_writing()
    for minute in range(20):
        client.unsent = 100_000 - 1000 * minute
        plane.sweep(later_s=60 * minute)
    assert plane.records() == []
    plane.sweep(later_s=60 * 19 + 101)
    assert [record.error_code for record in plane.records()] == ["client_stopped_reading"]


@pytest.mark.parametrize("plane", [{"timeouts": {"client_write": 100}}], indirect=True)
def test_so_may_one_that_takes_the_end_of_its_answer(plane: Plane) -> None:  # failure 20
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    engine.says(whole(b"{}"))
    begun = monotonic_ns()
    for minute in range(20):
        client.unsent = 100_000 - 1000 * minute
        client.connection.sweep(begun + 60 * minute * 1_000_000_000)
    assert client.closed == ""
    client.connection.sweep(begun + (60 * 19 + 101) * 1_000_000_000)
    assert client.closed == "aborted"


def test_a_client_that_has_not_taken_the_answer_before_holds_up_the_next(plane: Plane) -> None:  # failure 20
    """The transport says only once that it is full."""
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    client.on_write = lambda data: client.connection.pause_writing()
    engine.says(whole(b"{}"))
    client.on_write = lambda data: None
    client.says(ask(stream=True))
    assert not engine.reading
    client.connection.resume_writing()
    assert engine.reading
    engine.says(HEAD + chunk(text("", "stop", 2) + DONE) + b"0\r\n\r\n")
    client.says(ask(stream=True))
    assert engine.reading


def test_a_client_that_never_took_the_answer_before_is_let_go(plane: Plane) -> None:  # failure 20
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    client.connection.pause_writing()
    engine.says(whole(b"{}"))
    client.says(ask(stream=True))
    plane.sweep(later_s=61)
    assert (client.closed, engine.closed) == ("aborted", "aborted")
    assert [record.error_code for record in plane.records()] == ["", "client_stopped_reading"]


@pytest.mark.parametrize("plane", [{"limits": {"pipelined_bytes": 10_000}}], indirect=True)
def test_what_waits_for_its_turn_is_bounded_however_long_it_goes_on(plane: Plane) -> None:
    """Each answer lets one request run, and its client sends three more."""

    async def run() -> None:
        client, engine = plane.client(), plane.engine()
        sent = 0
        while not client.closed:
            client.says(ask(user="x" * 500) * 3)
            sent += 3
            assert sent < 100
            engine.says(whole(b"{}"))
            await asyncio.sleep(0)
        client.connection.connection_lost(None)

    asyncio.run(run())


@pytest.mark.parametrize("plane", [{"limits": {"pipelined_bytes": 10_000}}], indirect=True)
def test_who_never_sends_far_ahead_may_go_on_for_ever(plane: Plane) -> None:
    async def run() -> None:
        client, engine = plane.client(), plane.engine()
        client.says(ask(user="x" * 500))
        for _ in range(100):
            client.says(ask(user="x" * 500))
            engine.says(whole(b"{}"))
            await asyncio.sleep(0)
        assert not client.closed

    asyncio.run(run())


def test_what_a_client_had_not_taken_is_on_record(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()))
    client.unsent = 77
    engine.says(chunk(text("", "stop", 2) + DONE))
    assert [record.unsent_bytes for record in plane.records()] == [77]


# --- ends --------------------------------------------------------------------------------------------------------------


def test_what_came_whole_before_an_engine_died_is_the_clients(plane: Plane) -> None:  # failure 4
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()) + chunk(text("", "stop", 2)) + b"ff\r\ndata: half an ev")
    engine.dies()
    body = client.heard.partition(b"\r\n\r\n")[2]
    assert text("", "stop", 2).replace(_usage(2), b"") in body
    assert b"half" not in body
    assert b"[DONE]" not in body
    assert not body.endswith(b"0\r\n\r\n")
    assert b'"code":"upstream_disconnected"' in body
    assert client.closed == "closed"
    [record] = plane.records()
    assert (record.outcome, record.output_tokens, record.usage_source) == (Outcome.UPSTREAM_ERROR, 2, UsageSource.ENGINE)


def test_everything_in_flight_can_be_ended(plane: Plane) -> None:  # failure 50
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + chunk(text()))
    plane.pipeline.interrupt_all(ShuttingDown("The proxy is shutting down."))
    assert b'"code":"shutting_down"' in client.heard
    assert (client.closed, engine.closed) == ("closed", "aborted")
    [record] = plane.records()
    assert (record.outcome, record.error_code) == (Outcome.REJECTED, "shutting_down")


def test_bytes_that_nobody_asked_for_close_the_connection(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    engine.says(whole(b"{}"))
    engine.says(whole(b'{"poison":true}'))
    assert engine.closed == "aborted"
    other = plane.engine()
    client.says(ask())
    assert other.heard
    assert b"poison" not in client.heard


def test_two_answers_at_once_are_one_answer_and_a_broken_connection(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    engine.says(whole(b'{"first":1}') + whole(b'{"second":2}'))
    assert b"first" in client.heard
    assert b"second" not in client.heard
    plane.engine()
    client.says(ask())
    assert b"second" not in client.heard


def _leave(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD)
    client.leaves()
    engine.dies()


def _fail_in_mid_stream(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD)
    engine.dies()
    client.leaves()


def _be_refused(plane: Plane) -> None:
    client = plane.client()
    client.says(ask(model="nowhere"))
    client.leaves()


@pytest.mark.parametrize("happens", [_leave, _fail_in_mid_stream, _be_refused])
def test_what_has_ended_is_freed_without_the_garbage_collector(
    plane: Plane, happens: Callable[[Plane], None]
) -> None:  # failure 19
    kinds = (Exchange, Reply, Flow, Call, httptools.HttpRequestParser, httptools.HttpResponseParser)
    happens(plane)  # what is learnt once stays
    gc.collect()
    gc.disable()
    try:
        before = Counter(type(each) for each in gc.get_objects())
        for _ in range(5):
            happens(plane)
        after = Counter(type(each) for each in gc.get_objects())
        assert [kind for kind in kinds if after[kind] > before[kind]] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("plane", [{"everyone": {"requests_per_minute": 5}}], indirect=True)
def test_a_request_that_waits_for_its_admission_is_on_record(plane: Plane) -> None:
    """It is accepted: were the worker killed now, it would be a row all the same."""

    class Silent:
        """A Redis that takes its time."""

        up, parts, clock_offset_ns = True, 1, 0

        def ask(self, permit: object) -> None: ...

        def changed(self, *what: object) -> None: ...

    plane.pipeline.admission.shared = Silent()  # type: ignore[assignment]
    plane.client().says(ask())
    [exchange] = plane.pipeline.admission.in_flight
    assert exchange.opened
