"""The database as control asks it: without waiting itself, and never for ever."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from proxy.control.database import READERS, Database, Unavailable
from proxy.nouns import TeamSettings
from proxy.store import (
    TEAMS,
    NameTaken,
    StoreError,
    create_key,
    entries,
    find_key,
    list_keys,
    open_database,
    put,
    revision,
)
from proxy.store.migrations import HEAD, current
from tests.support.postgresql import PostgreSQL
from tests.support.worker import deaf_host
from tests.unit.store.test_catalogue import ALICE

SOON_S = 0.3
AGES_S = 60


@contextmanager
def closing_engine(engine: Engine) -> Iterator[Engine]:
    yield engine
    engine.dispose()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(AGES_S):
            await work()

    asyncio.run(bounded())


def test_each_call_is_one_transaction(database_url: str) -> None:
    async def work() -> None:
        database = Database(database_url)

        def half(connection: Connection) -> None:
            put(connection, TEAMS, "red", TeamSettings(), ALICE)
            raise LookupError

        with pytest.raises(LookupError):
            await database.write(half)
        assert await database.read(entries, TEAMS) == []
        _, row = await database.write(create_key, "alice")
        assert await database.read(find_key, "alice") == row
        with pytest.raises(NameTaken):
            await database.write(create_key, "alice")
        assert await database.read(revision) == 1
        await database.close()

    run(work)


def test_the_first_use_brings_the_tables_up_to_date(database_url: str) -> None:
    async def work() -> None:
        database = Database(database_url)
        assert await asyncio.gather(*(database.read(current) for _ in range(5))) == [HEAD] * 5
        await database.close()

    run(work)


def test_a_read_sees_one_moment_and_holds_nobody_up(database_url: str) -> None:
    async def work() -> None:
        database = Database(database_url)
        await database.write(create_key, "alice")
        with closing_engine(open_database(database_url)) as other:

            def meanwhile(connection: Connection) -> list[int]:
                before = revision(connection)
                with other.begin() as writing:
                    create_key(writing, "bob")
                return [before, revision(connection)]

            assert await database.read(meanwhile) == [1, 1]
        assert await database.read(revision) == 2
        await database.close()

    run(work)


def test_a_read_cannot_change_anything(postgresql: PostgreSQL, name: str) -> None:
    async def work() -> None:
        database = Database(postgresql.url_of(name))
        with pytest.raises(Unavailable, match="read-only"):
            await database.read(create_key, "bob")
        assert await database.read(list_keys) == []
        await database.close()

    run(work)


def test_many_at_once(database_url: str) -> None:
    async def work() -> None:
        database = Database(database_url)
        await asyncio.gather(*(database.write(create_key, f"key {number}") for number in range(20)))
        counts = await asyncio.gather(*(database.read(list_keys) for _ in range(20)))
        assert [len(rows) for rows in counts] == [20] * 20
        assert await database.read(revision) == 20
        await database.close()

    run(work)


TWICE = text("INSERT INTO catalogue (id, revision) VALUES (1, 1)")


def test_a_wrong_question_is_not_an_unavailable_database(database_url: str) -> None:
    async def work() -> None:
        database = Database(database_url)
        with pytest.raises(IntegrityError):
            await database.write(
                lambda connection: connection.execute(text("INSERT INTO catalogue (id, revision) VALUES (1, 1)"))
            )
        await database.close()

    run(work)


def test_a_url_that_is_none() -> None:
    for url in ("nonsense", "mysql://u:hunter2@host/db"):
        with pytest.raises(StoreError, match="allowed: sqlite:///PATH or postgresql://") as caught:
            Database(url)
        assert "hunter2" not in str(caught.value)


# -- SQLite --


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "glasshouse.db"
    open_database(f"sqlite:///{path}").dispose()
    return path


COUNTING = text("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000000) SELECT count(*) FROM n")
"""Which takes a minute."""


def _count(connection: Connection) -> None:
    connection.execute(COUNTING)


def test_what_takes_too_long_is_broken_off_and_its_thread_is_free_again(file: Path) -> None:  # failure 47
    async def work() -> None:
        database = Database(f"sqlite:///{file}", SOON_S)
        for _ in range(2):  # more than there are threads
            outcomes = await asyncio.gather(*(database.read(_count) for _ in range(READERS)), return_exceptions=True)
            assert {str(outcome) for outcome in outcomes} == {f"the database can't be used: no answer for {SOON_S:.0f} s"}
        patient = Database(f"sqlite:///{file}")
        assert await patient.read(revision) == 0
        await patient.close()
        await database.close()

    before = threading.active_count()
    run(work)
    _until(lambda: threading.active_count() <= before)


def test_a_change_that_is_given_up_is_undone(file: Path) -> None:
    async def work() -> None:
        database = Database(f"sqlite:///{file}")
        begun = threading.Event()

        def at_length(connection: Connection) -> None:
            create_key(connection, "alice")
            begun.set()
            connection.execute(COUNTING)

        task = asyncio.ensure_future(database.write(at_length))
        await asyncio.to_thread(begun.wait, AGES_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await database.write(create_key, "bob")  # in the same thread, after what was given up
        assert [row.name for row in await database.read(list_keys)] == ["bob"]
        await database.close()

    run(work)


def test_writers_that_wait_hold_up_no_reader(file: Path) -> None:  # failure 65
    """Another process writes for long: what changes something waits, what reads doesn't."""

    async def work() -> None:
        database = Database(f"sqlite:///{file}")
        assert await database.read(revision) == 0
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writing = [asyncio.ensure_future(database.write(create_key, f"key {number}")) for number in range(2 * READERS)]
            for _ in range(20):
                assert await database.read(revision) == 0
            assert not any(task.done() for task in writing)
            other.execute("ROLLBACK")
        await asyncio.gather(*writing)
        assert await database.read(revision) == len(writing)
        await database.close()

    run(work)


