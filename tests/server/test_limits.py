"""Limits and budgets as callers meet them, with one worker and nothing else: held from admission to the last byte, let go on
every way out, and known again after a restart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import openai
import pytest

from proxy.errors import Outcome
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, KEY, MODEL, PICO_INPUT, PICO_OUTPUT, Worker, chat

MONEY = (PICO_INPUT * 31 + PICO_OUTPUT * 8) / 1e12
"""What one answer of 8 tokens costs: the prompt `Hi` has 31."""


@pytest.fixture(scope="module")
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


def everyone(**allowance: Any) -> dict[str, Any]:
    return {"everyone": allowance}


def code(reply: Reply) -> str:
    """Of an error; of anything else its status."""
    return str(reply.json()["error"]["code"]) if reply.status >= 400 else str(reply.status)


def held(worker: Worker) -> int:
    return worker.heartbeat().reservations


# -- rates --


def test_requests_per_minute(worker: StartWorker, vllm: ScriptedVLLM) -> None:  # failure 61
    one = worker(vllm.url, config=everyone(requests_per_minute=3))
    replies = [one.ask(chat(stream=False)) for _ in range(5)]
    assert [each.status for each in replies] == [200, 200, 200, 429, 429]
    assert [each.header("x-ratelimit-remaining-requests") for each in replies] == ["2", "1", "0", "0", "0"]
    assert {each.header("x-ratelimit-limit-requests") for each in replies} == {"3"}
    refused = replies[3]
    assert refused.json()["error"]["type"] == "requests"
    assert code(refused) == "rate_limit_exceeded"
    assert 1 <= int(refused.header("retry-after") or 0) <= 20
    assert 0 < int(refused.header("retry-after-ms") or 0) <= 20_000
    rejected = [record for record in one.records(5) if record.outcome == Outcome.REJECTED]
    assert [(each.refused_by, each.status, each.error_code) for each in rejected] == [
        ("everyone.requests_per_minute", 429, "rate_limit_exceeded")
    ] * 2
    assert not any(record.attempts for record in rejected)


def test_tokens_are_set_aside_while_an_answer_runs_and_given_back_at_its_end(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, config=everyone(output_tokens_per_minute=1000))
    with one.begin(chat({"tokens": 4, "first": 0.2, "interval": 0.1}, max_tokens=700)) as running:
        running.read(events=1)
        refused = one.ask(chat(max_tokens=400))
        assert (refused.json()["error"]["type"], code(refused)) == ("tokens", "rate_limit_exceeded")
        running.read()
    assert one.ask(chat(max_tokens=400, stream=False)).status == 200


def test_the_openai_client_takes_a_refusal_for_what_it_is(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, config=everyone(requests_per_minute=1, budgets=[{"tokens": 10_000, "per": "day"}]))
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key=KEY, max_retries=0) as client:
        ask: Callable[..., Any] = client.chat.completions.create
        messages = [{"role": "user", "content": "Hi"}]
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as refused:
            ask(model=MODEL, messages=messages)
        assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
        with pytest.raises(openai.RateLimitError) as over_budget:
            ask(model=MODEL, messages=messages, max_tokens=20_000)
    assert over_budget.value.code == "insufficient_quota"
    assert over_budget.value.response.headers["x-should-retry"] == "false"


# -- at the same time --


def test_a_place_is_held_to_the_last_byte(worker: StartWorker, vllm: ScriptedVLLM) -> None:  # failure 61
    one = worker(vllm.url, config=everyone(concurrent_requests=2))
    long = chat({"tokens": 200, "interval": 0.02})
    with one.begin(chat({"tokens": 30, "interval": 0.02})) as first, one.begin(long) as second:
        second.read(events=1)
        refused = one.ask(chat())
        assert code(refused) == "rate_limit_exceeded"
        assert (refused.header("retry-after"), refused.json()["error"]["type"]) == ("1", "requests")
        first.read()
        assert one.ask(chat()).status == 200
        second.reset()
        one.until(lambda: held(one) == 0 or None, "nothing to be held")
    with one.begin(chat({"tokens": 3, "first": 0.3})) as third:
        third.read_head()
        assert one.ask(chat()).status == 200


# -- budgets --


def test_a_hard_budget(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, config=everyone(budgets=[{"tokens": 150, "per": "day", "time_zone": "Europe/Vienna"}]))
    replies = [one.ask(chat(stream=False, max_tokens=8)) for _ in range(6)]
    spent = sum(record.input_tokens + record.output_tokens for record in one.records(6))
    assert [each.status for each in replies] == [200] * 3 + [429] * 3
    assert spent == 3 * 39
    refused = replies[-1]
    assert (code(refused), refused.json()["error"]["type"]) == ("insufficient_quota", "insufficient_quota")
    assert refused.header("x-should-retry") == "false"
    assert 0 < int(refused.header("retry-after") or 0) <= 25 * 3600
    assert {record.refused_by for record in one.records(6)} == {"", "everyone.budget"}


def test_a_soft_budget_only_tells(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, config=everyone(budgets=[{"money": MONEY, "per": "month", "soft": True}]))
    replies = [one.ask(chat(stream=False)) for _ in range(3)]
    assert [each.status for each in replies] == [200] * 3
    line = "everyone money per month"
    assert [each.header("x-glasshouse-over-budget") for each in replies] == [None, line, line]
    assert [record.over_budget for record in one.records(3)] == ["", "everyone", "everyone"]


def test_the_tightest_level_wins_and_levels_are_counted_apart(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    config = {
        "everyone": {"requests_per_minute": 6},
        "teams": {"research": {"requests_per_minute": 4}},
        "keys": {"name 0": {"team": "research", "requests_per_minute": 3}, "name 1": {"team": "research"}},
    }
    one = worker(vllm.url, config=config, keys=["gh-one", "gh-two"])

    def ask(key: str, times: int) -> list[str]:
        for _ in range(times):
            one.ask(chat(stream=False), key=key)
        return [record.refused_by for record in one.records()[-times:]]

    assert ask(KEY, 4) == ["", "", "", "key.requests_per_minute"]
    assert ask("gh-one", 2) == ["", "team.requests_per_minute"]
    assert ask("gh-two", 3) == ["", "", "everyone.requests_per_minute"]
    assert {(record.key_name, record.team) for record in one.records()} == {
        ("name 0", "research"),
        ("name 1", "research"),
        ("name 2", ""),
    }


def test_a_hundred_at_once_with_a_budget_for_three(worker: StartWorker, vllm: ScriptedVLLM) -> None:  # failure 60
    one = worker(vllm.url, config=everyone(budgets=[{"tokens": 3 * 60, "per": "total"}]))
    body = chat({"tokens": 8, "interval": 0.05}, max_tokens=8)
    with ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda _: one.ask(body), range(100)))
    passed = sum(each.status == 200 for each in replies)
    records = one.records(100)
    assert sum(record.input_tokens + record.output_tokens for record in records) == passed * 39 <= 180
    assert passed >= 2
    assert {each.status for each in replies} == {200, 429}
    assert held(one) == 0 or one.until(lambda: held(one) == 0 or None, "nothing to be held")


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ({}, {}),
        ({"status": 400}, {}),
        ({"status": 500}, {}),
        ({"tokens": 50, "cut_after_events": 3}, {}),
        ({}, {"stream": False}),
        ({}, {"n": 1000}),
        ({}, {"model": "nobody's"}),
    ],
    ids=["stream", "engine refuses", "engine fails", "engine dies", "whole", "out of bounds", "unknown model"],
)
def test_every_way_out_lets_go(worker: StartWorker, vllm: ScriptedVLLM, script: dict[str, Any], more: dict[str, Any]) -> None:
    budget = {"tokens": 1200, "per": "day"}
    one = worker(vllm.url, config=everyone(concurrent_requests=1, tokens_per_minute=1200, budgets=[budget]))
    for _ in range(3):
        reply = one.ask(chat(script, **more))
        assert reply.status != 429
    one.records(3)
    one.until(lambda: (held(one) == 0 and one.heartbeat().in_flight == 0) or None, "nothing to be held")
    with one.begin(chat({"tokens": 100, "interval": 0.05}, max_tokens=900)) as leaving:
        leaving.read(events=2)
    one.until(lambda: (held(one) == 0) or None, "what a client left behind to be let go")
    assert one.ask(chat(max_tokens=900, stream=False)).status == 200


def test_an_engine_that_cant_be_reached_costs_nothing(worker: StartWorker) -> None:
    one = worker("http://127.0.0.1:9", config=everyone(concurrent_requests=1, budgets=[{"tokens": 1100, "per": "day"}]))
    assert [one.ask(chat()).status for _ in range(3)] == [503] * 3


# -- clocks --

FAKETIME: Final = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.skipif(FAKETIME is None, reason="faketime isn't installed")
def test_a_clock_that_jumps(worker: StartWorker, vllm: ScriptedVLLM, tmp_path: Path) -> None:  # failure 60
    """By an hour over midnight and back again: a day's budget goes by the clock, a rate doesn't."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    last_hour = (23 - datetime.now(UTC).hour + 12) % 24 - 12
    zone = f"Etc/GMT{-last_hour:+d}"  # where it is past eleven in the evening; the sign is turned round in these names
    budget = {"tokens": 150, "per": "day", "time_zone": zone}
    one = worker(vllm.url, config=everyone(requests_per_minute=5, budgets=[budget]), env={"LD_PRELOAD": str(FAKETIME), **faked})

    def ask(offset: str = "+0") -> str:
        clock.write_text(offset)
        time.sleep(0.6)  # the worker takes its bearings four times a second
        return code(one.ask(chat(stream=False, max_tokens=8)))

    assert [ask(), ask(), ask(), ask()] == ["200", "200", "200", "insufficient_quota"]
    assert [ask("+1h"), ask("+0"), ask("+1h")] == ["200", "insufficient_quota", "200"]
    assert ask("+1h") == "rate_limit_exceeded"
    records = one.records(8)
    assert all(0 <= record.ended_ns < 10**9 * 3000 for record in records)
    assert max(record.received_unix_ns for record in records) - min(record.received_unix_ns for record in records) > 3500 * 10**9


