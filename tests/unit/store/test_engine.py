"""How databases are opened: what SQLite is told, who waits for whom, and what is said when it doesn't work."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import OperationalError

from proxy.store import StoreError, create_key, list_keys, open_database, reader, revision
from proxy.store.tables import requests


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'glasshouse.db'}")
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    ("pragma", "value"), [("journal_mode", "wal"), ("synchronous", 1), ("busy_timeout", 10_000), ("foreign_keys", 1)]
)
def test_what_sqlite_is_told(sqlite: Engine, pragma: str, value: object) -> None:
    with sqlite.connect() as connection:
        assert connection.execute(text(f"PRAGMA {pragma}")).scalar_one() == value


def test_a_reader_neither_waits_for_a_writer_nor_sees_half_of_its_work(engine: Engine) -> None:
    with engine.connect() as writing:
        create_key(writing, "alice")
        with reader(engine).connect() as reading:
            assert list_keys(reading) == []
            assert revision(reading) == 0
        writing.commit()
    with reader(engine).connect() as reading:
        assert len(list_keys(reading)) == revision(reading) == 1


def test_a_transaction_that_reads_first_can_still_write(sqlite: Engine) -> None:  # failure 65
    """With a deferred transaction it couldn't, once somebody else had written: SQLite gives up at once, whatever the patience."""
    with sqlite.begin() as connection, closing(sqlite3.connect(str(sqlite.url.database), timeout=0)) as other:
        assert list_keys(connection) == []
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("UPDATE catalogue SET revision = 7")
        create_key(connection, "alice")


def test_switching_to_wal_waits_for_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 65
    """SQLite itself would say "locked" at once."""
    file = tmp_path / "glasshouse.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN IMMEDIATE")
        waited = []

        def the_other_ends(seconds: float) -> None:
            waited.append(seconds)
            other.execute("ROLLBACK")

        monkeypatch.setattr("proxy.store.engine.time.sleep", the_other_ends)
        open_database(f"sqlite:///{file}").dispose()
        assert len(waited) == 1


_WRITER = """
import sys
from proxy.exchange import Record, new_id
from proxy.store import insert_records, load_checkpoint, open_database, save_checkpoint
url, name = sys.argv[1:]
engine = open_database(url)
sys.stdin.read()
for batch in range(40):
    with engine.begin() as connection:
        assert int(load_checkpoint(connection, name, "ledger") or 0) == batch
        insert_records(connection, [Record(new_id(1_795_000_000_000), bytes(16), 1, 10**18) for _ in range(25)])
        save_checkpoint(connection, name, "ledger", str(batch + 1).encode())
"""


def test_two_processes_that_write_at_once(engine: Engine, database_url: str) -> None:  # failure 65
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, database_url, name], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
        writer.stdin = None
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    with engine.connect() as connection:
        assert len(connection.execute(select(requests.c.id)).all()) == 2 * 40 * 25


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "allowed: sqlite:///PATH or postgresql://"),
        ("oracle9://host/db", "allowed: sqlite:///PATH or postgresql://"),
        ("sqlite:////nowhere/at/all/glasshouse.db", "unable to open database file"),
        ("postgresql+pg8000://u:hunter2@host/db", "needs the package 'pg8000'"),
    ],
)
def test_what_is_said_of_an_unusable_database(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_database(f"sqlite:///{tmp_path / 'text'}")


def test_parameters_stay_out_of_error_texts(sqlite: Engine) -> None:  # failure 76
    with sqlite.connect() as connection, pytest.raises(OperationalError) as caught:
        connection.execute(text("SELECT :secret FROM nothing"), {"secret": "gh-canary"})
    assert "gh-canary" not in str(caught.value)
