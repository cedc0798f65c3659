"""Streams over real sockets: what breaks them, who notices, and what the record says of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.exchange import Record, UsageSource
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, ask
from tests.support.worker import CHAT, PICO_INPUT, PICO_OUTPUT, Worker, backend, chat, deaf_host

DONE: Final = b"data: [DONE]\n\n"
PROMPT_TOKENS: Final = 31
"""Of the body that `chat` makes, as the scripted engine counts."""


def error_event(message: str, code: str) -> bytes:
    """The proxy's own, as it goes into a stream that is broken."""
    error = {"message": message, "type": "upstream_error", "param": None, "code": code}
    return b"data: %b\n\n" % json.dumps({"error": error}, separators=(",", ":")).encode()


DISCONNECTED: Final = error_event("The engine closed the connection before its answer was complete.", "upstream_disconnected")
UNFINISHED: Final = error_event("The engine's stream ended before the answer was complete.", "upstream_disconnected")


def raw_stream(*events: str) -> str:
    """A script's `raw`: a whole event stream of one's own."""
    body = "".join(events)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body.encode())}\r\n\r\n"
    return (head + body).encode().decode("latin-1")


def seen_straight(vllm: ScriptedVLLM, body: dict[str, Any]) -> list[bytes]:
    """The events, without what is different in each answer."""
    return [Reply(parts=[(0.0, event)]).anonymous for event in ask(vllm.url, CHAT, body).events]


def seen(reply: Reply) -> list[bytes]:
    return [Reply(parts=[(0.0, event)]).anonymous for event in reply.events]


def counted(record: Record) -> tuple[int, int, int]:
    return record.input_tokens, record.output_tokens, record.usage_source


# --- the client leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_client_that_leaves_mid_stream_stops_the_engine(worker: StartWorker, vllm: ScriptedVLLM, leave: str) -> None:
    # failure 1
    running = worker(vllm.url)
    with running.begin(chat({"tokens": 1000, "hang_after_events": 6})) as client:
        assert len(client.read(events=6).events) == 6
        getattr(client, leave)()
    vllm.wait(lambda: vllm.aborted and not vllm.in_flight and not vllm.open_connections)
    record = running.record()
    assert (record.outcome, record.error_code, record.status) == (Outcome.CLIENT_GONE, "client_disconnected", 200)
    assert counted(record) == (PROMPT_TOKENS, 5, UsageSource.ENGINE)
    assert record.cost_nano == (PROMPT_TOKENS * PICO_INPUT + 5 * PICO_OUTPUT) // 1000
    assert record.finish_reasons == []
    assert record.chunks == 6
    [attempt] = record.attempts
    assert (attempt.status, attempt.error) == (200, "client_disconnected")
    running.until_in_flight(0)


def test_what_was_generated_before_a_client_left_is_booked(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 1: the engine goes on generating until it notices
    running = worker(vllm.url)
    with running.begin(chat({"tokens": 100_000, "interval": 0.002})) as client:
        delivered = len(client.read(events=20).events) - 1
    vllm.wait(lambda: vllm.aborted)
    record = running.record()
    assert delivered <= record.output_tokens <= vllm.generated_tokens < 100_000
    assert record.outcome == Outcome.CLIENT_GONE


@pytest.mark.parametrize("script", [{"hang": True}, {"first": 100.0}, {"first": 100.0, "late_head": True}], ids=str)
def test_a_client_that_leaves_before_the_first_token_stops_the_engine(
    worker: StartWorker, vllm: ScriptedVLLM, script: dict[str, Any]
) -> None:
    # failure 2
    running = worker(vllm.url)
    with running.begin(chat(script)):
        vllm.wait(lambda: vllm.in_flight == 1)
    vllm.wait(lambda: vllm.aborted and not vllm.in_flight)
    record = running.record()
    assert (record.outcome, record.first_token_ns) == (Outcome.CLIENT_GONE, 0)
    assert counted(record) == (0, 0, UsageSource.NONE)


@pytest.mark.parametrize("script", [{"hang": True}, {"first": 100.0}, {"tokens": 1000, "interval": 0.1}], ids=str)
def test_a_client_that_leaves_a_call_that_does_not_stream_stops_the_engine(
    worker: StartWorker, vllm: ScriptedVLLM, script: dict[str, Any]
) -> None:
    # failure 3
    running = worker(vllm.url)
    with running.begin(chat(script, stream=False)):
        vllm.wait(lambda: vllm.in_flight == 1)
    vllm.wait(lambda: vllm.aborted and not vllm.in_flight)
    record = running.record()
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, 499)


