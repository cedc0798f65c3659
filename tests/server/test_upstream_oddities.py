"""Engines that answer oddly, whatever the operation: compressed, with a redirect, with what is no HTTP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.exchange import UsageSource
from tests.server.conftest import StartWorker
from tests.server.test_operations import CASES, STREAMS, Case, by_path, message, send, send_straight
from tests.support.scripted_vllm import Script, ScriptedVLLM
from tests.support.wire_client import Reply, anonymous
from tests.support.worker import Worker, backend, chat

RUBBISH: Final = {
    "another protocol": "SSH-2.0-OpenSSH_9.2\r\n",
    "a negative length": "HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}",
    "two lengths": "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length and chunks": "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "no chunk": "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "a huge head": "HTTP/1.1 200 OK\r\nx: " + "y" * 100_000,
    "a stream of no chunks": "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url)


@pytest.fixture
def elsewhere() -> Iterator[ScriptedVLLM]:
    """Where nothing of a client's or of the proxy's may arrive."""
    with ScriptedVLLM() as server:
        yield server
        assert (server.connections, server.requests) == (0, [])


def oddly(worker: Worker, vllm: ScriptedVLLM, case: Case, raw: str, **more: Any) -> Reply:
    """The answer to a request which the engine answers with these bytes. It leaves the connection open."""
    vllm.fail_next(1, Script(raw=raw, raw_closes=False))
    return send(worker, case, **more)


def refusal(case: Case, reply: Reply) -> str:
    """The message of an error in the API's own shape."""
    assert reply.header("content-type") == "application/json"
    said = reply.json()
    if case.path.startswith("/v1/messages"):
        assert (list(said), said["type"], list(said["error"])) == (["type", "error"], "error", ["type", "message"])
    else:
        assert (list(said), list(said["error"])) == (["error"], ["message", "type", "param", "code"])
    return str(said["error"]["message"])


# --- compressed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_no_engine_is_asked_to_compress(shared: Worker, shared_vllm: ScriptedVLLM, case: Case) -> None:  # failure 22
    body, headers = message(case)
    assert shared.ask(body, case.path, headers=headers | {"Accept-Encoding": "gzip, br, zstd"}).status == 200
    assert shared_vllm.requests[-1].header("accept-encoding") == "identity"


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_what_is_compressed_all_the_same_passes_as_it_is(  # failure 22
    shared: Worker, shared_vllm: ScriptedVLLM, case: Case
) -> None:
    straight, reply = send_straight(shared_vllm, case), send(shared, case, script={"gzip": True})
    assert (reply.status, reply.header("content-encoding")) == (200, "gzip")
    assert anonymous(gzip.decompress(reply.body)) == straight.anonymous
    record = shared.record_of(reply)
    assert record.outcome == Outcome.OK
    assert record.usage_source == (UsageSource.ESTIMATED if case.source != UsageSource.NONE else UsageSource.NONE)


@pytest.mark.parametrize("case", STREAMS, ids=by_path)
def test_a_stream_that_is_compressed_all_the_same_is_a_bad_gateway(shared: Worker, case: Case) -> None:  # failure 22
    # It can't be watched: neither its tokens nor its end would be known.
    reply = send(shared, case, stream=True, script={"gzip": True})
    assert (reply.status, reply.header("content-encoding")) == (502, None)
    assert "compressed" in refusal(case, reply)
    record = shared.record_of(reply)
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "bad_gateway")


# --- redirects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("stream", [False, True])
def test_no_redirect_is_followed(  # failure 23
    worker: StartWorker, vllm: ScriptedVLLM, elsewhere: ScriptedVLLM, status: int, stream: bool
) -> None:
    running = worker(backend(vllm.url, api_key_env="ENGINE_KEY"), env={"ENGINE_KEY": "the-engines-own"})
    for case in STREAMS if stream else CASES:
        script = {"status": status, "headers": {"location": elsewhere.url + case.path}}
        more = {"stream": True} if stream else {}
        reply = send(running, case, script=script, **more)
        assert (reply.status, reply.header("location")) == (502, None)
        assert "redirect" in refusal(case, reply)
        assert vllm.requests[-1].path == case.path
    assert len(vllm.requests) == len(STREAMS if stream else CASES)


# --- no answer ---------------------------------------------------------------------------------------------------------

