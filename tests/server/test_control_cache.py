"""What the control process has to do with the cache, as it is started: revisions, purges, and Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from proxy.settings import Settings
from proxy.snapshot import SnapshotError, SnapshotFile, read_snapshot
from tests.support.control import ControlProcess
from tests.support.redis import redis_server

PATIENCE = 30.0


class Engine(ThreadingHTTPServer):
    """A vLLM that says what it is, and nothing else. `version` "": it doesn't."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = "0.11.0"
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        engine = self.server
        said = {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm", "created": engine.asked}]}}
        if engine.version:
            said["/version"] = {"version": engine.version}  # type: ignore[dict-item]
        engine.asked += 1
        body = json.dumps(said.get(self.path, {})).encode()
        self.send_response(200 if self.path in said else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Engine]:
    with Engine() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def until(look: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s in vain for {what}"
        time.sleep(0.01)


def snapshot(settings: Settings) -> SnapshotFile:
    try:
        return read_snapshot(settings.snapshot_path)
    except (OSError, SnapshotError):
        return SnapshotFile()


def control(state_dir: Path, engine: Engine, **more: object) -> ControlProcess:
    backends = [{"name": "a", "url": engine.url}]
    return ControlProcess(state_dir, backends=backends, control={"discover_every": 0.1, "listen": "127.0.0.1:0"}, **more)


def test_another_version_of_the_engine_is_another_revision(tmp_path: Path) -> None:
    with running() as engine:
        started = control(tmp_path, engine)

        def told(version: str) -> str:
            until(lambda: getattr(snapshot(started.settings).backends.get("a"), "version", "") == version, version)
            return snapshot(started.settings).models["m"].revision

        def asked_again() -> None:
            before = engine.asked
            until(lambda: engine.asked > before + 4, "some questions")

        with started:
            first = told("0.11.0")
            assert started.ask("GET", "/backends/a", local=True)[2]["version"] == "0.11.0"
            assert started.ask("GET", "/models/m", local=True)[2]["revision"] == first
            engine.version = "0.12.0"
            second = told("0.12.0")
            engine.version = ""
            asked_again()
            assert told("0.12.0") == second, "it didn't say it for once"
        with started:
            asked_again()
            assert told("0.12.0") == second, "nor to the next process"
            engine.version = "0.11.0"
            assert told("0.11.0") == first != second


def test_a_purge_reaches_the_snapshot_and_redis(tmp_path: Path) -> None:
    with running() as engine, redis_server() as redis:
        started = control(tmp_path, engine, redis={"url": redis.url}, cache={})
        with started:
            until(lambda: snapshot(started.settings).models, "the model")
            secret = snapshot(started.settings).cache_secret
            redis.client.set("{glasshouse}:cache:00", "damaged")
            redis.client.set("{glasshouse}:other", "stays")
            status, _, made = started.ask("POST", "/cache/purge", {"model": "m"}, local=True)
            assert (status, made["model"], made["deleted"]) == (200, "m", None)
            until(lambda: started.ask("GET", "/cache", local=True)[2]["data"][0]["deleted"] == 1, "Redis to be looked through")
            assert list(redis.client.scan_iter("*")) == ["{glasshouse}:other"]
            [purge] = snapshot(started.settings).purges
            assert purge.model == "m"
        with started:
            until(lambda: snapshot(started.settings).published_unix_ns, "a snapshot")
            assert (snapshot(started.settings).cache_secret, len(secret)) == (secret, 32)
            assert snapshot(started.settings).purges == (purge,)
        assert secret.hex() not in started.log.read_text()
