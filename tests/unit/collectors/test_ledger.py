"""The ledger's sink: rows and position together, whatever the database does."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection

from collectors.records import ledger
from collectors.records.ledger import LedgerSink
from proxy.exchange import Record, decode_record
from proxy.journal import Batch, Checkpoint
from proxy.spend import Period
from proxy.spend.file import Row, decode_spend
from proxy.store import StoreError, day_of, engine, insert_records, remove_expired
from tests.unit.collectors.made import DAY, identity, make_record, make_rejected

TOTAL = Period("total")
DAY_NS = 86_400 * 10**9


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_MS", 20)
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(ledger, "SHARE", 0)


def make_sink(
    directory: Path, collector: str = "one", database: str = "ledger.db", periods: Sequence[Period] = (TOTAL,)
) -> LedgerSink:
    url = f"sqlite:///{directory / database}"
    return LedgerSink(url, collector, directory / "unstored", directory / f"spend-{collector}", lambda: periods, "USD")


def written(directory: Path, collector: str = "one") -> tuple[Checkpoint, list[Row]]:
    """What the spend file says: the position, and the rows of all windows."""
    file = decode_spend((directory / f"spend-{collector}").read_bytes())
    return file.checkpoint, [row for period in file.periods for each in period.windows for row in each.rows]


def rows(directory: Path) -> list[str]:
    with sqlite3.connect(directory / "ledger.db") as connection:
        found = [identity for (identity,) in connection.execute("SELECT id FROM requests ORDER BY id")]
    connection.close()
    return found


def batch(position: int, *records: Record) -> Batch:
    return Batch(list(records), Checkpoint({"segment": position}), False, [])


def stored(sink: LedgerSink) -> Checkpoint | None:
    return sink.stored


def cost(count: int, worker: str = "") -> Row:
    """Of so many `make_record`."""
    return Row(worker, "key_1", "", 30_000 * count, 605 * count, 0)


def ids(*numbers: int) -> list[str]:
    return [identity(number).hex() for number in numbers]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    other = sqlite3.connect(directory / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_rows_and_position_are_stored_together(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    assert sink.load() == Checkpoint()
    sink.write(batch(7, make_record(1), make_rejected(2)))
    assert rows(tmp_path) == ids(1, 2)
    sink.close(1.0)
    again = make_sink(tmp_path)
    assert again.load() == Checkpoint({"segment": 7})
    again.close(1.0)


# failure 47, failure 65
def test_while_the_database_is_locked_nothing_moves_and_then_all_is_there_once(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1)))
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(sink.failures):
                sink.write(batch(2, make_record(2)))
        sink.tend()
        assert sink.stored == Checkpoint({"segment": 1})
    sink.write(batch(2, make_record(2)))
    assert rows(tmp_path) == ids(1, 2)
    sink.close(1.0)


# failure 46
def test_a_database_that_is_not_there_yet_is_asked_again(tmp_path: Path) -> None:
    sink = make_sink(tmp_path, database="missing/ledger.db")
    for _ in range(2):
        with pytest.raises(sink.failures):
            sink.load()
    assert sink.stored is None, "nothing is known, so nothing may be deleted"
    (tmp_path / "missing").mkdir()
    assert sink.load() == Checkpoint()
    sink.close(1.0)


def test_a_url_that_means_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        LedgerSink("nonsense", "one", tmp_path, tmp_path, list, "USD").load()


# failure 48
@pytest.mark.parametrize("step", ["insert_records", "save_checkpoint"])
def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    sink = make_sink(tmp_path)
    sink.load()

    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(ledger, step, fails)
        with pytest.raises(OSError, match="full"):
            sink.write(batch(1, make_record(1)))
    assert rows(tmp_path) == []
    assert make_sink(tmp_path).load() == Checkpoint()
    sink.write(batch(1, make_record(1)))
    assert rows(tmp_path) == ids(1)
    sink.close(1.0)


def test_collectors_share_a_database_without_sharing_a_position(tmp_path: Path) -> None:
    one, two = make_sink(tmp_path, "one"), make_sink(tmp_path, "two")
    one.load()
    one.write(batch(5, make_record(1)))
    assert two.load() == Checkpoint()
    two.write(batch(9, make_record(2)))
    assert make_sink(tmp_path, "one").load() == Checkpoint({"segment": 5})
    assert rows(tmp_path) == ids(1, 2)
    one.close(1.0)
    two.close(1.0)


def test_a_position_that_cannot_be_read_makes_no_double_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1)))
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE checkpoints SET position = x'c1'")
    connection.close()
    assert sink.load() == Checkpoint()
    assert "read again" in caplog.text
    sink.write(batch(1, make_record(1), make_record(2)))
    assert rows(tmp_path) == ids(1, 2)
    sink.close(1.0)


def test_a_position_that_cannot_be_read_counts_nothing_again_whose_row_was_taken_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1), make_record(2, received_unix_ns=make_record().received_unix_ns + 2 * DAY_NS)))
    with sink._connected().begin() as connection:
        assert remove_expired(connection, day_of(make_record()) + timedelta(1), 10) is not None
    assert rows(tmp_path) == ids(2)
    late = make_record(3, received_unix_ns=make_record().received_unix_ns + 1)
    sink.write(batch(2, late))
    assert rows(tmp_path) == ids(2, 3), "what comes late is a row like any other"
    with sqlite3.connect(tmp_path / "ledger.db") as other:
        other.execute("UPDATE checkpoints SET position = x'c1'")
    other.close()
    sink.load()
    sink.write(batch(2, make_record(1), make_record(2, received_unix_ns=make_record().received_unix_ns + 2 * DAY_NS), late))
    assert rows(tmp_path) == ids(2, 3)
    assert "counted already" in caplog.text
    sink.write(batch(3, make_record(4)))
    assert rows(tmp_path) == ids(2, 3, 4), "after that everything is taken again"
    sink.tend()
    assert written(tmp_path)[1] == [cost(4)]
    sink.close(1.0)


def test_what_the_database_refuses_for_good_is_put_aside_and_keeps_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    monstrous = make_record(2, request_bytes=2**64 - 1)
    sink.write(batch(3, make_record(1), monstrous, make_record(3)))
    assert rows(tmp_path) == ids(1, 3)
    sink.tend()
    assert sink.stored == Checkpoint({"segment": 3})
    assert written(tmp_path)[1] == [cost(2)], "what is no row isn't spent"
    (aside,) = (tmp_path / "unstored").iterdir()
    assert decode_record(aside.read_bytes()) == monstrous
    assert "put aside" in caplog.text
    sink.close(1.0)


def test_a_lock_while_sorting_out_puts_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    bad = batch(3, make_record(1), make_record(2, request_bytes=2**64 - 1))
    calls = list[int]()

    def then_locked(connection: Connection, records: list[Record], collector: str) -> int:
        calls.append(len(records))
        if len(calls) == 2:
            raise OSError("gone in the meantime")
        return insert_records(connection, records, collector)

    monkeypatch.setattr(ledger, "insert_records", then_locked)
    with pytest.raises(OSError, match="meantime"):
        sink.write(bad)
    assert not (tmp_path / "unstored").exists()
    sink.tend()
    assert sink.stored == Checkpoint()
    sink.write(bad)
    assert rows(tmp_path) == ids(1)
    sink.close(1.0)


# -- the spend file --


def test_the_journal_is_kept_until_the_spend_file_has_it(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    assert stored(sink) is None
    sink.tend()
    assert (sink.stored, []) == written(tmp_path) == (Checkpoint(), [])
    sink.write(batch(7, make_record(1, worker="w"), make_rejected(2)))
    assert (sink.stored, []) == written(tmp_path)
    sink.tend()
    assert (sink.stored, [cost(1, "w")]) == written(tmp_path) == (Checkpoint({"segment": 7}), [cost(1, "w")])
    sink.close(1.0)


def test_it_is_written_once_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 1.0)
    monkeypatch.setattr(ledger, "SHARE", 20)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sink = make_sink(tmp_path)
    sink.load()
    sink.tend()
    sink.write(batch(1, make_record(1)))
    now += 0.99
    sink.tend()
    assert sink.stored == Checkpoint()
    now += 0.01
    sink.tend()
    assert sink.stored == Checkpoint({"segment": 1})
    sink.write(batch(2, make_record(2)))
    sink.tend()
    sink.close(1.0)
    assert written(tmp_path) == (Checkpoint({"segment": 2}), [cost(2)])


def test_a_large_one_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0

    def slowly(*_: object) -> None:
        nonlocal now
        now += 0.5

    monkeypatch.setattr(ledger, "WRITE_SECONDS", 1.0)
    monkeypatch.setattr(ledger, "SHARE", 20)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(ledger, "write_spend", slowly)
    sink = make_sink(tmp_path)
    sink.load()
    sink.tend()
    sink.write(batch(1, make_record(1)))
    now += 9.9
    sink.tend()
    assert sink.stored == Checkpoint()
    now += 0.2
    sink.tend()
    assert sink.stored == Checkpoint({"segment": 1})
    sink.close(1.0)


def test_where_nothing_changes_nothing_is_written(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.tend()
    before = (tmp_path / "spend-one").stat()
    sink.tend()
    sink.close(1.0)
    assert (tmp_path / "spend-one").stat().st_mtime_ns == before.st_mtime_ns


# failure 47
def test_a_spend_file_that_cannot_be_written_keeps_the_journal(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.tend()
    (tmp_path / f"spend-one.{os.getpid()}").mkdir()
    sink.write(batch(1, make_record(1)))
    for _ in range(2):
        with pytest.raises(sink.failures):
            sink.tend()
    assert (sink.stored, []) == written(tmp_path) == (Checkpoint(), [])
    (tmp_path / f"spend-one.{os.getpid()}").rmdir()
    sink.tend()
    assert (sink.stored, [cost(1)]) == written(tmp_path) == (Checkpoint({"segment": 1}), [cost(1)])
    sink.close(1.0)


def test_a_collector_begins_with_what_the_database_has(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1, worker="w"), make_record(2, worker="x"), make_rejected(3, worker="y")))
    sink._connected().dispose()  # it is killed
    again = make_sink(tmp_path)
    again.load()
    again.write(batch(2, make_record(4, worker="w")))
    again.close(1.0)
    assert written(tmp_path) == (Checkpoint({"segment": 2}), [cost(2, "w"), cost(1, "x")])


# failure 65
def test_a_commit_whose_answer_was_lost_is_not_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1)))
    with sink._connected().begin() as connection:  # what the first try has left behind
        insert_records(connection, [make_record(2)], "one")
    sink.write(batch(2, make_record(2), make_record(3)))
    sink.tend()
    assert written(tmp_path) == (Checkpoint({"segment": 2}), [cost(3)])
    sink.write(batch(3, make_record(4)))
    sink.tend()
    assert written(tmp_path) == (Checkpoint({"segment": 3}), [cost(4)])
    sink.close(1.0)


def test_what_is_to_be_read_again_and_cannot_be_is_read_later(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.tend()
    sink.write(batch(1, make_record(1)))
    sink.write(batch(2, make_record(1)))
    (tmp_path / "ledger.db").rename(tmp_path / "gone.db")
    (tmp_path / "ledger.db").mkdir()
    sink._connected().dispose()
    with pytest.raises(sink.failures):
        sink.tend()
    assert sink.stored == Checkpoint()
    (tmp_path / "ledger.db").rmdir()
    (tmp_path / "gone.db").rename(tmp_path / "ledger.db")
    sink.tend()
    assert written(tmp_path) == (Checkpoint({"segment": 2}), [cost(1)])
    sink.close(1.0)


def test_a_position_that_cannot_be_read_is_not_written_with_sums_that_are_ahead_of_it(tmp_path: Path) -> None:
    """The journal's records are rows already: file and journal together would have them twice."""
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1), make_record(2)))
    sink.tend()
    before = written(tmp_path)
    with sink._connected().begin() as connection:
        connection.exec_driver_sql("UPDATE checkpoints SET position = x'c1'")
    again = make_sink(tmp_path)
    assert again.load() == Checkpoint()
    again.tend()
    again.write(batch(1, make_record(1))._replace(more=True))
    again.tend()
    assert stored(again) is None
    assert written(tmp_path) == before
    again.write(batch(2, make_record(2)))
    again.tend()
    assert (again.stored, [cost(2)]) == written(tmp_path) == (Checkpoint({"segment": 2}), [cost(2)])
    for each in (sink, again):
        each.close(1.0)


