"""The collector as a process: whatever happens to it, the ledger has every row once and the counters say the same.

Workers are played by the test: real journals, real heartbeats, written in this process and "killed" by letting go of their locks.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing as closed_at_the_end
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.errors import Outcome
from proxy.exchange import Record
from proxy.journal import BackendBeat, Heartbeat, HeartbeatFile, Journal, JournalFull
from proxy.settings import Settings
from proxy.store import open_database, reader, usage
from tests.unit.collectors.made import make_coalesced, make_hit, make_queued, make_record, make_rejected, make_retried
from tests.unit.collectors.receiver import Receiver, receiving
from tests.unit.journal.made import SEGMENT_BYTES, closing, dead_segment, kill, opening, progress

PATIENCE = 30.0


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


class Collecting:
    """A state directory, and the collector that works in it."""

    def __init__(self, state: Path, **config: Any) -> None:
        state.mkdir(exist_ok=True)
        config = {"phoenix": {"url": None}, "backends": [{"url": "http://127.0.0.1:1", "name": "gpu-0"}], **config}
        config.setdefault("metrics", {"listen": "127.0.0.1:0"})
        self.settings = Settings.of({"state_dir": str(state), **config})
        self.file = state / "settings.json"
        self.settings.write(self.file)
        self.state = state
        self.journal_path = self.settings.journal_path
        self.port = 0
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Collecting:
        already = len(self.said("collecting"))
        self.starts += 1
        with (self.state / f"{self.starts:04d}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "collectors", "--settings", str(self.file)], stderr=log, stdout=log
            )
        wait(lambda: len(self.said("collecting")) > already or self.running.poll() is not None)
        assert self.running.poll() is None, self.log()
        self.port = int(self.said("collecting")[-1]["metrics"].rpartition(":")[2])
        return self

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def kill(self) -> None:
        self.running.kill()
        self.running.wait()

    def stop(self) -> None:
        """A clean stop, as the supervisor does it."""
        self.running.send_signal(signal.SIGTERM)
        assert self.running.wait(PATIENCE) == 0, self.log()

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.state.glob("*.log")))

    def said(self, message: str) -> list[dict[str, Any]]:
        """The log's lines with this message; the last line of a process that was killed may be half of one."""
        whole = [line for line in self.log().splitlines() if line.endswith("}")]
        return [line for line in map(json.loads, whole) if line["message"] == message]

    def rows(self, columns: str = "*") -> list[dict[str, Any]]:
        path = self.state / "glasshouse.db"
        if not path.exists():
            return []
        with closed_at_the_end(sqlite3.connect(path, timeout=PATIENCE)) as connection:
            connection.row_factory = sqlite3.Row
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone():
                return []
            return [dict(row) for row in connection.execute(f"SELECT {columns} FROM requests")]  # noqa: S608

    def metrics(self) -> Metrics:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return Metrics(text)


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.values = {
            (sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples
        }
        rising = {family.name for family in families if family.type == "counter"}
        self.rising = {
            key: value
            for key, value in self.values.items()
            if key[0].startswith("glasshouse_") and (key[0].removesuffix("_total") in rising or key[0].endswith("_count"))
        }

    def total(self, name: str, **labels: str) -> float:
        return sum(
            value
            for (each, have), value in self.values.items()
            if each == f"glasshouse_{name}" and labels.items() <= dict(have).items()
        )


def append(journal: Journal, payload: bytes) -> None:
    """As a worker in no hurry: the next segment is being prepared."""
    while True:
        try:
            return journal.append(payload)
        except JournalFull:
            threading.Event().wait(0.002)


def agree(rows: list[dict[str, Any]], metrics: Metrics) -> None:
    """Prometheus' counters are the ledger's sums."""
    assert metrics.total("requests_total") == len(rows)
    for outcome, number in Counter(row["outcome"] for row in rows).items():
        assert metrics.total("requests_total", outcome=outcome) == number
    for kind, column in (("input", "input_tokens"), ("cached_input", "cached_tokens"), ("output", "output_tokens")):
        assert metrics.total("tokens_total", kind=kind) == sum(row[column] for row in rows)
    assert round(metrics.total("cost_total") * 1e9) == sum(row["cost_nano"] for row in rows)
    gaps = sum(sum(json.loads(row["inter_token_counts"])) for row in rows)
    assert metrics.total("inter_token_latency_seconds_count") == gaps
    for why, number in Counter(row["routed_by"] for row in rows if row["routed_by"]).items():
        assert metrics.total("routing_decisions_total", reason=why) == number
    assert metrics.total("retries_total") == sum(max(0, len(json.loads(row["attempts"])) - 1) for row in rows)
    assert metrics.total("queued_requests_total") == sum(row["queued_ns"] > 0 for row in rows)
    for result, number in Counter(row["cache"] for row in rows if row["cache"]).items():
        assert metrics.total("cache_requests_total", result=result) == number
    for kind in ("input", "output"):
        assert metrics.total("cache_saved_tokens_total", kind=kind) == sum(row[f"saved_{kind}_tokens"] for row in rows)
    for name, column in (("cache_saved_cost_total", "saved_cost_nano"), ("cache_saved_seconds_total", "saved_ns")):
        assert round(metrics.total(name) * 1e9) == sum(row[column] for row in rows)
    assert metrics.total("cache_age_seconds_count") == sum(row["cache"] == "hit" for row in rows)


# -- exactly once --


class Workers:
    """Two workers at a time that serve, die and come back; all that they promised is in `expected`."""

    def __init__(self, directory: Path, dice: random.Random) -> None:
        self._directory = directory
        self._dice = dice
        self._numbers = 0
        self._workers = [self._begin(), self._begin()]
        self.expected: dict[str, str] = {}

    def _begin(self) -> tuple[Journal, dict[int, Record]]:
        return Journal(self._directory, SEGMENT_BYTES), {}

    def step(self) -> None:
        which = self._dice.randrange(2)
        journal, running = self._workers[which]
        what = self._dice.random()
        if what < 0.5 or not running:
            self._numbers += 1
            make = self._dice.choice([make_record, make_queued, make_retried, make_rejected, make_hit, make_coalesced])
            record = running[self._numbers] = make(self._numbers)
            append(journal, opening(record))
        elif what < 0.6:
            append(journal, progress(self._dice.choice(list(running.values()))))
        elif what < 0.99:
            number = self._dice.choice(list(running))
            record = running.pop(number)
            append(journal, closing(record))
            self.expected[record.id.hex()] = Outcome(record.outcome).label
        else:
            self._end(which)

    def _end(self, which: int, again: bool = True) -> None:
        journal, running = self._workers[which]
        kill(journal)
        self.expected |= {record.id.hex(): "crashed" for record in running.values()}
        if again:
            self._workers[which] = self._begin()

    def end(self) -> None:
        for which in range(2):
            self._end(which, again=False)


@pytest.mark.parametrize("kills", [6, pytest.param(150, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_a_collector_killed_at_any_moment_stores_each_request_once(collecting: Callable[..., Collecting], kills: int) -> None:
    dice = random.Random(49)
    collector = collecting().start()
    workers = Workers(collector.journal_path, dice)
    seen: dict[Any, float] = {}
    for _ in range(kills):
        for _ in range(dice.randrange(40, 400)):
            workers.step()
        if dice.random() < 0.5:
            seen = assert_rises(seen, collector.metrics())
        threading.Event().wait(dice.random() * 0.4)  # any moment
        collector.kill()
        collector.start()
    seen = assert_rises(seen, collector.metrics())
    workers.end()
    collector.stop()
    rows = collector.rows()
    assert {row["id"]: row["outcome"] for row in rows} == workers.expected
    assert len(rows) == len(workers.expected)
    collector.start()
    metrics = collector.metrics()
    assert_rises(seen, metrics)
    agree(rows, metrics)
    collector.stop()
    assert list(collector.journal_path.iterdir()) == [], "what everybody has is deleted"


def assert_rises(before: Mapping[Any, float], metrics: Metrics) -> dict[Any, float]:
    """To Prometheus a counter that falls is a restart from zero: it would count everything again."""
    fallen = {key: (value, metrics.rising.get(key)) for key, value in before.items() if metrics.rising.get(key, -1.0) < value}
    assert fallen == {}
    return metrics.rising


def test_a_stop_right_after_the_start_leaves_nothing_unread(collecting: Callable[..., Collecting]) -> None:
    collector = collecting()
    journal = Journal(collector.journal_path, 1024 * 1024)
    for number in range(6000):
        append(journal, closing(make_record(number)))
    append(journal, opening(make_record(6000)))
    kill(journal)
    collector.start()
    collector.stop()
    rows = collector.rows("outcome, count(*) AS count")
    assert sum(row["count"] for row in rows) == 6001
    assert collector.said("ended")


def test_a_second_signal_cuts_nothing_short(collecting: Callable[..., Collecting]) -> None:
    collector = collecting().start()
    wait(lambda: (collector.state / "glasshouse.db").exists() and collector.metrics().total("sink_up", sink="ledger") == 1)
    with lock(collector):
        dead_segment(collector.journal_path, closing(make_record(1)))
        collector.running.send_signal(signal.SIGTERM)
        wait(lambda: collector.said("draining"))
        collector.running.send_signal(signal.SIGTERM)
    assert collector.running.wait(PATIENCE) == 0
    assert len(collector.rows()) == 1


# -- the database --


class lock:  # noqa: N801  (reads as a word)
    """Another process that holds SQLite's write lock."""

    def __init__(self, collector: Collecting) -> None:
        self._connection = sqlite3.connect(collector.state / "glasshouse.db", isolation_level=None, timeout=PATIENCE)

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_: object) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()


# failure 46, failure 47
def test_a_database_that_is_away_loses_nothing_and_shows(collecting: Callable[..., Collecting], tmp_path: Path) -> None:
    database = tmp_path / "volume"  # not mounted yet
    collector = collecting(database=f"sqlite:///{database / 'ledger.db'}").start()
    journal = Journal(collector.journal_path, SEGMENT_BYTES)
    for number in range(600):
        append(journal, closing(make_record(number)))
    wait(lambda: collector.metrics().total("requests_total") == 600)
    metrics = collector.metrics()
    assert metrics.total("sink_up", sink="ledger") == 0
    assert metrics.total("sink_up", sink="metrics") == 1
    assert metrics.total("journal_lag_seconds", sink="ledger") > 0
    assert len(list(collector.journal_path.glob("*.seg"))) >= 3, "segments wait on disk"
    database.mkdir()
    wait(lambda: collector.metrics().total("sink_up", sink="ledger") == 1)
    journal.close()
    collector.stop()
    with closed_at_the_end(sqlite3.connect(database / "ledger.db")) as connection:
        assert connection.execute("SELECT count(*) FROM requests").fetchone() == (600,)
    assert len(collector.said("sink down; records wait in the journal")) == 1
    assert len(collector.said("sink up again")) == 1


# -- what it says of itself and of the workers --


def test_workers_show_while_they_live_and_their_totals_stay(collecting: Callable[..., Collecting]) -> None:
    collector = collecting().start()
    journal = Journal(collector.journal_path, SEGMENT_BYTES)
    file = HeartbeatFile(collector.journal_path, journal.incarnation)
    append(journal, closing(make_record(1)))
    segment, position = journal.position
    beat = Heartbeat(
        journal.incarnation,
        unix_ns=time.time_ns(),
        in_flight=7,
        in_flight_by_backend={"gpu-0": 5},
        connections=9,
        segment=segment,
        segment_position=position,
        unrecorded=2,
        unaccepted={"invalid_api_key": 3},
        waiting=4,
        backends={"gpu-0": BackendBeat("suspect", "upstream_timeout", 5, 900, 400, ejections=1, probes=2, failed_probes=1)},
        retries_denied=1,
    )
    file.write(beat)
    metrics = collector.metrics()
    assert metrics.total("workers") == 1
    assert metrics.total("requests_in_flight") == 7
    assert metrics.total("backend_requests_in_flight", backend="gpu-0") == 5
    assert metrics.total("connections") == 9
    assert metrics.total("requests_waiting") == 4
    assert metrics.total("backend_state", backend="gpu-0", state="suspect") == 1
    assert metrics.total("backend_tokens_in_flight", backend="gpu-0") == 900
    wait(lambda: collector.metrics().total("journal_lag_bytes") == 0)
    beat.unaccepted["invalid_api_key"] = 4  # its last word, seen by no scrape
    beat.retries_denied, beat.backends["gpu-0"].ejections, beat.backends["gpu-0"].probes = 3, 2, 5
    file.write(beat)
    kill(journal)
    file.close()
    wait(lambda: not list(collector.journal_path.glob("*.heartbeat")))
    for _ in range(2):
        collector.kill()
        metrics = collector.start().metrics()
        assert metrics.total("workers") == metrics.total("requests_in_flight") == 0
        assert metrics.total("unaccepted_requests_total", code="invalid_api_key") == 4
        assert metrics.total("unrecorded_total") == 2
        assert metrics.total("requests_waiting") == metrics.total("backend_state") == 0
        assert metrics.total("backend_tokens_in_flight", backend="gpu-0") == 0
        assert metrics.total("backend_ejections_total", backend="gpu-0") == 2
        assert metrics.total("backend_probes_total", backend="gpu-0") == 5
        assert metrics.total("backend_failed_probes_total", backend="gpu-0") == 1
        assert metrics.total("retries_denied_total") == 3


def test_unreadable_bytes_are_said_counted_and_kept(collecting: Callable[..., Collecting]) -> None:
    collector = collecting()
    good = closing(make_record(1))
    path = dead_segment(collector.journal_path, good, closing(make_record(2)), closing(make_record(3)))
    data = bytearray(path.read_bytes())
    data[24 + 8 + len(good) + 20] ^= 1
    path.write_bytes(data)
    collector.start()
    wait(lambda: len(collector.rows()) == 2)
    wait(lambda: collector.metrics().total("journal_damaged_segments") == 1)
    assert (collector.journal_path / f"{path.name}.damaged").read_bytes() == bytes(data)
    assert {line["sink"] for line in collector.said("unreadable bytes in the journal")} == {"ledger", "metrics"}
    collector.stop()


def test_captured_content_does_not_outstay(collecting: Callable[..., Collecting]) -> None:
    collector = collecting()
    path = dead_segment(collector.settings.content_path, b"x" * 50)
    os.utime(path, (0, 0))
    collector.start()
    wait(lambda: not path.exists())
    collector.stop()


# -- starting --


def test_a_second_collector_says_so_and_leaves(collecting: Callable[..., Collecting]) -> None:
    collector = collecting().start()
    second = subprocess.run(
        [sys.executable, "-m", "collectors", "--settings", str(collector.file)],
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert second.returncode == 1
    assert "another collector" in json.loads(second.stderr)["error"]
    collector.stop()


def test_a_port_in_use_is_said_and_the_process_leaves(collecting: Callable[..., Collecting]) -> None:
    first = collecting().start()
    other = collecting("other", metrics={"listen": f"127.0.0.1:{first.port}"})
    second = subprocess.run(
        [sys.executable, "-m", "collectors", "--settings", str(other.file)], capture_output=True, check=False, timeout=PATIENCE
    )
    assert second.returncode == 1
    assert "in use" in json.loads(second.stderr)["error"]
    first.stop()


def test_the_state_is_nobody_elses_business(collecting: Callable[..., Collecting]) -> None:
    collector = collecting().start()
    dead_segment(collector.journal_path, closing(make_record(1)))
    wait(lambda: collector.metrics().total("requests_total") == 1)
    collector.stop()
    for name in ("collector-metrics", "collector-id", "collector.lock", "glasshouse.db"):
        assert (collector.state / name).stat().st_mode & 0o077 == 0


# -- all together --


@pytest.fixture
def phoenix() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_ledger_prometheus_and_phoenix_agree(collecting: Callable[..., Collecting], phoenix: Receiver) -> None:
    price = {"price": {"input": "0.1", "cached_input": "0.02", "output": "0.4"}}
    phoenix.prices.append(
        {
            "id": "0",
            "name": "qwen3-8b (glasshouse)",
            "namePattern": "^qwen3\\-8b$",
            "startTime": None,
            "costs": [
                {"tokenType": "input", "kind": "PROMPT", "costPerMillionTokens": 0.1},
                {"tokenType": "cache_read", "kind": "PROMPT", "costPerMillionTokens": 0.02},
                {"tokenType": "output", "kind": "COMPLETION", "costPerMillionTokens": 0.4},
            ],
        }
    )  # known already: no waiting until Phoenix has read its table again
    collector = collecting(phoenix={"url": phoenix.url}, models={"qwen3-8b": price}).start()
    workers = Workers(collector.journal_path, random.Random(5))
    for _ in range(400):
        workers.step()
    workers.end()
    wait(lambda: len(collector.rows()) == len(workers.expected))
    wait(lambda: collector.metrics().total("traces_waiting") == 0 and len(phoenix.traces()) == len(workers.expected))
    rows, metrics = collector.rows(), collector.metrics()
    agree(rows, metrics)
    assert sorted(phoenix.traces()) == sorted(row["trace_id"] for row in rows)
    attributes = [{each.key: each.value for each in span.attributes} for span in phoenix.spans]
    for key, column in (("prompt", "input_tokens"), ("completion", "output_tokens")):
        told = sum(each[f"llm.token_count.{key}"].int_value for each in attributes if f"llm.token_count.{key}" in each)
        assert told == sum(row[column] for row in rows)
    costs = sum(each["llm.cost.total"].double_value for each in attributes if "llm.cost.total" in each)
    assert round(costs * 1e9) == sum(row["cost_nano"] for row in rows)
    assert metrics.total("spans_exported_total") == len(phoenix.spans)
    assert phoenix.mutations == 0
    collector.stop()


def test_rows_that_are_too_old_become_sums(collecting: Callable[..., Collecting]) -> None:
    collector = collecting(retention={"requests_days": 32})
    now, day = time.time_ns(), 86_400 * 10**9
    makers = (make_record, make_record, make_hit, make_hit, make_coalesced)
    records = [makers[number % 5](number, received_unix_ns=now - number % 2 * 40 * day) for number in range(100)]
    dead_segment(collector.journal_path, *map(closing, records))
    collector.start()
    wait(lambda: len(collector.rows("id")) + collector.metrics().total("retention_removed_rows_total", kind="requests") == 100)
    collector.stop()
    collector.start()  # it looks at once
    wait(lambda: len(collector.rows("id")) == 50)
    wait(lambda: collector.metrics().total("retention_overdue_days") == 0)
    dead_segment(collector.journal_path, closing(make_record(1000, received_unix_ns=now)))
    wait(lambda: len(collector.rows("id")) == 51)
    collector.stop()
    engine = open_database(collector.settings.database_url)
    with reader(engine).connect() as connection:
        [used] = usage(connection)
    engine.dispose()
    assert (used.requests, used.cost_nano) == (101, {"USD": 41 * make_record().cost_nano})
    assert (used.cache_hits, used.coalesced, used.saved_ns) == (40, 20, 40 * make_hit().saved_ns)
    assert used.saved_cost_nano == {"USD": 60 * make_hit().saved_cost_nano}
    assert (used.saved_input_tokens, used.saved_output_tokens) == (60 * 600, 60 * 5)
    assert [line for line in collector.log().splitlines() if '"error"' in line] == []
