"""How databases are opened: what SQLite is told, who waits for whom, and what is said when it doesn't work."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from sqlalchemy import Engine, make_url, select, text
from sqlalchemy.exc import OperationalError

from proxy.exchange import Record
from proxy.store import (
    StoreError,
    create_key,
    insert_records,
    list_keys,
    migrations,
    open_async_engine,
    open_database,
    open_engine,
    reader,
    revision,
    usage,
)
from proxy.store import engine as store_engine
from proxy.store.engine import _for_asyncpg, without_deadline
from proxy.store.tables import requests
from tests.support.postgresql import PostgreSQL
from tests.support.worker import deaf_host


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'glasshouse.db'}")
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    ("pragma", "value"),
    [("journal_mode", "wal"), ("synchronous", 1), ("busy_timeout", 10_000), ("foreign_keys", 1), ("cache_size", -512)],
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


def test_a_reader_sees_one_moment(engine: Engine) -> None:
    """What two queries say belongs together, whatever is committed between them."""
    with reader(engine).connect() as reading:
        assert revision(reading) == 0
        with engine.begin() as writing:
            create_key(writing, "alice")
        assert list_keys(reading) == []
        assert revision(reading) == 0


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
        ("mysql://u:hunter2@host/db", "allowed: sqlite:///PATH or postgresql://"),
        ("postgresql+psycopg_async://u:hunter2@host/db", "allowed: sqlite:///PATH or postgresql://"),
        ("sqlite:////nowhere/at/all/glasshouse.db", "unable to open database file"),
        ("postgresql+pg8000://u:hunter2@host/db", "needs the package 'pg8000'"),
        ("sqlite+aiosqlite:////tmp/x.db", "needs the package 'aiosqlite'|allowed: sqlite"),
    ],
)
def test_what_is_said_of_an_unusable_database(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)


SAME = [f"postgresql{driver}://u:hunter2@host/db" for driver in ("", "+psycopg", "+asyncpg")]


@pytest.mark.parametrize("url", SAME)
def test_a_missing_driver_is_named_with_where_to_get_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(package, opening) for package in ("asyncpg", "greenlet") for opening in (open_database, open_async_engine)]
    for package, opening in (("psycopg", open_database), *cases):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(StoreError, match=f"needs the package '{package}', .* extra `postgres`: pip install") as caught:
                opening(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", SAME)
def test_each_asks_in_its_own_way_whatever_the_url_names(url: str) -> None:
    assert open_engine(url).dialect.driver == "psycopg"
    assert open_async_engine(url).dialect.driver == "asyncpg"


def _connecting(engine: Engine) -> dict[str, Any]:
    """What the driver is told of the URL."""
    _, told = engine.dialect.create_connect_args(engine.url)
    return {name: value for name, value in told.items() if name != "context"}


def test_what_asyncpg_alone_understands_is_said_to_psycopg_in_its_words() -> None:
    said = "ssl=require&prepared_statement_cache_size=0&statement_cache_size=0&application_name=gh"
    told = _connecting(open_engine(f"postgresql+asyncpg://u:p@host/db?{said}"))
    assert told == {"host": "host", "dbname": "db", "user": "u", "password": "p", "sslmode": "require", "application_name": "gh"}


def test_what_libpq_alone_understands_is_not_said_to_asyncpg() -> None:
    said = (
        "sslmode=verify-full&sslrootcert=/ca.pem&channel_binding=require&tcp_user_timeout=7000&connect_timeout=3&options=-cx%3D1"
    )
    place, told = _for_asyncpg(make_url(f"postgresql://u:p@/db?host=/run/pg&port=5433&{said}"))
    assert place.render_as_string(hide_password=False).startswith("postgresql+asyncpg://u:p@/db?")
    assert dict(place.query) == {"host": "/run/pg", "port": "5433"}
    query = parse_qs(urlsplit(told["dsn"]).query)
    assert query == {"sslmode": ["verify-full"], "sslrootcert": ["/ca.pem"], "options": ["-cx=1"]}
    assert told["timeout"] == 3.0


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_database(f"sqlite:///{tmp_path / 'text'}")


def test_parameters_stay_out_of_error_texts(sqlite: Engine) -> None:  # failure 76
    with sqlite.connect() as connection, pytest.raises(OperationalError) as caught:
        connection.execute(text("SELECT :secret FROM nothing"), {"secret": "gh-canary"})
    assert "gh-canary" not in str(caught.value)


# -- PostgreSQL: whatever is asked of it has an end (failure 47) --


@pytest.fixture
def postgres(postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, str]]:
    """A database with its tables, by TCP and with little patience → its engine and its name."""
    name = postgresql.new_database()
    engine = open_database(postgresql.url_of(name, tcp=True))
    monkeypatch.setattr("proxy.store.engine.STATEMENT_MS", 200)
    yield engine, name
    engine.dispose()


def test_a_statement_has_an_end(postgres: tuple[Engine, str]) -> None:
    engine, _ = postgres
    with engine.begin() as connection, pytest.raises(OperationalError, match="statement timeout"):
        connection.execute(text("SELECT pg_sleep(60)"))
    with engine.begin() as connection:
        without_deadline(connection)
        connection.execute(text("SELECT pg_sleep(0.4)"))
    with engine.begin() as connection, pytest.raises(OperationalError, match="statement timeout"):
        connection.execute(text("SELECT pg_sleep(60)"))  # in the next transaction there is a deadline again


def test_waiting_for_anothers_lock_has_an_end(postgres: tuple[Engine, str], postgresql: PostgreSQL) -> None:
    engine, name = postgres
    with postgresql.connect(name) as other:
        other.execute("LOCK TABLE requests")
        with engine.begin() as connection, pytest.raises(OperationalError, match="statement timeout"):
            insert_records(connection, [Record(bytes(16), bytes(16), 1, 10**18)])


@contextmanager
def held_for(seconds: float, held: psycopg.Connection[Any], statement: LiteralString) -> Iterator[None]:
    """What `statement` locks is held for so long, while the block runs."""
    held.execute(statement)
    letting_go = threading.Timer(seconds, held.rollback)
    letting_go.start()
    yield
    letting_go.join()


def test_a_report_takes_its_time(postgres: tuple[Engine, str], postgresql: PostgreSQL) -> None:
    engine, name = postgres
    reading = reader(engine).connect()
    with reading, postgresql.connect(name) as other, held_for(0.6, other, "LOCK TABLE requests"):
        assert usage(reading) == []


def test_a_migration_takes_its_time(postgres: tuple[Engine, str], postgresql: PostgreSQL) -> None:
    """Another host's migration holds the lock for longer than a statement may take."""
    name = postgresql.new_database()
    with postgresql.connect(name) as other, held_for(0.6, other, f"SELECT pg_advisory_xact_lock({migrations._LOCK})"):
        open_database(postgresql.url_of(name)).dispose()


