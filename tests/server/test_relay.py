"""To engines and back over real sockets: what goes to them, which one gets it, what happens when one can't be reached."""

from __future__ import annotations

import gzip
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.exchange import UsageSource
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import Script, ScriptedVLLM, captured
from tests.support.scripted_vllm.answers import Received
from tests.support.wire_client import anonymous, ask
from tests.support.worker import CHAT, KEY, MODEL, Worker, backend, chat, deaf_host

COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
NEVER_ANSWERS: Final = Script(raw="")
"""What a stale connection does: it takes the request and closes without a byte."""
TURNS: Final = {"routing": {"policy": "round_robin"}}
"""Two requests reach both of a pair."""


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url)


def last_request(vllm: ScriptedVLLM) -> Received:
    return vllm.requests[-1]


# --- what goes to an engine --------------------------------------------------------------------------------------------


def test_only_the_proxys_own_headers_reach_an_engine(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    sent = {
        "X-Request-Id": "mine",
        "Cookie": "session=secret",
        "X-Forwarded-For": "10.0.0.1",
        "X-Api-Key": KEY,
        "Accept-Encoding": "gzip, br",
        "OpenAI-Organization": "org",
        "User-Agent": "client/1.0",
        "Proxy-Authorization": "Basic c2VjcmV0",
        "TE": "trailers",
        "X-Custom": "1",
    }
    reply = shared.ask(chat(stream=False), headers=sent)
    assert reply.status == 200
    received = last_request(shared_vllm)
    names = [name.decode() for name, _ in received.headers]
    assert names == ["host", "accept-encoding", "content-type", "content-length", "x-request-id", "traceparent"]
    assert received.header("accept-encoding") == "identity"
    assert received.header("host") == shared_vllm.url.removeprefix("http://")
    assert received.header("content-length") == str(len(received.body))


def test_a_body_reaches_an_engine_as_it_came(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    body = (
        b'{ "model" :"smollm2",\n"messages":[{"role":"user","content":"caf\\u00e9 \xe6\x97\xa5"}],"temperature":1.0E0,'
        b'"vendor":{"a":[1,2.50,null]},"stream": false,"big":123456789012345678901234567890}'
    )
    assert shared.ask(body).status == 200
    assert last_request(shared_vllm).body == body


def test_of_a_streams_body_only_the_stream_options_change(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    body = b'{ "model" :"smollm2", "messages":[{"role":"user","content":"Hi"}], "stream":true,"x":1.0E0}'
    assert shared.ask(body).status == 200
    options = b'"stream_options":{"include_usage":true,"continuous_usage_stats":true},'
    assert last_request(shared_vllm).body == b"{" + options + body[1:]


def test_every_attempt_has_an_id_of_the_proxys_own(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    # failure 59
    ids = []
    for _ in range(2):
        reply = shared.ask(chat(), headers={"X-Request-Id": "the-same"})
        identity = reply.header("x-request-id")
        assert identity is not None
        assert re.fullmatch(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", identity)
        assert last_request(shared_vllm).header("x-request-id") == f"{identity}-1"
        record = shared.record_of(reply)
        assert (record.client_request_id, record.hex_id) == ("the-same", identity)
        ids.append(identity)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(("theirs", "kept"), [("x" * 200, "x" * 128), ("\xe9\xff-1", "\ufffd\ufffd-1"), ("", "")])
def test_a_callers_id_is_an_attribute_and_no_more(shared: Worker, theirs: str, kept: str) -> None:
    # failure 59
    reply = shared.ask(chat(stream=False), headers={"X-Request-Id": theirs})
    assert shared.record_of(reply).client_request_id == kept


def test_an_engines_id_is_not_the_answers(worker: StartWorker) -> None:
    # failure 59
    with ScriptedVLLM(request_id_headers=True) as vllm:
        running = worker(vllm.url)
        for stream in (True, False):
            reply = running.ask(chat(stream=stream))
            ids = [value for name, value in reply.headers if name == "x-request-id"]
            assert ids == [running.record_of(reply).hex_id]


PARENT: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_callers_trace_goes_on(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    reply = shared.ask(chat(), headers={"traceparent": PARENT, "tracestate": "a=1,b=2"})
    record = shared.record_of(reply)
    assert record.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert (record.parent_span_id, record.trace_flags) == (0x00F067AA0BA902B7, 1)
    received = last_request(shared_vllm)
    version, trace, span, flags = (received.header("traceparent") or "").split("-")
    assert (version, trace, flags) == ("00", record.trace_id.hex(), "01")
    assert int(span, 16) == record.span_id + 1, "the engine's parent is the attempt"
    assert received.header("tracestate") == "a=1,b=2"


def test_a_callers_wish_not_to_be_traced_goes_on(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    reply = shared.ask(chat(), headers={"traceparent": PARENT[:-2] + "00"})
    assert shared.record_of(reply).trace_flags == 0
    assert (last_request(shared_vllm).header("traceparent") or "").endswith("-00")


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "nonsense",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
        PARENT + "-more",
        PARENT + "0",
    ],
)
def test_a_trace_that_is_none_is_ignored(shared: Worker, shared_vllm: ScriptedVLLM, parent: str) -> None:
    reply = shared.ask(chat(), headers={"traceparent": parent, "tracestate": "a=1"})
    record = shared.record_of(reply)
    assert (record.trace_id, record.parent_span_id, record.trace_flags) == (record.id, 0, 1)
    received = last_request(shared_vllm)
    assert (received.header("traceparent") or "")[3:35] == record.hex_id
    assert received.header("tracestate") is None


def test_a_later_version_of_a_trace_is_understood(shared: Worker) -> None:
    reply = shared.ask(chat(), headers={"traceparent": "01" + PARENT[2:] + "-more"})
    assert shared.record_of(reply).parent_span_id == 0x00F067AA0BA902B7


def test_an_engine_may_have_a_path_and_a_key(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url + "/deep/down", api_key_env="ENGINE_KEY"), env={"ENGINE_KEY": "the-engines"})
    running.ask(chat())
    received = last_request(vllm)
    assert received.target == "/deep/down" + CHAT
    assert received.header("authorization") == "Bearer the-engines"


@pytest.mark.parametrize(
    "path", ["/metrics", "/health/", "/sleep", "/v1/load_lora_adapter", "/tokenizer_info", "/docs", "/v1/chat"]
)
def test_what_an_engine_has_besides_the_api_is_out_of_reach(shared: Worker, shared_vllm: ScriptedVLLM, path: str) -> None:
    before = len(shared_vllm.requests)
    for body in (None, chat()):
        reply = shared.ask(body, path)
        assert reply.status == 404
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert len(shared_vllm.requests) == before


# --- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "err_nomessages",
        "err_toolong",
        "err_temp",
        "err_maxtokens_zero",
        "err_405",
        "err_404",
        "llamacpp/err_toolong",
    ],
)
def test_a_refusal_passes_as_it_is_and_is_not_tried_again(worker: StartWorker, vllm: ScriptedVLLM, name: str) -> None:
    # failure 9
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url)
        reply = running.ask(chat({"replay": name}))
        assert len(vllm.requests) + len(other.requests) == 1
    sample = captured.load(name)
    assert (reply.status, reply.body) == (sample.status, sample.body)
    record = running.record()
    assert (record.outcome, record.status) == (Outcome.CLIENT_ERROR, sample.status)
    assert [attempt.status for attempt in record.attempts] == [sample.status]
    assert (record.usage_source, record.cost_nano) == (UsageSource.NONE, 0)
    assert record.error


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
@pytest.mark.parametrize("stream", [True, False])
def test_an_engines_failure_passes_as_it_is(worker: StartWorker, vllm: ScriptedVLLM, status: int, stream: bool) -> None:
    running = worker(vllm.url)
    body = chat({"status": status, "headers": {"retry-after": "7"}}, stream=stream)
    reply = running.ask(body)
    straight = ask(vllm.url, CHAT, body)
    assert (reply.status, reply.body, reply.header("retry-after")) == (status, straight.body, "7")
    record = running.record()
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, str(status))
    assert record.error == f"The engine answered with status {status}."  # its words may quote the prompt: see below


