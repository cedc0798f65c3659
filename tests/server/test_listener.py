"""Clients over real sockets: HTTP as it should be and as it should not be, keys, probes, the drain, captured content."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.exchange import UsageSource
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, ask, request
from tests.support.worker import CHAT, KEY, Worker, chat

MODELS: Final = "/v1/models"


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url)


def assert_error(reply: Reply, status: int, code: str | None) -> dict[str, Any]:
    """An error in OpenAI's shape, whole and as JSON; → the error."""
    assert (reply.status, reply.ending) == (status, "complete")
    assert reply.header("content-type") == "application/json"
    assert reply.header("content-length") == str(len(reply.body))
    [(name, error)] = reply.json().items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    return dict(error)


# --- one connection, many requests -------------------------------------------------------------------------------------


def test_a_connection_is_kept(shared: Worker) -> None:
    with WireClient(shared.url) as client:
        for stream in (True, False, True):
            assert client.ask(CHAT, chat(stream=stream), key=KEY).ending == "complete"
        assert client.ask(MODELS, key=KEY).header("connection") is None


@pytest.mark.parametrize("wish", ["close", "Close"])
def test_a_client_may_ask_to_close(shared: Worker, wish: str) -> None:
    for body in (chat(), chat(stream=False), None):
        with shared.begin(body, CHAT if body else MODELS, headers={"Connection": wish}) as client:
            reply = client.read()
            assert (reply.ending, reply.header("connection")) == ("complete", "close")
            assert client.socket.recv(1) == b""


def test_pipelined_requests_are_answered_in_their_order(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    # failure 29
    bodies = [chat({"tokens": 3, "first": 0.2}), chat({"content": "two"}, stream=False), None, chat({"tokens": 2}), None]
    with WireClient(shared.url) as client:
        client.send(b"".join(request(CHAT if body else MODELS, body, key=KEY) for body in bodies))
        replies = [client.read() for _ in bodies]
    for body, reply in zip(bodies, replies, strict=True):
        assert (reply.status, reply.ending) == (200, "complete")
        if body:
            assert reply.anonymous == ask(shared_vllm.url, CHAT, body).anonymous
        else:
            assert reply.json()["object"] == "list"
    assert len({reply.header("x-request-id") for reply in replies}) == len(replies)


def test_requests_that_were_waiting_when_their_client_left_never_ran(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    with WireClient(running.url) as client:
        client.send(request(CHAT, chat({"hang": True}), key=KEY) + request(CHAT, chat(), key=KEY))
        vllm.wait(lambda: vllm.in_flight == 1)
    assert running.record().outcome == Outcome.CLIENT_GONE
    running.until_in_flight(0)
    assert len(vllm.requests) == 1


def test_what_is_sent_ahead_is_bounded(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"limits": {"pipelined_bytes": 10_000}})
    with running.begin(chat({"hang": True})) as client:
        vllm.wait(lambda: vllm.in_flight == 1)
        client.send(request(CHAT, b"x" * 20_000, key=KEY))
        assert client.read().ending in ("reset", "closed")
    assert running.record().outcome == Outcome.CLIENT_GONE


def test_what_is_sent_ahead_is_also_counted(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 29: each of them costs many times its bytes
    running = worker(vllm.url)
    with running.begin(chat({"hang": True})) as client:
        vllm.wait(lambda: vllm.in_flight == 1)
        client.send(request("/health") * 100)
        running.until_in_flight(1)
        client.send(request("/health") * 2)
        assert client.read().ending in ("reset", "closed")
    assert running.record().outcome == Outcome.CLIENT_GONE


def test_a_request_may_come_byte_by_byte(shared: Worker) -> None:
    data = request(CHAT, chat({"tokens": 3}), key=KEY)
    with WireClient(shared.url) as client:
        for at in range(len(data)):
            client.send(data[at : at + 1])
        assert client.read().ending == "complete"


def test_a_request_may_come_in_chunks(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    body = json.dumps(chat({"tokens": 3})).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:50], body[50:])) + b"0\r\n\r\n"
    fields = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\n{fields}\r\n".encode()
    with WireClient(shared.url) as client:
        client.send(head + chunks)
        reply = client.read()
    assert (reply.status, reply.ending) == (200, "complete")
    assert shared.record_of(reply).request_bytes == len(body)
    assert shared_vllm.requests[-1].header("transfer-encoding") is None