def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    """It is said, and looked for again."""

    async def work() -> None:
        database = Database(f"sqlite:///{tmp_path / 'later' / 'glasshouse.db'}")
        with pytest.raises(Unavailable, match="unable to open database file"):
            await database.read(revision)
        (tmp_path / "later").mkdir()
        assert await database.read(revision) == 0
        await database.close()

    run(work)


# -- PostgreSQL --


@pytest.fixture
def name(postgresql: PostgreSQL, postgresql_with_tables: str) -> str:
    """Of a database with its tables."""
    return postgresql.new_database(postgresql_with_tables)


@pytest.fixture
def thawed(postgresql: PostgreSQL) -> Iterator[None]:
    yield
    postgresql.thaw()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + AGES_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_form_of_the_url(postgresql: PostgreSQL, name: str) -> None:
    async def work() -> None:
        place = f"postgres@127.0.0.1:{postgresql.port}/{name}"
        socket = f"postgres@/{name}?host={postgresql.home}&port={postgresql.port}"
        of_libpq = "sslmode=prefer&connect_timeout=9&keepalives_idle=7&channel_binding=prefer&application_name=glasshouse"
        for url in (
            f"postgresql://{place}",
            f"postgresql+psycopg://{place}",
            f"postgresql+asyncpg://{place}",
            f"postgresql://{socket}",
            f"postgresql+asyncpg://{socket}",
            f"postgresql://{place}?{of_libpq}",
        ):
            database = Database(url)
            assert await database.read(revision) == 0
            assert await database.read(_driver) == "asyncpg"
            await database.close()
            with closing_engine(open_database(url)) as engine, engine.connect() as connection:
                assert _driver(connection) == "psycopg"

    def _driver(connection: Connection) -> str:
        return connection.dialect.driver

    run(work)


