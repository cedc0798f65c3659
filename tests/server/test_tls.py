"""TLS with clients and with engines, over real sockets and real certificates."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from proxy.errors import Outcome
from proxy.tls import expiry_unix_s
from tests.conftest import Start
from tests.server.conftest import StartWorker
from tests.server.test_edge import error_of, head, is_closed
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.tls import CA, OTHER_CA, certificate, client_context, key, server_context
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, KEY, Worker, backend, chat

MODELS: Final = "/v1/models"
CONTEXT: Final = client_context()


class Files:
    """A listener's certificate and key, where they can be replaced."""

    def __init__(self, directory: Path) -> None:
        self.certificate, self.key = directory / "tls.pem", directory / "tls.key"
        self.install("server")

    def install(self, name: str) -> None:
        for source, target in ((certificate(name), self.certificate), (key(name), self.key)):
            shutil.copy(source, f"{target}.new")
            Path(f"{target}.new").rename(target)

    @property
    def config(self) -> dict[str, Any]:
        return {"tls": {"certificate": str(self.certificate), "key": str(self.key)}}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(worker: Worker, **more: Any) -> WireClient:
    return WireClient(worker.url, tls=CONTEXT, **more)


def plain(worker: Worker) -> WireClient:
    """A TCP connection to a port at which TLS is spoken."""
    return WireClient(worker.url.replace("https", "http"))


def ask(worker: Worker, body: object = None, path: str = CHAT) -> Reply:
    with connected(worker) as client:
        return client.ask(path, body, key=KEY)


def shown_expiry(worker: Worker) -> str:
    """Of the certificate that a new client is shown."""
    with connected(worker) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        shown = client.socket.getpeercert()
    assert shown is not None
    return str(shown["notAfter"])


# --- clients -----------------------------------------------------------------------------------------------------------


