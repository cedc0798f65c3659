"""Requests that wait for an engine with room: who is held back, who comes first, what those hear who wait in vain."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import openai
import pytest

from proxy.errors import Outcome
from proxy.exchange import Phase, named_times, peek_record
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import Script, ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, KEY, MODEL, PATIENCE, Worker, backend, chat

OTHER_KEY: Final = "gh-other"
COMMENT: Final = b": waiting\n\n"
BUSY: Final = {"hang": True, "tokens": 2}


def until_waiting(running: Worker, requests: int) -> None:
    running.until(lambda: running.heartbeat().waiting == requests or None, f"{requests} that wait")


@contextmanager
def full(running: Worker, vllm: ScriptedVLLM) -> Iterator[Future[Reply]]:
    """One request is there that takes as long as the test wants."""
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(running.ask, chat(BUSY))
        try:
            vllm.wait(lambda: vllm.in_flight == 1)
            yield first
        finally:
            vllm.release()
        assert first.result(PATIENCE).ending == "complete"


def test_an_engine_gets_no_more_than_its_depth(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, depth=2))
    with ThreadPoolExecutor(6) as clients:
        futures = [clients.submit(running.ask, chat(BUSY, stream=at % 2 == 0)) for at in range(6)]
        until_waiting(running, 4)
        for left in (4, 2, 0):
            vllm.wait(lambda: vllm.in_flight == 2)
            until_waiting(running, left)
            assert running.heartbeat().in_flight_by_backend == {"b0": 2}
            vllm.release()
        assert {future.result(PATIENCE).status for future in futures} == {200}
    records = running.records(6)
    queued = [record for record in records if record.queued_ns]
    assert len(queued) == 4
    for record in records:
        times = {name: end - begin for name, begin, end in named_times(record, record.attempts)}
        waited = record.attempts[0].started_ns - record.queued_ns if record.queued_ns else 0
        assert times.get("wait", 0) == record.wait_ns == waited
        assert bool(record.wait_ns) == (record in queued)
        assert record.proxy_added_ns() < record.wait_ns or record not in queued, "waiting is no time of the proxy's own"


def test_who_leaves_while_he_waits_is_never_sent(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failures 2, 55
    running = worker(backend(vllm.url, depth=1))
    with full(running, vllm):
        for stream in (True, False):
            with running.begin(chat({"tokens": 2}, stream=stream)):
                until_waiting(running, 1)
            until_waiting(running, 0)
        assert [(record.outcome, record.attempts) for record in running.records(2)] == [(Outcome.CLIENT_GONE, [])] * 2
        assert all(0 < record.queued_ns < record.ended_ns for record in running.records(2))
    running.records(3)
    assert len(vllm.requests) == 1
    assert running.ask(chat({"tokens": 2})).status == 200
    assert len(vllm.requests) == 2


def test_a_line_that_is_full_says_so(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 55
    running = worker(backend(vllm.url, depth=1), config={"waiting": {"requests": 1}})
    with full(running, vllm), running.begin(chat({"tokens": 2})) as waiting:
        until_waiting(running, 1)
        reply = running.ask(chat())
        assert (reply.status, reply.json()["error"]["code"]) == (503, "queue_full")
        assert int(reply.header("retry-after") or 0) >= 1
        vllm.release()
        assert waiting.read().ending == "complete"
    [refused] = [record for record in running.records(3) if record.outcome == Outcome.REJECTED]
    assert (refused.attempts, refused.error_code, refused.queued_ns) == ([], "queue_full", 0)


def test_nobody_fills_the_line_alone(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 55: something is left for others
    running = worker(backend(vllm.url, depth=1), config={"waiting": {"requests": 8}}, keys=[OTHER_KEY])
    with full(running, vllm), ExitStack() as stack:
        begun = [stack.enter_context(running.begin(chat({"tokens": 2}))) for _ in range(7)]
        until_waiting(running, 7)
        reply = running.ask(chat())
        assert (reply.status, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(reply.header("retry-after") or 0) >= 1
        begun.append(stack.enter_context(WireClient(running.url)))
        begun[-1].send(request(CHAT, chat({"tokens": 2}), key=OTHER_KEY))
        until_waiting(running, 8)
        vllm.release()
        assert [client.read().ending for client in begun] == ["complete"] * 8


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_in_vain_hears_when_to_come_again(worker: StartWorker, vllm: ScriptedVLLM, stream: bool) -> None:
    # failure 55
    running = worker(backend(vllm.url, depth=1), config={"waiting": {"timeout": 0.5}})
    with full(running, vllm):
        reply = running.ask(chat(stream=stream))
        assert (reply.status, reply.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(reply.header("retry-after") or 0) >= 1
        record = running.record()
        assert (record.outcome, record.attempts) == (Outcome.REJECTED, [])
        assert record.wait_ns >= 500_000_000
    assert len(vllm.requests) == 1


def test_the_rate_of_late_tells_when_to_come_again(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 55: about a request in half a second, and six are before it
    running = worker(backend(vllm.url, depth=1), config={"waiting": {"requests": 6}})
    with ThreadPoolExecutor(8) as clients:
        futures = [clients.submit(running.ask, chat({"first": 0.5, "tokens": 2})) for _ in range(7)]
        until_waiting(running, 6)
        vllm.wait(lambda: len(vllm.requests) == 4)
        futures += [clients.submit(running.ask, chat({"first": 0.5, "tokens": 2})) for _ in range(3)]
        until_waiting(running, 6)
        reply = running.ask(chat())
        assert reply.status == 503
        assert 2 <= int(reply.header("retry-after") or 0) <= 30
        assert all(future.result(PATIENCE).status == 200 for future in futures)


def test_classes_come_one_after_the_other(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    keys = {"name 0": {"priority": "low"}, "name 1": {}, "name 2": {"priority": "high"}}
    running = worker(backend(vllm.url, depth=1), config={"keys": keys}, keys=["gh-1", "gh-2"])
    with ThreadPoolExecutor(1) as clients, ExitStack() as stack:
        first = clients.submit(running.ask, chat(BUSY))
        vllm.wait(lambda: vllm.in_flight == 1)
        begun: list[WireClient] = []
        for waiting, key in enumerate([KEY, KEY, "gh-1", "gh-1", "gh-2", "gh-2"], 1):
            begun.append(stack.enter_context(WireClient(running.url)))
            begun[-1].send(request(CHAT, chat({"tokens": 2}), key=key))
            until_waiting(running, waiting)
        vllm.release()
        assert first.result(PATIENCE).status == 200
        assert [client.read().ending for client in begun] == ["complete"] * 6
    order = sorted(running.records(7), key=lambda record: record.attempts[0].started_ns + record.received_unix_ns)
    assert [record.key_name for record in order] == ["name 0", *["name 2"] * 2, *["name 1"] * 2, *["name 0"] * 2]


def test_a_key_with_many_does_not_keep_another_ones_one_waiting(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, depth=1), keys=[OTHER_KEY])
    with ThreadPoolExecutor(1) as clients, ExitStack() as stack:
        first = clients.submit(running.ask, chat(BUSY))
        vllm.wait(lambda: vllm.in_flight == 1)
        begun: list[WireClient] = []
        for waiting, key in enumerate([*[KEY] * 8, OTHER_KEY], 1):
            begun.append(stack.enter_context(WireClient(running.url)))
            begun[-1].send(request(CHAT, chat({"tokens": 2}), key=key))
            until_waiting(running, waiting)
        vllm.release()
        assert first.result(PATIENCE).status == 200
        assert [client.read().ending for client in begun] == ["complete"] * 9
    order = sorted(running.records(10), key=lambda record: record.attempts[0].started_ns + record.received_unix_ns)
    assert [record.key_name for record in order].index("name 1") <= 3


# --- a stream is kept alive while it waits -----------------------------------------------------------------------------

KEPT: Final = {"waiting": {"keep_alive": 0.2}}


def test_a_stream_that_waits_is_kept_alive(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 15
    running = worker(backend(vllm.url, depth=1), config=KEPT)
    with full(running, vllm) as first, running.begin(chat({"tokens": 3})) as client:
        begun = client.read(events=3)
        assert (begun.status, begun.header("content-type")) == (200, "text/event-stream; charset=utf-8")
        assert begun.events == [COMMENT] * 3
        vllm.release()
        reply = client.read()
        assert reply.ending == "complete"
        assert first.result(PATIENCE).ending == "complete"
    straight = vllm.requests[-1]
    assert straight.outcome == "done"
    answer = reply.body.removeprefix(COMMENT * reply.events.count(COMMENT))
    assert COMMENT not in answer
    assert answer.endswith(b"data: [DONE]\n\n")
    record = running.record_of(reply)
    assert (record.outcome, record.status, record.output_tokens) == (Outcome.OK, 200, 3)
    assert record.first_token_ns > record.attempts[0].started_ns > record.queued_ns > 0
    assert record.response_bytes == len(answer), "comments are no part of the answer"


def test_an_answer_in_one_piece_is_not_kept_alive(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, depth=1), config=KEPT)
    with full(running, vllm), running.begin(chat({"tokens": 3}, stream=False)) as client:
        until_waiting(running, 1)
        time.sleep(0.5)
        vllm.release()
        reply = client.read()
        assert reply.header("content-length") == str(len(reply.body))
        assert reply.json()["choices"]


def test_openais_client_reads_through_what_keeps_it_alive(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 15
    running = worker(backend(vllm.url, depth=1), config=KEPT)
    with full(running, vllm), ThreadPoolExecutor(1) as clients:

        def read() -> list[Any]:
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
                return list(
                    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True)
                )

        chunks = clients.submit(read)
        until_waiting(running, 1)
        time.sleep(0.5)
        vllm.release()
        assert chunks.result(PATIENCE)[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Script(status=400, error="No."), "400"),
        (Script(status=500), "500"),
        (Script(error_event_after=0), "500"),
        (Script(cut_after_bytes=0), "upstream_disconnected"),
    ],
    ids=["400", "500", "first event", "reset"],
)
def test_what_goes_wrong_after_comments_is_an_event(worker: StartWorker, vllm: ScriptedVLLM, wrong: Script, code: str) -> None:
    # failure 6: the status is said already
    running = worker(backend(vllm.url, depth=1), config=KEPT)
    with full(running, vllm), running.begin(chat()) as client:
        client.read(events=1)
        vllm.fail_next(1, wrong)
        vllm.release()
        reply = client.read()
    assert reply.status == 200
    assert reply.ending != "complete"
    last = reply.events[-1]
    assert last.startswith(b'data: {"error":{')
    assert b'"code":"%b"' % code.encode() in last
    assert set(reply.events[:-1]) == {COMMENT}
    assert running.record_of(reply).error_code == code


def test_waiting_in_vain_ends_a_stream_that_was_kept_alive(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, depth=1), config={"waiting": {"keep_alive": 0.2, "timeout": 0.7}})
    with full(running, vllm):
        reply = running.ask(chat())
        assert reply.status == 200
        assert b'"code":"queue_timeout"' in reply.events[-1]
        assert b"[DONE]" not in reply.body
        assert running.record().error_code == "queue_timeout"


# --- ends --------------------------------------------------------------------------------------------------------------


def test_those_who_wait_when_a_worker_is_killed_are_in_its_journal(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 49
    running = worker(backend(vllm.url, depth=1))
    with ExitStack() as stack:
        for begun in range(1, 5):
            stack.enter_context(running.begin(chat(BUSY)))
            running.until_in_flight(begun)
        until_waiting(running, 3)
        running.kill()
    records = running.records(4)
    assert {record.outcome for record in records} == {Outcome.CRASHED}
    assert sorted((bool(record.queued_ns), len(record.attempts)) for record in records) == [(False, 1), *[(True, 0)] * 3]


def test_who_has_waited_is_opened_once(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, depth=1))
    with full(running, vllm), running.begin(chat(BUSY)) as client:
        until_waiting(running, 1)
        vllm.release()
        vllm.wait(lambda: len(vllm.requests) == 2)
        vllm.release()
        assert client.read().ending == "complete"
    running.records(2)
    phases = Counter(phase for phase, _ in map(peek_record, running.journaled()))
    assert (phases[Phase.OPENING], phases[Phase.CLOSING]) == (2, 2)


def test_a_worker_that_ends_tells_those_who_wait(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 50
    running = worker(backend(vllm.url, depth=1), config={"timeouts": {"drain": 0.5}})
    with running.begin(chat(BUSY)) as first, running.begin(chat(stream=False)) as second:
        until_waiting(running, 1)
        running.stop()
        replies = [first.read(), second.read()]
    assert [reply.status for reply in replies] == [503, 503]
    assert [record.error_code for record in running.records(2)] == ["shutting_down"] * 2
    assert not running.open_records()
