"""The ledger's sink: rows and position together, whatever the database does."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection

from collectors.records import ledger
from collectors.records.ledger import LedgerSink
from proxy.exchange import Record, decode_record
from proxy.journal import Batch, Checkpoint
from proxy.store import StoreError, engine, insert_records
from tests.unit.collectors.made import identity, make_record, make_rejected


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_MS", 20)


def make_sink(directory: Path, collector: str = "one") -> LedgerSink:
    return LedgerSink(f"sqlite:///{directory / 'ledger.db'}", collector, directory / "unstored")


def rows(directory: Path) -> list[str]:
    with sqlite3.connect(directory / "ledger.db") as connection:
        found = [identity for (identity,) in connection.execute("SELECT id FROM requests ORDER BY id")]
    connection.close()
    return found


def batch(position: int, *records: Record) -> Batch:
    return Batch(list(records), Checkpoint({"segment": position}), False, [])


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
    assert sink.stored == Checkpoint({"segment": 7})
    sink.close(1.0)
    again = make_sink(tmp_path)
    assert again.load() == again.stored == Checkpoint({"segment": 7})
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
        assert sink.stored == Checkpoint({"segment": 1})
    sink.write(batch(2, make_record(2)))
    assert rows(tmp_path) == ids(1, 2)
    sink.close(1.0)


# failure 46
def test_a_database_that_is_not_there_yet_is_asked_again(tmp_path: Path) -> None:
    sink = LedgerSink(f"sqlite:///{tmp_path / 'missing' / 'ledger.db'}", "one", tmp_path / "unstored")
    for _ in range(2):
        with pytest.raises(sink.failures):
            sink.load()
    assert sink.stored is None, "nothing is known, so nothing may be deleted"
    (tmp_path / "missing").mkdir()
    assert sink.load() == Checkpoint()
    sink.close(1.0)


def test_a_url_that_means_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        LedgerSink("nonsense", "one", tmp_path).load()


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


def test_what_the_database_refuses_for_good_is_put_aside_and_keeps_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    monstrous = make_record(2, request_bytes=2**64 - 1)
    sink.write(batch(3, make_record(1), monstrous, make_record(3)))
    assert rows(tmp_path) == ids(1, 3)
    assert sink.stored == Checkpoint({"segment": 3})
    (aside,) = (tmp_path / "unstored").iterdir()
    assert decode_record(aside.read_bytes()) == monstrous
    assert "put aside" in caplog.text
    sink.close(1.0)


def test_a_lock_while_sorting_out_puts_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = make_sink(tmp_path)
    sink.load()
    bad = batch(3, make_record(1), make_record(2, request_bytes=2**64 - 1))
    calls = list[int]()

    def then_locked(connection: Connection, records: list[Record]) -> int:
        calls.append(len(records))
        if len(calls) == 2:
            raise OSError("gone in the meantime")
        return insert_records(connection, records)

    monkeypatch.setattr(ledger, "insert_records", then_locked)
    with pytest.raises(OSError, match="meantime"):
        sink.write(bad)
    assert not (tmp_path / "unstored").exists()
    assert sink.stored == Checkpoint()
    sink.write(bad)
    assert rows(tmp_path) == ids(1)
    sink.close(1.0)