def test_collectors_that_share_a_database_count_their_own_rows_and_those_that_nobody_knows_of(tmp_path: Path) -> None:
    for collector, number in (("one", 1), ("two", 2)):
        sink = make_sink(tmp_path, collector)
        sink.load()
        sink.write(batch(1, make_record(number, worker=collector)))
        sink.close(1.0)
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE requests SET worker = '', collector = '' WHERE worker = 'two'")
    connection.close()
    for collector, expected in (("one", [cost(1), cost(1, "one")]), ("two", [cost(1)])):
        sink = make_sink(tmp_path, collector)
        sink.load()
        sink.close(1.0)
        assert written(tmp_path, collector)[1] == expected


def test_only_money_of_the_settings_currency_counts(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    sink.write(batch(1, make_record(1, currency="EUR")))
    sink.tend()
    assert written(tmp_path)[1] == [Row("", "key_1", "", 0, 605, 0)]
    again = make_sink(tmp_path)
    again.load()
    again.tend()
    assert written(tmp_path)[1] == [Row("", "key_1", "", 0, 605, 0)]
    for each in (sink, again):
        each.close(1.0)


def test_memory_holds_two_windows_of_a_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = DAY
    monkeypatch.setattr(time, "time_ns", lambda: now)
    sink = make_sink(tmp_path, periods=[Period("day")])
    sink.load()
    for day in range(4):
        now = DAY + day * 86_400_000_000_000
        sink.write(batch(day, make_record(day, received_unix_ns=now), make_record(100 + day, received_unix_ns=DAY)))
        sink.tend()
    assert written(tmp_path)[1] == [cost(1), cost(1)]
    sink.close(1.0)
