"""A request whose answer hasn't begun is answered by somebody else, if anybody can: who is asked, how often, what remains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.exchange import UsageSource
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import Script, ScriptedVLLM, captured
from tests.support.wire_client import Reply
from tests.support.worker import Worker, backend, chat

TURNS: Final = {"routing": {"policy": "round_robin"}}
"""Two requests reach both of a pair."""
RESET: Final = Script(cut_after_bytes=0)


@pytest.fixture
def other() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


def raw(status: int, body: str = "{}", headers: str = "") -> Script:
    reason = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n{body}"
    return Script(raw=reason)


def ask_both(running: Worker, body: dict[str, Any]) -> list[Reply]:
    """Each of a pair is the first one that is asked of one of these."""
    return [running.ask(body) for _ in range(2)]


FIRST_EVENT: Final = Script(error_event_after=0, error="The engine is overloaded.")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (RESET, "upstream_disconnected"),
        (Script(raw=""), "upstream_disconnected"),
        (Script(status=429), "429"),
        (Script(status=502), "502"),
        (Script(status=503), "503"),
        (Script(status=504), "504"),
        (Script(replay="two/queue_full_503"), "503"),
        (Script(replay="two/killed_nonstream"), "500"),
        (Script(raw="HTTP/1.1 abc\r\n\r\n"), "bad_gateway"),
    ],
    ids=["reset", "closed", "429", "502", "503", "504", "queue full", "engine dead", "nonsense"],
)
def test_the_other_one_answers(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, wrong: Script, error: str, stream: bool
) -> None:
    # failures 7, 8
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.fail_next(1, wrong)
    replies = ask_both(running, chat({"tokens": 3}, stream=stream))
    assert [(reply.status, reply.ending) for reply in replies] == [(200, "complete")] * 2
    records = running.records(2)
    assert [record.outcome for record in records] == [Outcome.OK] * 2
    [record] = [each for each in records if len(each.attempts) == 2]
    ends = [(attempt.backend, attempt.error or str(attempt.status)) for attempt in record.attempts]
    assert ends == [("b0", error), ("b1", "200")]
    assert record.backend == "b1"


def test_an_error_that_comes_as_the_first_event_is_asked_elsewhere(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 7
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.fail_next(1, FIRST_EVENT)
    replies = ask_both(running, chat({"tokens": 3}))
    assert [(reply.status, reply.ending) for reply in replies] == [(200, "complete")] * 2
    assert all(b"error" not in reply.body for reply in replies)
    [record] = [each for each in running.records(2) if len(each.attempts) == 2]
    first, last = record.attempts
    assert (first.backend, first.status, last.backend, last.error) == ("b0", 200, "b1", "")
    assert first.error


def test_an_answer_that_was_withdrawn_leaves_nothing_but_its_try(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 7: the whole answer came, and says that the engine gave up
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.fail_next(1, Script(finish="abort", tokens=2, cached_tokens=5))
    for reply in ask_both(running, chat({"tokens": 7}, stream=False)):
        assert reply.json()["choices"][0]["finish_reason"] == "stop"
        assert reply.header("x-glasshouse-backend") in ("b0", "b1")
    records = running.records(2)
    [record] = [each for each in records if len(each.attempts) == 2]
    [plain] = [each for each in records if len(each.attempts) == 1]
    assert record.attempts[0].error == "engine_aborted"
    for each in (record, plain):
        assert (each.output_tokens, each.cached_tokens, each.finish_reasons) == (7, 0, ["stop"])
        assert (each.outcome, each.usage_source) == (Outcome.OK, UsageSource.ENGINE)
    assert (record.input_tokens, record.cost_nano) == (plain.input_tokens, plain.cost_nano)
    assert record.first_byte_ns >= record.attempts[1].started_ns


def test_when_all_refuse_the_last_ones_words_go_out(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 8
    running = worker(vllm.url, other.url, config=TURNS)
    for server, seconds in ((vllm, 7), (other, 9)):
        server.fail_next(1, raw(429, '{"error":{"message":"Slow down.","type":"x"}}', f"Retry-After: {seconds}\r\n"))
    reply = running.ask(chat())
    record = running.record()
    last = record.attempts[-1].backend
    assert len(record.attempts) == 2
    assert (reply.status, reply.header("retry-after")) == (429, "7" if last == "b0" else "9")
    assert reply.json()["error"]["message"] == "Slow down."
    assert reply.header("x-glasshouse-backend") == last
    assert (record.outcome, record.status, record.backend) == (Outcome.UPSTREAM_ERROR, 429, last)
    attempt = record.attempts[-1]
    assert (record.first_byte_ns, record.upstream_ended_ns) == (attempt.first_byte_ns, attempt.ended_ns)


def test_a_refusals_words_go_out_rather_than_that_the_other_one_is_dead(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 8: whichever of the two is asked first
    running = worker(vllm.url, other.url, config={**TURNS, "health": {"failures": 100}})
    vllm.fail_next(100, raw(429, headers="Retry-After: 7\r\n"))
    other.fail_next(100, RESET)
    for reply in ask_both(running, chat(stream=False)):
        assert (reply.status, reply.header("retry-after"), reply.header("x-glasshouse-backend")) == (429, "7", "b0")
    for record in [each for each in running.records() if each.key_id != "system"]:
        refusing = next(attempt for attempt in record.attempts if attempt.backend == "b0")
        assert {attempt.error for attempt in record.attempts if attempt is not refusing} <= {"upstream_disconnected"}
        assert (record.error_code, refusing.status) == ("429", 429)
        assert (record.first_byte_ns, record.upstream_ended_ns) == (refusing.first_byte_ns, refusing.ended_ns)


@pytest.mark.parametrize("name", ["err_toolong", "err_nomessages", "err_404"])
def test_a_request_that_is_refused_hurts_nobody(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, name: str) -> None:
    # failure 9
    running = worker(vllm.url, other.url, config=TURNS)
    sample = captured.load(name)
    for _ in range(8):
        reply = running.ask(chat({"replay": name}, stream=False))
        assert (reply.status, reply.body) == (sample.status, sample.body)
    assert all(len(record.attempts) == 1 for record in running.records(8))
    time.sleep(0.3)  # a probe would have been sent by the sweep
    beats = running.heartbeat().backends
    assert [(beat.state, beat.probes) for beat in beats.values()] == [("up", 0)] * 2
    assert {len(vllm.requests), len(other.requests)} == {4}


def test_a_plain_500_passes_and_a_probe_follows(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 7: it may be the request's own fault, and the other one's end
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.fail_next(1, Script(status=500))
    statuses = [reply.status for reply in ask_both(running, chat(stream=False))]
    assert sorted(statuses) == [200, 500]
    running.until(lambda: running.heartbeat().backends["b0"].probes == 1 or None, "a probe")
    running.until(lambda: running.heartbeat().backends["b0"].state == "up" or None, "its answer")
    mine = [record for record in running.records(3) if record.key_id != "system"]
    assert [len(record.attempts) for record in mine] == [1, 1]
    assert running.heartbeat().backends["b1"].probes == 0


def test_a_model_that_the_engine_does_not_have_is_asked_for_elsewhere(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 54: restarted with another model, and the catalogue doesn't know yet
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.models = ("another",)
    for _ in range(6):
        assert running.ask(chat({"tokens": 2}, stream=False)).status == 200
    records = running.records(6)
    assert {record.backend for record in records} == {"b1"}
    assert len(vllm.requests) == 1, "once is enough to know"
    assert running.heartbeat().backends["b0"].state == "up"
    vllm.models = ("smollm2",)
    running.publish()
    for _ in range(2):
        assert running.ask(chat({"tokens": 2}, stream=False)).status == 200
    assert len(vllm.requests) == 2


def test_nothing_is_asked_again_once_something_has_gone_out(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failures 4, 7
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.fail_next(1, Script(tokens=9, cut_after_events=3))
    replies = ask_both(running, chat({"tokens": 3}))
    [broken] = [reply for reply in replies if b"[DONE]" not in reply.body]
    assert b"upstream_disconnected" in broken.body
    [record] = [each for each in running.records(2) if each.outcome != Outcome.OK][:1]
    assert (len(record.attempts), record.error_code) == (1, "upstream_disconnected")
    assert len(vllm.requests) + len(other.requests) == 2 + running.heartbeat().backends["b0"].probes


def test_an_engine_that_dies_under_streams_is_known_to_have_failed(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failures 4, 7: those who come next don't find out for themselves
    running = worker(vllm.url, other.url, config={**TURNS, "health": {"probe": 0.3}})
    vllm.fail_next(1, Script(tokens=9, cut_after_events=3))
    ask_both(running, chat({"tokens": 3}))
    running.until(lambda: running.heartbeat().backends["b0"].reason == "upstream_disconnected" or None, "that it has failed")


def test_an_engine_that_says_in_a_stream_that_it_died_is_out_at_once(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failures 6, 7
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.fail_next(1, Script(replay="two/killed_midstream"))
    ask_both(running, chat({"tokens": 3}))
    running.until(lambda: running.heartbeat().backends["b0"].ejections == 1 or None, "that it is out")


def test_refusals_are_not_doubled(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 8: a fleet that says no is asked a fifth more often, and not twice as often
    refusing = Script(status=429)
    running = worker(vllm.url, other.url, config=TURNS)
    vllm.default = other.default = refusing
    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(running.ask, [chat(stream=False)] * 100))
    assert {reply.status for reply in replies} == {429}
    asked, heartbeat = len(vllm.requests) + len(other.requests), running.heartbeat()
    assert 110 <= asked <= 100 + 20 + 10 + 5, "a few of the floor come back with time"
    assert heartbeat.backends["b0"].state == heartbeat.backends["b1"].state == "up"
    running.until(lambda: running.heartbeat().retries_denied == 200 - asked or None, "how many weren't")


def test_what_could_not_be_sent_costs_no_budget(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 7: no engine works twice
    running = worker(vllm.url, other.url, config={**TURNS, "health": {"failures": 1000, "probe": 0.2, "ejection": 0.01}})
    vllm.refuse()
    vllm.drop()
    for _ in range(60):
        assert running.ask(chat({"tokens": 2}, stream=False)).status == 200
    assert running.heartbeat().retries_denied == 0


def test_who_is_out_is_asked_where_everybody_else_has_failed(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 7: it may be back, which nobody has found out yet
    running = worker(vllm.url, other.url, config={**TURNS, "health": {"ejection": 60}})
    vllm.refuse()
    vllm.drop()
    while running.heartbeat().backends["b0"].state != "out":
        assert running.ask(chat({"tokens": 2}, stream=False)).status == 200
    vllm.accept()
    other.fail_next(1, RESET)
    reply = running.ask(chat({"tokens": 2}, stream=False))
    assert (reply.status, reply.header("x-glasshouse-backend")) == (200, "b0")


@pytest.mark.parametrize("how", [429, 503])
def test_a_suspect_is_asked_where_the_other_one_refuses(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, how: int
) -> None:
    # failure 8
    running = worker(vllm.url, other.url, config={**TURNS, "health": {"probe": 60}})
    vllm.fail_next(1, Script(status=500))
    vllm.default = Script(hang=True)  # what the probe gets
    assert sorted(reply.status for reply in ask_both(running, chat({"tokens": 2}))) == [200, 500]
    running.until(lambda: running.heartbeat().backends["b0"].state == "suspect" or None, "the suspicion")
    other.fail_next(1, Script(status=how))
    reply = running.ask(chat({"tokens": 2}))
    assert (reply.status, reply.header("x-glasshouse-backend")) == (200, "b0")


@pytest.mark.parametrize("stream", [True, False])
def test_every_answer_says_which_backend_it_is_from(worker: StartWorker, vllm: ScriptedVLLM, stream: bool) -> None:
    running = worker(backend(vllm.url, "gpu-1"))
    for script in ({}, {"status": 400}, {"status": 500}):
        reply = running.ask(chat(script, stream=stream))
        assert [value for name, value in reply.headers if name == "x-glasshouse-backend"] == ["gpu-1"]
    assert running.ask(chat() | {"model": "none"}).header("x-glasshouse-backend") is None
    assert running.ask(path="/v1/models").header("x-glasshouse-backend") is None


def test_an_engines_own_header_is_not_taken_for_ours(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    reply = running.ask(chat({"headers": {"x-glasshouse-backend": "theirs"}}, stream=False))
    assert [value for name, value in reply.headers if name == "x-glasshouse-backend"] == ["b0"]