NO_ANSWER: Final = {
    "a page": ("text/html", "<html><body>Welcome to nginx!</body></html>"),
    "a page that says it is JSON": ("application/json", "<html></html>"),
    "text": ("text/css", "body {}"),
    "nothing": ("application/json", ""),
    "the beginning of an answer": ("application/json", '{"id":"1","usage":{"prompt_tokens":5,'),
    "two answers": ("application/json", "{} {}"),
    "bytes": ("application/octet-stream", "\x00\xff\xfe"),
}


@pytest.mark.parametrize("case", CASES, ids=by_path)
@pytest.mark.parametrize(("kind", "body"), NO_ANSWER.values(), ids=NO_ANSWER)
def test_what_is_no_answer_is_a_bad_gateway(  # failure 24
    shared: Worker, shared_vllm: ScriptedVLLM, case: Case, kind: str, body: str
) -> None:
    raw = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    reply = oddly(shared, shared_vllm, case, raw)
    assert (reply.status, reply.ending) == (502, "complete")
    assert refusal(case, reply) == "The engine's answer isn't JSON."
    record = shared.record_of(reply)
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "bad_gateway")
    assert (record.input_tokens, record.output_tokens, record.cost_nano) == (0, 0, 0)
    assert send(shared, case).status == 200


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_json_of_another_shape_is_the_engines_business(shared: Worker, shared_vllm: ScriptedVLLM, case: Case) -> None:
    reply = oddly(shared, shared_vllm, case, "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n[1]")
    assert (reply.status, reply.body) == (200, b"[1]")


def test_a_transcription_may_be_text(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    text = "WEBVTT\n\n00:00.000 --> 00:02.500\nAll is glass.\n"
    raw = f"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(text)}\r\n\r\n{text}"
    for case in CASES:
        reply = oddly(shared, shared_vllm, case, raw)
        assert (reply.status, reply.body == text.encode()) == ((200, True) if "audio" in case.path else (502, False))


def test_a_page_that_says_what_went_wrong_passes(shared: Worker) -> None:
    page = "<html>Bad Gateway</html>"
    raw = f"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/html\r\ncontent-length: {len(page)}\r\n\r\n{page}"
    reply = shared.ask(chat({"raw": raw}))
    assert (reply.status, reply.body, reply.header("content-type")) == (502, page.encode(), "text/html")


# --- no HTTP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=by_path)
@pytest.mark.parametrize("raw", RUBBISH.values(), ids=RUBBISH)
def test_what_is_no_http_is_a_bad_gateway(  # failure 24
    shared: Worker, shared_vllm: ScriptedVLLM, case: Case, raw: str
) -> None:
    reply = oddly(shared, shared_vllm, case, raw)
    assert (reply.status, reply.ending) == (502, "complete")
    assert "y" * 100 not in refusal(case, reply)
    record = shared.record_of(reply)
    assert (record.outcome, record.status, record.error_code) == (Outcome.UPSTREAM_ERROR, 502, "bad_gateway")
    assert (record.input_tokens, record.output_tokens, record.cost_nano) == (0, 0, 0)
    assert len(record.attempts) == 1  # no engine is made to do it again


@pytest.mark.parametrize("case", STREAMS, ids=by_path)
def test_what_ceases_to_be_http_breaks_the_stream(  # failures 4, 24
    shared: Worker, shared_vllm: ScriptedVLLM, case: Case
) -> None:
    begun = b"".join(send_straight(shared_vllm, case, stream=True).events[:5])
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    raw = f"{head}{len(begun):x}\r\n{begun.decode()}\r\nzz\r\n"
    reply = oddly(shared, shared_vllm, case, raw, stream=True)
    assert (reply.status, reply.ending) == (200, "closed")
    assert reply.body.startswith(begun)
    [error] = reply.events[5:]
    assert json.loads(error.split(b"data: ")[1])
    assert b"error" in error
    record = shared.record_of(reply)
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "bad_gateway")


def test_a_connection_that_brought_rubbish_is_closed(worker: StartWorker) -> None:  # failure 24
    with ScriptedVLLM(keep_alive=60) as vllm:
        running = worker(vllm.url)
        for raw in RUBBISH.values():
            running.ask(chat({"raw": raw, "raw_closes": False}))
            vllm.wait(lambda: not vllm.open_connections)
            assert running.ask(chat(stream=False)).status == 200
        assert vllm.connections == len(RUBBISH) + 1
