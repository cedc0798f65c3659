"""What engines say of their load, over real sockets: asked all the time, each for itself, and whatever they do it is heard of.

Only the pace is the tests' own: ten rounds a second instead of one. The last test runs the collector as it is.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from collectors.engines import EngineWatch
from collectors.engines.engine import STALE_SECONDS, Engine
from collectors.engines.http import MOST_BYTES
from collectors.engines.kinds import KINDS
from collectors.records.metrics import EngineView
from proxy.engines import EngineLoad, Engines, read_engines
from proxy.snapshot import Backend, SnapshotFile, write_snapshot
from tests.server.test_collectors import Collecting
from tests.support import tls
from tests.support.worker import backend, deaf_host

PATIENCE: Final = 30.0
BODY: Final = (Path(__file__).parents[1] / "fixtures" / "vllm-0.32.0" / "two" / "metrics_busy.body").read_bytes()
LOAD: Final = EngineLoad(2, 1, 0.0020618556701030855, 185, 289, 1795144559.0, 185, 64)

Act = Callable[[socket.socket, bytes], None]
"""What a server does with a connection on which this head of a request has come."""


def whole(body: bytes = BODY, status: str = "200 OK", headers: str = "") -> Act:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    return lambda connection, _: connection.sendall(head.encode() + body)


def sends(data: bytes) -> Act:
    """These bytes, and the end of the connection."""
    return lambda connection, _: connection.sendall(data)


def chunked(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for at in range(0, len(BODY), 5000):
        piece = BODY[at : at + 5000]
        connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
    connection.sendall(b"0\r\n\r\n")


def hangs(connection: socket.socket, _: bytes) -> None:
    """Until the client has left."""
    with contextlib.suppress(OSError):
        connection.recv(1)


def after_an_interim_one(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 103 Early Hints\r\nlink: </>\r\n\r\n")
    time.sleep(0.05)  # so that it comes alone
    whole()(connection, head)


def stays_open(connection: socket.socket, head: bytes) -> None:
    whole()(connection, head)
    hangs(connection, head)


def drips(connection: socket.socket, _: bytes) -> None:
    """A header's byte now and then, for ever."""
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nx-slow: ")
        while True:
            connection.sendall(b"x")
            time.sleep(0.1)


