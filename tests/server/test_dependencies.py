"""Whatever the product depends on is taken away, made slow or filled up: what must go on goes on, and a metric shows what can't.

The table of it is in README.md, "What runs".
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from sqlalchemy import text

from proxy.errors import Outcome
from proxy.journal import Journal, read_heartbeats
from proxy.store import create_key, open_database
from proxy.store.engine import open_engine
from tests.conftest import Start
from tests.server.test_collectors import Collecting, Workers, append, wait
from tests.server.test_control import Control
from tests.support.disk import small_disk
from tests.support.glasshouse import Glasshouse
from tests.support.postgresql import postgresql_server
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import WireClient, ask, request
from tests.support.worker import CHAT, Worker, backend, chat, deaf_host
from tests.unit.collectors.made import make_record
from tests.unit.collectors.receiver import Receiver, receiving
from tests.unit.journal.made import SEGMENT_BYTES, closing, kill

PATIENCE: Final = 90.0
_direct = build_opener(ProxyHandler({}))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s in vain for {what}"
        time.sleep(0.05)


class Running:
    """A whole product, and what its clients know: the ids of what was answered."""

    def __init__(self, product: Glasshouse) -> None:
        self.product = product
        self.answered: list[str] = []

    def ask(self, number: int = 1) -> None:
        """Each is answered, at once and in full."""
        for _ in range(number):
            reply = ask(self.product.url, CHAT, chat({"tokens": 3}), key=self.product.key)
            assert (reply.status, reply.ending) == (200, "complete"), reply.body
            self.answered.append(reply.header("x-request-id") or "")

    def ask_until(self, condition: Callable[[], object], what: str) -> None:
        """Go on asking; at least a few are asked."""
        self.ask(5)

        def met() -> object:
            self.ask(5)
            return condition()

        until(met, what)

    def metric(self, name: str, **labels: str) -> float:
        return self.product.metrics().total(f"glasshouse_{name}", **labels)

    def control(self, path: str) -> dict[str, Any]:
        with _direct.open(self.product.control_url + path, timeout=PATIENCE) as answer:
            told: dict[str, Any] = json.loads(answer.read())
            return told

    def rows(self) -> list[str]:
        """The ids in the ledger."""
        engine = open_engine(self.product.settings.database_url)
        with engine.connect() as connection:
            found = [str(row.id) for row in connection.execute(text("SELECT id FROM requests"))]
        engine.dispose()
        return found


# -- the database --


class Database:
    """One that can be put into trouble; each trouble ends with its block."""

    def __init__(self, url: str, troubles: dict[str, Callable[[], AbstractContextManager[None]]]) -> None:
        self.url = url
        self.troubles = troubles


@contextmanager
def a_postgresql() -> Iterator[Database]:
    """Its tables are on a small disk of their own."""
    with postgresql_server() as server, small_disk(server.home / "disk", 32 * 1024 * 1024) as disk:
        shutil.chown(disk.path, *server.owner)
        server.execute(f"CREATE TABLESPACE small LOCATION '{disk.path}'")
        server.execute("CREATE DATABASE ledger TABLESPACE small")

        @contextmanager
        def down() -> Iterator[None]:
            server.stop()
            yield
            server.start()

        @contextmanager
        def frozen() -> Iterator[None]:
            server.freeze()
            try:
                yield
            finally:
                server.thaw()

        @contextmanager
        def locked() -> Iterator[None]:
            with server.connect("ledger") as other:
                other.execute("LOCK TABLE requests")
                yield

        @contextmanager
        def slow() -> Iterator[None]:
            """Every batch takes five seconds."""
            server.execute(SLOW, "ledger")
            yield
            server.execute("DROP TRIGGER slow ON checkpoints", "ledger")

        @contextmanager
        def full() -> Iterator[None]:
            disk.fill()
            yield
            disk.make_room()

        yield Database(server.url_of("ledger", tcp=True), {each.__name__: each for each in (down, frozen, locked, slow, full)})


SLOW: Final = """
CREATE OR REPLACE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(5); RETURN NULL; END';
CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON checkpoints FOR EACH STATEMENT EXECUTE FUNCTION slowly();
"""


@contextmanager
def a_sqlite(directory: Path) -> Iterator[Database]:
    with small_disk(directory / "disk", 8 * 1024 * 1024) as disk:
        path = disk.path / "ledger.db"

        @contextmanager
        def locked() -> Iterator[None]:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE)) as other:
                other.execute("BEGIN IMMEDIATE")
                yield

        @contextmanager
        def full() -> Iterator[None]:
            disk.fill()
            yield
            disk.make_room()

        yield Database(f"sqlite:///{path}", {"locked": locked, "full": full})


@pytest.fixture(scope="module")
def phoenix() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def on_postgresql(shared_glasshouse: Start, shared_vllm: ScriptedVLLM, phoenix: Receiver) -> Iterator[tuple[Running, Database]]:
    with a_postgresql() as database:
        product = shared_glasshouse([shared_vllm.url], {"database": database.url, "phoenix": {"url": phoenix.url}})
        yield Running(product), database
        product.stop()


@pytest.fixture(scope="module")
def on_sqlite(
    tmp_path_factory: pytest.TempPathFactory, shared_glasshouse: Start, shared_vllm: ScriptedVLLM, phoenix: Receiver
) -> Iterator[tuple[Running, Database]]:
    with a_sqlite(tmp_path_factory.mktemp("database")) as database:
        product = shared_glasshouse([shared_vllm.url], {"database": database.url, "phoenix": {"url": phoenix.url}})
        yield Running(product), database
        product.stop()


# failure 46, failure 47, failure 66
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("trouble", ["down", "frozen", "locked", "slow", "full"])
def test_with_postgresql_in_trouble_requests_go_on_and_every_row_comes_later(
    on_postgresql: tuple[Running, Database], phoenix: Receiver, trouble: str
) -> None:
    go_through(*on_postgresql, phoenix, trouble)


# failure 47, failure 65, failure 66
@pytest.mark.timeout(400)
@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_with_sqlite_in_trouble_requests_go_on_and_every_row_comes_later(
    on_sqlite: tuple[Running, Database], phoenix: Receiver, trouble: str
) -> None:
    go_through(*on_sqlite, phoenix, trouble)


def go_through(running: Running, database: Database, phoenix: Receiver, trouble: str) -> None:
    running.ask(2)
    until(lambda: sorted(running.rows()) == sorted(running.answered), "the rows before")
    with database.troubles[trouble]():
        running.ask_until(lambda: running.metric("journal_lag_seconds", sink="ledger") > 2, "the ledger to fall behind")
        if trouble in ("down", "full"):  # otherwise the sink still waits for an answer
            until(lambda: running.metric("sink_up", sink="ledger") == 0, "the sink to say so")
        assert running.metric("journal_lag_bytes", sink="ledger") > 0
        # The other sinks and control go on.
        until(lambda: running.metric("requests_total") == len(running.answered), "the counts")
        until(lambda: set(phoenix.traces()) >= set(running.answered), "the traces")
        if trouble in ("down", "frozen"):
            until(lambda: running.control("/health")["status"] == "degraded", "control to say so")
            assert running.control("/health")["database"] != "ok"
        if trouble == "down":
            until(lambda: running.metric("snapshot_age_seconds") > 20, "the snapshot to grow old")
        assert running.control("/health")["version"]
        running.ask(2)
    running.ask(2)
    until(lambda: len(running.rows()) >= len(running.answered), "every row")
    assert sorted(running.rows()) == sorted(running.answered), "each once"
    until(lambda: running.metric("sink_up", sink="ledger") == 1, "the sink to be up")
    until(lambda: running.metric("journal_lag_seconds", sink="ledger") == 0, "the sink to have everything")
    until(lambda: running.control("/health")["status"] == "ok", "control to be well")
    until(lambda: running.metric("snapshot_age_seconds") < 20, "a snapshot of today")


class Load:
    """Clients that go on asking, each on a connection of its own, until the block ends. `answered`: the ids of all requests."""

    def __init__(self, product: Glasshouse, clients: int) -> None:
        self._product = product
        self.answered: list[str] = []
        self.failed: list[object] = []
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(clients)
        self._running = [self._threads.submit(self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with WireClient(self._product.url) as client:
            for number in count():
                if self._stop.is_set():
                    return
                reply = client.ask(CHAT, chat({"tokens": 3}, stream=number % 2 == 0), key=self._product.key)
                if (reply.status, reply.ending) == (200, "complete"):
                    self.answered.append(reply.header("x-request-id") or "")
                else:
                    self.failed.append((reply.status, reply.ending, reply.body))
                self._stop.wait(0.02)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._running:
            each.result(PATIENCE)
        self._threads.shutdown()


# failure 46
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("trouble", "seconds"),
    [
        ("stopped", 3),
        pytest.param("stopped", 60, marks=pytest.mark.long),
        pytest.param("frozen", 60, marks=pytest.mark.long),
    ],
)
def test_with_postgresql_away_under_load_nothing_fails_and_each_row_comes_once(
    glasshouse: Start, vllm: ScriptedVLLM, trouble: str, seconds: int
) -> None:
    with postgresql_server() as server:
        product = glasshouse([vllm.url], {"database": server.url_of(server.new_database(), tcp=True)})
        running = Running(product)
        with Load(product, 4) as load:
            until(lambda: len(running.rows()) > 20, "the first rows")
            server.stop() if trouble == "stopped" else server.freeze()
            try:
                until(lambda: running.metric("journal_lag_seconds", sink="ledger") > 1, "the ledger to fall behind")
                before = len(load.answered)
                time.sleep(seconds)
                assert len(load.answered) > before + 10, "known keys go on"
                assert running.metric("journal_lag_bytes", sink="ledger") > 0
                assert ask(product.url, "/ready").status == 200
            finally:
                server.start() if trouble == "stopped" else server.thaw()
            until(lambda: running.metric("journal_lag_seconds", sink="ledger") < 1, "the ledger to catch up, under load")
        assert load.failed == []
        until(lambda: len(running.rows()) >= len(load.answered), "every row")
        assert sorted(running.rows()) == sorted(load.answered), "each once"
        assert len(set(load.answered)) == len(load.answered)
        assert running.metric("ledger_set_aside_records") == 0
        product.stop()


# failure 46, failure 48
@pytest.mark.long
@pytest.mark.timeout(400)
def test_whoever_is_killed_postgresql_has_each_request_once(collecting: Callable[..., Collecting]) -> None:
    dice = random.Random(46)
    with postgresql_server() as server:
        database = server.new_database()
        collector = collecting(database=server.url_of(database)).start()
        workers = Workers(collector.journal_path, dice)
        for _ in range(6):
            what = dice.random()
            for killed in (False, True):
                for _ in range(dice.randrange(40, 200)):
                    workers.step()
                time.sleep(dice.random() * 0.5)  # any moment
                if what < 0.7 and not killed:
                    server.stop()
            if what > 0.4:
                collector.kill()
                collector.start()
            if what < 0.7:
                server.start()
        workers.end()
        collector.stop()
        rows = server.rows("SELECT id, outcome FROM requests", database)
        assert {row["id"]: row["outcome"] for row in rows} == workers.expected
        assert len(rows) == len(workers.expected)
        collector.start()
        assert collector.metrics().total("requests_total") == len(rows)
        collector.stop()


# -- the disk --


# failure 66
@pytest.mark.timeout(400)
def test_on_a_full_disk_requests_go_on_and_with_room_everything_recovers(
    tmp_path: Path, glasshouse: Start, vllm: ScriptedVLLM
) -> None:
    """Journal, database, the collector's states, the snapshot and the logs: all of it is on that disk."""
    with small_disk(tmp_path / "disk", 16 * 1024 * 1024) as disk:
        config = {"journal": {"segment_bytes": 64 * 1024}}
        running = Running(glasshouse([vllm.url], config, state_dir=disk.path / "state"))
        running.ask(5)
        until(lambda: len(running.rows()) == 5, "the rows before")
        disk.fill()
        running.ask_until(lambda: running.metric("journal_full") == 1, "the journal to be full")
        running.ask_until(lambda: running.metric("unrecorded_total") > 5, "requests that nobody records")
        ready = ask(running.product.url, "/ready")
        assert (ready.status, b"journal full" in ready.body) == (503, True)
        disk.fill()  # a segment that was finished has given a little back
        running.ask_until(lambda: running.metric("sink_up", sink="metrics") == 0, "a sink that can't keep what it has")
        last = time.time_ns()
        until(lambda: read_heartbeats(disk.path / "state" / "journal")[0].unix_ns > last, "its heartbeat to have counted all")
        worker = running.product.kill("worker")
        running.product.wait_replaced("worker", worker)
        running.ask_until(lambda: running.product.pid("worker"), "the new worker to serve")
        assert ask(running.product.url, "/ready").status == 503
        disk.make_room()
        until(lambda: ask(running.product.url, "/ready").status == 200, "it to be ready")
        before = len(running.answered)
        running.ask(5)
        until(lambda: set(running.answered[before:]) <= set(running.rows()), "rows of what came since")
        for sink in ("ledger", "metrics"):
            until(lambda sink=sink: running.metric("sink_up", sink=sink) == 1, "the sink to be up")  # type: ignore[misc]
            until(lambda sink=sink: running.metric("journal_lag_bytes", sink=sink) == 0, "it to have all")  # type: ignore[misc]
        assert running.metric("journal_full") == 0
        rows = running.rows()
        assert len(rows) == len(set(rows)) == running.metric("requests_total")
        assert set(rows) <= set(running.answered)
        assert len(rows) + running.metric("unrecorded_total") >= len(running.answered), "what is not known is counted"
        running.product.stop()


