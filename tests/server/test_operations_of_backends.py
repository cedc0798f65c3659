"""What is done to backends while requests run and wait: they appear, vanish, are drained, restarted, come back; and who answers
for a model that nobody serves."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import msgspec
import pytest

from proxy.errors import Outcome
from proxy.snapshot import Model
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import Script, ScriptedVLLM
from tests.support.scripted_vllm.process import VLLMProcess
from tests.support.wire_client import Reply
from tests.support.worker import PATIENCE, PICO_CACHED, PICO_INPUT, PICO_OUTPUT, Worker, backend, chat

TURNS: Final = {"routing": {"policy": "round_robin"}}
SHORT: Final = chat({"tokens": 2}, stream=False)
HANGS: Final = {"hang": True, "tokens": 2}


@pytest.fixture
def other() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


class Load:
    """Short requests, one after the other, of each of so many clients. `replies`: all so far."""

    def __init__(self, running: Worker, clients: int, body: dict[str, Any]) -> None:
        self.replies: list[Reply] = []
        self._running, self._body = running, body
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def more(self, requests: int) -> None:
        """Until so many more have been answered."""
        wanted = len(self.replies) + requests
        self._running.until(lambda: len(self.replies) >= wanted or None, f"{requests} more answers")

    def _ask(self) -> None:
        while not self._over.is_set():
            self.replies.append(self._running.ask(self._body))


def until_waiting(running: Worker, requests: int) -> None:
    running.until(lambda: running.heartbeat().waiting == requests or None, f"{requests} that wait")


def until_up(running: Worker, name: str) -> None:
    running.until(lambda: running.heartbeat().backends[name].state == "up" or None, f"the return of {name}")


# --- the catalogue changes ---------------------------------------------------------------------------------------------


def test_backends_come_go_and_are_drained_under_load_and_nothing_fails(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 67: some requests run, and some wait
    first, second = backend(vllm.url, "b0", depth=2), backend(other.url, "b1", depth=2)
    running = worker(first, config=TURNS)
    states = [[first, second], [second], [first, msgspec.structs.replace(second, drained=True)], [first], [second, first], []]
    with Load(running, 8, chat({"tokens": 2, "first": 0.02}, stream=False)) as load:
        load.more(10)
        for backends in [*states[:-1], *states[:-1]]:
            running.backends = backends
            running.publish()
            load.more(10)
    assert {reply.status for reply in load.replies} == {200}
    records = running.records(len(load.replies))
    assert {record.outcome for record in records} == {Outcome.OK}
    assert {record.backend for record in records} == {"b0", "b1"}
    assert any(record.queued_ns for record in records)


def test_those_who_wait_go_where_there_is_room_now(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 67
    running = worker(backend(vllm.url, depth=1))
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(running.ask, chat(HANGS))
        vllm.wait(lambda: vllm.in_flight == 1)
        waiting = [clients.submit(running.ask, SHORT) for _ in range(3)]
        until_waiting(running, 3)
        running.backends.append(backend(other.url, "b1", depth=1))
        running.publish()
        replies = [future.result(PATIENCE) for future in waiting]
        assert [(reply.status, reply.header("x-glasshouse-backend")) for reply in replies] == [(200, "b1")] * 3
        vllm.release()
        assert first.result(PATIENCE).status == 200


def test_those_who_wait_for_one_that_vanishes_hear_it(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 67: the one that runs there ends well
    running = worker(backend(vllm.url, depth=1))
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(running.ask, chat(HANGS))
        vllm.wait(lambda: vllm.in_flight == 1)
        waiting = clients.submit(running.ask, SHORT)
        until_waiting(running, 1)
        running.backends.clear()
        running.publish()
        reply = waiting.result(PATIENCE)
        assert (reply.status, reply.json()["error"]["code"]) == (503, "no_backend")
        vllm.release()
        assert (first.result(PATIENCE).status, first.result().ending) == (200, "complete")


def test_a_request_that_falls_after_the_catalogue_has_changed_waits_where_others_do(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    # failure 67: it set out by the old one
    running = worker(backend(vllm.url, "b0", depth=1), config=TURNS)
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(running.ask, chat(stream=False) | {"script": {"hang": True, "tokens": 2}})
        vllm.wait(lambda: vllm.in_flight == 1)
        running.backends.append(backend(other.url, "b1", depth=1))
        running.publish()
        second = clients.submit(running.ask, chat(HANGS, stream=False))
        other.wait(lambda: other.in_flight == 1)
        vllm.refuse()
        vllm.drop()
        until_waiting(running, 1)
        other.release()
        other.wait(lambda: len(other.requests) == 2)
        other.release()
        for future in (first, second):
            assert (future.result(PATIENCE).status, future.result().header("x-glasshouse-backend")) == (200, "b1")


def test_who_is_drained_ends_what_it_has_and_gets_no_more(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    running = worker(vllm.url, other.url, config=TURNS)
    with ThreadPoolExecutor(2) as clients:
        begun = [clients.submit(running.ask, chat(HANGS)) for _ in range(2)]
        vllm.wait(lambda: vllm.in_flight == 1)
        other.wait(lambda: other.in_flight == 1)
        running.backends[0] = msgspec.structs.replace(running.backends[0], drained=True)
        running.publish()
        for _ in range(4):
            assert running.ask(SHORT).header("x-glasshouse-backend") == "b1"
        vllm.release()
        other.release()
        assert [future.result(PATIENCE).ending for future in begun] == ["complete"] * 2
    assert len(vllm.requests) == 1
    running.backends[0] = msgspec.structs.replace(running.backends[0], drained=False)
    running.publish()
    assert {running.ask(SHORT).header("x-glasshouse-backend") for _ in range(2)} == {"b0", "b1"}


def test_where_all_are_drained_there_is_no_backend(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url, drained=True))
    reply = running.ask(SHORT)
    assert (reply.status, reply.json()["error"]["code"], reply.header("retry-after")) == (503, "no_backend", "1")
    assert not vllm.requests


def test_weights_count_at_once(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    running = worker(vllm.url, other.url, config={"routing": {"policy": "weighted"}})
    running.backends[0] = msgspec.structs.replace(running.backends[0], weight=3.0)
    running.publish()
    for _ in range(20):
        running.ask(SHORT)
    assert (len(vllm.requests), len(other.requests)) == (15, 5)


# --- engines are restarted ---------------------------------------------------------------------------------------------


def _restart_each(running: Worker, engines: list[VLLMProcess], load: Load) -> None:
    for name, engine in zip(("b0", "b1"), engines, strict=True):
        engine.kill()
        load.more(5)
        engine.start()
        load.more(5)
        until_up(running, name)
        load.more(5)


HEALTH: Final = {"ejection": 0.2, "longest_ejection": 0.5, "slow_start": 0.5, "probe": 2}


def test_engines_that_are_restarted_one_after_the_other_fail_nobody(worker: StartWorker) -> None:
    # failure 51
    with VLLMProcess() as one, VLLMProcess() as two:
        running = worker(one.url, two.url, config={**TURNS, "health": HEALTH})
        with Load(running, 4, SHORT) as load:
            load.more(5)
            _restart_each(running, [one, two], load)
    assert {(reply.status, reply.ending) for reply in load.replies} == {(200, "complete")}


@pytest.mark.long
@pytest.mark.timeout(240)
def test_engines_that_are_restarted_again_and_again_fail_nobody(worker: StartWorker) -> None:
    # failure 51
    with VLLMProcess() as one, VLLMProcess() as two:
        running = worker(one.url, two.url, config={**TURNS, "health": {**HEALTH, "longest_ejection": 1}})
        with Load(running, 8, SHORT) as load:
            ends = time.monotonic() + 60
            while time.monotonic() < ends:
                _restart_each(running, [one, two], load)
    assert {(reply.status, reply.ending) for reply in load.replies} == {(200, "complete")}


def test_a_herd_is_let_in_little_by_little(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    # failure 55: hundreds wait when a backend comes back; those who left meanwhile are never sent
    depth, herd = 40, 250
    health = {"ejection": 0.3, "longest_ejection": 0.3, "slow_start": 3.0, "failures": 1}
    waiting = {"requests": 1000, "timeout": 60}
    running = worker(
        backend(vllm.url, "b0", depth=depth),
        backend(other.url, "b1", depth=1),
        config={**TURNS, "health": health, "waiting": waiting},
    )
    vllm.refuse()
    while running.heartbeat().backends["b0"].state != "out":
        assert running.ask(SHORT).status == 200
    before = len(vllm.requests)
    with ThreadPoolExecutor(1) as clients, ExitStack() as stack:
        hanging = clients.submit(running.ask, chat(HANGS))  # nobody gets by
        other.wait(lambda: other.in_flight == 1)
        body = chat({"first": 0.2, "tokens": 2}, stream=False)
        begun = [stack.enter_context(running.begin(body, timeout=PATIENCE)) for _ in range(herd)]
        until_waiting(running, herd)
        for client in begun[:50]:
            client.close()
        until_waiting(running, herd - 50)
        vllm.accept()
        seen: list[tuple[int, float]] = []

        def look() -> bool | None:
            heartbeat = running.heartbeat()
            seen.append((heartbeat.backends["b0"].in_flight, heartbeat.backends["b0"].part))
            return heartbeat.waiting == 0 or None

        running.until(look, "all of them let in")
        assert {client.read().status for client in begun[50:]} == {200}
        other.release()
        assert hanging.result(PATIENCE).status == 200
    most = [in_flight for in_flight, part in seen if part < 1.0]
    assert all(in_flight <= math.ceil(depth * part) for in_flight, part in seen), seen
    assert max(most) > 2 * depth // 10, "it grew"
    probes = running.heartbeat().backends["b0"].probes
    sent = [received for received in vllm.requests[before:] if b'"first"' in received.body]
    assert len(sent) <= herd - 50
    assert probes >= 1
    assert len([record for record in running.records() if record.outcome == Outcome.CLIENT_GONE]) == 50


# --- other models ------------------------------------------------------------------------------------------------------

LARGE: Final = "large"
PLENTY: Final = 1_000


def model(name: str, *backends: str, price: int = 1, **more: Any) -> Model:
    card = msgspec.json.encode({"id": name, "object": "model"})
    return Model(name, backends, price * PICO_INPUT, price * PICO_CACHED, price * PICO_OUTPUT, card, **more)


@contextmanager
def with_fallbacks(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, models: list[str] | None = None, **more: Any
) -> Iterator[Worker]:
    """`large` is on b0, a thousand times as dear, and falls back to `smollm2`, on b1; `big` is another name of it."""
    vllm.models = (LARGE,)
    config = {**TURNS, "health": {"ejection": 60}, **({"everyone": {"models": models}} if models else {})}
    running = worker(vllm.url, other.url, config=config)
    large = model(LARGE, "b0", price=PLENTY, fallbacks=("missing", "smollm2"), **more)
    running.publish(models={LARGE: large, "big": large, "smollm2": model("smollm2", "b1")})
    yield running


def asked(name: str, script: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return chat(script, **more) | {"model": name}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["refuses", "dead", "drained", "not there"])
def test_another_model_answers_where_nobody_has_the_one_that_was_asked_for(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, how: str, stream: bool
) -> None:
    with with_fallbacks(worker, vllm, other) as running:
        if how == "refuses":
            vllm.fail_next(1, Script(status=429))
        elif how == "dead":
            vllm.refuse()
        elif how == "not there":
            vllm.models = ("nothing",)
        else:
            running.backends[0] = msgspec.structs.replace(running.backends[0], drained=True)
            running.publish(
                models={
                    LARGE: model(LARGE, "b0", price=PLENTY, fallbacks=("smollm2",)),
                    "smollm2": model("smollm2", "b1"),
                }
            )
        reply = running.ask(asked(LARGE, {"tokens": 4}, stream=stream))
        assert (reply.status, reply.ending, reply.header("x-glasshouse-backend")) == (200, "complete", "b1")
        record = running.record_of(reply)
        plain = running.record_of(running.ask(asked("smollm2", {"tokens": 4}, stream=stream)))
    assert (record.model, record.fallback_of, record.requested_model) == ("smollm2", LARGE, "")
    assert (record.outcome, record.backend, record.output_tokens) == (Outcome.OK, "b1", 4)
    assert record.cost_nano == plain.cost_nano > 0, "the price of the one that answered"
    assert plain.fallback_of == ""
    tries = {"refuses": ["b0", "b1"], "dead": ["b0", "b1"], "drained": ["b1"], "not there": ["b0", "b1"]}
    assert [attempt.backend for attempt in record.attempts] == tries[how]
    assert msgspec.json.decode(other.requests[0].body)["model"] == "smollm2"


def test_the_name_that_was_asked_for_stays_known(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    with with_fallbacks(worker, vllm, other) as running:
        vllm.fail_next(1, Script(status=429))
        record = running.record_of(running.ask(asked("big")))
        assert (record.model, record.fallback_of, record.requested_model) == ("smollm2", LARGE, "big")
        record = running.record_of(running.ask(asked("big")))
        assert (record.model, record.fallback_of, record.requested_model) == (LARGE, "", "big")


def test_a_fallback_that_the_key_may_not_use_is_none(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    with with_fallbacks(worker, vllm, other, models=[LARGE]) as running:
        vllm.fail_next(1, Script(status=429, headers={"retry-after": "7"}))
        reply = running.ask(asked(LARGE))
        assert (reply.status, reply.header("retry-after"), reply.header("x-glasshouse-backend")) == (429, "7", "b0")
        record = running.record()
        assert (record.model, record.fallback_of, len(record.attempts)) == (LARGE, "", 1)
    assert not other.requests


def test_where_the_fallback_cannot_either_the_refusal_goes_out(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    with with_fallbacks(worker, vllm, other) as running:
        other.refuse()
        vllm.fail_next(1, Script(status=429, headers={"retry-after": "7"}))
        reply = running.ask(asked(LARGE))
        assert (reply.status, reply.header("retry-after"), reply.header("x-glasshouse-backend")) == (429, "7", "b0")
        record = running.record()
        assert (record.model, record.fallback_of, record.error_code) == (LARGE, "", "429")
        assert [attempt.error or attempt.status for attempt in record.attempts] == [429, "upstream_unreachable"]


def test_where_nobody_has_either_what_was_asked_for_is_named(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    with with_fallbacks(worker, vllm, other) as running:
        running.backends = [msgspec.structs.replace(each, drained=True) for each in running.backends]
        running.publish(
            models={LARGE: model(LARGE, "b0", fallbacks=("smollm2",)), "smollm2": model("smollm2", "b1")},
        )
        reply = running.ask(asked(LARGE))
        assert (reply.status, reply.json()["error"]["code"]) == (503, "no_backend")
        assert f"`{LARGE}`" in reply.json()["error"]["message"]
        assert "smollm2" not in reply.json()["error"]["message"]


def test_a_refusal_of_the_request_itself_is_no_reason_to_fall_back(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    with with_fallbacks(worker, vllm, other) as running:
        vllm.fail_next(1, Script(status=400))
        assert running.ask(asked(LARGE)).status == 400
    assert not other.requests


# --- answers that requests go on from ----------------------------------------------------------------------------------

RESPONSES: Final = "/v1/responses"
FOUND: Final = Script(body='{"id":"resp_2","object":"response","status":"completed","output":[]}')


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_goes_on_where_the_answer_is_that_it_goes_on_from(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM, stream: bool
) -> None:
    running = worker(vllm.url, other.url, config=TURNS)
    for _ in range(6):
        reply = running.ask({"model": "smollm2", "input": "Hi", "stream": stream}, RESPONSES)
        first = running.record_of(reply)
        found = next(part for part in reply.body.split(b'"') if part.startswith(b"resp_")).decode()
        body = {"model": "smollm2", "input": "Go on", "previous_response_id": found, "script": {"status": 400}}
        second = running.record_of(running.ask(body, RESPONSES))
        assert [attempt.backend for attempt in second.attempts] == [first.backend]
        assert second.routed_by == "round_robin.previous_response"
    assert vllm.requests
    assert other.requests


def test_a_suspect_is_asked_for_what_it_alone_has(worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM) -> None:
    running = worker(vllm.url, other.url, config={**TURNS, "health": {"probe": 60}})
    replies = [running.ask({"model": "smollm2", "input": "Hi"}, RESPONSES) for _ in range(2)]
    [mine] = [reply for reply in replies if reply.header("x-glasshouse-backend") == "b0"]
    vllm.fail_next(1, Script(status=500))
    vllm.default = Script(hang=True)  # what the probe gets
    assert sorted(running.ask(SHORT).status for _ in range(2)) == [200, 500]
    running.until(lambda: running.heartbeat().backends["b0"].state == "suspect" or None, "the suspicion")
    body = {"model": "smollm2", "input": "Go on", "previous_response_id": mine.json()["id"], "script": {"status": 400}}
    record = running.record_of(running.ask(body, RESPONSES))
    assert ([attempt.backend for attempt in record.attempts], record.routed_by) == (["b0"], "round_robin.previous_response")


def test_a_backend_that_does_not_know_the_answer_is_not_the_last_one_asked(
    worker: StartWorker, vllm: ScriptedVLLM, other: ScriptedVLLM
) -> None:
    running = worker(vllm.url, other.url, config=TURNS)
    other.default = FOUND
    body = {"model": "smollm2", "input": "Go on", "previous_response_id": "resp_1"}
    for _ in range(2):  # whose turn it is
        reply = running.ask(body, RESPONSES)
        assert (reply.status, reply.json()["id"]) == (200, "resp_2")
    records = running.records(2)
    assert sorted(len(record.attempts) for record in records) == [1, 2]
    assert {beat.state for beat in running.heartbeat().backends.values()} == {"up"}
    other.default = Script()
    reply = running.ask(body, RESPONSES)
    assert (reply.status, reply.json()["error"]["message"]) == (404, "Response with id 'resp_1' not found.")