def test_a_client_that_expects_to_be_asked_is_asked(shared: Worker) -> None:
    # failure 27
    data = request(CHAT, chat({"tokens": 3}), key=KEY, headers={"Expect": "100-continue"})
    at = data.index(b"\r\n\r\n") + 4
    with WireClient(shared.url) as client:
        client.send(data[:at])
        asked = client.socket.recv(1024)
        assert asked == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(data[at:])
        reply = client.read()
    assert (reply.status, reply.ending) == (200, "complete")


def test_a_client_of_http_1_0_gets_an_answer_it_understands(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    # failure 28
    for body in (chat({"tokens": 5}), chat({"tokens": 5}, stream=False)):
        data = request(CHAT, body, key=KEY).replace(b"HTTP/1.1\r\nHost: localhost", b"HTTP/1.0", 1)
        with WireClient(shared.url) as client:
            client.send(data)
            reply = client.read()
        assert (reply.status, reply.ending) == (200, "complete")
        assert (reply.header("transfer-encoding"), reply.header("connection")) == (None, "close")
        assert reply.anonymous == ask(shared_vllm.url, CHAT, body).anonymous


def test_a_client_of_http_1_0_sees_that_a_stream_is_broken(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    data = request(CHAT, chat({"cut_after_events": 3}), key=KEY).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with WireClient(running.url) as client:
        client.send(data)
        reply = client.read()
    assert b'"code":"upstream_disconnected"' in reply.events[-1]


def test_an_offer_to_upgrade_is_passed_over(shared: Worker) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    with WireClient(shared.url) as client:
        for _ in range(2):
            reply = client.ask(CHAT, chat({"tokens": 2}), key=KEY, headers=offer)
            assert (reply.status, reply.ending) == (200, "complete")


# --- requests that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v2/models", "//v1/models", "/v1/models/", "/V1/MODELS", "/metrics"])
def test_an_unknown_path_is_a_404(shared: Worker, path: str) -> None:
    error = assert_error(shared.ask(path=path), 404, None)
    assert path in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("DELETE", CHAT, "POST"), ("POST", MODELS, "GET"), ("PUT", MODELS, "GET")],
)
def test_another_method_is_a_405(shared: Worker, method: str, path: str, allowed: str) -> None:
    with WireClient(shared.url) as client:
        client.send(request(path, method=method, key=KEY))
        error = assert_error(client.read(), 405, "method_not_allowed")
        assert client.ask(MODELS, key=KEY).status == 200
    assert error["message"].endswith(f"allowed: {allowed}.")


@pytest.mark.parametrize("path", ["/health", "/ready", MODELS, CHAT, "/nowhere"])
def test_the_answer_to_a_head_has_no_body(shared: Worker, path: str) -> None:
    with WireClient(shared.url) as client:
        client.send(request(path, method="HEAD", key=KEY) + request(MODELS, key=KEY))
        data = b""
        while b'"object":"list"' not in data:
            more = client.socket.recv(65536)
            assert more
            data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"content-length:" in head
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n")