def test_clients_may_speak_tls(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    running = worker(vllm.url, config=files.config)
    with connected(running) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        assert client.socket.version() in ("TLSv1.2", "TLSv1.3")
        for stream in (True, False, True):
            reply = client.ask(CHAT, chat({"tokens": 20}, stream=stream), key=KEY)
            assert (reply.status, reply.ending) == (200, "complete")
        client.send(request(MODELS, key=KEY) + request("/health") + request(CHAT, chat({"tokens": 2}), key=KEY))
        assert [client.read().status for _ in range(3)] == [200] * 3
        client.send(request(MODELS, key=KEY, headers={"Connection": "close"}))
        assert client.read().status == 200
        assert client.socket.recv(1) == b""
    assert {record.client_address for record in running.records(6)} == {"127.0.0.1"}
    assert running.heartbeat().certificate_expiry_unix_s == expiry_unix_s(certificate("server"))


def test_large_bodies_pass_both_ways(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    running = worker(vllm.url, config=files.config)
    with connected(running, receive_buffer=4096) as client:
        reply = client.ask(CHAT, chat({"body_bytes": 3_000_000}, stream=False, filler="x" * 3_000_000), key=KEY)
    assert (reply.status, reply.ending, len(reply.body)) == (200, "complete", 3_000_000)


def test_an_engine_waits_for_a_slow_reader(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    # failure 20
    running = worker(vllm.url, config=files.config)
    with connected(running, receive_buffer=4096) as client:
        client.send(request(CHAT, chat({"tokens": 20_000}), key=KEY))
        client.read(events=1)
        running.until_in_flight(1)
        before = running.rss_bytes
        with pytest.raises(TimeoutError):  # it never gets as far as the end
            vllm.wait(lambda: not vllm.in_flight, 1.0)
        assert running.rss_bytes - before < 2 * 1024 * 1024
        assert client.read().ending == "complete"
    assert running.record().output_tokens == 20_000


def test_what_is_refused_is_told(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    running = worker(vllm.url, config=files.config | {"limits": {"body_bytes": 1000}})
    with connected(running) as client:
        client.send(head("Content-Length: 5000000"))
        for _ in range(5):
            client.send(b"x" * 100_000)
        assert error_of(client.read()) == (413, "request_too_large")
        assert is_closed(client)
    with connected(running) as client:
        client.send(b"garbage\r\n\r\n")
        assert error_of(client.read()) == (400, None)


@pytest.mark.parametrize("data", [request(MODELS, key=KEY), b"\x16\x03\x01\x00\x05hello", b"\0" * 1000])
def test_who_does_not_speak_tls_is_let_go(worker: StartWorker, vllm: ScriptedVLLM, files: Files, data: bytes) -> None:
    running = worker(vllm.url, config=files.config)
    with plain(running) as client:
        client.send(data)
        try:
            while client.socket.recv(1000):
                pass  # an alert
        except ConnectionResetError:
            pass
    running.until(lambda: running.heartbeat().unaccepted == {"tls_handshake_failed": 1} or None, "the count")
    assert ask(running, chat({"tokens": 2})).status == 200


def test_a_client_that_does_not_trust_us_is_let_go(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    running = worker(vllm.url, config=files.config)
    with pytest.raises(ssl.SSLCertVerificationError):
        WireClient(running.url, tls=client_context(OTHER_CA))
    assert ask(running, chat({"tokens": 2})).status == 200


def test_handshakes_count_as_connections_and_end_in_time(
    worker: StartWorker, vllm: ScriptedVLLM, files: Files, clients: ExitStack
) -> None:
    # failures 25, 41
    running = worker(vllm.url, config=files.config | {"limits": {"connections": 20, "connections_per_client": 10}})
    silent = [clients.enter_context(plain(running)) for _ in range(10)]
    with plain(running) as refused:
        assert refused.socket.recv(1) == b"", "closed at once"
    running.until(lambda: running.heartbeat().unaccepted.get("too_many_connections_per_client") or None, "the count")
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    with socket.create_connection(address, source_address=("127.0.0.2", 0)) as other:
        secured = clients.enter_context(CONTEXT.wrap_socket(other, server_hostname="127.0.0.1"))
        secured.sendall(request("/health"))
        assert secured.recv(12) == b"HTTP/1.1 200"
    for client in silent:
        client.socket.settimeout(30)
        assert client.socket.recv(1) == b""

    def answered() -> int | None:
        try:
            return ask(running, chat({"tokens": 2})).status
        except ConnectionResetError:
            return None  # who is gone may still be counted for a moment

    assert running.until(answered, "room for another") == 200


def test_a_new_certificate_is_taken_up_while_streams_go_on(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    running = worker(vllm.url, config=files.config)
    former = shown_expiry(running)
    with connected(running, timeout=30) as client:
        client.send(request(CHAT, chat({"tokens": 5, "hang_after_events": 3}), key=KEY))
        client.read(events=3)
        files.install("renewed")
        renewed = expiry_unix_s(certificate("renewed"))
        running.until(lambda: running.heartbeat().certificate_expiry_unix_s == renewed or None, "the new certificate")
        assert ssl.cert_time_to_seconds(shown_expiry(running)) == renewed
        assert shown_expiry(running) != former
        vllm.release()
        reply = client.read()
        assert (reply.ending, reply.events[-1]) == ("complete", b"data: [DONE]\n\n")
        assert client.ask(MODELS, key=KEY).status == 200, "the connection is kept"


def test_a_certificate_that_cannot_be_used_changes_nothing(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    running = worker(vllm.url, config=files.config)
    former = shown_expiry(running)
    files.certificate.write_bytes(certificate("renewed").read_bytes())  # the key is still the other one's
    running.until(lambda: [line for line in running.log() if line["level"] == "error"] or None, "the complaint")
    assert shown_expiry(running) == former
    assert ask(running, chat({"tokens": 2})).status == 200
    files.install("renewed")
    running.until(lambda: shown_expiry(running) != former or None, "the new certificate")
    running.terminate()
    with pytest.raises(AssertionError, match="can't be used; the former one stays"):
        running.wait_exit()


def test_streams_finish_when_it_is_told_to_stop(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    # failure 50
    running = worker(vllm.url, config=files.config)
    with connected(running) as client, connected(running) as idle:
        client.send(request(CHAT, chat({"tokens": 5, "hang_after_events": 3}), key=KEY))
        client.read(events=3)
        idle.ask("/health")
        running.terminate()
        assert is_closed(idle)
        vllm.release()
        assert client.read().ending == "complete"
        running.wait_exit()
    assert running.record().output_tokens == 5


def test_a_client_that_leaves_stops_its_engine(worker: StartWorker, vllm: ScriptedVLLM, files: Files) -> None:
    # failure 1
    running = worker(vllm.url, config=files.config)
    with connected(running) as client:
        client.send(request(CHAT, chat({"tokens": 50, "hang_after_events": 3}), key=KEY))
        client.read(events=3)
    vllm.wait(lambda: len(vllm.aborted) == 1)
    assert running.record().outcome == Outcome.CLIENT_GONE


# --- engines -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure_vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM(tls=server_context()) as server:
        yield server


def test_engines_may_speak_tls(worker: StartWorker, secure_vllm: ScriptedVLLM) -> None:
    running = worker(backend(secure_vllm.url, ca_file=str(CA)))
    large = json.dumps(chat({"tokens": 3, "body_bytes": 2_000_000}, stream=False, filler="x" * 2_000_000), separators=(",", ":"))
    for body in (chat({"tokens": 20}), chat({"tokens": 20}, stream=False), large.encode(), chat({"tokens": 2})):
        reply = running.ask(body)
        assert (reply.status, reply.ending) == (200, "complete")
    assert secure_vllm.requests[2].body == large.encode()
    first, *others = running.records(4)
    assert not first.attempts[0].reused
    assert first.attempts[0].connected_ns > 0
    assert all(record.attempts[0].reused for record in others), "its connection is kept"


def test_an_engine_that_speaks_tls_notices_who_leaves(worker: StartWorker, secure_vllm: ScriptedVLLM) -> None:
    # failure 1
    running = worker(backend(secure_vllm.url, ca_file=str(CA)))
    with running.begin(chat({"tokens": 50, "hang_after_events": 3})) as client:
        client.read(events=3)
    secure_vllm.wait(lambda: len(secure_vllm.aborted) == 1)
    assert running.record().outcome == Outcome.CLIENT_GONE


def test_an_engine_that_speaks_tls_and_dies_is_noticed(worker: StartWorker, secure_vllm: ScriptedVLLM) -> None:
    # failure 4
    running = worker(backend(secure_vllm.url, ca_file=str(CA)))
    with running.begin(chat({"tokens": 50, "hang_after_events": 3})) as client:
        client.read(events=3)
        secure_vllm.drop()
        reply = client.read()
    assert reply.ending == "closed"
    assert b'"code":"upstream_disconnected"' in reply.events[-1]


UNTRUSTED: Final[dict[str, tuple[str, Path | None, str]]] = {
    "expired": ("expired", CA, "certificate has expired"),
    "another host's": ("elsewhere", CA, "certificate is not valid for '127.0.0.1'"),
    "from somebody else": ("server", OTHER_CA, "unable to get local issuer certificate"),
    "from nobody that the system knows": ("server", None, "unable to get local issuer certificate"),
    "vouched for by a file that isn't there": ("server", Path("/nowhere.pem"), "ca_file"),
}


@pytest.mark.parametrize(("name", "ca", "reason"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_an_engine_that_cannot_be_trusted_is_not_asked(
    worker: StartWorker, vllm: ScriptedVLLM, name: str, ca: Path | None, reason: str
) -> None:
    with ScriptedVLLM(tls=server_context(name)) as impostor:
        entry = backend(impostor.url, ca_file=str(ca or ""))
        running = worker(entry)
        refused = running.ask(chat())
        assert error_of(refused) == (503, "upstream_unreachable")
        assert reason in refused.json()["error"]["message"]
        assert not impostor.requests
    record = running.record()
    assert [attempt.error for attempt in record.attempts] == ["upstream_unreachable"]


def test_the_next_engine_is_asked_instead(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    # failure 7
    with ScriptedVLLM(tls=server_context("expired")) as impostor:
        running = worker(backend(impostor.url, "b0", ca_file=str(CA)), backend(vllm.url, "b1"))
        for _ in range(4):
            assert running.ask(chat({"tokens": 2})).status == 200
    tried = [[(attempt.backend, attempt.error) for attempt in record.attempts] for record in running.records(4)]
    assert [("b0", "upstream_unreachable"), ("b1", "")] in tried
    assert {attempts[-1][0] for attempts in tried} == {"b1"}


def test_an_engine_that_does_not_speak_tls_is_unreachable_by_it(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(backend(vllm.url.replace("http:", "https:"), ca_file=str(CA)))
    refused = running.ask(chat())
    assert error_of(refused) == (503, "upstream_unreachable")
    assert "TLS" in refused.json()["error"]["message"]


def test_new_authorities_are_taken_up(worker: StartWorker, secure_vllm: ScriptedVLLM, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    shutil.copyfile(OTHER_CA, file)
    running = worker(backend(secure_vllm.url, ca_file=str(file)))
    assert running.ask(chat()).status == 503
    shutil.copyfile(CA, tmp_path / "new.pem")
    (tmp_path / "new.pem").rename(file)
    assert running.ask(chat({"tokens": 2})).status == 200


# --- all of it ---------------------------------------------------------------------------------------------------------


def test_the_whole_of_it(glasshouse: Start, secure_vllm: ScriptedVLLM, files: Files) -> None:
    running = glasshouse([{"url": secure_vllm.url, "ca_file": str(CA)}], files.config)
    assert running.url.startswith("https://")
    with WireClient(running.url, tls=CONTEXT) as client:
        assert client.ask(CHAT, chat({"tokens": 5}), key=running.key).ending == "complete"
    running.until_said(f"OPENAI_BASE_URL={running.url}/v1")
    [row] = running.rows(1)
    assert row["output_tokens"] == 5
    expiry = running.metrics().total("glasshouse_certificate_expiry_timestamp_seconds")
    assert expiry == expiry_unix_s(certificate("server"))
