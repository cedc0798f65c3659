"""`GET /v1/usage` of a worker: control is asked with the caller's own key, and with nothing else of his."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.relay.control import MOST
from tests.server.conftest import StartWorker
from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, request
from tests.support.wire_client import ask as ask_once
from tests.support.worker import CHAT, KEY, Worker, chat

USAGE: Final = "/v1/usage"
BODY: Final = b'{"object":"usage","data":[]}'


class Control:
    """Somebody who listens where control would. `answer`: what it says to everybody; None: nothing."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.answer: bytes | None = whole(BODY)
        self.closes = False
        self.heard: list[bytes] = []
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listening.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections.append(connection)
            self.heard.append(connection.recv(65536))
            if self.answer is not None:
                connection.sendall(self.answer)
            if self.closes:
                connection.close()

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self._thread.join()
        for connection in self.connections:
            connection.close()


def whole(body: bytes, status: str = "200 OK", *lines: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *lines])
    return head.encode() + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def listening() -> Iterator[Control]:
    with closing(Control()) as control:
        yield control


@pytest.fixture(scope="module")
def worker(shared_worker: StartWorker, listening: Control) -> Worker:
    return shared_worker(config={"control": {"listen": listening.address}, "keys": {"name 0": {"operations": ["chat"]}}})


@pytest.fixture
def control(listening: Control) -> Control:
    """As if it had just begun."""
    listening.answer = whole(BODY)
    listening.heard.clear()
    return listening


def ask(worker: Worker, target: str = USAGE, *, timeout: float = 10.0, **more: Any) -> Reply:
    with WireClient(worker.url, timeout=timeout) as client:
        client.send(request(target, **{"key": KEY, **more}))
        return client.read()


def test_control_is_asked_with_the_callers_key_and_query_alone(worker: Worker, control: Control) -> None:
    headers = {
        "Cookie": "c",
        "X-Forwarded-For": "1.2.3.4",
        "X-Request-Id": "mine",
        "Traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    }
    reply = ask(worker, f"{USAGE}?since=2026-11-01&by=day,model&x=%20", headers=headers)
    assert (reply.status, reply.body) == (200, BODY)
    record = worker.record_of(reply)
    assert control.heard == [
        f"GET {USAGE}?since=2026-11-01&by=day,model&x=%20 HTTP/1.1\r\n"
        f"host: {control.address}\r\naccept-encoding: identity\r\nconnection: close\r\n"
        f"x-request-id: {record.hex_id}-1\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()
    ]
    assert (record.operation, record.outcome, record.status, record.model) == ("usage", Outcome.OK, 200, "")
    assert (record.cost_nano, record.usage_source, record.key_id) == (0, 0, "key_0")
    assert [each.backend for each in record.attempts] == ["control"]


def test_a_key_as_anthropics_clients_send_it(worker: Worker, control: Control) -> None:
    assert ask(worker, key=None, headers={"X-Api-Key": KEY}).status == 200
    assert f"\r\nx-api-key: {KEY}\r\n".encode() in control.heard[0]
    assert b"authorization" not in control.heard[0]


@pytest.mark.parametrize("key", [None, "gh-wrong"])
def test_who_is_nobody_here_asks_nothing_there(worker: Worker, control: Control, key: str | None) -> None:
    assert ask(worker, key=key).status == 401
    assert control.heard == []


@pytest.mark.parametrize(
    "query",
    ["?" + "x" * 2049, "?a=\u00e9", "?a=<script>", '?"', "?a=[1]", "?a|b", "?a\\b", "?a#b"],
)
def test_a_query_that_is_none_goes_nowhere(worker: Worker, control: Control, query: str) -> None:  # failure 33
    reply = ask(worker, USAGE + query)
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"
    assert control.heard == []


def test_the_longest_query(worker: Worker, control: Control) -> None:
    assert ask(worker, f"{USAGE}?{'x' * 2048}").status == 200


@pytest.mark.parametrize(
    "target", [f"{USAGE}/", f"{USAGE}/../admin/keys", f"/{USAGE}", f"{USAGE};x", f"{USAGE}%2f..%2fkeys", "/v1/Usage"]
)
def test_no_other_path_of_control_is_reached(worker: Worker, control: Control, target: str) -> None:  # failures 35, 73
    assert ask(worker, target).status == 404
    assert control.heard == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_it_can_only_be_read(worker: Worker, control: Control, method: str) -> None:
    reply = ask(worker, body={}, method=method)
    assert reply.status == 405
    assert control.heard == []


def test_nor_without_its_body(worker: Worker, control: Control) -> None:
    with WireClient(worker.url) as client:
        client.send(request(USAGE, method="HEAD", key=KEY))
        reply = client.read_head()
    assert (reply.status, reply.header("allow")) == (405, "GET")
    assert control.heard == []


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "503 Service Unavailable"])
def test_what_control_says_no_with_is_its_own(worker: Worker, control: Control, status: str) -> None:
    problem = b'{"title":"x","error":{"message":"no","type":"t","param":null,"code":"because"}}'
    control.answer = whole(problem, status, "retry-after: 7")
    reply = ask(worker)
    assert (reply.status, reply.body, reply.header("retry-after")) == (int(status[:3]), problem, "7")
    assert worker.record_of(reply).error_code == "because"


