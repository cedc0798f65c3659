"""The HTTP edge over real sockets: who may connect, how long he may take, what is answered before it is a request, and to whom.

What is sent to do harm is in `hostile.py`; TLS is in `test_tls.py`.
"""

from __future__ import annotations

import gzip
import json
import resource
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from proxy.errors import Outcome
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.tls import certificate, client_context, key
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, KEY, Worker, chat

MODELS: Final = "/v1/models"
SWEEP_S: Final = 5.0
"""Between two looks at the connections; nothing here waits for fewer than two of them."""


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url)


def error_of(reply: Reply) -> tuple[int, str | None]:
    """(status, code) of an error in OpenAI's shape."""
    assert reply.ending == "complete"
    assert reply.header("content-type") == "application/json"
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return reply.status, error["code"]


def head(*fields: str, method: str = "POST", path: str = CHAT, key: str = KEY) -> bytes:
    """The head of a request whose body is still to come."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def is_closed(client: WireClient) -> bool:
    return client.read().ending in ("closed", "reset")


# --- keys in either header ---------------------------------------------------------------------------------------------


def test_a_key_in_either_header_is_the_same_key(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 32
    running = worker(vllm.url)
    with WireClient(running.url) as client:
        for headers in (
            {"X-Api-Key": KEY},
            {"Authorization": f"Bearer {KEY}"},
            {"x-api-key": KEY, "authorization": f"bearer {KEY}"},
        ):
            assert client.ask(CHAT, chat({"tokens": 2}), headers=headers).status == 200
        refused = client.ask(CHAT, chat(), headers={"X-Api-Key": KEY, "Authorization": "Bearer gh-other"})
        assert error_of(refused) == (400, "conflicting_api_keys")
        assert error_of(client.ask(CHAT, chat(), headers={"X-Api-Key": "gh-other"})) == (401, "invalid_api_key")
    assert {record.key_id for record in running.records(3)} == {"key_0"}
    assert len(vllm.requests) == 3


# --- where a request goes ----------------------------------------------------------------------------------------------


def test_a_target_may_be_a_whole_url(shared: Worker) -> None:
    # failure 35
    for target in ("http://proxy.example/v1/models", "HTTP://127.0.0.1:8400/v1/models?limit=1"):
        with WireClient(shared.url) as client:
            client.send(request(target, key=KEY))
            assert client.read().json()["object"] == "list"


def test_a_method_that_is_not_there_says_which_is(shared: Worker) -> None:
    for method, path, allow in (
        *((method, CHAT, "POST") for method in ("GET", "HEAD", "DELETE", "OPTIONS", "PUT", "PATCH")),
        *((method, MODELS, "GET, HEAD") for method in ("POST", "DELETE", "OPTIONS")),
        ("POST", "/v1/models/smollm2", "GET, HEAD"),
    ):
        with WireClient(shared.url) as client:
            client.send(request(path, method=method, key=KEY))
            reply = client.read_head()
            assert (reply.status, reply.header("allow")) == (405, allow)


def test_head_is_get_without_a_body(shared: Worker) -> None:
    for path in (MODELS, "/v1/models/smollm2", "/health", "/ready"):
        whole = shared.ask(path=path)
        with WireClient(shared.url) as client:
            client.send(request(path, method="HEAD", key=KEY) + request("/health"))
            data = b""
            while b'{"status":"alive"}' not in data:
                more = client.socket.recv(65536)
                assert more
                data += more
        first, _, rest = data.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert f"content-length: {len(whole.body)}".encode() in first
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n"), "there is a body"


# --- what reaches an engine --------------------------------------------------------------------------------------------


def test_only_what_is_listed_goes_on(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 33
    running = worker(vllm.url)
    theirs = {
        "X-Request-Id": "mine",
        "Cookie": "a=b",
        "X-Forwarded-For": "6.6.6.6",
        "Accept-Encoding": "gzip",
        "User-Agent": "me",
        "Connection": "X-Gone",
        "X-Gone": "1",
        "X-Data-Parallel-Rank": "3",
        "Origin": "https://page.example",
    }
    assert running.ask(chat({"tokens": 2}), headers=theirs).status == 200
    [received] = vllm.requests
    names = [name.lower().decode() for name, _ in received.headers]
    assert names == ["host", "accept-encoding", "content-type", "content-length", "x-request-id", "traceparent"]
    assert received.header("x-request-id") != "mine"
    assert received.header("accept-encoding") == "identity"
    assert running.record().client_request_id == "mine"


def test_a_name_with_a_line_break_is_a_name(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 33: a model may be called anything, and what is written of it stays one line
    name = "a\r\nx-evil: 1\r\n\r\nb"
    running = worker(vllm.url, models=[name])
    reply = running.ask(chat({"tokens": 2}, model=name))
    assert reply.status == 404, "the engine doesn't know it"
    [received] = vllm.requests
    assert received.header("x-evil") is None
    assert reply.header("x-evil") is None
    with WireClient(running.url) as client:
        client.send(request("/v1/models/a%0d%0ax-evil:%201%0d%0a%0d%0ab", key=KEY))
        known = client.read()
    assert (known.status, known.header("x-evil")) == (200, None)


def test_a_second_trace_makes_both_void(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 31
    running = worker(vllm.url)
    first, second = f"traceparent: 01-{'a' * 32}-{'a' * 16}-01-more", f"traceparent: 00-{'b' * 32}-{'b' * 16}-01"
    body = json.dumps(chat({"tokens": 2})).encode()
    for fields in ((first,), (first, second)):
        with WireClient(running.url) as client:
            client.send(head(*fields, "tracestate: a=1", "tracestate: b=2", f"Content-Length: {len(body)}") + body)
            assert client.read().status == 200
    joined, void = running.records(2)
    assert (joined.trace_id.hex(), joined.parent_span_id) == ("a" * 32, int("a" * 16, 16))
    assert (void.trace_id, void.parent_span_id) == (void.id, 0)
    assert vllm.requests[0].header("tracestate") == "a=1,b=2"


def test_a_trailer_changes_nothing(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 40
    running = worker(vllm.url)
    body = json.dumps(chat({"tokens": 2})).encode()
    trailers = b"X-Request-Id: theirs\r\nAuthorization: Bearer other\r\nX-Api-Key: other\r\nHost: a/b\r\nHost: c\r\n"
    framed = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)
    with WireClient(running.url) as client:
        for _ in range(2):
            client.send(head("Transfer-Encoding: chunked", "X-Request-Id: mine") + framed)
            assert client.read().status == 200
    assert {record.client_request_id for record in running.records(2)} == {"mine"}


# --- bodies ------------------------------------------------------------------------------------------------------------


def test_a_body_that_will_be_too_large_is_refused_unread(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 26: nothing but the head has been sent
    running = worker(vllm.url, config={"limits": {"body_bytes": 1000}})
    with WireClient(running.url) as client:
        client.send(head("Content-Length: 1001"))
        assert error_of(client.read()) == (413, "request_too_large")
    with WireClient(running.url) as client:
        client.send(head("Content-Length: 000000001000") + b"x" * 1000)
        assert client.read().status == 400, "at the limit it is read"


def test_a_body_in_chunks_is_refused_at_the_limit(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 26
    running = worker(vllm.url, config={"limits": {"body_bytes": 1000}})
    with WireClient(running.url) as client:
        client.send(head("Transfer-Encoding: chunked") + b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n")
        assert error_of(client.read()) == (413, "request_too_large")


def test_a_large_body_is_held_once(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    size = 32 * 1024 * 1024
    running = worker(vllm.url)
    running.ask(chat({"tokens": 2}, stream=False))
    body = json.dumps(chat({"tokens": 2}, stream=False, filler="x" * size), separators=(",", ":")).encode()
    before = running.peak_rss_bytes
    assert running.ask(body).status == 200
    assert size * 0.9 < running.peak_rss_bytes - before < size * 1.3
    assert vllm.requests[-1].body == body
    assert running.records(2)[-1].request_bytes == len(body)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_compressed_body_is_refused_unless_it_has_a_limit(shared: Worker, shared_vllm: ScriptedVLLM, encoding: str) -> None:
    # failure 39
    before = len(shared_vllm.requests)
    with WireClient(shared.url) as client:
        client.send(head(f"Content-Encoding: {encoding}", "Content-Length: 100000000"))
        reply = client.read()
    assert error_of(reply)[0] in (413, 415)
    reply = shared.ask(gzip.compress(json.dumps(chat()).encode()), headers={"Content-Encoding": encoding})
    assert error_of(reply) == (415, "unsupported_content_encoding")
    assert reply.header("accept-encoding") == "identity"
    assert len(shared_vllm.requests) == before


def test_a_compressed_body_goes_on_as_what_it_says(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 39
    running = worker(vllm.url, config={"limits": {"decompressed_body_bytes": 100_000}})
    body = json.dumps(chat({"tokens": 2}, stream=False)).encode()
    with WireClient(running.url) as client:
        for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
            reply = client.ask(CHAT, packed, key=KEY, headers={"Content-Encoding": encoding})
            assert reply.status == 200
            assert vllm.requests[-1].body == body
            assert vllm.requests[-1].header("content-encoding") is None
            assert running.record_of(reply).request_bytes == len(body)
        refused = client.ask(CHAT, b"x", key=KEY, headers={"Content-Encoding": "br"})
        assert error_of(refused) == (415, "unsupported_content_encoding")
        assert refused.header("accept-encoding") == "gzip, deflate"


def test_a_bomb_does_not_go_off(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 39: 256 MiB in 256 KB, and who has no key isn't even decompressed for
    running = worker(vllm.url, config={"limits": {"decompressed_body_bytes": 1_000_000}})
    bomb = gzip.compress(bytes(256 * 1024 * 1024), 9)
    before = running.peak_rss_bytes
    for sent, expected in ((KEY, (413, "request_too_large")), ("nobody", (401, "invalid_api_key"))):
        with WireClient(running.url) as client:
            client.send(head("Content-Encoding: gzip", f"Content-Length: {len(bomb)}", key=sent) + bomb)
            assert error_of(client.read()) == expected
    assert running.peak_rss_bytes - before < 8 * 1024 * 1024
    assert not vllm.requests


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None])
def test_a_body_of_another_kind_is_refused(shared: Worker, media: str | None) -> None:
    # failure 38
    body = json.dumps(chat()).encode()
    fields = [f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"]
    fields += [] if media is None else [f"Content-Type: {media}\r\n"]
    with WireClient(shared.url) as client:
        client.send(f"POST {CHAT} HTTP/1.1\r\n{''.join(fields)}\r\n".encode() + body)
        assert error_of(client.read()) == (415, "unsupported_media_type")


@pytest.mark.parametrize("media", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
def test_a_body_of_this_kind_is_taken(shared: Worker, media: str) -> None:
    # failure 38
    assert shared.ask(chat({"tokens": 2}), headers={"Content-Type": media}).status == 200


# --- who waits to be asked ---------------------------------------------------------------------------------------------

EXPECTANT: Final[dict[str, tuple[bytes, tuple[int, str | None]]]] = {
    "a body that is too large": (head("Expect: 100-continue", "Content-Length: 99999999999"), (413, "request_too_large")),
    "no key": (head("Expect: 100-continue", "Content-Length: 10", key="nobody"), (401, "invalid_api_key")),
    "no such path": (head("Expect: 100-continue", "Content-Length: 10", path="/v1/nothing"), (404, None)),
    "another method": (head("Expect: 100-continue", "Content-Length: 10", path=MODELS), (405, "method_not_allowed")),
    "a coding": (
        head("Expect: 100-continue", "Content-Length: 9", "Content-Encoding: br"),
        (415, "unsupported_content_encoding"),
    ),
    "something else": (head("Expect: 200-ok", "Content-Length: 10"), (417, "expectation_failed")),
}


@pytest.mark.parametrize(("data", "expected"), EXPECTANT.values(), ids=EXPECTANT)
def test_who_would_be_refused_is_not_asked_for_a_body(shared: Worker, data: bytes, expected: tuple[int, str | None]) -> None:
    # failure 27
    with WireClient(shared.url) as client:
        client.send(data)
        assert client.socket.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL) == f"HTTP/1.1 {expected[0]}".encode()
        assert error_of(client.read()) == expected


def test_who_waits_to_be_asked_is_asked_in_his_turn(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failures 27, 29
    running = worker(vllm.url)
    body = json.dumps(chat({"tokens": 2}, stream=False)).encode()
    with running.begin(chat({"content": "first", "hang": True}, stream=False)) as client:
        vllm.wait(lambda: vllm.in_flight == 1)
        client.send(head("Expect: 100-continue", f"Content-Length: {len(body)}"))
        running.until(lambda: running.heartbeat().in_flight == 1 or None, "the first request")
        vllm.release()
        data = b""
        while not data.endswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
            more = client.socket.recv(65536)
            assert more
            data += more
        assert data.index(b'"first"') < data.index(b"HTTP/1.1 100 Continue")
        client.send(body)
        assert client.socket.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
    running.records(2)


def test_a_client_that_does_not_wait_is_not_asked_afterwards(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failures 27, 29
    running = worker(vllm.url)
    body = json.dumps(chat({"tokens": 2}, stream=False)).encode()
    with running.begin(chat({"hang": True}, stream=False)) as client:
        vllm.wait(lambda: vllm.in_flight == 1)
        client.send(head("Expect: 100-continue", f"Content-Length: {len(body)}") + body + request("/health"))
        vllm.release()
        data = b""
        while b'{"status":"alive"}' not in data:
            more = client.socket.recv(65536)
            assert more
            data += more
    assert b"100 Continue" not in data
    assert data.count(b"HTTP/1.1 200 OK") == 3


def test_a_client_of_http_1_0_is_never_asked(shared: Worker) -> None:
    # failures 27, 28
    body = json.dumps(chat({"tokens": 2})).encode()
    with WireClient(shared.url) as client:
        client.send(
            head("Expect: 100-continue", f"Content-Length: {len(body)}").replace(b"HTTP/1.1\r\nHost: x", b"HTTP/1.0") + body
        )
        assert client.socket.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"


def test_what_is_refused_is_refused_in_its_turn(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 29: the answer that is under way is not lost
    running = worker(vllm.url)
    with running.begin(chat({"content": "first", "hang": True}, stream=False)) as client:
        vllm.wait(lambda: vllm.in_flight == 1)
        client.send(request(CHAT, chat({"tokens": 2}, stream=False), key=KEY) + b"garbage\r\n\r\n")
        vllm.release()
        assert [client.read().status for _ in range(3)] == [200, 200, 400]
        assert is_closed(client)
    assert [record.outcome for record in running.records(2)] == [Outcome.OK] * 2


def test_an_offer_of_another_protocol_is_passed_over_with_its_body(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 30: the parser ends such a request with its head; its body must not become the next one
    running = worker(vllm.url)
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", "X-Request-Id: mine")
    inner = request(CHAT, chat({"tokens": 2}, user="inner"), key=KEY).decode()
    body = json.dumps(chat({"tokens": 3}, stream=False, filler=inner)).encode()
    framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with WireClient(running.url) as client:
        for data in (
            head(*offer, f"Content-Length: {len(body)}") + body,
            head(*offer, "Transfer-Encoding: chunked") + framed,
            head(*offer, "Content-Length: 0", path=MODELS, method="GET"),
        ):
            for at in range(0, len(data), 100):
                client.send(data[at : at + 100])
            client.send(request("/health"))
            assert [client.read().status for _ in range(2)] == [200, 200]
    assert [each.body for each in vllm.requests] == [body, body]
    assert {record.client_request_id for record in running.records(3)} == {"mine"}


# --- browsers ----------------------------------------------------------------------------------------------------------

PAGE: Final = {"Origin": "https://page.example"}
PREFLIGHT: Final = {**PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def preflight(worker: Worker, path: str = CHAT, **headers: str) -> Reply:
    with WireClient(worker.url) as client:
        client.send(request(path, method="OPTIONS", headers={**PREFLIGHT, **headers}))
        return client.read()


def test_any_page_may_read_answers_as_with_vllm(shared: Worker) -> None:
    for reply in (
        *(shared.ask(chat({"tokens": 2}, stream=stream), headers=PAGE) for stream in (True, False)),
        shared.ask(path=MODELS, headers=PAGE),
        shared.ask(path="/nowhere", headers=PAGE),
        shared.ask(path="/health", headers=PAGE),
        shared.ask(b"{", headers={**PAGE, "Content-Encoding": "br"}),
    ):
        assert reply.header("access-control-allow-origin") == "*"
        assert reply.header("access-control-expose-headers") == "x-request-id, x-glasshouse-cache, age"
    assert shared.ask(chat({"tokens": 2})).header("access-control-allow-origin") is None
    asked = preflight(shared)
    assert (asked.status, asked.body, asked.header("access-control-allow-origin")) == (200, b"OK", "*")
    assert asked.header("access-control-allow-headers") == "authorization"


def test_pages_may_be_listed(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"cors": {"origins": [PAGE["Origin"]]}})
    reply = running.ask(chat({"tokens": 2}), headers=PAGE)
    assert (reply.header("access-control-allow-origin"), reply.header("vary")) == (PAGE["Origin"], "Origin")
    assert (
        running.ask(chat({"tokens": 2}), headers={"Origin": "https://evil.example"}).header("access-control-allow-origin") is None
    )
    assert preflight(running).status == 200
    assert preflight(running, Origin="https://evil.example").status == 400


def test_pages_may_be_kept_out(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"cors": {"origins": []}})
    assert running.ask(chat({"tokens": 2}), headers=PAGE).header("access-control-allow-origin") is None
    refused = preflight(running)
    assert (error_of(refused), refused.header("allow")) == ((405, "method_not_allowed"), "POST")


# --- behind other proxies ----------------------------------------------------------------------------------------------


def test_a_record_says_who_asked(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    running.ask(chat({"tokens": 2}), headers={"X-Forwarded-For": "6.6.6.6"})
    assert running.record().client_address == "127.0.0.1", "anybody can write a header"


def test_a_trusted_proxy_says_who_asks(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, config={"trusted_proxies": ["127.0.0.0/8", "10.0.0.0/8"]})
    with WireClient(running.url) as client:
        for forwarded in ({"X-Forwarded-For": "6.6.6.6, 192.0.2.7, 10.1.1.1"}, {"X-Forwarded-For": "2001:db8::1"}, {}):
            assert client.ask(CHAT, chat({"tokens": 2}), key=KEY, headers=forwarded).status == 200
    assert [record.client_address for record in running.records(3)] == ["192.0.2.7", "2001:db8::1", "127.0.0.1"]


# --- who may connect ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """To be closed in the end."""
    with ExitStack() as stack:
        yield stack


def test_when_all_places_are_taken_the_longest_idle_makes_room(
    worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack
) -> None:
    # failure 41
    running = worker(vllm.url, config={"limits": {"connections": 4}})
    busy = clients.enter_context(running.begin(chat({"hang": True})))
    vllm.wait(lambda: vllm.in_flight == 1)
    kept = [clients.enter_context(WireClient(running.url)) for _ in range(3)]
    for client in (kept[1], kept[0], kept[2]):
        assert client.ask("/health").status == 200
    newcomer = clients.enter_context(WireClient(running.url))
    assert newcomer.ask(MODELS, key=KEY).status == 200
    assert is_closed(kept[1])
    assert [client.ask("/health").status for client in (kept[0], kept[2])] == [200, 200]
    vllm.release()
    assert busy.read().ending == "complete"


def test_when_nobody_is_idle_a_newcomer_is_told(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    # failure 41
    running = worker(vllm.url, config={"limits": {"connections": 3}})
    busy = [clients.enter_context(running.begin(chat({"hang": True}))) for _ in range(3)]
    vllm.wait(lambda: vllm.in_flight == 3)
    for _ in range(100):
        with WireClient(running.url) as client:
            refused = client.ask(CHAT, chat(), key=KEY)
            assert error_of(refused) == (503, "too_many_connections")
            assert refused.header("retry-after") == "1"
            assert is_closed(client)
    vllm.release()
    assert {client.read().ending for client in busy} == {"complete"}
    assert running.ask(chat({"tokens": 2})).status == 200
    running.until(lambda: running.heartbeat().unaccepted.get("too_many_connections") == 100 or None, "the count")


def test_newcomers_without_end_are_no_burden(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    # failure 41: who is refused and stays gets no place either
    running = worker(vllm.url, config={"limits": {"connections": 1}})
    clients.enter_context(running.begin(chat({"hang": True})))
    vllm.wait(lambda: vllm.in_flight == 1)
    before = running.open_files
    for _ in range(300):
        clients.enter_context(WireClient(running.url))
    running.until(lambda: running.heartbeat().unaccepted.get("too_many_connections") == 300 or None, "all of them")
    assert running.open_files - before < 100
    vllm.release()


def test_one_client_cannot_take_all_places(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    # failures 25, 41
    running = worker(vllm.url, config={"limits": {"connections_per_client": 5}})
    greedy = [clients.enter_context(WireClient(running.url)) for _ in range(5)]
    refused = clients.enter_context(WireClient(running.url))
    assert error_of(refused.read()) == (503, "too_many_connections_per_client")
    other = clients.enter_context(
        socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), source_address=("127.0.0.2", 0))
    )
    other.sendall(request("/health"))
    assert other.recv(12) == b"HTTP/1.1 200"
    greedy[0].close()
    running.until(lambda: _is_served(running) or None, "the place that became free")


def _is_served(worker: Worker) -> bool:
    with WireClient(worker.url) as client:
        return client.ask("/health").status == 200


def test_a_trusted_proxy_comes_for_many(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    running = worker(vllm.url, config={"limits": {"connections_per_client": 1}, "trusted_proxies": ["127.0.0.1"]})
    many = [clients.enter_context(WireClient(running.url)) for _ in range(20)]
    assert {client.ask("/health").status for client in many} == {200}


def test_it_takes_the_file_descriptors_that_it_may_have(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    # failure 41: 400 in all, of which 128 are reserved, and each connection may need two: 136
    running = worker(vllm.url, files=(64, 400))
    for _ in range(300):
        clients.enter_context(WireClient(running.url))
    running.until(lambda: running.heartbeat().connections == 136 or None, "as many connections as there may be")
    assert running.ask(chat({"tokens": 2})).status == 200
    assert running.open_files < 250


@pytest.mark.parametrize("secure", [False, pytest.param(True, marks=pytest.mark.long)])
def test_without_file_descriptors_it_says_so_once_and_goes_on(
    worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack, secure: bool
) -> None:
    # failure 41: its limit is taken away under it, as by a leak
    tls = {"tls": {"certificate": str(certificate("server")), "key": str(key("server"))}} if secure else {}
    running = worker(vllm.url, config={"timeouts": {"upstream_idle": 0.1}, **tls})
    held = clients.enter_context(WireClient(running.url, tls=client_context()))
    assert held.ask("/health").status == 200
    limit = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (running.open_files, limit[1]))
    newcomers = [clients.enter_context(WireClient(running.url.replace("https", "http"))) for _ in range(50)]
    used = cpu_s(running.pid)
    complaint = running.until(lambda: [line for line in running.log() if line["level"] == "error"] or None, "the complaint")
    assert secure or sum(map(is_gone, newcomers)) >= 40, "none of them is left waiting"
    time.sleep(2 * SWEEP_S)
    assert cpu_s(running.pid) - used < 2.0, "it is in a busy loop"
    assert held.ask("/health").status == 200
    assert [line["message"] for line in running.log() if line["level"] == "error"] == [complaint[0]["message"]]
    assert "file descriptors" in complaint[0]["message"]
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limit)
    with WireClient(running.url, tls=client_context(), timeout=30) as client:
        assert client.ask(CHAT, chat({"tokens": 2}), key=KEY).status == 200
    running.until(lambda: [line for line in running.log() if "again" in line["message"]] or None, "the good news")
    running.terminate()
    with pytest.raises(AssertionError, match="file descriptors"):
        running.wait_exit()


def is_gone(client: WireClient) -> bool:
    """Its connection has been closed from the other side."""
    client.socket.setblocking(False)
    try:
        return client.socket.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def cpu_s(pid: int) -> float:
    """CPU time that it has used so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / 100