def resets(connection: socket.socket, _: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


class Server:
    """On a free port of 127.0.0.1, or on `port`; each connection has a thread. `act` may be changed while it runs."""

    def __init__(self, act: Act, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.act = act
        self.heads: list[bytes] = []
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", port))
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http{'s' if self._context else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._begin(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _begin(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._open.add(connection)
                self._begin(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._context is not None:
                self._open.discard(connection)
                connection = self._context.wrap_socket(connection, server_side=True)
                self._open.add(connection)
            with connection:
                head = b""
                while b"\r\n\r\n" not in head and (data := connection.recv(65536)):
                    head += data
                if head:
                    self.heads.append(head)
                    self.act(connection, head)
        self._open.discard(connection)


class Watched:
    """An EngineWatch in this process, and the catalogue that it follows."""

    def __init__(self, directory: Path) -> None:
        self._snapshot, self._file = directory / "snapshot", directory / "engines"
        self._revision = 0
        self.watch = EngineWatch(self._snapshot, self._file)

    def publish(self, *backends: Backend) -> None:
        self._revision += 1
        catalogue = {each.name: each for each in backends}
        write_snapshot(self._snapshot, SnapshotFile(revision=self._revision, backends=catalogue))

    def file(self) -> Engines | None:
        return read_engines(self._file, time.time_ns())

    def loads(self) -> dict[str, EngineLoad]:
        engines = self.file()
        return {} if engines is None else engines.loads

    def view(self, name: str = "b0") -> EngineView:
        [found] = [view for view in self.watch.view() if view.backend == name]
        return found

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}; {self.watch.view()}"
            time.sleep(0.02)

    def until_heard(self, name: str = "b0", load: EngineLoad = LOAD) -> None:
        self.until(lambda: self.loads().get(name) == load, f"{name} to be heard")

    def until_counted(self, outcome: str, name: str = "b0", times: int = 1) -> None:
        """So often more than now."""

        def count() -> int:
            return sum(view.scrapes[outcome] for view in self.watch.view() if view.backend == name)

        before = count()
        self.until(lambda: count() >= before + times, f"{times} x {outcome} of {name}")

    def until_rounds(self, times: int) -> None:
        """So many more files."""
        seen: set[int] = set()

        def look() -> bool:
            if (engines := self.file()) is not None:
                seen.add(engines.unix_ns)
            return len(seen) > times

        self.until(look, f"{times} files")


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr("collectors.engines.watch.EVERY_SECONDS", 0.1)
    made = Watched(tmp_path)
    made.watch.start()
    yield made
    made.watch.stop(PATIENCE)


ANSWERS: Final[dict[str, Act]] = {
    "with a length": whole(),
    "in chunks": chunked,
    "until it closes": sends(b"HTTP/1.1 200 OK\r\n\r\n" + BODY),
    "of HTTP/1.0": sends(b"HTTP/1.0 200 OK\r\n\r\n" + BODY),
    "after an interim one": after_an_interim_one,
    "on a connection that stays open": stays_open,
}


@pytest.mark.parametrize("act", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_in_whatever_framing(watched: Watched, act: Act) -> None:
    with Server(act) as server:
        watched.publish(backend(server.url))
        watched.until_heard()


FAILURES: Final[dict[str, tuple[Act, str]]] = {
    "hangs": (hangs, "timeout"),
    "drips": (drips, "timeout"),
    "half a body": (sends(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(BODY) + 1) + BODY), "unreachable"),
    "half a chunk": (sends(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nvllm"), "unreachable"),
    "half a head": (sends(b"HTTP/1.1 200 OK\r\n"), "unreachable"),
    "nothing": (sends(b""), "unreachable"),
    "a reset": (resets, "unreachable"),
    "an error": (whole(b"starting", "503 Service Unavailable"), "refused"),
    "an error with a load": (whole(status="500 Internal Server Error"), "refused"),
    "a redirect": (whole(b"", "307 Temporary Redirect", "location: /metrics/\r\n"), "refused"),
    "another protocol": (sends(b"SSH-2.0-OpenSSH_9.2\r\n"), "unreadable"),
    "a switch of protocols": (
        sends(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"),
        "unreadable",
    ),
    "a page": (whole(b"<html></html>"), "unreadable"),
    "no statistics": (whole(b"process_start_time_seconds 1.7e9\n"), "unreadable"),
    "too much": (whole(BODY + b"#" * MOST_BYTES), "unreadable"),
    "a head without end": (sends(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * (MOST_BYTES // 6 + 6)), "unreadable"),
}


@pytest.mark.parametrize(("act", "outcome"), FAILURES.values(), ids=FAILURES)
def test_an_engine_that_says_nothing_delays_and_hides_nobody(watched: Watched, act: Act, outcome: str) -> None:
    with Server(act) as bad, Server(whole()) as good:
        watched.publish(backend(bad.url, "bad"), backend(good.url, "good"))
        watched.until_counted(outcome, "bad")
        watched.until_rounds(2)
        assert watched.loads() == {"good": LOAD}
        assert watched.view("bad").load is None
        assert watched.view("bad").scrapes.keys() == {outcome}
        bad.act = whole()
        watched.until(lambda: watched.loads() == {"good": LOAD, "bad": LOAD}, "both")


def test_others_are_heard_in_every_round_while_one_hangs(watched: Watched) -> None:
    """A question that hangs takes as long as some rounds; the good one is asked in each."""
    with Server(hangs) as bad, Server(whole()) as good:
        watched.publish(backend(bad.url, "bad"), backend(good.url, "good"))
        watched.until_counted("timeout", "bad", 3)
        asked, hung = (sum(watched.view(name).scrapes.values()) for name in ("good", "bad"))
        assert asked >= 2 * hung
        assert watched.view("good").scrapes.keys() == {"ok"}


def test_one_that_cannot_be_connected_to(watched: Watched) -> None:
    with deaf_host() as deaf, socket.socket() as unused, Server(whole()) as good:
        unused.bind(("127.0.0.1", 0))  # and doesn't listen
        refusing = f"http://127.0.0.1:{unused.getsockname()[1]}"
        nowhere = backend("http://glasshouse.invalid:1", "nowhere")
        nameless = backend(f"http://{'x' * 64}.invalid:1", "nameless")  # no label of a name is so long
        watched.publish(backend(deaf, "deaf"), backend(refusing, "refusing"), nowhere, nameless, backend(good.url, "good"))
        for name, outcome in (("deaf", "timeout"), ("refusing", "unreachable"), ("nameless", "unreachable")):
            watched.until_counted(outcome, name)
        watched.until(lambda: watched.loads() == {"good": LOAD}, "the good one alone")


def test_what_was_said_grows_old() -> None:
    """Where a question takes longer than it may, as with a resolver that hangs."""
    with Server(whole()) as server:
        engine = Engine(backend(server.url), KINDS["vllm"])
        engine.ask()
        engine.wait(PATIENCE)
        now = time.monotonic()
        assert engine.load(now) == LOAD
        assert engine.load(now + STALE_SECONDS) is None
        assert engine.view(now + STALE_SECONDS).load is None


def test_nobody_is_asked_twice_at_a_time() -> None:
    with Server(hangs) as server:
        engine = Engine(backend(server.url), KINDS["vllm"])
        for _ in range(3):
            engine.ask()
        engine.wait(PATIENCE)
        assert engine.view(time.monotonic()).scrapes == {"timeout": 1}
        assert len(server.heads) == 1


def test_only_what_is_known_to_tell_its_load_is_asked(watched: Watched) -> None:
    with Server(whole()) as openai, Server(whole()) as vllm:
        watched.publish(backend(openai.url, "other", "openai"), backend(vllm.url, "b0"))
        watched.until_heard()
        watched.until_rounds(2)
        assert [view.backend for view in watched.watch.view()] == ["b0"]
        assert not openai.heads


def test_the_catalogue_is_followed(watched: Watched) -> None:
    watched.until(lambda: watched.file() is not None, "a file without any engine")
    with Server(whole()) as one, Server(whole(BODY.replace(b"} 2.0", b"} 7.0"))) as two:
        watched.publish(backend(one.url))
        watched.until_heard()
        watched.publish(backend(one.url), backend(two.url, "b1"))
        watched.until(lambda: {name: load.running for name, load in watched.loads().items()} == {"b0": 2, "b1": 7}, "both")
        asked = watched.view().scrapes["ok"]
        watched.publish(backend(one.url, weight=0.5), backend(one.url, "b1"))
        watched.until_heard("b1")
        assert watched.view().scrapes["ok"] >= asked, "one that stayed goes on"
        watched.publish(backend(two.url, "b1"))
        watched.until(lambda: watched.loads().keys() == {"b1"}, "the first one to be gone")
        assert [view.backend for view in watched.watch.view()] == ["b1"]


def test_a_restart_is_seen(watched: Watched) -> None:
    """Counted once: what it had computed before it was heard of isn't, what it computed anew is."""
    with Server(whole()) as before:
        port = before.port
        watched.publish(backend(before.url))
        watched.until_heard()
        more = BODY.replace(b"} 185.0", b"} 285.0")
        before.act = whole(more)
        watched.until(lambda: watched.view().computed["prompt_tokens"] == 100, "100 more tokens")
    watched.until_counted("unreachable")
    assert watched.view().load is None, "at once"
    watched.until(lambda: not watched.loads(), "its load to be gone")
    anew = BODY.replace(b"1.795144559e+09", b"1.7951446e+09").replace(b"} 185.0", b"} 10.0")
    with Server(whole(anew), port=port):
        watched.until(lambda: watched.loads(), "it to be back")
        assert watched.loads()["b0"].started_unix_s == 1795144600.0
        assert watched.view().computed["prompt_tokens"] == 110
        assert watched.view().load == watched.loads()["b0"]


def test_the_request(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "sk-engine\n")
    with Server(whole()) as server:
        watched.publish(backend(f"{server.url}/engines/0", api_key_env="ENGINE_KEY"), backend(f"{server.url}", "plain"))
        watched.until(lambda: len(watched.loads()) == 2, "both")
        heads = {head.split(b"\r\n")[0]: head.split(b"\r\n")[1:-2] for head in server.heads}
        host = b"host: 127.0.0.1:%d" % server.port
    every = [host, b"accept: text/plain", b"accept-encoding: identity", b"connection: close"]
    assert heads == {
        b"GET /engines/0/metrics HTTP/1.1": [*every, b"authorization: Bearer sk-engine"],
        b"GET /metrics HTTP/1.1": every,
    }


def test_an_address_of_six(watched: Watched) -> None:
    with Server(whole()) as server, socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
        done = threading.Thread(target=lambda: server._serve(six.accept()[0]))
        done.start()
        watched.publish(Backend("b0", "::1", six.getsockname()[1]))
        watched.until_heard()
        done.join()
    assert b"\r\nhost: [::1]:" in server.heads[0]


@pytest.mark.parametrize(
    ("certificate", "ca", "heard"),
    [("server", tls.CA, True), ("server", tls.OTHER_CA, False), ("expired", tls.CA, False), ("elsewhere", tls.CA, False)],
)
def test_only_an_engine_that_is_who_it_should_be_is_believed(watched: Watched, certificate: str, ca: Path, heard: bool) -> None:
    with Server(whole(), tls.server_context(certificate)) as server:
        watched.publish(backend(server.url, ca_file=str(ca)))
        if heard:
            watched.until_heard()
        else:
            watched.until_counted("unreachable", times=2)
            assert not watched.loads()
            assert not server.heads


def test_an_authority_that_cannot_be_read(watched: Watched, tmp_path: Path) -> None:
    with Server(whole(), tls.server_context()) as server:
        watched.publish(backend(server.url, ca_file=str(tmp_path / "none.pem")))
        watched.until_counted("unreachable")


def test_a_bug_in_one_is_counted_and_stops_nothing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(whole()) as server:
        monkeypatch.setattr("collectors.engines.engine.SCRAPE_SECONDS", "a bug")
        watched.publish(backend(server.url))
        watched.until_counted("internal_error", times=2)
        monkeypatch.setattr("collectors.engines.engine.SCRAPE_SECONDS", PATIENCE)
        watched.until_heard()


def test_what_cannot_be_written_is_said_once_and_tried_again(
    watched: Watched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched.until(lambda: watched.file() is not None, "a file")
    file, kept = tmp_path / "engines", tmp_path / "kept"
    with Server(whole()) as server:
        while not file.is_dir():  # rounds come and go meanwhile
            with contextlib.suppress(FileExistsError):
                file.rename(kept)
                file.mkdir()
        watched.publish(backend(server.url))
        watched.until_counted("ok", times=3)
        assert sum("can't be written" in record.message for record in caplog.records) == 1
        file.rmdir()
        watched.until_heard()


# -- the process --


def test_the_collector_tells_it_on_its_own_page(collecting: Callable[..., Collecting]) -> None:
    with Server(whole()) as server, Server(hangs) as bad:
        collector = collecting().start()
        catalogue = {"gpu-0": backend(server.url, "gpu-0"), "gpu-1": backend(bad.url, "gpu-1")}
        write_snapshot(collector.settings.snapshot_path, SnapshotFile(backends=catalogue))
        deadline = time.monotonic() + PATIENCE
        while not (
            (metrics := collector.metrics()).total("engine_requests_running", backend="gpu-0")
            and metrics.total("engine_scrapes_total", backend="gpu-1", outcome="timeout") >= 2
        ):
            assert time.monotonic() < deadline, collector.log()
            time.sleep(0.05)
        assert metrics.total("engine_requests_running") == 2
        assert metrics.total("engine_requests_waiting") == 1
        engines = read_engines(collector.settings.engines_path, time.time_ns())
        assert engines is not None
        assert engines.loads == {"gpu-0": LOAD}
        assert [line["backend"] for line in collector.said("an engine doesn't tell its load")] == ["gpu-1"]
        collector.running.send_signal(signal.SIGTERM)  # while it is asking one that hangs
        assert collector.running.wait(PATIENCE) == 0, collector.log()
        assert not collector.said("a bug in what asks an engine")