# -- what a key may do at all --


def test_operations_and_models_and_the_length_of_prompts(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    config = {"keys": {"name 0": {"operations": ["chat"], "models": ["smol*"], "max_input_tokens": 60}}}
    one = worker(vllm.url, config=config, keys=["gh-free"], models=[MODEL, "large"])
    assert one.ask(chat(stream=False)).status == 200
    refused = one.ask({"model": MODEL, "prompt": "Hi"}, "/v1/completions")
    assert (refused.status, code(refused)) == (403, "operation_not_allowed")
    long = one.ask(chat(messages=[{"role": "user", "content": "word " * 100}]))
    assert (long.status, code(long)) == (400, "context_length_exceeded")
    hidden, unknown = one.ask(chat(model="large")), one.ask(chat(model="nobody"))
    assert hidden.body.replace(b"large", b"nobody") == unknown.body
    assert one.ask(chat(model="large"), key="gh-free").header("server") == "uvicorn"  # the engine's own answer
    assert [(each.outcome, each.refused_by) for each in one.records(6)[1:3]] == [
        (Outcome.REJECTED, ""),
        (Outcome.REJECTED, "key.max_input_tokens"),
    ]


# -- after a restart --


def test_a_budget_outlives_its_worker(vllm: ScriptedVLLM, tmp_path: Path) -> None:  # failure 49
    """No collector, no database: what the journal has, of answers that ended and of one that the kill cut off."""
    config = everyone(budgets=[{"tokens": 200, "per": "day"}])
    one = Worker([vllm.url], config, directory=tmp_path).start()
    assert one.ask(chat(stream=False, max_tokens=8)).status == 200
    with one.begin(chat({"tokens": 60, "interval": 0.05}, max_tokens=60)) as cut:
        cut.read(events=25)
        one.until(lambda: any(record.output_tokens for record in one.open_records()) or None, "a record of its progress")
        one.kill()
    with one:
        spent = sum(record.input_tokens + record.output_tokens for record in one.records(2))
        assert 39 + 31 < spent < 39 + 31 + 60
        room = 200 - spent
        prompt = len(json.dumps(chat(stream=False, max_tokens=10))) // 4 + 1
        assert one.ask(chat(stream=False, max_tokens=room - prompt + 1)).status == 429
        assert one.ask(chat(stream=False, max_tokens=room - prompt)).status == 200


def test_while_a_worker_takes_anothers_place_both_count(vllm: ScriptedVLLM, tmp_path: Path) -> None:
    """The old one's streams go on: what they have taken, and what is set aside for them, is known to the new one."""
    config = everyone(concurrent_requests=2, budgets=[{"tokens": 1000, "per": "day"}])
    with Worker([vllm.url], config, directory=tmp_path) as old:
        script = {"tokens": 100, "interval": 0.03}
        with (
            old.begin(chat(script, max_tokens=600)) as running,
            _Beside(old, vllm) as new,
            WireClient(old.url) as second,
        ):
            running.read(events=3)
            new.until(lambda: code(new.ask(chat(max_tokens=600))) == "insufficient_quota" or None, "the first to be known of")
            second.send(request(CHAT, chat(script, max_tokens=100), key=KEY))
            second.read(events=3)
            new.until(lambda: code(new.ask(chat(max_tokens=5000))) == "rate_limit_exceeded" or None, "the second to be known of")
            running.read()
            second.read()
            new.until(lambda: new.ask(chat(stream=False, max_tokens=600)).status == 200 or None, "them to have ended")
            assert code(new.ask(chat(stream=False, max_tokens=750))) == "insufficient_quota"


class _Beside(Worker):
    """Another incarnation on the same state directory."""

    def __init__(self, other: Worker, vllm: ScriptedVLLM) -> None:
        super().__init__([vllm.url], directory=other._directory, snapshot=False)
        self.settings = other.settings

    @property
    def _log_path(self) -> Path:
        return self._directory / "beside.log"