BODIES: Final[dict[str, tuple[bytes, str | None]]] = {
    "nothing": (b"", None),
    "no JSON": (b"{model:1}", None),
    "cut off": (b'{"model":"smollm2"', None),
    "a list": (b"[]", None),
    "null": (b"null", None),
    "NaN": (b'{"model":"smollm2","top_p":NaN}', None),
    "bad UTF-8": (b'{"model":"smo\xff"}', None),
    "a lone surrogate": (b'{"model":"smo\\ud800"}', None),
    "very deep": (b'{"model":"smollm2","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "a model that is a number": (b'{"model":7}', "model"),
    "a stream that is a text": (b'{"model":"smollm2","stream":"yes"}', "stream"),
    "two documents": (b'{"model":"smollm2"} {}', None),
}


@pytest.mark.parametrize(("body", "param"), BODIES.values(), ids=BODIES)
def test_a_body_that_cannot_be_read_is_a_400(shared: Worker, shared_vllm: ScriptedVLLM, body: bytes, param: str | None) -> None:
    # failure 36
    before = len(shared_vllm.requests)
    reply = shared.ask(body)
    assert assert_error(reply, 400, None)["param"] == param
    assert len(shared_vllm.requests) == before
    record = shared.record_of(reply)
    assert (record.outcome, record.status, record.error_code) == (Outcome.CLIENT_ERROR, 400, "invalid_request_error")


def test_a_body_that_names_two_models_names_none(worker: StartWorker) -> None:
    # failure 36: whoever reads it next may read the other one
    with ScriptedVLLM(models=("allowed", "other")) as vllm:
        running = worker(vllm.url, models=["allowed"])
        for first, second in (("other", "allowed"), ("allowed", "other")):
            body = b'{"model":"%b","model":"%b","messages":[]}' % (first.encode(), second.encode())
            assert_error(running.ask(body), 400, None)
        assert not vllm.requests


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(worker: StartWorker, vllm: ScriptedVLLM, chunked: bool) -> None:
    # failure 26: 8 MB against a limit of 1 MB, sent to the end by a client that doesn't look up
    running = worker(vllm.url, config={"limits": {"body_bytes": 1_000_000}})
    part = b"x" * 100_000
    framed = b"%x\r\n%b\r\n" % (len(part), part) if chunked else part
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {80 * len(part)}"
    before = running.peak_rss_bytes
    with WireClient(running.url) as client:
        client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{how}\r\n\r\n".encode())
        for _ in range(80):
            client.send(framed)
        reply = client.read()
        assert_error(reply, 413, "request_too_large")
        assert reply.header("connection") == "close"
        assert client.socket.recv(1) == b""
    assert running.peak_rss_bytes - before < 4 * 1024 * 1024
    assert not vllm.requests
    running.until(lambda: running.heartbeat().unaccepted == {"request_too_large": 1} or None, "the count")


def test_a_large_body_without_a_key_is_not_held(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 26: who has no key is told so after the first reads, not after 32 MB
    running = worker(vllm.url)
    part = b"x" * 1_000_000
    before = running.peak_rss_bytes
    with WireClient(running.url) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer nobody\r\nContent-Length: {32 * len(part)}\r\n\r\n"
        client.send(head.encode())
        for _ in range(32):
            client.send(part)
        assert_error(client.read(), 401, "invalid_api_key")
    assert running.peak_rss_bytes - before < 4 * 1024 * 1024
    assert not vllm.requests


def test_a_body_at_the_limit_is_none_too_many(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    body = json.dumps(chat(user="x" * 100_000)).encode()
    running = worker(vllm.url, config={"limits": {"body_bytes": len(body)}})
    assert running.ask(body).status == 200
    assert running.ask(body + b" ").status == 413


def test_a_head_over_the_limit_is_a_431(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"limits": {"header_bytes": 10_000}})
    with WireClient(running.url) as client:
        client.send(f"POST {CHAT} HTTP/1.1\r\n".encode())
        for i in range(2000):
            client.send(b"X-%d: %b\r\n" % (i, b"y" * 100))
        assert_error(client.read(), 431, "headers_too_large")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n{",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"hello\r\n\r\n",
    ],
    ids=["space", "bare LF", "both lengths", "two lengths", "signed", "xchunked", "NUL", "TLS", "HTTP/2", "no HTTP"],
)
def test_what_is_no_request_is_a_400(worker: StartWorker, data: bytes) -> None:
    # failure 30
    running = worker()
    with WireClient(running.url) as client:
        client.send(data)
        reply = client.read()
        assert_error(reply, 400, None)
        assert reply.header("connection") == "close"
        assert client.socket.recv(1) == b""
    assert running.records() == []
    running.until(lambda: running.heartbeat().unaccepted == {"invalid_request_error": 1} or None, "the count")


# --- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": ""}, "invalid_api_key"),
        ({"Authorization": "Bearer"}, "invalid_api_key"),
        ({"Authorization": "Bearer "}, "invalid_api_key"),
        ({"Authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"Authorization": KEY}, "invalid_api_key"),
        ({"Authorization": "Basic Z2gtdGVzdDo="}, "invalid_api_key"),
        ({"Authorization": f"Bearer {KEY}x"}, "invalid_api_key"),
        ({"X-Api-Key": ""}, "invalid_api_key"),
        ({"X-Api-Key": f"{KEY}x"}, "invalid_api_key"),
        ({"X-Api-Key": f"Bearer {KEY}"}, "invalid_api_key"),
    ],
    ids=str,
)
def test_without_a_good_key_nothing_is_reached_and_nothing_is_booked(
    worker: StartWorker, vllm: ScriptedVLLM, headers: dict[str, str], code: str
) -> None:
    running = worker(vllm.url)
    for path, body in ((CHAT, chat()), (MODELS, None)):
        with WireClient(running.url) as client:
            reply = client.ask(path, body, headers=headers)
            assert_error(reply, 401, code)
            assert client.ask(path, body, key=KEY).status == 200, "a wrong key is no reason to close"
    assert len(vllm.requests) == 1
    assert len(running.records(2)) == 2
    running.until(lambda: running.heartbeat().unaccepted == {code: 2} or None, "the count")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_may_be_written_in_any_case(shared: Worker, scheme: str) -> None:
    with WireClient(shared.url) as client:
        assert client.ask(MODELS, headers={"Authorization": f"{scheme} {KEY}"}).status == 200


def test_a_key_of_the_catalogue_works_as_soon_as_it_is_there_and_as_long(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    with WireClient(running.url) as client:
        assert client.ask(MODELS, key="gh-new").status == 401
        running.keys.append("gh-new")
        running.publish()
        assert client.ask(MODELS, key="gh-new").status == 200
        assert running.record().key_name == "name 1"
        running.keys.remove("gh-new")
        running.publish()
        assert client.ask(MODELS, key="gh-new").status == 401, "the connection remembers it"


def test_an_error_before_the_key_is_known_writes_no_record(shared: Worker) -> None:
    reply = shared.ask(path="/nowhere")
    known = shared.ask(path=MODELS)
    shared.record_of(known)
    assert all(record.hex_id != reply.header("x-request-id") for record in shared.records())


# --- probes and the drain ----------------------------------------------------------------------------------------------


def test_probes_need_no_key_and_write_no_record(worker: StartWorker) -> None:
    running = worker()
    with WireClient(running.url) as client:
        health, ready = client.ask("/health"), client.ask("/ready")
        client.send(request("/health") + request("/ready"))
        assert [client.read().status for _ in range(2)] == [200, 200]
    assert (health.status, health.json()) == (200, {"status": "alive"})
    assert (ready.status, ready.json()) == (200, {"status": "ready"})
    assert running.records() == []


def test_without_a_catalogue_it_lives_and_is_not_ready(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, snapshot=False)
    assert running.ask(path="/health").status == 200
    ready = running.ask(path="/ready")
    assert (ready.status, ready.json()) == (503, {"status": "no snapshot yet"})
    early = running.ask(chat())
    assert (early.status, early.json()["error"]["code"], early.header("retry-after")) == (503, "not_ready", "1")
    running.publish()
    assert running.ask(path="/ready").status == 200
    assert running.ask(chat()).status == 200
    running.records(1)


def test_a_catalogue_that_cannot_be_read_changes_nothing(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    assert running.ask(chat()).status == 200
    garbage = running.settings.snapshot_path.with_name("garbage")
    garbage.write_bytes(b"garbage")
    garbage.replace(running.settings.snapshot_path)
    running.until(lambda: [line for line in running.log() if line["level"] == "error"] or None, "the complaint")
    assert running.ask(chat()).status == 200
    running.publish()
    running.terminate()
    with pytest.raises(AssertionError, match="snapshot not readable"):
        running.wait_exit()


def test_streams_finish_when_it_is_told_to_stop(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 50
    running = worker(vllm.url)
    with running.begin(chat({"tokens": 5, "hang_after_events": 3})) as client, WireClient(running.url) as idle:
        client.read(events=3)
        idle.ask("/health")
        running.terminate()
        assert idle.socket.recv(1) == b"", "an idle connection is closed at once"
        with pytest.raises(ConnectionRefusedError):
            WireClient(running.url)
        vllm.release()
        reply = client.read()
        assert reply.ending == "complete"
        assert client.socket.recv(1) == b""
        running.wait_exit()
    assert running.record().output_tokens == 5


def test_a_request_on_a_kept_connection_is_the_last_of_it(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    data = request(CHAT, chat({"tokens": 2}), key=KEY)
    with WireClient(running.url) as client, running.begin(chat({"hang": True})) as other:
        vllm.wait(lambda: vllm.in_flight == 1)
        client.send(data[:-5])  # being read when the drain begins
        running.until(lambda: running.heartbeat().connections == 2 or None, "both connections")
        running.terminate()
        running.until(lambda: running.heartbeat().draining or None, "the drain")
        client.send(data[-5:])
        reply = client.read()
        assert (reply.status, reply.ending, reply.header("connection")) == (200, "complete", "close")
        vllm.release()
        assert other.read().ending == "complete"
        running.wait_exit()


def test_what_outlasts_the_grace_time_fails_visibly(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 50
    running = worker(vllm.url, config={"timeouts": {"drain": 0.3}})
    with running.begin(chat({"hang_after_events": 3})) as streaming, running.begin(chat({"hang": True})) as waiting:
        streaming.read(events=3)
        vllm.wait(lambda: vllm.in_flight == 2)
        running.terminate()
        broken = streaming.read()
        assert broken.ending == "closed"
        assert json.loads(broken.events[-1].removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        refused = waiting.read()
        assert (refused.status, refused.json()["error"]["code"]) == (503, "shutting_down")
        running.wait_exit()
    records = running.records(2)
    assert {record.error_code for record in records} == {"shutting_down"}
    assert {record.outcome for record in records} == {Outcome.REJECTED}


def test_an_answer_that_its_client_is_still_taking_is_not_cut_off(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 50
    running = worker(vllm.url)
    with running.begin(chat({"body_bytes": 900_000}, stream=False), receive_buffer=4096) as client:
        record = running.record()  # written before the last bytes go
        running.terminate()
        running.until(lambda: running.heartbeat().draining or None, "the drain")
        reply = client.read()
        assert (reply.ending, len(reply.body)) == ("complete", 900_000)
        assert record.outcome == Outcome.OK
        running.wait_exit()


def test_idle_connections_are_closed_in_time(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    """The sweep over connections comes every five seconds."""
    running = worker(vllm.url, config={"timeouts": {"client_idle": 0.2, "client_request": 0.2, "between_chunks": 30}})
    with (
        WireClient(running.url, timeout=20) as idle,
        WireClient(running.url, timeout=20) as slow,
        running.begin(chat({"hang": True}), timeout=20) as busy,
    ):
        slow.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        assert idle.socket.recv(1) == b""
        assert slow.read().status == 408
        assert slow.socket.recv(1) == b""
        vllm.release()
        assert busy.read().ending == "complete"


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_an_opening_record_is_there_while_a_request_runs(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    with running.begin(chat({"tokens": 50, "hang_after_events": 6}, max_tokens=60, temperature=0.5, user="u")) as client:
        client.read(events=6)
        [progress] = running.until(lambda: [r for r in running.open_records() if r.chunks] or None, "a progress record")
        assert (progress.output_tokens, progress.usage_source, progress.chunks) == (5, UsageSource.ENGINE, 6)
        assert (progress.model, progress.max_tokens, progress.temperature, progress.user) == ("smollm2", 60, 0.5, "u")
        vllm.release()
        client.read()
    assert running.open_records() == []
    record = running.record()
    assert (record.id, record.output_tokens) == (progress.id, 50)
    assert record.ended_ns > progress.ended_ns


def test_a_request_whose_worker_dies_is_closed_as_crashed(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 49
    running = worker(vllm.url)
    with running.begin(chat({"hang": True})):
        vllm.wait(lambda: vllm.in_flight == 1)
        assert len(running.open_records()) == 1
        running.kill()
    assert (running.record().outcome, running.record().error_code) == (Outcome.CRASHED, "worker_crashed")


def test_prompts_and_answers_are_kept_where_that_is_wanted(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"capture": {"content": True}})
    bodies = [json.dumps(body).encode() for body in (chat({"tokens": 3}), chat(stream=False), chat({"cut_after_events": 3}))]
    replies = [running.ask(body) for body in bodies]
    kept = running.contents()
    assert len(kept) == 3
    for body, reply in zip(bodies, replies, strict=True):
        content = kept[running.record_of(reply).id]
        assert (content.request, content.answer, content.truncated) == (body, reply.body, False)
    for path in running.settings.content_path.glob("*.seg"):
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("stream", [True, False])
def test_of_a_long_answer_the_beginning_is_kept(worker: StartWorker, vllm: ScriptedVLLM, stream: bool) -> None:
    running = worker(vllm.url, config={"capture": {"content": True, "max_bytes": 2000}})
    reply = running.ask(chat({"tokens": 100}, stream=stream, user="x" * 3000))
    [content] = running.contents().values()
    assert content.answer == reply.body[:2000]
    assert len(content.request) == 2000
    assert content.truncated


def test_nothing_is_kept_where_it_is_not_wanted(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    running.ask(chat())
    assert running.contents() == {}
    assert not running.settings.content_path.exists()


def test_a_record_says_where_the_time_went(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    reply = running.ask(chat({"tokens": 5, "first": 0.2, "interval": 0.05, "metrics": True}))
    record = running.record_of(reply)
    times = (
        *(record.read_ns, record.authenticated_ns, record.admitted_ns, record.sent_ns, record.first_byte_ns),
        *(record.first_token_ns, record.last_token_ns, record.upstream_ended_ns, record.ended_ns),
    )
    assert list(times) == sorted(times)
    assert record.first_token_ns - record.sent_ns >= 0.19e9
    assert sum(record.inter_token_counts) == 4
    assert record.inter_token_sum_ns == record.last_token_ns - record.first_token_ns >= 0.19e9
    assert record.first_content_ns == record.first_token_ns
    assert record.engine is not None
    assert record.engine.time_to_first_token_ms == 200.25
    assert record.proxy_added_ns() < record.ended_ns


def test_many_at_once_are_all_answered_and_booked(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    with ThreadPoolExecutor(20) as clients:
        replies = list(clients.map(lambda i: running.ask(chat({"tokens": 1 + i % 7}, stream=bool(i % 3))), range(200)))
    assert {reply.ending for reply in replies} == {"complete"}
    assert sum(record.output_tokens for record in running.records(200)) == vllm.generated_tokens
    assert len({record.id for record in running.records(200)}) == 200
    running.until(lambda: not any(running.heartbeat().in_flight_by_backend.values()) or None, "nothing in flight")