# --- how long one may take ---------------------------------------------------------------------------------------------


def test_a_head_that_does_not_come_ends_in_time(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    # failure 25
    running = worker(vllm.url, config={"timeouts": {"client_request": 1.0}})
    slow = [clients.enter_context(WireClient(running.url, timeout=30)) for _ in range(20)]
    for client in slow:
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    pending = list(slow)
    deadline = time.monotonic() + 60
    while pending:
        assert time.monotonic() < deadline
        for client in list(pending):
            client.socket.settimeout(0.01)
            try:
                if client.socket.recv(1, socket.MSG_PEEK):
                    pending.remove(client)
                else:
                    raise AssertionError("closed without a word")
            except TimeoutError:
                client.send(b"X-A: b\r\n")  # as slowhttptest does
        assert running.ask(chat({"tokens": 1})).status == 200, "others are served"
    for client in slow:
        client.socket.settimeout(10)
        assert error_of(client.read()) == (408, "request_timeout")
        assert is_closed(client)


def test_a_body_that_does_not_come_ends_in_time(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 25
    running = worker(vllm.url, config={"timeouts": {"client_request": 1.0}})
    with WireClient(running.url, timeout=30) as client:
        client.send(head("Content-Length: 1000") + b"{")
        assert error_of(client.read()) == (408, "request_timeout")
    assert running.records() == []


def test_a_body_that_comes_fast_enough_has_time(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 25: 400 KB are worth 50 s
    running = worker(vllm.url, config={"timeouts": {"client_request": 1.0}})
    body = json.dumps(chat({"tokens": 2}, filler="x" * 400_000)).encode()
    with WireClient(running.url, timeout=30) as client, WireClient(running.url, timeout=30) as idler:
        client.send(head(f"Content-Length: {len(body)}") + body[:-1])
        idler.send(head("Content-Length: 1000"))
        for _ in range(2):  # two sweeps have passed when the second idler is gone
            assert idler.read().status == 408
            idler.close()
            idler = WireClient(running.url, timeout=30)
            idler.send(head("Content-Length: 1000"))
        idler.close()
        client.send(body[-1:])
        assert client.read().status == 200


def test_bytes_that_are_no_request_do_not_keep_a_connection(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 25: the parser passes over empty lines before a request
    running = worker(vllm.url, config={"timeouts": {"client_idle": 1.0}})
    with WireClient(running.url) as client:
        client.socket.settimeout(0.05)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                client.send(b"\r\n")
                if client.socket.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("it is still there")


def test_readers_who_stopped_are_given_up(worker: StartWorker, vllm: ScriptedVLLM, clients: ExitStack) -> None:
    # failure 21
    running = worker(vllm.url, config={"timeouts": {"client_write": 1.0}, "limits": {"held_body_bytes": 65536}})
    stopped = [
        clients.enter_context(
            running.begin(chat({"tokens": 3000}) if i % 2 else chat({"body_bytes": 900_000}, stream=False), receive_buffer=4096)
        )
        for i in range(200)
    ]
    served = 0
    while len(running.records()) - served < len(stopped):
        reply = running.ask(chat({"tokens": 2}))
        assert (reply.status, reply.ending) == (200, "complete")
        served += 1
    given_up = [record for record in running.records() if record.outcome != Outcome.OK]
    assert {record.error_code for record in given_up} == {"client_stopped_reading"}
    assert len(given_up) == len(stopped)
    assert running.peak_rss_bytes < 256 * 1024 * 1024
    running.until_in_flight(0)
    vllm.wait_idle()
