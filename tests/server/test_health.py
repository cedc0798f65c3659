"""Backends that hang, die, stall and come back: who notices, how soon, what becomes of the requests that are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.exchange import Record
from proxy.journal import BackendBeat
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import Script, ScriptedVLLM
from tests.support.scripted_vllm.process import VLLMProcess
from tests.support.wire_client import Reply
from tests.support.worker import PATIENCE, Worker, backend, chat

TURNS: Final = {"policy": "round_robin"}
HANGS: Final = Script(hang=True)
SHORT: Final = chat({"tokens": 2}, stream=False)


@pytest.fixture
def other() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


@pytest.fixture
def hanging() -> Iterator[VLLMProcess]:
    with VLLMProcess("--script", '{"tokens": 3}') as process:
        yield process


def beat(running: Worker, name: str = "b0") -> BackendBeat:
    return running.heartbeat().backends[name]


def until(running: Worker, look: Callable[[BackendBeat], object], name: str = "b0") -> BackendBeat:
    """Its heartbeat, once that is so."""
    return running.until(lambda: seen if look(seen := beat(running, name)) else None, f"{name} as expected")


def until_out(running: Worker, name: str = "b0") -> BackendBeat:
    return until(running, lambda seen: seen.state == "out", name)


def mine(running: Worker, requests: int) -> list[Record]:
    """The records of so many requests, in the order of the journal; those of probes apart."""

    def look() -> list[Record] | None:
        found = [record for record in running.records() if record.key_id != "system"]
        return found if len(found) >= requests else None

    return running.until(look, f"{requests} records")


@contextmanager
def asking(running: Worker, bodies: list[dict[str, Any]]) -> Iterator[list[Future[Reply]]]:
    """All at the same time."""
    with ThreadPoolExecutor(len(bodies)) as clients:
        yield [clients.submit(running.ask, body) for body in bodies]


def answered(futures: list[Future[Reply]]) -> list[Reply]:
    replies = [future.result(PATIENCE) for future in futures]
    assert {(reply.status, reply.ending) for reply in replies} == {(200, "complete")}
    return replies


# --- one that hangs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_wait_at_one_that_hangs_are_answered_by_the_other(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, stream: bool
) -> None:
    # failures 11, 53: it accepts, /health says 200, and no byte comes
    config = {"routing": TURNS, "timeouts": {"first_byte": 1.0}, "health": {"probe": 0.3, "ejection": 60}}
    running = worker(vllm.url, other.url, config=config)
    answered([done(running.ask(SHORT)) for _ in range(2)])
    vllm.default = HANGS
    with asking(running, [chat(stream=stream)] * 20) as futures:
        answered(futures)
    seen = until_out(running)
    assert seen.reason == "first_byte_timeout"
    records = mine(running, 22)
    lost = [record for record in records if len(record.attempts) == 2]
    assert len(lost) == 10, "half of them were there"
    errors = sorted(record.attempts[0].error for record in lost)
    assert errors == sorted(["backend_lost"] * 9 + ["first_byte_timeout"]), "the first one's time was all of theirs"
    assert {record.attempts[1].backend for record in lost} == {"b1"}
    vllm.wait(lambda: len(vllm.aborted) == 10)
    before = len(vllm.requests)
    answered([done(running.ask(SHORT)) for _ in range(4)])
    assert len(vllm.requests) == before, "it gets no more"


def done(reply: Reply) -> Future[Reply]:
    future: Future[Reply] = Future()
    future.set_result(reply)
    return future


def test_one_that_hangs_just_after_it_said_something_is_found_out_too(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failures 11, 53: what it said to another one shortly after the request had come isn't a sign of life for ever
    config = {"routing": TURNS, "timeouts": {"first_byte": 1.5}, "health": {"probe": 0.3, "ejection": 60}}
    running = worker(vllm.url, other.url, config=config)
    while running.ask(SHORT).header("x-glasshouse-backend") != "b1":
        pass  # until it is b0's turn
    with running.begin(chat({"tokens": 50, "interval": 0.1, "hang_after_events": 4})):
        vllm.wait(lambda: vllm.in_flight == 1)
        vllm.fail_next(1, HANGS)
        with asking(running, [chat(stream=False)] * 2) as futures:
            answered(futures)
        assert until_out(running).reason == "first_byte_timeout"


def test_silence_is_asked_about_before_the_first_bytes_time_is_over(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 53
    health = {"silence": 0.3, "probe": 0.3, "ejection": 60}
    running = worker(vllm.url, other.url, config={"routing": TURNS, "health": health})
    vllm.default = HANGS
    with asking(running, [chat()] * 8) as futures:
        answered(futures)
    assert until_out(running).reason == "probe_timeout"
    assert {record.backend for record in mine(running, 8)} == {"b1"}
    assert [attempt.error for record in mine(running, 8) for attempt in record.attempts[:-1]] == ["backend_lost"] * 4


def test_who_was_taken_away_from_one_and_waits_for_the_other_may_come_back(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 53: the first is well again before the other has room
    health = {"silence": 0.3, "probe": 0.3, "ejection": 0.5, "slow_start": 0}
    first, second = backend(vllm.url, "b0"), backend(other.url, "b1", depth=1)
    running = worker(first, second, config={"routing": TURNS, "health": health})
    while running.ask(SHORT).header("x-glasshouse-backend") != "b0":
        pass  # until it is b1's turn
    with running.begin(chat({"tokens": 10_000, "interval": 0.01})):
        other.wait(lambda: other.in_flight == 1)
        vllm.default = HANGS
        with asking(running, [chat(stream=False)]) as futures:
            until_out(running)
            running.until(lambda: running.heartbeat().waiting or None, "one that waits")
            vllm.default = Script(tokens=2)
            answered(futures)
        assert other.in_flight == 1
    [lost] = [record for record in mine(running, 3) if len(record.attempts) > 1]
    assert [(attempt.backend, attempt.error) for attempt in lost.attempts] == [("b0", "backend_lost"), ("b0", "")]


@pytest.mark.parametrize("script", [{"first": 1.5, "tokens": 3}, {"tokens": 15, "interval": 0.1}], ids=["prefill", "decode"])
def test_a_long_answer_in_one_piece_is_no_reason_to_leave(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, script: dict[str, Any]
) -> None:
    # failure 53: a probe tells that it lives
    health = {"silence": 0.3, "probe": 5}
    running = worker(vllm.url, other.url, config={"routing": TURNS, "health": health})
    with asking(running, [chat(script, stream=False)] * 2) as futures:
        answered(futures)
    assert all(len(record.attempts) == 1 for record in mine(running, 2))
    for name in ("b0", "b1"):
        seen = until(running, lambda seen: seen.state == "up", name)
        assert seen.probes >= 1
        assert (seen.ejections, seen.failed_probes) == (0, 0)


def test_a_request_that_takes_too_long_at_a_living_engine_is_not_begun_elsewhere(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 11: another one would take as long
    config = {"routing": TURNS, "timeouts": {"first_byte": 0.8}}
    running = worker(vllm.url, other.url, config=config)
    lively = chat({"tokens": 60, "interval": 0.05})
    with asking(running, [lively] * 2) as streams:
        vllm.wait(lambda: vllm.in_flight == 1)
        other.wait(lambda: other.in_flight == 1)
        reply = running.ask(chat({"hang": True}))
        assert (reply.status, reply.json()["error"]["code"]) == (504, "first_byte_timeout")
        answered(streams)
    late = next(record for record in mine(running, 3) if record.outcome == Outcome.TIMEOUT)
    assert len(late.attempts) == 1
    assert {beat(running, name).ejections for name in ("b0", "b1")} == {0}


def test_a_stream_that_stalls_ends_as_broken_and_nobody_else_notices(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 12
    config = {"routing": TURNS, "timeouts": {"between_chunks": 0.5}, "health": {"probe": 0.3}}
    running = worker(vllm.url, other.url, config=config)
    vllm.fail_next(1, Script(tokens=9, hang_after_events=3))
    with asking(running, [chat({"tokens": 25, "interval": 0.05})] * 2) as futures:
        replies = [future.result(PATIENCE) for future in futures]
    [broken] = [reply for reply in replies if b"[DONE]" not in reply.body]
    assert b'"code":"idle_timeout"' in broken.body
    [whole] = [reply for reply in replies if reply is not broken]
    assert (whole.status, whole.ending) == (200, "complete")
    [record] = [each for each in mine(running, 2) if each.outcome == Outcome.TIMEOUT]
    assert (len(record.attempts), record.error_code, record.backend) == (1, "idle_timeout", "b0")
    assert until(running, lambda seen: seen.probes, "b0").probes


# --- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hang", "kill"])
def test_a_process_that_stops_takes_nobody_with_it_that_had_not_begun(
    worker: StartWorker, hanging: VLLMProcess, other: ScriptedVLLM, how: str
) -> None:
    # failures 4, 7, 11, 53: under load, also in the middle of streams
    timeouts = {"first_byte": 1.5, "between_chunks": 1.5}
    health = {"probe": 0.4, "ejection": 0.3, "longest_ejection": 0.6, "slow_start": 0.5}
    running = worker(hanging.url, other.url, config={"routing": TURNS, "timeouts": timeouts, "health": health})
    bodies = [chat({"tokens": 30, "interval": 0.03}), chat({"tokens": 3, "first": 0.4}), SHORT] * 8
    replies: list[Reply] = []
    with ThreadPoolExecutor(12) as clients:
        futures = [clients.submit(running.ask, body) for body in bodies]
        running.until(lambda: beat(running).in_flight >= 3 or None, "requests there")
        hanging.hang() if how == "hang" else hanging.kill()
        replies = [future.result(PATIENCE) for future in futures]
    until_out(running)
    broken = [reply for reply in replies if reply.ending != "complete" or reply.status != 200]
    assert all(reply.status == 200 and reply.body for reply in broken), [reply.status for reply in broken]
    assert len(broken) <= 8, "streams that had begun there"
    records = mine(running, len(bodies))
    assert len([record for record in records if record.outcome != Outcome.OK]) == len(broken)
    hanging.go_on() if how == "hang" else hanging.start()
    until(running, lambda seen: seen.state == "up")
    until(running, lambda seen: seen.part == 1.0)
    served = [running.ask(SHORT).header("x-glasshouse-backend") for _ in range(4)]
    assert sorted(filter(None, served)) == ["b0", "b0", "b1", "b1"]


def test_the_return_is_gradual(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failures 52, 55: a tenth of its part at first
    health = {"ejection": 0.2, "longest_ejection": 0.2, "slow_start": 4.0}
    running = worker(vllm.url, other.url, config={"routing": {"policy": "weighted"}, "health": health})
    vllm.refuse()
    vllm.drop()
    while beat(running).state != "out":
        assert running.ask(SHORT).status == 200
    vllm.accept()
    until(running, lambda seen: seen.state == "up")

    def share() -> float:
        before = len(vllm.requests)
        for _ in range(20):
            assert running.ask(SHORT).status == 200
        return (len(vllm.requests) - before) / 20

    first = share()
    until(running, lambda seen: seen.part == 1.0)
    last = share()
    assert first <= 0.35
    assert 0.4 <= last <= 0.6


def test_who_comes_and_goes_stays_away_longer_each_time(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 52
    health = {"ejection": 0.3, "longest_ejection": 30, "slow_start": 0.1, "failures": 1}
    running = worker(vllm.url, other.url, config={"routing": TURNS, "health": health})
    away = []
    for _ in range(3):
        vllm.refuse()
        vllm.drop()
        while beat(running).state != "out":
            assert running.ask(SHORT).status == 200
        since = time.monotonic()
        vllm.accept()
        until(running, lambda seen: seen.state == "up")
        away.append(time.monotonic() - since)
        until(running, lambda seen: seen.part == 1.0)
    assert away[2] > 0.3 * 2**2 - 0.6, away
    assert beat(running).ejections == 3
    assert all(record.outcome == Outcome.OK for record in running.records() if record.key_id != "system")


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_minute_of_flapping(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 52: up and down every two seconds
    running = worker(vllm.url, other.url, config={"routing": TURNS, "health": {"ejection": 2.0}})
    ends = time.monotonic() + 60
    replies: list[Reply] = []
    down = False
    flips = time.monotonic() + 2
    while time.monotonic() < ends:
        replies.append(running.ask(SHORT))
        if time.monotonic() >= flips:
            flips += 2
            down = not down
            if down:
                vllm.refuse()
                vllm.drop()
            else:
                vllm.accept()
    assert {reply.status for reply in replies} == {200}
    assert beat(running).ejections <= 6, "half a minute of ups and downs is fifteen"


def test_where_all_are_out_one_request_a_second_finds_out_and_the_others_hear_it_at_once(worker: StartWorker) -> None:
    # failure 52
    with ExitStack() as stack:
        vllms = [stack.enter_context(ScriptedVLLM(default=HANGS)) for _ in range(2)]
        timeouts, health = {"first_byte": 0.5}, {"probe": 0.3, "ejection": 120, "longest_ejection": 120}
        running = worker(*(server.url for server in vllms), config={"routing": TURNS, "timeouts": timeouts, "health": health})
        with asking(running, [chat(stream=False)] * 4) as futures:
            assert {future.result(PATIENCE).status for future in futures} <= {503, 504}
        for name in ("b0", "b1"):
            until_out(running, name)
        before = sum(len(server.requests) for server in vllms)
        with asking(running, [chat(stream=False)] * 30) as futures:
            replies = [future.result(PATIENCE) for future in futures]
        asked = sum(len(server.requests) for server in vllms) - before
        fast = [reply for reply in replies if reply.status == 503 and reply.json()["error"]["code"] == "no_backend"]
        assert 1 <= asked <= 8, "two that hang, for two seconds or so"
        assert len(fast) >= 30 - asked
        assert all(int(reply.header("retry-after") or 0) >= 1 for reply in fast)
        for server in vllms:
            server.default = Script(tokens=2)
            server.release()
        answered_again = running.until(lambda: reply if (reply := running.ask(SHORT)).status == 200 else None, "an answer")
        assert answered_again.header("x-glasshouse-backend")
        running.until(lambda: any(beat(running, name).state == "up" for name in ("b0", "b1")) or None, "its return")


# --- probes ------------------------------------------------------------------------------------------------------------


def test_nobody_is_probed_who_is_well(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"health": {"silence": 0.2}})
    for _ in range(5):
        assert running.ask(chat({"tokens": 5, "interval": 0.05})).status == 200
    time.sleep(0.5)
    assert beat(running).probes == 0
    assert {received.target for received in vllm.requests} == {"/v1/chat/completions"}


def test_probes_are_booked_to_the_system(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    assert running.ask(chat({"status": 500}, stream=False)).status == 500
    until(running, lambda seen: seen.probes == 1 and seen.state == "up")
    [asked, probe] = running.records(2)
    assert asked.key_id != "system"
    assert (probe.key_id, probe.key_name, probe.operation, probe.model) == ("system", "system", "chat", "smollm2")
    assert (probe.outcome, probe.backend, probe.output_tokens) == (Outcome.OK, "b0", 1)
    assert probe.cost_nano > 0
    assert [received.target for received in vllm.requests] == ["/v1/chat/completions", "/health", "/v1/chat/completions"]
    assert not running.open_records()


def test_who_says_that_it_is_not_well_is_not_asked_for_a_token(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"health": {"ejection": 60}})
    vllm.fail_next(1, Script(status=500))
    vllm.well = False
    assert running.ask(SHORT).status == 500
    until_out(running)
    assert [received.target for received in vllm.requests] == ["/v1/chat/completions", "/health"]


def test_an_openai_server_is_asked_for_a_token_only(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, kind="openai"))
    assert running.ask(chat({"status": 500}, stream=False)).status == 500
    until(running, lambda seen: seen.probes == 1 and seen.state == "up")
    assert [received.target for received in vllm.requests] == ["/v1/chat/completions"] * 2


def test_who_embeds_is_asked_to_embed(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    embed = {"model": "smollm2", "input": "Hi"}
    assert running.ask(embed, "/v1/embeddings").status == 200
    assert running.ask({**embed, "script": {"status": 500}}, "/v1/embeddings").status == 500
    until(running, lambda seen: seen.probes == 1 and seen.state == "up")
    assert vllm.requests[-1].target == "/v1/embeddings"
    assert running.records(3)[-1].key_id == "system"


def test_a_probe_does_not_outlive_its_worker(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 50: what it took is in the journal
    running = worker(vllm.url, config={"health": {"probe": 60}})
    assert running.ask(chat({"status": 500}, stream=False)).status == 500
    vllm.default = HANGS
    vllm.wait(lambda: vllm.in_flight == 1)
    running.stop()
    assert [record.key_id == "system" for record in running.records(2)] == [False, True]
    assert not running.open_records()