@pytest.mark.parametrize("stream", [True, False])
def test_an_engines_words_are_recorded_where_content_is(worker: StartWorker, vllm: ScriptedVLLM, stream: bool) -> None:
    running = worker(vllm.url, config={"capture": {"content": True}})
    running.ask(chat({"status": 503}, stream=stream))
    assert running.record().error == "The script says so."


def test_headers_of_one_hop_stay_there(shared: Worker) -> None:
    own = {"Keep-Alive": "timeout=5", "Connection": "keep-alive", "X-Engine": "7", "Proxy-Connection": "x", "Upgrade": "h2c"}
    for stream in (True, False):
        reply = shared.ask(chat({"headers": own}, stream=stream))
        names = [name for name, _ in reply.headers]
        assert not {"keep-alive", "proxy-connection", "upgrade", "connection"} & set(names)
        assert reply.header("x-engine") == "7"
        assert reply.header("server") == "uvicorn"
        assert names.count("transfer-encoding") == stream


def test_a_compressed_answer_passes_as_it_is(shared: Worker) -> None:
    reply = shared.ask(chat({"gzip": True, "content": "Bonjour"}, stream=False))
    assert reply.header("content-encoding") == "gzip"
    assert json.loads(gzip.decompress(reply.body))["choices"][0]["message"]["content"] == "Bonjour"
    assert shared.record_of(reply).usage_source == UsageSource.ESTIMATED


