"""PostgreSQL: a table for each day, made ahead of need, by whoever comes first; no row ever waits for one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, MetaData, Table, event, insert, select

from proxy.store import insert_records, migrations, open_database, partitions
from proxy.store.engine import open_engine
from proxy.store.partitions import DEFAULT, days_kept_apart, name_of
from proxy.store.tables import requests
from tests.support.postgresql import PostgreSQL
from tests.unit.store.test_ledger import record

DAY_NS = 86_400 * 10**9


def today() -> date:
    return datetime.now(UTC).date()


def at(day: date, number: int = 1) -> Any:
    return record(number, received_unix_ns=(day - date(1970, 1, 1)).days * DAY_NS + number)


@pytest.fixture
def url(postgresql: PostgreSQL) -> str:
    return postgresql.url_of(postgresql.new_database())


@pytest.fixture
def pg(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    yield engine
    engine.dispose()


def store(engine: Engine, *records: Any) -> int:
    with engine.begin() as connection:
        return insert_records(connection, records)


def apart(engine: Engine) -> list[date]:
    with engine.connect() as connection:
        return days_kept_apart(connection)


def lying_in(engine: Engine, table: str) -> list[str]:
    with engine.connect() as connection:
        return [row.id[-1] for row in connection.exec_driver_sql(f"SELECT id FROM {table} ORDER BY id")]  # noqa: S608 (ours)


def test_each_day_has_a_table_of_its_own_and_tomorrow_has_one_already(pg: Engine) -> None:
    before = today() - timedelta(3)
    assert store(pg, at(today(), 1), at(before, 2), at(today(), 3)) == 3
    assert apart(pg) == [before, today(), today() + timedelta(1)]
    assert lying_in(pg, name_of(today())) == ["1", "3"]
    assert lying_in(pg, name_of(before)) == ["2"]
    assert lying_in(pg, DEFAULT) == []
    assert store(pg, at(today(), 1), at(today(), 4)) == 1, "what is there is left alone"


@pytest.mark.parametrize("day", [date(1970, 1, 1), date(1677, 9, 22), date(2262, 4, 10)])
def test_a_day_that_no_clock_should_say_is_stored_all_the_same(pg: Engine, day: date) -> None:
    assert store(pg, at(day, 5), at(today(), 6)) == 2
    assert lying_in(pg, DEFAULT) == ["5"]
    assert apart(pg) == [today(), today() + timedelta(1)]


def test_rows_of_long_ago_make_no_tables(pg: Engine) -> None:
    """However many days the clock of somebody's host has gone through."""
    old = [at(today() - timedelta(32 + number), number) for number in range(300)]
    assert store(pg, *old) == 300
    assert apart(pg) == [today(), today() + timedelta(1)]


def test_collectors_that_do_it_at_once(url: str, pg: Engine) -> None:
    engines = [open_engine(url) for _ in range(6)]
    ready = threading.Barrier(len(engines))

    def go(number: int) -> int:
        ready.wait()
        return store(engines[number], *(at(today() - timedelta(back), 100 * number + back) for back in range(20)))

    with ThreadPoolExecutor(len(engines)) as threads:
        assert list(threads.map(go, range(len(engines)))) == [20] * len(engines)
    assert len(apart(pg)) == 21
    assert lying_in(pg, DEFAULT) == []
    for engine in engines:
        engine.dispose()


def test_a_batch_that_is_undone_leaves_tables_that_are_there(pg: Engine) -> None:
    def store_and_die() -> None:
        with pg.begin() as connection:
            insert_records(connection, [at(today())])
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store_and_die()
    assert lying_in(pg, "requests") == []
    assert store(pg, at(today())) == 1
    assert lying_in(pg, name_of(today())) == ["1"]


def test_who_reads_everything_for_long_keeps_no_row_waiting(pg: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "WAIT_MS", 50)
    with pg.connect() as report:
        report.execute(select(requests.c.id)).all()  # it holds on to every partition until its end
        assert store(pg, at(today(), 1)) == 1
        assert apart(pg) == []
    assert store(pg, at(today(), 2)) == 1, "it isn't tried at every batch"
    assert lying_in(pg, DEFAULT) == ["1", "2"]
    monkeypatch.setattr(partitions, "_not_before", {})
    assert store(pg, at(today(), 3), at(today() - timedelta(1), 4)) == 2
    assert apart(pg) == [today() - timedelta(1), today() + timedelta(1)], "a day that has begun elsewhere stays there"
    assert lying_in(pg, DEFAULT) == ["1", "2", "3"]
    assert store(pg, at(today(), 1)) == 0


def test_what_was_made_is_not_asked_for_again(pg: Engine) -> None:
    store(pg, at(today()))
    asked: list[str] = []
    event.listen(pg, "before_cursor_execute", lambda _connection, _cursor, sql, *_: asked.append(sql))
    store(pg, at(today(), 2))
    assert [sql.split()[0] for sql in asked] == ["SET", "INSERT"]


# -- the migration --


def config_on(connection: Any) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["connection"] = connection
    return config


def rows_of(engine: Engine, table: Table = requests) -> list[tuple[object, ...]]:
    """Of the columns that `table` has."""
    names = [requests.c[column.name] for column in table.c]
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(*names).order_by(requests.c.day, requests.c.id))]


def test_rows_move_into_their_days_and_back(database_url: str) -> None:
    days = [date(1970, 1, 1), date(2026, 1, 31), date(2026, 2, 1), date(2026, 11, 20)]
    engine = open_database(database_url)
    with engine.begin() as connection:
        insert_records(connection, [at(day, 10 * index + number) for index, day in enumerate(days) for number in range(3)])
        command.downgrade(config_on(connection), "0004")
        older = Table("requests", MetaData(), autoload_with=connection)
        assert "user_name" not in older.c
    before = rows_of(engine, older)
    assert len(before) == 12
    with engine.begin() as connection:
        command.upgrade(config_on(connection), "head")
    assert rows_of(engine, older) == before
    if engine.dialect.name == "postgresql":
        assert apart(engine) == days
        assert lying_in(engine, DEFAULT) == []
    with engine.begin() as connection:
        assert insert_records(connection, [at(day, 10 * index) for index, day in enumerate(days)]) == 0, "each is still known"
        command.downgrade(config_on(connection), "0004")
        values = dict(connection.execute(select(older)).mappings().all()[0])
        connection.execute(insert(older).values({**values, "id": "another"}))
    with engine.begin() as connection:
        command.upgrade(config_on(connection), "head")
    assert len(rows_of(engine)) == 13
    engine.dispose()