def unavailable(reply: Any) -> None:
    assert (reply.status, reply.header("retry-after")) == (503, "1")
    assert json.loads(reply.body)["error"] == {
        "message": "What was used can't be told right now; try again in a moment.",
        "type": "service_unavailable",
        "param": None,
        "code": "usage_unavailable",
    }


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\n", b"nonsense", whole(b"<html>"), whole(b"{}", "302 Found", "location: /")]
)
def test_control_that_makes_no_sense(worker: Worker, control: Control, answer: bytes) -> None:
    control.answer = answer
    control.closes = True
    unavailable(ask(worker))
    control.closes = False
    assert len(control.heard) == 1, "it is asked once"


def test_control_that_is_not_there(shared_worker: StartWorker, vllm: ScriptedVLLM) -> None:
    with closing(Control()) as gone:
        address = gone.address
    alone = shared_worker(vllm.url, config={"control": {"listen": address}})
    unavailable(ask(alone))
    assert alone.ask(chat(stream=False)).status == 200, "nothing else needs it"


def test_control_that_says_nothing(worker: Worker, control: Control) -> None:
    control.answer = None
    reply = ask(worker, timeout=60)
    unavailable(reply)
    assert worker.record_of(reply).attempts[0].error == "first_byte_timeout"


def test_control_is_asked_by_so_many_at_a_time(worker: Worker, control: Control) -> None:
    control.answer = None
    clients = [worker.begin(path=USAGE) for _ in range(MOST)]
    worker.until(lambda: len(control.heard) == MOST or None, "all of them")
    reply = ask(worker)
    assert (reply.status, len(control.heard)) == (503, MOST)
    clients.pop().close()
    worker.until(lambda: worker.heartbeat().in_flight == MOST - 1 or None, "the one who left")
    control.answer = whole(BODY)
    assert ask(worker).status == 200
    for client in clients:
        client.close()


def test_an_answer_of_many_megabytes_passes(worker: Worker, control: Control) -> None:
    body = b'{"data":"%b"}' % (b"x" * 3_000_000)
    control.answer = whole(body)
    assert ask(worker).body == body


def test_where_control_listens_everywhere_it_is_asked_on_this_host(shared_worker: StartWorker, control: Control) -> None:
    port = control.address.rpartition(":")[2]
    elsewhere = shared_worker(config={"control": {"listen": f"0.0.0.0:{port}"}})
    assert ask(elsewhere).status == 200
    assert f"host: 127.0.0.1:{port}\r\n".encode() in control.heard[0]


def test_the_whole_way(vllm: ScriptedVLLM, tmp_path: Path) -> None:
    with Glasshouse([vllm.url], state_dir=tmp_path / "state") as glasshouse:
        assert ask_once(glasshouse.url, CHAT, chat(stream=False), key=glasshouse.key).status == 200
        glasshouse.rows(1)
        reply = ask_once(glasshouse.url, USAGE, key=glasshouse.key)
        assert reply.status == 200, reply.body
        assert json.loads(reply.body)["object"] == "usage"
        usage = glasshouse.rows(2)[-1]
        assert (usage["operation"], usage["outcome"], usage["backend"]) == ("usage", "ok", "control")