# failure 66
def test_a_full_journal_may_be_a_reason_to_refuse(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    with small_disk(tmp_path / "disk", 8 * 1024 * 1024) as disk:
        config = {"journal": {"segment_bytes": 64 * 1024, "on_full": "refuse"}}
        with Worker([vllm.url], config, directory=disk.path / "state") as worker:
            disk.fill()
            statuses = [worker.ask(chat({"tokens": 1}, stream=False)).status for _ in range(400)]
            accepted = statuses.count(200)
            assert statuses == [200] * accepted + [503] * (400 - accepted)
            assert 0 < accepted < 400
            refused = worker.ask(chat({"tokens": 1}, stream=False))
            assert refused.json()["error"]["code"] == "journal_full"
            assert b"journal full" in ask(worker.url, "/ready").body
            disk.make_room()
            worker.until(lambda: ask(worker.url, "/ready").status == 200 or None, "room")
            assert worker.ask(chat({"tokens": 1}, stream=False)).status == 200
            answered = [record for record in worker.records() if record.status == 200]
            assert len(answered) == accepted + 1, "what is served is recorded"


# failure 66
def test_a_collector_whose_state_has_no_room_goes_on_counting(
    collecting: Callable[..., Collecting], tmp_path: Path, phoenix: Receiver
) -> None:
    with small_disk(tmp_path / "disk", 8 * 1024 * 1024) as disk:
        database = f"sqlite:///{tmp_path / 'elsewhere.db'}"
        collector = collecting("disk/state", database=database, phoenix={"url": phoenix.url}).start()
        journal = Journal(collector.journal_path, SEGMENT_BYTES)
        append(journal, closing(make_record(1)))
        wait(lambda: collector.metrics().total("requests_total") == 1)
        wait(lambda: journal._next is not None)
        disk.fill()
        for number in range(2, 150):  # in one segment: what it doesn't need of its room it gives back
            append(journal, closing(make_record(number)))
        wait(lambda: collector.metrics().total("requests_total") == 149)
        for sink in ("ledger", "metrics", "spans"):
            wait(lambda sink=sink: collector.metrics().total("sink_up", sink=sink) == 0)  # type: ignore[misc]
        with contextlib.closing(sqlite3.connect(tmp_path / "elsewhere.db")) as elsewhere:
            wait(lambda: elsewhere.execute("SELECT count(*) FROM requests").fetchone() == (149,))  # rows are stored all the same
        wait(lambda: collector.metrics().total("traces_waiting") == 0)
        collector.kill()
        disk.make_room()
        collector.start()
        wait(lambda: collector.metrics().total("requests_total") == 149)  # what it couldn't keep it reads again
        for sink in ("ledger", "metrics", "spans"):
            wait(lambda sink=sink: collector.metrics().total("sink_up", sink=sink) == 1)  # type: ignore[misc]
        collector.kill()
        assert collector.start().metrics().total("requests_total") == 149
        kill(journal)
        collector.stop()


# -- Phoenix --


# failure 62
@pytest.mark.long
def test_a_phoenix_that_hangs_costs_traces_and_nothing_else(collecting: Callable[..., Collecting]) -> None:
    with receiving() as hanging:
        hanging.hold.clear()
        collector = collecting(phoenix={"url": hanging.url}).start()
        journal = Journal(collector.journal_path, 4 * 1024 * 1024)
        for number in range(2200):
            append(journal, closing(make_record(number)))
        wait(lambda: len(collector.rows("id")) == 2200)
        wait(lambda: collector.metrics().total("spans_dropped_total", reason="full") == 200 * 4)
        assert collector.metrics().total("traces_waiting") == 2000
        assert collector.metrics().total("sink_up", sink="ledger") == 1
        kill(journal)
        hanging.delay = 1.0  # now it is only slow: sending all that waits would take minutes
        hanging.hold.set()
        wait(lambda: collector.metrics().total("spans_exported_total") > 0)
        collector.running.send_signal(signal.SIGTERM)
        assert collector.running.wait(25) == 0, "it must not wait for Phoenix as long as for a database"
        assert "traces not sent; they will be tried again at the next start" in collector.log()


# -- our own processes --


@contextmanager
def halted(product: Glasshouse, role: str) -> Iterator[None]:
    """One of the processes does nothing at all, and is there."""
    pid = product.kill(role, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_is_served_without_a_collector_is_taken_up_later(
    collecting: Callable[..., Collecting], tmp_path: Path, vllm: ScriptedVLLM
) -> None:
    with Worker([vllm.url], {"journal": {"segment_bytes": 64 * 1024}}, directory=tmp_path / "state") as worker:
        replies = [worker.ask(chat({"tokens": 2}, stream=number % 2 == 0)) for number in range(300)]
        assert {reply.status for reply in replies} == {200}
        collector = collecting().start()
        wait(lambda: len(collector.rows("id")) == 300)
        assert {row["id"] for row in collector.rows("id")} == {reply.header("x-request-id") for reply in replies}
        wait(lambda: collector.metrics().total("requests_total") == 300)
        assert len(list((tmp_path / "state" / "journal").glob("*.seg"))) > 1
        wait(lambda: len(list((tmp_path / "state" / "journal").glob("*.seg"))) == 1)
        collector.stop()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_while_control_hangs_keys_wait_and_requests_do_not(glasshouse: Start, vllm: ScriptedVLLM) -> None:
    running = Running(glasshouse([vllm.url]))
    engine = open_database(running.product.settings.database_url)
    with halted(running.product, "control"):
        with engine.begin() as connection:
            secret, _ = create_key(connection, "new")
        until(lambda: running.metric("snapshot_age_seconds") > 20, "the snapshot to grow old")
        running.ask(3)
        assert ask(running.product.url, "/v1/models", key=secret).status == 401
    engine.dispose()
    until(lambda: ask(running.product.url, "/v1/models", key=secret).status == 200, "the new key to work")
    until(lambda: running.metric("snapshot_age_seconds") < 20, "a snapshot of today")


def _rises(name: str) -> bool:
    return name.startswith("glasshouse_") and name.endswith(("_total", "_count", "_bucket", "_sum"))


# failure 46, failure 50
@pytest.mark.long
def test_control_ends_while_its_database_hangs(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    with postgresql_server() as server:
        database = server.url_of(server.new_database(), tcp=True)
        with Control(tmp_path, [{"url": vllm.url}], database=database) as control, ThreadPoolExecutor(1) as asking:
            control.published(lambda file: bool(file.models), "the models")
            server.freeze()
            try:
                until(lambda: "no answer for" in control.get("/health")["database"], "control to say so")
                keys = asking.submit(control.get, "/keys")
                control.stop()
            finally:
                server.thaw()
            assert keys.exception(PATIENCE) is not None


# failure 64
@pytest.mark.timeout(300)
def test_what_a_dead_worker_was_doing_vanishes_and_counters_never_fall(glasshouse: Start, vllm: ScriptedVLLM) -> None:
    """Under load, with a scrape after the other."""
    running = Running(glasshouse([vllm.url], {"metrics": {"listen": "127.0.0.1:0"}}))
    product = running.product
    stop = threading.Event()
    fallen: list[str] = []

    def scrape() -> None:
        before: dict[str, float] = {}
        while not stop.is_set():
            now = {f"{each.name} {sorted(each.labels.items())}": each.value for each in product.metrics() if _rises(each.name)}
            fallen.extend(name for name, value in before.items() if now.get(name, -1.0) < value)
            before = now

    def load() -> None:
        while not stop.is_set():
            try:
                ask(product.url, CHAT, chat({"tokens": 20, "interval": 0.005}), key=product.key)
            except OSError:
                continue  # the worker was killed

    with ThreadPoolExecutor(6) as threads:
        working = [threads.submit(scrape), threads.submit(scrape), *(threads.submit(load) for _ in range(4))]
        try:
            for _ in range(3):
                until(lambda: running.metric("requests_in_flight") > 0, "requests in flight")
                worker = product.kill("worker")
                product.wait_replaced("worker", worker)
                until(lambda: running.metric("workers") == 1, "the dead one to be gone")
        finally:
            stop.set()
        for each in working:
            each.result(PATIENCE)
    assert fallen == []
    until(lambda: running.metric("requests_in_flight") == 0, "nobody to be at work")
    assert running.metric("backend_requests_in_flight") == 0
    until(lambda: running.metric("connections") == 0, "nobody to be connected")


# -- backends --


@pytest.mark.timeout(300)
def test_however_a_backend_fails_its_attempts_tell(glasshouse: Start, vllm: ScriptedVLLM) -> None:  # failure 7, 11, 12, 24
    with deaf_host() as deaf, socket.create_server(("127.0.0.1", 0)) as freed:
        nobody = f"http://127.0.0.1:{freed.getsockname()[1]}"
        freed.close()
        backends = [
            {"url": vllm.url, "name": "odd"},
            {"url": nobody, "name": "nobody", "models": ["gone"]},
            {"url": deaf, "name": "deaf", "models": ["deaf"]},
        ]
        timeouts = {"connect": 0.5, "first_byte": 0.5, "between_chunks": 0.5}
        product = glasshouse(backends, {"timeouts": timeouts}, models=False)
        running = Running(product)
        until(lambda: "smollm2" in product.snapshot().models, "the models")
        until(lambda: ask(product.url, "/v1/models/smollm2", key=product.key).status == 200, "the workers to know")
        scripts: dict[str, tuple[dict[str, Any], int]] = {
            "first_byte_timeout": ({"hang": True}, 504),
            "idle_timeout": ({"hang_after_events": 3}, 200),
            "upstream_disconnected": ({"cut_after_events": 3}, 200),
            "bad_gateway": ({"raw": "SSH-2.0-OpenSSH_9.2\r\n"}, 502),
            "http_500": ({"status": 500}, 500),
            "ok": ({}, 200),
        }
        for result, (script, status) in scripts.items():
            assert ask(product.url, CHAT, chat(script), key=product.key).status == status, result
        for model in ("gone", "deaf"):
            assert ask(product.url, CHAT, chat(model=model), key=product.key).status == 503
        until(lambda: running.metric("requests_total", key="default") == len(scripts) + 2, "the requests to be counted")
        for result in scripts:  # probes, which follow, have attempts too
            assert running.metric("attempts_total", backend="odd", result=result) >= 1, result
        assert running.metric("attempts_total", backend="nobody", result="upstream_unreachable") >= 1
        assert running.metric("attempts_total", backend="deaf", result="upstream_unreachable") >= 1


@pytest.mark.timeout(300)
def test_a_backend_that_flaps_fails_no_request(glasshouse: Start, vllm: ScriptedVLLM) -> None:  # failure 52
    with ScriptedVLLM() as flapping:
        port = flapping.port
        running = Running(glasshouse([{"url": vllm.url, "name": "steady"}, {"url": flapping.url, "name": "flapping"}]))
        running.ask(6)
    for _ in range(4):
        running.ask(6)
        with ScriptedVLLM(port=port):
            running.ask(6)
    until(lambda: running.metric("requests_total", outcome="ok") == len(running.answered), "the counts")
    for result in ("ok", "upstream_unreachable"):
        assert running.metric("attempts_total", backend="flapping", result=result) > 0
    assert running.metric("attempts_total", backend="steady", result="ok") > 0


# failure 67
def test_clients_of_backends_survive_being_made_anew(tmp_path: Path) -> None:
    """The catalogue is published again and again, with the backend here and there, while requests run. The engines keep
    connections for as long as we do: what is no longer wanted is ours to close."""
    with (
        ScriptedVLLM(keep_alive=600) as here,
        ScriptedVLLM(keep_alive=600) as there,
        Worker([here.url], directory=tmp_path) as worker,
        ThreadPoolExecutor(4) as clients,
    ):
        statuses: list[int] = []
        stop = threading.Event()
        sockets = worker.open_sockets

        def load() -> None:
            with WireClient(worker.url) as client:
                for number in count():
                    if stop.is_set():
                        return
                    body = chat({"tokens": 3, "interval": 0.002}, stream=number % 2 == 0)
                    statuses.append(client.ask(CHAT, body, key=worker.key).status)

        running = [clients.submit(load) for _ in range(4)]
        try:
            for turn in range(30):
                worker.backends = [backend((here, there)[turn % 2].url, "b0")]
                worker.publish()
        finally:
            stop.set()
        for each in running:
            each.result(PATIENCE)
        assert set(statuses) == {200}
        assert len(statuses) > 30
        worker.until(lambda: worker.open_sockets <= sockets or None, "the last connection to be closed")


# failure 66
def test_on_a_full_disk_what_has_begun_ends_as_it_did_and_the_rest_is_counted(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    with small_disk(tmp_path / "disk", 8 * 1024 * 1024) as disk:
        config = {"journal": {"segment_bytes": 64 * 1024}}
        with Worker([vllm.url], config, directory=disk.path / "state") as worker:
            begun = [worker.begin(chat({"tokens": 8, "hang_after_events": 3})) for _ in range(15)]
            worker.until_in_flight(15)
            disk.fill()
            asked = 0
            while worker.heartbeat().unrecorded < 5:
                assert worker.ask(chat({"tokens": 1}, stream=False)).status == 200
                asked += 1
            vllm.release()
            streams = [client.read() for client in begun]
            assert {stream.ending for stream in streams} == {"complete"}
            worker.until(lambda: worker.heartbeat().in_flight == 0 or None, "the streams to end")
            unrecorded = worker.heartbeat().unrecorded
            worker.kill()
            records = {record.id.hex(): record for record in worker.records()}
            assert {records[stream.header("x-request-id") or ""].outcome for stream in streams} == {Outcome.OK}
            assert {record.outcome for record in records.values()} == {Outcome.OK}, "nothing that ended well is booked as crashed"
            assert len(records) + unrecorded == 15 + asked
            for client in begun:
                client.close()


# -- what must be nowhere --

PROMPT: Final = "canary-prompt-5d1f"
ECHO: Final = "what-an-engine-says"
"""What an engine's errors repeat of a prompt."""
BAD_KEY: Final = "gh-canary-of-a-wrong-key-2b7e"
ENGINE_KEY: Final = "canary-key-of-an-engine-93aa"
PHOENIX_KEY: Final = "canary-key-of-phoenix-06c4"


def files_of(product: Glasshouse) -> dict[str, bytes]:
    """All that lies in its state directory."""
    return {path.name: path.read_bytes() for path in product.state_dir.rglob("*") if path.is_file()}


def told_everywhere(product: Glasshouse, phoenix: Receiver) -> dict[str, bytes]:
    """All that is to be seen of it, by where: its files, its endpoints, its traces."""
    told = ("/health", "/keys?revoked=true", "/models", "/backends", "/admins", "/usage", "/requests", "/audit", "/export")
    key = {"Authorization": f"Bearer {product.admin_key}"}
    pages = {}
    for page in (product.metrics_url, *(product.control_url + path for path in told)):
        with _direct.open(Request(page, headers=key), timeout=PATIENCE) as answer:  # noqa: S310  (ours)
            pages[page] = answer.read()
    return files_of(product) | pages | {"traces": b"".join(span.SerializeToString() for span in phoenix.spans)}


def where(needles: Iterable[str], seen: dict[str, bytes]) -> list[str]:
    """Each place with one of them in it, and what is around it there."""
    found = ((needle, place, data.find(needle.encode())) for needle in needles for place, data in seen.items())
    return [f"{needle} in {place}: {seen[place][max(0, at - 100) : at + 60]!r}" for needle, place, at in found if at >= 0]


def talkative(secret: str) -> Iterator[tuple[str, object, dict[str, str]]]:
    """Requests of every kind, good and bad, with the prompt wherever a prompt can be: (path, body, headers)."""
    key = {"Authorization": f"Bearer {secret}"}
    messages = [
        {"role": "system", "content": PROMPT},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": PROMPT},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PROMPT}"}},
            ],
        },
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": PROMPT}}]},
        {"role": "tool", "tool_call_id": "1", "content": PROMPT},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": PROMPT, "parameters": {"type": "object"}}}]
    full: dict[str, Any] = {
        "messages": messages,
        "tools": tools,
        "stop": [PROMPT],
        "metadata": {"note": PROMPT},
        "unheard_of": PROMPT,
    }
    content = {"content": f"You said {PROMPT}."}
    for stream in (True, False):
        yield CHAT, chat(content, stream=stream, **full), key
        yield CHAT, chat({"tools": True}, stream=stream, **full), key
        for script in ({"status": 400}, {"status": 500}, {"status": 429}):
            yield CHAT, chat({**script, "error": f"cannot parse {ECHO}"}, stream=stream, **full), key
    odd_error = json.dumps({"error": {"message": ECHO, "type": f"{ECHO} is no type", "code": f"{ECHO} is no code"}})
    odd: list[dict[str, Any]] = [
        {"error_event_after": 0, "error": ECHO},
        {"error_event_after": 3, "error": ECHO},
        {**content, "cut_after_events": 2},
        {"hang": True},
        {"hang_after_events": 2},
        {"raw": f"{PROMPT}\r\n"},
        {"raw": f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{odd_error}"},
    ]
    for script in odd:
        yield CHAT, chat(script, **full), key
    yield "/v1/completions", {"model": "smollm2", "prompt": PROMPT}, key
    yield "/v1/embeddings", {"model": "smollm2", "input": [PROMPT]}, key
    yield (
        "/v1/messages",
        {"model": "smollm2", "max_tokens": 5, "messages": [{"role": "user", "content": PROMPT}]},
        {"x-api-key": secret},
    )
    yield "/v1/responses", {"model": "smollm2", "input": PROMPT}, key
    # What is refused before it reaches an engine.
    yield CHAT, f'{{"model": "smollm2", "messages": "{PROMPT}'.encode(), key
    yield CHAT, f'{{"model": "smollm2", "{ECHO}": 1, "{ECHO}": 2}}'.encode(), key
    yield CHAT, {"model": "smollm2", "messages": PROMPT, "n": PROMPT, "max_tokens": PROMPT}, key
    yield CHAT, {**chat(**full), "n": 10**9}, key
    yield CHAT, [PROMPT], key
    yield CHAT, chat(**full), {"Authorization": f"Bearer {BAD_KEY}"}
    yield CHAT, chat(**full), {"x-api-key": BAD_KEY}
    yield CHAT, chat(**full), {"Authorization": f"Basic {secret}"}
    yield CHAT, chat(**full), {**key, "x-api-key": BAD_KEY}
    yield f"/v1/models?api_key={secret}", None, {}
    yield f"/v1/{secret}", None, key
    yield f"/{secret}/../{BAD_KEY}?{PROMPT}", None, {}


# failure 76, failure 77
@pytest.mark.timeout(400)
@pytest.mark.parametrize("capturing", [False, True], ids=["capture off", "capture on"])
def test_keys_are_nowhere_and_prompts_only_where_they_are_wanted(glasshouse: Start, vllm: ScriptedVLLM, capturing: bool) -> None:
    with receiving() as phoenix:
        product = glasshouse(
            [{"url": vllm.url, "api_key_env": "CANARY_ENGINE"}],
            {
                "phoenix": {"url": phoenix.url, "api_key_env": "CANARY_PHOENIX"},
                "capture": {"content": capturing},
                "timeouts": {"first_byte": 1.0, "between_chunks": 1.0},
            },
            env={"CANARY_ENGINE": ENGINE_KEY, "CANARY_PHOENIX": PHOENIX_KEY},
        )
        database = open_database(product.settings.database_url)
        with database.begin() as connection:
            secret, _ = create_key(connection, "canary")
        database.dispose()
        until(lambda: ask(product.url, "/v1/models", key=secret).status == 200, "the key to work")
        canaries = (secret, BAD_KEY, ENGINE_KEY, PHOENIX_KEY, *([] if capturing else [PROMPT, ECHO]))
        with halted(product, "collector"):  # the journal keeps what it gets
            statuses = [ask(product.url, path, body, headers=headers).status for path, body, headers in talkative(secret)]
            assert {200, 400, 401, 404, 429, 500, 502, 504} <= set(statuses)
            with WireClient(product.url) as leaving, WireClient(product.url) as dying:
                for client in (leaving, dying):
                    client.send(request(CHAT, chat({"tokens": 99, "interval": 0.05, "content": f"{PROMPT} " * 99}), key=secret))
                    client.read(events=5)
                leaving.reset()
                worker = product.kill("worker")
                product.wait_replaced("worker", worker)
            assert where(canaries, files_of(product)) == []
        until(lambda: product.metrics().total("glasshouse_journal_lag_bytes") == 0, "everything to be collected")
        accepted = product.rows()
        assert len(accepted) > 20
        until(lambda: {row["trace_id"] for row in accepted} <= set(phoenix.traces()), "the traces")
        seen = told_everywhere(product, phoenix)
        assert where(canaries, seen) == []
        assert (PROMPT.encode() in seen["traces"]) == capturing
        assert {headers["authorization"] for _, headers, _ in phoenix.posts} == {f"Bearer {PHOENIX_KEY}"}, "it was used"
        sent = {(name.lower(), value) for received in vllm.requests for name, value in received.headers}
        assert (b"authorization", f"Bearer {ENGINE_KEY}".encode()) in sent, "so was this"
