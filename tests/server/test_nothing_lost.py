"""The promise: an answer that a client saw complete is in the ledger, once, with its exact tokens, whoever is killed when.

Clients speak over raw sockets, the worker and the collector die by SIGKILL: at the worst moment there is (the client's reading of
the last byte), and at any moment. What was broken off by a kill is in the ledger too, as `crashed`, with the tokens seen.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final
from urllib.parse import urlsplit

import pytest

from tests.conftest import Start
from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import request

PATH: Final = "/v1/chat/completions"
END_OF_CHUNKS: Final = b"0\r\n\r\n"
PATIENCE: Final = 30.0
TRIALS: Final = pytest.mark.parametrize("trials", [10, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
_names = count(1)


@dataclass
class Asked:
    """One request as its client saw it."""

    name: str
    body: dict[str, Any]
    answer: bytearray = field(default_factory=bytearray)

    @property
    def complete(self) -> bool:
        """The terminal bytes are there: the last chunk, or the last byte of a body of known length."""
        head, separator, body = bytes(self.answer).partition(b"\r\n\r\n")
        if not separator:
            return False
        if b"transfer-encoding: chunked" in head.lower():
            return body.endswith(END_OF_CHUNKS)
        return len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])

    @property
    def tokens(self) -> int:
        """Of a stream: the content events that arrived; the scripted engine writes one a token."""
        return self.answer.count(b'"delta":{"content":"')


def ask(glasshouse: Glasshouse, asked: Asked, kill: int | None = None) -> Asked:
    """Send and read to the end, whichever it is. `kill`: the process that dies the instant the terminal bytes are there."""
    url = urlsplit(glasshouse.url)
    with socket.create_connection((url.hostname, url.port), timeout=PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request(PATH, asked.body, key=glasshouse.key, headers={"X-Request-Id": asked.name}))
        try:
            while data := connection.recv(65536):
                asked.answer += data
                if asked.complete:
                    if kill is not None:
                        os.kill(kill, signal.SIGKILL)
                    break
        except ConnectionResetError:
            pass
    return asked


def chat(**script: Any) -> Asked:
    stream = script.pop("stream", True)
    model = script.pop("model", "smollm2")
    messages = [{"role": "user", "content": "Say something."}]
    return Asked(f"request-{next(_names)}", {"model": model, "messages": messages, "stream": stream, "script": script})


def posts(vllm: ScriptedVLLM) -> int:
    """Requests for generation so far; the control process asks for models meanwhile."""
    return sum(received.method == "POST" for received in list(vllm.requests))


def rows_by_name(glasshouse: Glasshouse, asked: list[Asked]) -> dict[str, dict[str, Any]]:
    """The ledger once it is complete; a request of ours that is there twice, or a stranger, is a failure."""
    rows = glasshouse.rows(len(asked))
    names = Counter(row["client_request_id"] for row in rows)
    assert names == Counter(each.name for each in asked)
    return {row["client_request_id"]: row for row in rows}


def assert_counted(glasshouse: Glasshouse, rows: dict[str, dict[str, Any]]) -> None:
    """Prometheus says what the ledger says, in each outcome."""
    glasshouse.wait_metric("glasshouse_requests_total", len(rows))
    metrics = glasshouse.metrics()
    assert metrics.total("glasshouse_requests_total") == len(rows)
    for outcome, number in Counter(row["outcome"] for row in rows.values()).items():
        assert metrics.total("glasshouse_requests_total", outcome=outcome) == number


ENDINGS: Final[dict[str, tuple[dict[str, Any], str, int]]] = {
    "stream": ({"tokens": 16}, "ok", 16),
    "slow stream": ({"tokens": 5, "interval": 0.01}, "ok", 5),
    "plain": ({"stream": False, "tokens": 12}, "ok", 12),
    "long plain": ({"stream": False, "tokens": 4000}, "ok", 4000),
    "refused by us": ({"model": "no-such-model"}, "client_error", 0),
    "failed in the engine": ({"status": 500}, "upstream_error", 0),
}


@TRIALS
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_worker_killed_at_the_last_byte_leaves_its_row(glasshouse: Start, vllm: ScriptedVLLM, ending: str, trials: int) -> None:
    # failure 49
    script, outcome, tokens = ENDINGS[ending]
    running = glasshouse([vllm.url])
    asked = []
    for _ in range(trials):
        worker = running.pid("worker")
        asked.append(ask(running, chat(**script), kill=worker))
        assert asked[-1].complete
        running.wait_replaced("worker", worker)
    rows = rows_by_name(running, asked)
    assert {row["outcome"] for row in rows.values()} == {outcome}
    assert {row["output_tokens"] for row in rows.values()} == {tokens}
    assert_counted(running, rows)


@TRIALS
def test_processes_killed_at_any_time_lose_nothing_and_count_nothing_twice(
    glasshouse: Start, vllm: ScriptedVLLM, trials: int
) -> None:
    # failure 49
    dice = random.Random(20261120)
    running = glasshouse([vllm.url])
    asked: list[Asked] = []
    with ThreadPoolExecutor(8) as clients:
        for _ in range(trials):
            round_ = [_random_request(dice) for _ in range(8)]
            expected = posts(vllm) + len(round_)
            answers = [clients.submit(ask, running, each) for each in round_]
            # Each request has been dispatched, so each has its opening record: from here on it is one row, whatever comes.
            vllm.wait(lambda all_of_them=expected: posts(vllm) == all_of_them, PATIENCE)  # type: ignore[misc]
            _kill_some(dice, running, answers)
            asked += [answer.result(PATIENCE) for answer in answers]
    rows = rows_by_name(running, asked)
    for each in asked:
        _check(each, rows[each.name])
    broken = [each for each in asked if not each.complete]
    assert broken, "no kill met a request: the dice are wrong"
    assert len(broken) < len(asked), "no request survived: the dice are wrong"
    assert_counted(running, rows)


def _random_request(dice: random.Random) -> Asked:
    """A quick one, a slow prefill or a stream of up to two seconds; every fourth not streamed."""
    tokens = dice.randint(1, 60)
    first, interval = dice.choice([0, 0.05, 0.8]), dice.choice([0, 0.01, 0.03])
    return chat(stream=dice.random() > 0.25, tokens=tokens, first=first, interval=interval)


def _kill_some(dice: random.Random, running: Glasshouse, answers: list[Future[Asked]]) -> None:
    """The worker most times, the collector half the time, each at a moment of its own."""
    victims = [("worker", dice.uniform(0, 1.5))] if dice.random() < 0.75 else []
    victims += [("collector", dice.uniform(0, 1.5))] if dice.random() < 0.5 else []
    before = {role: running.pid(role) for role, _ in victims}
    timers = [threading.Timer(moment, running.kill, (role,)) for role, moment in victims]
    for timer in timers:
        timer.start()
    for timer in timers:
        timer.join()
    for role, pid in before.items():
        running.wait_replaced(role, pid)


def _check(asked: Asked, row: dict[str, Any]) -> None:
    tokens = asked.body["script"]["tokens"]
    if asked.complete:
        assert (row["outcome"], row["output_tokens"]) == ("ok", tokens), asked.name
    elif row["outcome"] == "ok":  # it died between the record and the release: all that the client lacks is the end
        assert row["output_tokens"] == tokens, asked.name
    else:
        assert (row["outcome"], row["error_code"]) == ("crashed", "worker_crashed"), asked.name
        delivered = asked.tokens if asked.body["stream"] else tokens
        assert row["output_tokens"] <= delivered, asked.name


def test_streams_in_flight_finish_when_it_is_told_to_stop(glasshouse: Start, vllm: ScriptedVLLM) -> None:
    # failure 50
    running = glasshouse([vllm.url])
    asked = [chat(tokens=40, interval=0.05), chat(tokens=30, first=0.5), chat(stream=False, tokens=20, interval=0.05)]
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = [clients.submit(ask, running, each) for each in asked]
        vllm.wait(lambda: vllm.in_flight == len(asked))
        running.signal(signal.SIGTERM)
        assert running.wait_exit() == 0
        assert all(answer.result(PATIENCE).complete for answer in answers)
    rows = rows_by_name(running, asked)  # nothing runs any more: they were there when it ended
    assert {name: (row["outcome"], row["output_tokens"]) for name, row in rows.items()} == {
        each.name: ("ok", each.body["script"]["tokens"]) for each in asked
    }
    assert "every request is in the ledger" in running.logs()["up"]


def test_a_drain_that_takes_too_long_ends_visibly_and_is_recorded(glasshouse: Start, vllm: ScriptedVLLM) -> None:
    # failure 50
    running = glasshouse([vllm.url], {"timeouts": {"drain": 0.5}})
    stream = chat(tokens=1000, interval=0.05)
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(ask, running, stream)
        vllm.wait(lambda: vllm.generated_tokens >= 3)
        running.signal(signal.SIGTERM)
        assert running.wait_exit() == 0
        assert b"shutting_down" in answer.result(PATIENCE).answer
    row = rows_by_name(running, [stream])[stream.name]
    assert row["error_code"] == "shutting_down"
    assert 3 <= row["output_tokens"] <= stream.tokens
    assert b"[DONE]" not in stream.answer
