"""Real databases: SQLite in a file, and PostgreSQL."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import pytest
from sqlalchemy import Connection, Engine

from proxy.control.database import Database
from proxy.store import open_database, reader
from proxy.store.tables import metadata
from tests.support.postgresql import PostgreSQL, postgresql_server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'glasshouse.db'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.url_of(server.new_database())


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A database with its tables."""
    engine = open_database(database_url)
    yield engine
    engine.dispose()


T = TypeVar("T")
P = ParamSpec("P")


EMPTY = ";".join(
    [
        *(f"DELETE FROM {table}" for table in metadata.tables if table != "catalogue"),  # noqa: S608 (ours)
        "UPDATE catalogue SET revision = 0, everyone = '{}'",
    ]
)


class Store:
    """Functions of the store, asked as what waits asks: by an engine. Each call is a transaction."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = open_database(url)

    def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        with reader(self._engine).begin() as connection:
            return function(connection, *args, **kwargs)

    def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._engine.begin() as connection:
            return function(connection, *args, **kwargs)

    def close(self) -> None:
        self._engine.dispose()


class StoreOfControl(Store):
    """The same as control asks: from an event loop."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._loop = asyncio.Runner()
        self._database = Database(url)

    def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(self._database.read(function, *args, **kwargs))

    def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(self._database.write(function, *args, **kwargs))

    def close(self) -> None:
        self._loop.run(self._database.close())
        self._loop.close()


@pytest.fixture(scope="session")
def sqlite_with_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to be copied."""
    path = tmp_path_factory.mktemp("database") / "glasshouse.db"
    open_database(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture(scope="session")
def postgresql_with_tables(postgresql: PostgreSQL) -> str:
    """A database to be copied."""
    name = postgresql.new_database()
    open_database(postgresql.url_of(name)).dispose()
    return name


@pytest.fixture(scope="session")
def used_postgresql(postgresql: PostgreSQL, postgresql_with_tables: str) -> str:
    """A database that one test after the other empties: hundreds of their own would take minutes, and gigabytes."""
    return postgresql.new_database(postgresql_with_tables)


@pytest.fixture(params=[Store, StoreOfControl], ids=["waiting", "in a loop"])
def ask(request: pytest.FixtureRequest) -> type[Store]:
    way: type[Store] = request.param
    return way


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, ask: type[Store], tmp_path: Path) -> Iterator[Store]:
    """A database with its tables, asked in each of the program's ways."""
    if request.param == "sqlite":
        path = shutil.copy(request.getfixturevalue("sqlite_with_tables"), tmp_path)
        store = ask(f"sqlite:///{path}")
    else:
        server: PostgreSQL = request.getfixturevalue("postgresql")
        name = request.getfixturevalue("used_postgresql")
        server.execute(EMPTY, name)
        store = ask(server.url_of(name))
    yield store
    store.close()