def test_a_host_that_vanished_is_given_up(postgres: tuple[Engine, str]) -> None:
    engine, _ = postgres
    with engine.connect() as connection:
        held = connection.connection.driver_connection
        assert isinstance(held, psycopg.Connection)
        with socket.socket(fileno=os.dup(held.fileno())) as wire:
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10


def test_what_the_url_says_of_connecting_comes_first(postgres: tuple[Engine, str]) -> None:
    engine, _ = postgres
    own = open_database(engine.url.update_query_dict({"tcp_user_timeout": "7000"}).render_as_string(hide_password=False))
    with own.connect() as connection:
        held = connection.connection.driver_connection
        assert isinstance(held, psycopg.Connection)
        assert held.info.get_parameters()["tcp_user_timeout"] == "7000"
        assert held.info.get_parameters()["connect_timeout"] == "5"
    own.dispose()


def test_connecting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store_engine._VANISHED, "connect_timeout", 2)
    with deaf_host() as url, pytest.raises(StoreError, match="timeout expired"):
        open_database(url.replace("http://", "postgresql://u@") + "/db")


def test_a_server_that_came_back_is_used_again(postgresql: PostgreSQL) -> None:
    """The connections that the pool has kept are dead."""
    engine = open_database(postgresql.url_of(postgresql.new_database()))
    with engine.connect() as connection:
        assert list_keys(connection) == []
    postgresql.stop()
    postgresql.start()
    with engine.connect() as connection:
        assert list_keys(connection) == []
    engine.dispose()