def test_a_redirect_is_not_followed(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    before = len(shared_vllm.requests)
    reply = shared.ask(chat({"status": 307, "headers": {"location": shared_vllm.url + CHAT}}, stream=False))
    assert (reply.status, len(shared_vllm.requests) - before) == (502, 1)


@pytest.mark.parametrize("size", [1, 10_000, 1_048_575, 1_048_577, 1_300_000, 5_000_000])
def test_bodies_of_any_size_pass_whole_and_are_counted(shared: Worker, shared_vllm: ScriptedVLLM, size: int) -> None:
    # What is too large to be held goes out as it comes, and its usage stands at its end.
    script = {"body_bytes": size} if size > 1 else {"tokens": 1}
    reply = shared.ask(chat(script, stream=False))
    assert (reply.status, reply.ending) == (200, "complete")
    assert reply.json()["usage"]["completion_tokens"]
    assert size == 1 or len(reply.body) == size
    record = shared.record_of(reply)
    assert (record.outcome, record.usage_source, record.input_tokens) == (Outcome.OK, UsageSource.ENGINE, 31)
    assert record.response_bytes == len(reply.body)


def test_a_large_body_without_usage_is_estimated_by_all_of_it(shared: Worker) -> None:
    reply = shared.ask(chat({"usage": "none", "body_bytes": 3_000_000}, stream=False))
    record = shared.record_of(reply)
    assert (record.usage_source, record.output_tokens) == (UsageSource.ESTIMATED, 750_000)


def test_a_body_that_breaks_off_is_no_answer(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    small = running.ask(chat({"cut_after_bytes": 100, "cut": "close"}, stream=False))
    assert (small.status, small.json()["error"]["code"]) == (502, "upstream_disconnected")
    large = running.ask(chat({"body_bytes": 5_000_000, "cut_after_bytes": 4_000_000, "cut": "close"}, stream=False))
    assert (large.status, large.ending) == (200, "closed")
    assert len(large.body) < 4_000_000
    assert [record.outcome for record in running.records(2)] == [Outcome.UPSTREAM_ERROR] * 2


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_body_may_end_with_its_connection(worker: StartWorker, vllm: ScriptedVLLM, version: str, stream: bool) -> None:
    name = "chat_stream" if stream else "chat"
    sample = captured.load(name)
    kind = "text/event-stream" if stream else "application/json"
    raw = f"HTTP/{version} 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n" + sample.body.decode()
    running = worker(vllm.url)
    with running.begin(chat({"raw": raw.encode().decode("latin-1")}, stream=stream)) as client:
        reply = client.read()
        assert (reply.status, reply.ending, reply.body) == (200, "complete", sample.body)
        again = client.ask("/v1/models", key=running.key)
        assert again.status == 200, "the engine's last answer was its own connection's end, not the client's"
    assert [record.outcome for record in running.records(2)] == [Outcome.OK] * 2


def test_an_answer_of_http_1_0_is_one_of_1_1(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    body = captured.load("chat").body.decode()
    raw = f"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    running = worker(vllm.url)
    with running.begin(chat({"raw": raw}, stream=False)) as client:
        assert client.socket.recv(9) == b"HTTP/1.1 "


@pytest.mark.parametrize(
    "raw",
    [
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        "HTTP/1.1 200 OK\r\nx: " + "y" * 100_000,
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n\x00\x01",
        "HTTP/1.1 200 OK\ncontent-length: 2\n\n{}",
    ],
    ids=["another protocol", "negative length", "two lengths", "no chunk", "a huge head", "an upgrade", "bare LF"],
)
def test_what_is_no_http_is_a_bad_gateway(worker: StartWorker, vllm: ScriptedVLLM, raw: str) -> None:
    running = worker(vllm.url)
    reply = running.ask(chat({"raw": raw}))
    assert (reply.status, reply.ending) == (502, "complete")
    assert reply.json()["error"]["code"] == "bad_gateway"
    record = running.record()
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "bad_gateway")
    assert running.ask(chat()).ending == "complete"


def test_interim_answers_are_passed_over(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    body = captured.load("chat").body.decode()
    early = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    raw = f"{early}HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    running = worker(vllm.url)
    reply = running.ask(chat({"raw": raw}, stream=False))
    assert (reply.status, reply.body.decode(), reply.header("link")) == (200, body, None)


# --- other endpoints ---------------------------------------------------------------------------------------------------


def test_completions_of_a_batch(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    body = {"model": MODEL, "prompt": ["one", "two three"], "n": 2, "stream": True, "script": {"tokens": 3, "finish": "length"}}
    reply = shared.ask(body, COMPLETIONS)
    assert reply.anonymous == ask(shared_vllm.url, COMPLETIONS, body).anonymous
    record = shared.record_of(reply)
    assert (record.operation, record.choices, record.output_tokens) == ("completions", 4, 12)
    assert (record.input_tokens, record.finish_reasons) == (3, ["length"] * 4)


def test_a_batch_that_broke_off_is_counted_by_its_prompts(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    script = {"tokens": 3, "hang_after_events": 8}
    body = {"model": MODEL, "prompt": ["one", "two three"], "n": 2, "stream": True, "script": script}
    with running.begin(body, COMPLETIONS) as client:
        client.read(events=8)
    record = running.record()
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (3, 8, UsageSource.ENGINE)


def test_embeddings(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    body = {"model": MODEL, "input": ["one", "two three"], "user": "u"}
    reply = shared.ask(body, EMBEDDINGS)
    straight = ask(shared_vllm.url, EMBEDDINGS, body)
    assert reply.json()["data"] == straight.json()["data"]
    record = shared.record_of(reply)
    assert (record.operation, record.input_tokens, record.output_tokens, record.user) == ("embeddings", 3, 0, "u")
    assert (record.stream, record.usage_source) == (False, UsageSource.ENGINE)


def test_embeddings_without_usage_have_no_output_tokens(shared: Worker) -> None:
    reply = shared.ask({"model": MODEL, "input": "Hi", "script": {"body": '{"data":[{"embedding":[1.0,2.0]}]}'}}, EMBEDDINGS)
    record = shared.record_of(reply)
    assert (record.usage_source, record.output_tokens) == (UsageSource.ESTIMATED, 0)
    assert record.input_tokens == record.request_bytes // 4


def test_models_come_from_the_catalogue(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, models=["a", "org/b c"])
    assert [model["id"] for model in running.ask(path="/v1/models").json()["data"]] == ["a", "org/b c"]
    assert running.ask(path="/v1/models?x=1").status == 200
    for path in ("/v1/models/org/b%20c", "/v1/models/org%2Fb%20c"):
        assert running.ask(path=path).json() == {"id": "org/b c", "object": "model"}
    unknown = running.ask(path="/v1/models/none")
    assert (unknown.status, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert not vllm.requests
    records = running.records(5)
    assert [(record.operation, record.status) for record in records[1:3]] == [("models", 200), ("model", 200)]
    assert (records[-1].outcome, records[-1].model) == (Outcome.CLIENT_ERROR, "none")


def test_a_model_that_is_not_there_is_openais_404(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    before = len(shared_vllm.requests)
    reply = shared.ask(chat() | {"model": "gpt-5"})
    assert reply.status == 404
    assert reply.json() == {
        "error": {
            "message": "The model `gpt-5` does not exist.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert len(shared_vllm.requests) == before
    record = shared.record_of(reply)
    assert (record.outcome, record.model, record.attempts) == (Outcome.CLIENT_ERROR, "gpt-5", [])


@pytest.mark.parametrize(
    "more",
    [{"max_tokens": 2**70}, {"max_tokens": -(2**70)}, {"n": 10**30}, {"max_completion_tokens": 1e300}, {"top_p": "x" * 1000}],
    ids=str,
)
def test_no_number_is_too_large_for_the_record(shared: Worker, more: dict[str, Any]) -> None:
    # failure 37: what is odd is the engine's to judge, and is recorded as not said
    reply = shared.ask(chat({"body": "{}"}, stream=False, **more))
    assert reply.status in (200, 400), reply.body  # 400: in the engine's words
    assert b"vllm" not in reply.body
    record = shared.record_of(reply)
    assert record.max_tokens is None


def test_an_engine_that_counts_too_far_is_not_believed(shared: Worker) -> None:
    usage = {"prompt_tokens": 2**80, "completion_tokens": 2}
    reply = shared.ask(chat({"body": json.dumps({"usage": usage})}, stream=False))
    record = shared.record_of(reply)
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (0, 2, UsageSource.ENGINE)


# --- which engine gets it ----------------------------------------------------------------------------------------------


def test_an_idle_pair_takes_turns(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url)
        for _ in range(10):
            running.ask(chat({"tokens": 2}))
        assert (len(vllm.requests), len(other.requests)) == (5, 5)


def test_the_one_with_the_fewest_in_flight_gets_it(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    with ScriptedVLLM() as other, ThreadPoolExecutor(10) as clients:
        running = worker(vllm.url, other.url)
        hanging = [clients.submit(running.ask, chat({"hang": True})) for _ in range(9)]
        running.until(lambda: vllm.in_flight + other.in_flight == 9 or None, "nine requests in the engines")
        assert abs(vllm.in_flight - other.in_flight) == 1
        fewer = min(vllm, other, key=lambda server: server.in_flight)
        seen = len(fewer.requests)
        for _ in range(3):
            running.ask(chat({"tokens": 2}))
        assert len(fewer.requests) == seen + 3
        running.until_in_flight(9)
        assert running.heartbeat().in_flight_by_backend == {"b0": vllm.in_flight, "b1": other.in_flight}
        vllm.release()
        other.release()
        assert all(reply.result().ending == "complete" for reply in hanging)


# --- one that can't be reached -----------------------------------------------------------------------------------------


def test_another_backend_answers_for_one_that_refuses(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 7
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url, config=TURNS)
        other.refuse()
        for _ in range(4):
            reply = running.ask(chat({"tokens": 3}))
            assert (reply.status, reply.ending) == (200, "complete")
        records = running.records(4)
    assert all(record.outcome == Outcome.OK and record.backend == "b0" for record in records)
    failed = [attempt for record in records for attempt in record.attempts[:-1]]
    assert [(attempt.backend, attempt.error, attempt.status) for attempt in failed] == [("b1", "upstream_unreachable", 0)]
    tried = [received.header("x-request-id") for received in vllm.requests]
    assert sorted((identity or "")[-2:] for identity in tried) == ["-1", "-1", "-1", "-2"], "who comes later knows"


def test_no_backend_at_all_is_a_503_in_openais_shape(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 7
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url)
        vllm.refuse()
        other.refuse()
        for stream in (True, False):
            reply = running.ask(chat(stream=stream))
            assert (reply.status, reply.ending, reply.header("retry-after")) == (503, "complete", "1")
            error = reply.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("upstream_error", "upstream_unreachable", None)
            assert "127.0.0.1" not in error["message"]
    for record in running.records(2):
        assert (record.outcome, record.status) == (Outcome.UPSTREAM_ERROR, 503)
        assert {attempt.backend for attempt in record.attempts} == {"b0", "b1"}


def test_connecting_has_a_time_limit(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    with deaf_host() as url:
        running = worker(url, config={"timeouts": {"connect": 0.3}})
        reply = running.ask(chat())
        assert (reply.status, reply.json()["error"]["code"]) == (503, "upstream_unreachable")


def test_a_host_without_an_address_is_unreachable(worker: StartWorker) -> None:
    running = worker("http://no-such-host.invalid:80")
    reply = running.ask(chat())
    assert (reply.status, reply.json()["error"]["code"]) == (503, "upstream_unreachable")


def test_a_model_without_a_backend_is_a_503(worker: StartWorker) -> None:
    running = worker()
    reply = running.ask(chat())
    assert (reply.status, reply.json()["error"]["code"]) == (503, "no_backend")
    assert running.record().outcome == Outcome.REJECTED


# --- kept-alive connections --------------------------------------------------------------------------------------------


def test_connections_are_used_again(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    for stream in (True, False, True, False):
        running.ask(chat(stream=stream))
    assert vllm.connections == 1
    assert [record.attempts[0].reused for record in running.records(4)] == [False, True, True, True]


def test_a_stale_connection_is_replaced_unnoticed(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 10
    running = worker(vllm.url)
    running.ask(chat())
    vllm.fail_next(1, NEVER_ANSWERS)
    reply = running.ask(chat({"tokens": 4}))
    assert (reply.status, reply.ending) == (200, "complete")
    record = running.records(2)[-1]
    assert record.outcome == Outcome.OK
    assert [(attempt.reused, attempt.error) for attempt in record.attempts] == [(True, "upstream_disconnected"), (False, "")]
    assert (last_request(vllm).header("x-request-id") or "").endswith("-2")


def test_a_fresh_connection_that_breaks_is_an_error(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 10: the engine may have begun to work; only a connection that had grown old is tried again
    running = worker(vllm.url)
    vllm.fail_next(1, NEVER_ANSWERS)
    reply = running.ask(chat())
    assert (reply.status, reply.json()["error"]["code"]) == (502, "upstream_disconnected")
    assert len(running.record().attempts) == len(vllm.requests) == 1


def test_a_stale_connection_is_replaced_once(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 10
    running = worker(vllm.url)
    running.ask(chat())
    vllm.fail_next(2, NEVER_ANSWERS)
    reply = running.ask(chat())
    assert (reply.status, reply.json()["error"]["code"]) == (502, "upstream_disconnected")
    assert len(running.records(2)[-1].attempts) == 2


def test_an_answer_that_has_begun_is_never_asked_for_again(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 10
    running = worker(vllm.url)
    running.ask(chat())
    vllm.fail_next(1, Script(raw="HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n"))
    reply = running.ask(chat(stream=False))
    assert (reply.status, len(vllm.requests)) == (502, 2)
    assert len(running.records(2)[-1].attempts) == 1


def test_the_other_backend_answers_when_a_stale_connections_engine_is_gone(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failures 7, 10
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url, config=TURNS)
        for _ in range(2):
            running.ask(chat())  # one connection to each
        other.refuse()
        other.fail_next(1, NEVER_ANSWERS)
        for _ in range(2):  # either's turn
            reply = running.ask(chat({"tokens": 4}))
            assert (reply.status, reply.ending) == (200, "complete")
    [attempts] = [record.attempts for record in running.records(4) if len(record.attempts) > 1]
    errors = [(attempt.backend, attempt.error) for attempt in attempts]
    assert errors == [("b1", "upstream_disconnected"), ("b1", "upstream_unreachable"), ("b0", "")]


def test_a_connection_is_given_up_before_its_engine_does(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 10: vLLM closes after 5 s; a request sent into that moment is lost
    running = worker(vllm.url, config={"timeouts": {"upstream_idle": 0.3}})
    running.ask(chat())
    vllm.wait(lambda: vllm.connections == 1 and not vllm.open_connections, timeout=4.5)
    running.ask(chat())
    assert [record.attempts[0].reused for record in running.records(2)] == [False, False]


def test_requests_in_the_rhythm_of_an_engines_idle_timeout_never_fail(worker: StartWorker) -> None:
    # failure 10, scaled
    with ScriptedVLLM(keep_alive=0.05) as vllm:
        running = worker(vllm.url, config={"timeouts": {"upstream_idle": 0.04}})
        for _ in range(40):
            assert running.ask(chat(stream=False)).status == 200
            vllm.wait(lambda: not vllm.open_connections)
            assert running.ask(chat(stream=False)).status == 200
        assert all(len(record.attempts) == 1 for record in running.records(80))


@pytest.mark.long
@pytest.mark.timeout(420)
def test_a_request_every_five_seconds_never_fails(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 10
    running = worker(vllm.url)
    due = time.monotonic()
    for _ in range(60):
        time.sleep(max(0.0, due - time.monotonic()))
        due += 5.0
        assert running.ask(chat(stream=False)).status == 200
    assert all(record.outcome == Outcome.OK for record in running.records(60))


def test_a_backend_that_left_the_catalogue_is_let_go(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    with ScriptedVLLM() as other:
        running = worker(vllm.url, other.url)
        for _ in range(2):
            running.ask(chat())
        assert (vllm.open_connections, other.open_connections) == (1, 1)
        running.backends.pop()
        running.publish()
        other.wait(lambda: not other.open_connections, timeout=3)  # it would have been kept for four seconds
        for _ in range(2):
            running.ask(chat())
        assert (vllm.connections, other.connections) == (1, 1)


def test_a_backend_that_moved_is_sought_where_it_is_now(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    with ScriptedVLLM() as other:
        running = worker(vllm.url)
        running.ask(chat())
        running.backends = [backend(other.url, "b0")]
        running.publish()
        running.ask(chat())
        assert len(other.requests) == 1
        vllm.wait(lambda: not vllm.open_connections)


def test_the_same_backend_in_a_new_catalogue_keeps_its_connections(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    running.ask(chat())
    running.publish()
    running.ask(chat())
    assert [record.attempts[0].reused for record in running.records(2)] == [False, True]


@pytest.mark.parametrize("asked", [{}, {"stream_options": {"include_usage": True}}], ids=str)
def test_a_stream_of_known_length_comes_without_what_was_not_asked_for(shared: Worker, asked: dict[str, Any]) -> None:
    body = captured.load("chat_stream_usage_cont").body
    raw = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    reply = shared.ask(chat({"raw": (raw + body).decode("latin-1")}, **asked))
    expected = captured.load("chat_stream_usage" if asked else "chat_stream").body
    assert (reply.ending, reply.header("content-length")) == ("complete", None)
    assert reply.anonymous == anonymous(expected)


def test_an_engine_that_does_not_end_its_answer_holds_nobody_up(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    """The stream is complete with `[DONE]`, whether or not its last HTTP chunk comes."""
    body = captured.load("chat_stream").body
    raw = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % (len(body) + 10)
    running = worker(vllm.url)
    reply = running.ask(chat({"raw": (raw + body).decode("latin-1")}))
    assert (reply.ending, reply.body) == ("complete", body)
    assert running.ask(chat()).ending == "complete"
    assert [record.outcome for record in running.records(2)] == [Outcome.OK] * 2
