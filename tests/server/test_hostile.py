"""The corpus of `hostile.py` against a real worker: it answers as it should, serves on, and nothing has reached the engine."""

from __future__ import annotations

import pytest

from tests.server.conftest import StartWorker
from tests.server.hostile import CORPUS, MARK, Hostile
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.scripted_vllm.answers import Received
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import Worker, chat

LIMITS = {"body_bytes": 50_000_000, "header_bytes": 16 * 1024}


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url, config={"limits": LIMITS})


def test_the_corpus_is_a_corpus() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 60


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_it_does_no_harm(shared: Worker, shared_vllm: ScriptedVLLM, case: Hostile) -> None:
    # failures 26-36, 38-40
    before = len(shared_vllm.requests)
    with WireClient(shared.url) as client:
        client.send(case.data)
        replies = [client.read() for _ in case.statuses]
        assert tuple(reply.status for reply in replies) == case.statuses
        for reply in replies:
            assert reply.ending == "complete"
            if reply.status >= 400:
                assert_openai_error(reply)
        if case.closed:
            assert client.read().ending in ("closed", "reset")
        else:
            client.send(request("/health"))
            assert client.read().json() == {"status": "alive"}, "something else was still to be answered"
    reached = shared_vllm.requests[before:]
    assert len(reached) == case.statuses.count(200)
    assert not [each for each in reached if MARK in everything(each)]
    assert shared.ask(chat({"tokens": 1})).status == 200


def assert_openai_error(reply: Reply) -> None:
    assert reply.header("content-type") == "application/json"
    [(name, error)] = reply.json().items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]


def everything(received: Received) -> bytes:
    return repr(received).encode()