def test_a_session_keeps_nothing_of_a_transaction(postgresql: PostgreSQL, name: str) -> None:
    """A pooler may give the next transaction to another session."""

    async def work() -> None:
        database = Database(postgresql.url_of(name))
        for number in range(3):
            await database.write(create_key, f"key {number}")
            await database.read(list_keys, containing="key")

        def kept(connection: Connection) -> list[object]:
            statements = connection.execute(text("SELECT name FROM pg_prepared_statements")).scalars().all()
            settings = connection.execute(text("SHOW default_transaction_read_only")).scalars().all()
            return [*statements, *settings]

        assert await database.write(kept) == ["off"]
        await database.close()

    run(work)


def test_a_frozen_server_is_given_up(postgresql: PostgreSQL, name: str, thawed: None) -> None:  # failure 47
    async def work() -> None:
        database = Database(postgresql.url_of(name, tcp=True), 1)
        assert await database.read(revision) == 0
        postgresql.freeze()
        outcomes = await asyncio.gather(
            *(database.read(revision) for _ in range(3)), database.write(create_key, "alice"), return_exceptions=True
        )
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes), outcomes
        postgresql.thaw()
        patient = Database(postgresql.url_of(name, tcp=True))
        assert await patient.read(find_key, "alice") is None
        await patient.close()
        while True:  # the same goes on
            try:
                assert await database.read(revision) == 0
                break
            except Unavailable:
                continue
        await database.close()

    run(work)


def test_who_goes_away_leaves_no_work_behind(postgresql: PostgreSQL, name: str) -> None:
    asleep = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}' AND query LIKE '%pg_sleep%' AND state = 'active'"  # noqa: S608

    async def work() -> None:
        database = Database(postgresql.url_of(name))

        def at_length(connection: Connection) -> None:
            create_key(connection, "alice")
            connection.execute(text("SELECT pg_sleep(600)"))

        task = asyncio.ensure_future(database.write(at_length))
        await asyncio.to_thread(_until, lambda: len(postgresql.rows(asleep, "postgres")) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(_until, lambda: postgresql.rows(asleep, "postgres") == [])
        assert await database.read(list_keys) == []
        await database.close()

    run(work)


def test_a_statement_has_an_end(postgresql: PostgreSQL, name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 47
    monkeypatch.setattr("proxy.store.engine.STATEMENT_MS", 200)

    async def work() -> None:
        database = Database(postgresql.url_of(name))
        with pytest.raises(Unavailable, match="statement timeout"):
            await database.read(lambda connection: connection.execute(text("SELECT pg_sleep(60)")))
        await database.close()

    run(work)


def test_connecting_has_an_end() -> None:  # failure 47
    async def work() -> None:
        with deaf_host() as url:
            database = Database(url.replace("http://", "postgresql://u:hunter2@") + "/db?connect_timeout=1")
            with pytest.raises(Unavailable, match="connecting takes too long") as caught:
                await database.read(revision)
            assert "hunter2" not in str(caught.value)
            await database.close()

    run(work)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    async def work() -> None:
        database = Database(f"postgresql://u:hunter2@/db?host={tmp_path}&port=5432")
        with pytest.raises(Unavailable, match="the database can't be used: ") as caught:
            await database.read(revision)
        assert "hunter2" not in str(caught.value)
        await database.close()

    run(work)


def test_a_server_that_came_back_is_used_again(postgresql: PostgreSQL, name: str) -> None:  # failure 46
    async def work() -> None:
        database = Database(postgresql.url_of(name))
        await database.write(create_key, "alice")
        await asyncio.to_thread(postgresql.stop)
        await asyncio.to_thread(postgresql.start)
        assert await database.read(revision) == 1, "the connections that the pool has kept are dead, and nobody notices"
        await asyncio.to_thread(postgresql.stop)
        try:
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await database.read(revision)
        finally:
            await asyncio.to_thread(postgresql.start)
        assert [row.name for row in await database.read(list_keys)] == ["alice"]
        await database.close()

    run(work)