def test_a_client_that_leaves_while_its_engine_is_being_reached_is_booked(worker: StartWorker) -> None:
    # failure 2
    with deaf_host() as url:
        running = worker(url)
        with running.begin(chat()):
            running.until_in_flight(1)
        record = running.record()
    assert (record.outcome, record.status, record.sent_ns) == (Outcome.CLIENT_GONE, 499, 0)
    assert [attempt.error for attempt in record.attempts] == ["client_disconnected"]
    running.until_in_flight(0)


def test_a_client_that_leaves_when_every_choice_has_ended_has_what_it_wanted(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    # The role, seven tokens and the end; then silence instead of usage and [DONE].
    with running.begin(chat({"tokens": 8, "hang_after_events": 9})) as client:
        vllm.wait(lambda: vllm.generated_tokens == 8)
        client.read(events=8)
        client.close()
    vllm.wait(lambda: vllm.aborted)
    record = running.record()
    assert (record.outcome, record.finish_reasons, record.output_tokens) == (Outcome.OK, ["stop"], 8)


# --- the engine breaks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["reset", "close"])
@pytest.mark.parametrize("asked", [{}, {"stream_options": {"include_usage": True}}], ids=str)
def test_an_engine_that_dies_mid_stream_is_an_error_event_and_no_clean_end(
    worker: StartWorker, vllm: ScriptedVLLM, cut: str, asked: dict[str, Any]
) -> None:
    # failure 4
    running = worker(vllm.url)
    body = chat({"tokens": 100, "cut_after_events": 6, "cut": cut}, **asked)
    reply = running.ask(body)
    assert (reply.status, reply.ending) == (200, "closed")
    assert seen(reply) == [*seen_straight(vllm, body), DISCONNECTED]
    assert reply.body.endswith(DISCONNECTED)
    assert len(vllm.requests) == 2, "one straight, one through the proxy: it was tried again"
    record = running.record()
    assert (record.outcome, record.error_code, record.status) == (Outcome.UPSTREAM_ERROR, "upstream_disconnected", 200)
    assert counted(record) == (PROMPT_TOKENS, 5, UsageSource.ENGINE)
    assert [attempt.error for attempt in record.attempts] == ["upstream_disconnected"]
    assert record.response_bytes == len(reply.body)


def test_an_event_that_did_not_come_whole_is_not_handed_on(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 4
    running = worker(vllm.url)
    whole = running.ask(chat({"tokens": 8})).events
    # Cut in the middle of the third event; the proxy's own request has usage on each, so it is longer.
    reply = running.ask(chat({"tokens": 8, "cut_after_bytes": 800}))
    assert len(reply.events) < len(whole)
    assert reply.events[-1] == DISCONNECTED
    assert all(json.loads(event.removeprefix(b"data: ")) for event in reply.events)


@pytest.mark.parametrize(
    "script",
    [
        {"tokens": 100, "cut_after_events": 6, "cut": "clean"},
        {"tokens": 5, "no_finish": True, "no_done": True},
        {"tokens": 5, "no_finish": True},
        {"cut_after_events": 0, "cut": "clean"},
    ],
    ids=str,
)
def test_a_stream_that_ends_without_an_end_is_broken(worker: StartWorker, vllm: ScriptedVLLM, script: dict[str, Any]) -> None:
    # failure 5
    running = worker(vllm.url)
    reply = running.ask(chat(script))
    record = running.record()
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "upstream_disconnected")
    assert DONE not in reply.body
    if script.get("cut_after_events") == 0:  # nothing had gone out: a status can still be given
        assert (reply.status, reply.json()["error"]["code"]) == (502, "upstream_disconnected")
        return
    assert (reply.status, reply.ending) == (200, "closed")
    assert reply.events[-1] == UNFINISHED
    assert record.output_tokens == 5


def test_a_stream_with_one_choice_left_open_is_broken(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 5
    running = worker(vllm.url)
    script = {"pieces": [["a"], ["b", "c", "d"]], "order": [0, 0, 1, 1], "cut_after_events": 5, "cut": "clean"}
    reply = running.ask(chat(script, n=2))
    assert (reply.ending, reply.events[-1]) == ("closed", UNFINISHED)
    record = running.record()
    assert (record.outcome, record.finish_reasons, record.output_tokens) == (Outcome.UPSTREAM_ERROR, ["stop"], 3)


def test_a_stream_that_is_finished_needs_no_done(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    body = chat({"tokens": 5, "no_done": True})
    reply = running.ask(body)
    assert (reply.status, reply.ending) == (200, "complete")
    assert seen(reply) == seen_straight(vllm, body)
    assert running.record().outcome == Outcome.OK


def test_an_error_that_comes_first_becomes_a_status(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 6
    running = worker(vllm.url)
    reply = running.ask(chat({"error_event_after": 0, "error": "The engine is out of memory."}))
    assert (reply.status, reply.ending) == (500, "complete")
    assert reply.header("content-type") == "application/json"
    error = reply.json()["error"]
    assert (error["message"], error["code"]) == ("The engine is out of memory.", 500)
    record = running.record()
    assert (record.outcome, record.status) == (Outcome.UPSTREAM_ERROR, 500)
    assert (record.error, record.error_code) == ("The engine answered with status 500.", "500")


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        ('{"message":"Too long.","type":"BadRequestError","code":400}', 400, Outcome.CLIENT_ERROR),
        ('{"message":"Busy.","type":"Service Unavailable","code":"503"}', 503, Outcome.UPSTREAM_ERROR),
        ('{"message":"Who knows.","code":"odd"}', 502, Outcome.UPSTREAM_ERROR),
        ('{"message":"Who knows.","code":200}', 502, Outcome.UPSTREAM_ERROR),
        ('"just a text"', 502, Outcome.UPSTREAM_ERROR),
    ],
)
def test_the_status_of_a_first_error_is_its_code(
    worker: StartWorker, vllm: ScriptedVLLM, error: str, status: int, outcome: Outcome
) -> None:
    # failure 6
    running = worker(vllm.url)
    reply = running.ask(chat({"raw": raw_stream(f'data: {{"error":{error}}}\n\n', "data: [DONE]\n\n")}))
    assert (reply.status, reply.ending) == (status, "complete")
    assert reply.body == b'{"error":%b}' % error.encode()
    assert (running.record().status, running.record().outcome) == (status, outcome)


@pytest.mark.parametrize("done", [True, False])
def test_an_error_that_comes_later_passes_and_is_a_failure(worker: StartWorker, vllm: ScriptedVLLM, done: bool) -> None:
    # failure 6
    running = worker(vllm.url)
    body = chat({"error_event_after": 4, "error_done": done})
    reply = running.ask(body)
    assert (reply.status, reply.ending) == (200, "complete")
    assert seen(reply) == seen_straight(vllm, body)
    assert reply.events[-1 - done].startswith(b'data: {"error": {"message": "EngineCore')
    record = running.record()
    assert (record.outcome, record.error_code, record.finish_reasons) == (Outcome.UPSTREAM_ERROR, "500", [])
    assert counted(record) == (PROMPT_TOKENS, 3, UsageSource.ENGINE)


def test_a_line_without_an_end_is_cut_off(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 14
    running = worker(vllm.url, config={"limits": {"event_bytes": 64 * 1024}})
    reply = running.ask(chat({"huge_line": 1_000_000, "hang_after_events": 3}))
    assert reply.ending == "closed"
    assert reply.events[-1] == error_event("The engine sent an event of more than 65536 bytes.", "bad_gateway")
    assert len(reply.body) < 64 * 1024
    vllm.wait(lambda: vllm.aborted and vllm.aborted[0].sent < 1_000_000 + 2000)
    record = running.record()
    assert (record.outcome, record.error_code, record.output_tokens) == (Outcome.UPSTREAM_ERROR, "bad_gateway", 1)


def test_a_line_of_100_mb_costs_no_memory(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 14
    running = worker(vllm.url)
    running.ask(chat())
    before = running.peak_rss_bytes
    reply = running.ask(chat({"huge_line": 100_000_000}))
    assert b'"code":"bad_gateway"' in reply.events[-1]
    assert running.peak_rss_bytes - before < 32 * 1024 * 1024
    vllm.wait(lambda: vllm.aborted and vllm.aborted[0].sent < 20_000_000)


# --- the engine is silent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [{"hang": True}, {"first": 100.0}], ids=["not even a head", "only a head"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_sends_nothing_times_out(
    worker: StartWorker, vllm: ScriptedVLLM, script: dict[str, Any], stream: bool
) -> None:
    # failure 11
    running = worker(vllm.url, config={"timeouts": {"first_byte": 0.3}})
    reply = running.ask(chat(script, stream=stream))
    assert (reply.status, reply.ending) == (504, "complete")
    assert reply.json()["error"]["code"] == "first_byte_timeout"
    assert reply.json()["error"]["type"] == "upstream_error"
    vllm.wait(lambda: vllm.aborted and not vllm.in_flight)
    record = running.record()
    assert (record.outcome, record.status, record.error_code) == (Outcome.TIMEOUT, 504, "first_byte_timeout")


def test_another_backend_is_unaffected_by_one_that_hangs(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 11
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url)
        with running.begin(chat({"hang": True})):
            running.until(lambda: vllm.in_flight + other.in_flight == 1 or None, "the request that hangs")
            hanging, fine = (vllm, other) if vllm.in_flight else (other, vllm)
            for _ in range(4):
                assert running.ask(chat({"tokens": 3})).ending == "complete"
            assert len(fine.requests) == 4
            assert len(hanging.requests) == 1


def test_a_long_prefill_is_no_stall(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 12: vLLM sends the head at once, and the first token when it is there
    running = worker(vllm.url, config={"timeouts": {"between_chunks": 0.3}})
    reply = running.ask(chat({"tokens": 3, "first": 1.2}))
    assert (reply.status, reply.ending) == (200, "complete")
    assert running.record().outcome == Outcome.OK


def test_an_engine_that_stalls_between_tokens_times_out(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 12
    running = worker(vllm.url, config={"timeouts": {"between_chunks": 0.3}})
    reply = running.ask(chat({"tokens": 100, "hang_after_events": 6}))
    assert (reply.status, reply.ending) == (200, "closed")
    assert reply.events[-1] == error_event("The engine fell silent for 0.3 s.", "idle_timeout")
    assert len(reply.events) == 7
    assert DONE not in reply.body
    vllm.wait(lambda: vllm.aborted and not vllm.in_flight)
    record = running.record()
    assert (record.outcome, record.error_code) == (Outcome.TIMEOUT, "idle_timeout")
    assert counted(record) == (PROMPT_TOKENS, 5, UsageSource.ENGINE)


def test_no_stream_is_too_long_as_long_as_it_goes_on(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 19: every timeout there is passes several times over
    short = {"connect": 0.4, "first_byte": 0.4, "between_chunks": 0.4, "client_write": 0.4, "client_request": 0.4}
    running = worker(vllm.url, config={"timeouts": {**short, "client_idle": 0.4}})
    reply = running.ask(chat({"tokens": 25, "interval": 0.1}))
    assert (reply.status, reply.ending) == (200, "complete")
    assert running.record().output_tokens == 25


def test_comments_keep_a_stream_alive_and_are_no_tokens(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 15
    running = worker(vllm.url, config={"timeouts": {"first_byte": 0.6, "between_chunks": 0.6}})
    reply = running.ask(chat({"tokens": 3, "first": 1.5, "prefill_comments": 9}))
    assert reply.ending == "complete"
    assert [event for event in reply.events if event.startswith(b":")] == [b": keep-alive\n\n"] * 9
    (first_comment, _), *_ = reply.parts
    arrivals = [at for at, data in reply.parts if b'"content":"The' in data or b'"role"' in data]
    assert arrivals[0] > first_comment
    record = running.record()
    assert record.first_token_ns - record.first_byte_ns > 1.2e9
    assert (record.chunks, sum(record.inter_token_counts)) == (5, 2)


# --- every dress -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url)


DRESSES: Final[dict[str, dict[str, Any]]] = {
    "byte by byte": {"content": "日本語 👋🏽!", "chunk_bytes": 1},
    "bytes as HTTP chunks": {"content": "日本語 👋🏽!", "chunk_bytes": 1, "split": "http"},
    "several in a write": {"coalesce": 4},
    "split anywhere": {"coalesce": 3, "chunk_bytes": 77},
    "all in one write": {"coalesce": 1000},
    "CRLF": {"newline": "\r\n"},
    "CRLF byte by byte": {"newline": "\r\n", "chunk_bytes": 1},
    "CR": {"newline": "\r"},
    "byte order mark": {"bom": True},
    "comments": {"comments": 1},
    "two lines of data": {"multiline": True},
    "event, id and retry": {"event_fields": True},
    "tools": {"tools": True},
    "reasoning": {"tokens": 9, "reasoning": 4},
    "four tokens an event": {"tokens": 17, "tokens_per_event": 4},
    "cached": {"cached_tokens": 12},
}


@pytest.mark.parametrize("script", DRESSES.values(), ids=DRESSES)
def test_whatever_its_dress_a_stream_passes_and_is_counted(
    shared: Worker, shared_vllm: ScriptedVLLM, script: dict[str, Any]
) -> None:
    # failures 13, 18
    body = chat(script)
    before = shared_vllm.generated_tokens
    reply = shared.ask(body)
    generated = shared_vllm.generated_tokens - before
    assert reply.anonymous == ask(shared_vllm.url, CHAT, body).anonymous
    record = shared.record_of(reply)
    assert (record.outcome, record.usage_source, record.output_tokens) == (Outcome.OK, UsageSource.ENGINE, generated)
    assert (record.input_tokens, record.cached_tokens) == (PROMPT_TOKENS, script.get("cached_tokens", 0))
    assert record.reasoning_tokens == script.get("reasoning", 0)
    assert record.finish_reasons == ["tool_calls" if "tools" in script else "stop"]
    assert record.response_bytes == len(reply.body)
    assert 0 < record.first_token_ns <= record.last_token_ns <= record.upstream_ended_ns <= record.ended_ns


USAGES: Final[dict[str, tuple[int, int, UsageSource]]] = {
    "last": (PROMPT_TOKENS, 8, UsageSource.ENGINE),
    "continuous": (PROMPT_TOKENS, 8, UsageSource.ENGINE),
    "middle": (PROMPT_TOKENS, 8, UsageSource.ENGINE),
    "twice": (PROMPT_TOKENS, 8, UsageSource.ENGINE),
    "zero": (0, 0, UsageSource.ENGINE),
    # Seven events with text for eight tokens, and four bytes a token: guesses, and booked as guesses.
    "none": (0, 7, UsageSource.ESTIMATED),
    "null": (0, 7, UsageSource.ESTIMATED),
    "float": (0, 7, UsageSource.ESTIMATED),
}


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("asked", [{}, {"stream_options": {"include_usage": True}}], ids=str)
def test_usage_is_recorded_once_whatever_the_engine_says(shared: Worker, usage: str, asked: dict[str, Any]) -> None:
    # failure 16
    expected_input, expected_output, source = USAGES[usage]
    reply = shared.ask(chat({"usage": usage, "tokens": 8}, **asked))
    assert reply.ending == "complete"
    record = shared.record_of(reply)
    assert (record.output_tokens, record.usage_source) == (expected_output, source)
    assert record.input_tokens == (expected_input if source is UsageSource.ENGINE else record.request_bytes // 4)
    assert record.outcome == Outcome.OK


@pytest.mark.parametrize("usage", ["last", "none", "null", "zero", "float"])
def test_usage_of_a_whole_answer_is_recorded(shared: Worker, usage: str) -> None:
    # failure 16
    reply = shared.ask(chat({"usage": usage, "tokens": 8}, stream=False))
    record = shared.record_of(reply)
    if usage in ("last", "zero"):
        assert counted(record) == ((PROMPT_TOKENS, 8, UsageSource.ENGINE) if usage == "last" else (0, 0, UsageSource.ENGINE))
    else:
        assert counted(record) == (record.request_bytes // 4, len(reply.body) // 4, UsageSource.ESTIMATED)


def test_stream_options_without_a_stream_are_the_engines_to_refuse(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    # failure 17
    body = chat(stream=False, stream_options={"include_usage": True})
    reply = shared.ask(body)
    assert reply.status == 400
    assert reply.body == ask(shared_vllm.url, CHAT, body).body
    assert shared.record_of(reply).outcome == Outcome.CLIENT_ERROR


def test_choices_of_a_stream_that_broke_off_are_counted_each_for_itself(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 18
    running = worker(vllm.url)
    script = {"pieces": [["a", "b", "c"], ["d", "e"], ["f"]], "order": [0, 1, 2, 0, 1, 0], "hang_after_events": 3 + 5}
    with running.begin(chat(script, n=3)) as client:
        client.read(events=8)
    vllm.wait(lambda: vllm.aborted)
    record = running.record()
    assert counted(record) == (PROMPT_TOKENS, 5, UsageSource.ENGINE)
    assert record.choices == 3


def test_an_engine_of_another_kind_is_asked_for_usage_at_the_end_only(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 17: a strict server may refuse what only vLLM knows
    running = worker(backend(vllm.url, kind="openai"))
    body = chat({"tokens": 5})
    reply = running.ask(body)
    assert vllm.requests[0].json()["stream_options"] == {"include_usage": True}
    assert b'"usage"' not in reply.body
    assert counted(running.record()) == (PROMPT_TOKENS, 5, UsageSource.ENGINE)


# --- long streams, slow readers ----------------------------------------------------------------------------------------


def read_all(running: Worker, body: dict[str, Any], mark: int) -> tuple[int, int, int]:
    """Read a stream to its end → (bytes read, peak of the worker's memory when `mark` bytes were there, and at the end)."""
    read = at_mark = 0
    end = b""
    with running.begin(body, timeout=60) as client:
        while not end.endswith(b"\r\n0\r\n\r\n"):
            data = client.socket.recv(1 << 20)
            assert data, "the stream broke off"
            read += len(data)
            end = (end + data)[-16:]
            if not at_mark and read > mark:
                at_mark = running.peak_rss_bytes
        return read, at_mark, running.peak_rss_bytes


@pytest.mark.parametrize("capture", [False, True], ids=["", "captured"])
def test_memory_does_not_grow_with_a_stream(worker: StartWorker, vllm: ScriptedVLLM, capture: bool) -> None:
    # failure 19
    running = worker(vllm.url, config={"capture": {"content": capture}})
    read, before, after = read_all(running, chat({"tokens": 60_000, "coalesce": 2}), mark=1_000_000)
    assert read > 14_000_000
    assert after - before < 8 * 1024 * 1024
    assert running.record().output_tokens == 60_000


@pytest.mark.long
@pytest.mark.timeout(4200)
def test_memory_does_not_grow_in_an_hour(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 19
    running = worker(vllm.url)
    read, before, after = read_all(running, chat({"tokens": 100_000, "interval": 0.036}), mark=1_000_000)
    assert read > 20_000_000
    assert after - before < 8 * 1024 * 1024
    assert running.record().output_tokens == 100_000


def test_memory_does_not_grow_with_requests(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    sizes = []
    with WireClient(running.url) as client:
        for _ in range(3):
            for number in range(700):
                assert client.ask(CHAT, chat({"tokens": 3}, stream=bool(number % 2)), key=running.key).ending == "complete"
            sizes.append(running.rss_bytes)
    assert sizes[2] - sizes[1] < 1024 * 1024


def test_clients_that_come_and_go_as_they_like_leave_one_record_each_and_nothing_else(
    worker: StartWorker, vllm: ScriptedVLLM
) -> None:
    # failures 1, 2, 3
    dice = random.Random(20261120)
    running = worker(vllm.url)
    running.ask(chat())
    sockets = running.open_sockets

    def come_and_go(seed: int) -> None:
        own = random.Random(seed)
        script = {"tokens": own.randint(1, 40), "first": own.choice([0, 0.01, 0.05]), "interval": own.choice([0, 0.002, 0.01])}
        with running.begin(chat(script, stream=own.random() < 0.8)) as client:
            client.socket.settimeout(own.choice([0.001, 0.02, 0.05, 10]))
            client.read()

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(come_and_go, [dice.getrandbits(32) for _ in range(400)]))
    records = running.records(401)
    assert len({record.id for record in records}) == 401
    outcomes = Counter(record.outcome for record in records)
    assert outcomes.keys() == {Outcome.OK, Outcome.CLIENT_GONE}, outcomes
    assert sum(record.output_tokens for record in records) <= vllm.generated_tokens
    vllm.wait_idle()
    running.until_in_flight(0)
    assert not any(running.heartbeat().in_flight_by_backend.values())
    assert running.open_records() == []
    running.until(lambda: running.open_sockets <= sockets + len(vllm.open) or None, "the sockets to be closed")


def test_a_reader_who_stopped_slows_its_engine_down_and_is_let_go(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 20
    running = worker(vllm.url, config={"timeouts": {"client_write": 1.0}})
    running.ask(chat())
    before = running.peak_rss_bytes
    with running.begin(chat({"tokens": 400_000}), receive_buffer=4096):
        vllm.wait(lambda: vllm.aborted, timeout=60)
        record = running.records(2)[-1]
    assert (record.outcome, record.error_code, record.status) == (Outcome.CLIENT_GONE, "client_stopped_reading", 200)
    assert record.response_bytes < 512 * 1024
    assert running.peak_rss_bytes - before < 4 * 1024 * 1024
    # Of 140 MB it could send what fits into the kernel's buffers: its own, by Linux's default up to 4 MB, and the proxy's.
    assert vllm.aborted[0].sent < 16 * 1024 * 1024
    assert 0 < record.output_tokens <= vllm.aborted[0].generated


def test_a_slow_reader_gets_everything_in_its_own_time(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 20
    running = worker(vllm.url)
    body = chat({"tokens": 60_000})
    with running.begin(body, receive_buffer=4096) as client:
        client.read(events=2)
        # The engine is held up: what it can send fits into the buffers on the way.
        vllm.wait(lambda: any(connection.blocked for connection in list(vllm.open)))
        reply = client.read()
    assert reply.ending == "complete"
    assert reply.anonymous == ask(vllm.url, CHAT, body).anonymous
    assert running.record().output_tokens == 60_000
