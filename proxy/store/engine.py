"""Opening a database. What SQLite and PostgreSQL need differently is said here and in `ledger.py`'s upsert, nowhere else.

SQLite: write-ahead log with synchronous=NORMAL (readers never wait; a power cut may take the last commits, never the file's
soundness), foreign keys on, ten seconds of patience for another writer. Python's own transaction handling is switched off: it
would begin a transaction late, at the first change, and a transaction that first reads and then writes fails at once when
another process has written in between, whatever the patience. Transactions therefore begin as writers (`BEGIN IMMEDIATE`),
except those of a `reader`, which never hold anybody up.

PostgreSQL: somebody else's machine, so whatever is asked of it has an end. Connecting takes five seconds at most, a statement
thirty (`without_deadline` lifts that), and a host that vanished is given up when it acknowledges nothing for as long. What the
URL itself says of connecting and of these comes first. The deadline of statements is set in each transaction and not by the
connection's options, which connection poolers refuse.

PostgreSQL is reached by psycopg from what waits (`open_engine`) and by asyncpg from an event loop (`open_async_engine`),
whichever of the two the URL names. asyncpg's statements have no names here, and none outlives its transaction: a pooler may hand
each transaction to another session of the server. psycopg's have, because the ledger's rows take half the time then: what stands
before PostgreSQL has to know of prepared statements (PgBouncer 1.22 and later does) or to pool whole sessions.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

BUSY_MS = 10_000
"""How long SQLite waits for another process's write transaction."""

CACHE_KIB = 512
"""Of each SQLite connection. The operating system caches the file anyway, and whenever another process writes, SQLite drops its
own: a larger one changes nothing but the memory of whoever holds it."""

STATEMENT_MS = 30_000
"""How long PostgreSQL may take for a statement, waiting for others' locks included."""

_VANISHED = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
"""libpq's words for it. Source: PostgreSQL's documentation, "Parameter Key Words"."""

_WAYS = ("postgresql", "postgresql+psycopg", "postgresql+asyncpg")
"""How PostgreSQL is said in a URL, meaning the same."""

_FOR_ASYNCPG = frozenset(
    {
        *("sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs", "passfile", "krbsrvname", "gsslib"),
        *("application_name", "options"),
    }
)
"""Of libpq's words in a URL those that asyncpg, or the server itself, knows as well. The others are about libpq's own ways."""

_UNUSABLE = "database: not a usable database URL; allowed: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"


class StoreError(Exception):
    """The database can't do what was asked; the text is for the person who asked, and holds no secret."""


def open_database(url: str) -> Engine:
    """An engine for `url` with its tables up to date. Safe to call in several processes at once. Raises StoreError."""
    from proxy.store.migrations import upgrade

    if not is_sqlite(url):
        with _usable(url):
            _look_for_asyncpg()
    engine = open_engine(url)
    try:
        upgrade(engine)
    except DBAPIError as error:
        engine.dispose()
        raise StoreError(f"the database {_shown(url)} can't be used: {error.orig}") from None
    except StoreError:
        engine.dispose()
        raise
    return engine


def open_engine(url: str) -> Engine:
    """An engine, without a look at the tables. Statement parameters never get into error texts. Raises StoreError."""
    with _usable(url) as parsed:
        backend = parsed.get_backend_name()
        engine = create_engine(_for_psycopg(parsed), hide_parameters=True, pool_pre_ping=backend != "sqlite")
    if engine.dialect.is_async:
        raise StoreError(_UNUSABLE)
    if backend == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgresql)
        if engine.dialect.driver in ("psycopg", "psycopg2"):
            event.listen(engine, "do_connect", _notice_the_vanished)
    return engine


def open_async_engine(url: str, connect_s: float = 5) -> AsyncEngine:
    """An engine for one event loop, on PostgreSQL, as `open_engine` makes them. Raises StoreError."""
    with _usable(url) as parsed:
        if parsed.get_backend_name() != "postgresql":
            raise StoreError(_UNUSABLE)
        place, said = _for_asyncpg(parsed)
        _look_for_asyncpg()
        from sqlalchemy.ext.asyncio import create_async_engine

        arguments: dict[str, Any] = {"timeout": connect_s, "command_timeout": 2 * STATEMENT_MS / 1000, **said}
        engine = create_async_engine(place, hide_parameters=True, pool_pre_ping=True, connect_args=arguments)
    event.listen(engine.sync_engine, "begin", _begin_postgresql)
    return engine


def is_sqlite(url: str) -> bool:
    """Whether this is a file of our own, and nothing that answers by itself. Raises StoreError."""
    with _usable(url) as parsed:
        return parsed.get_backend_name() == "sqlite"


def reader(engine: Engine) -> Engine:
    """The same database, for transactions that only read: each sees one moment, and on SQLite they take no write lock."""
    return engine.execution_options(reads_only=True)


def without_deadline(connection: Connection) -> None:
    """For the rest of the transaction: what is asked takes its time, as a migration or a report over years may."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")


def now_ns(connection: Connection) -> int:
    """ns since 1970, by the database's clock: the same for all hosts. SQLite's is this host's."""
    if connection.dialect.name != "postgresql":
        return time.time_ns()
    microseconds = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)")
    return int(connection.execute(microseconds).scalar_one()) * 1000


@contextmanager
def _usable(url: str) -> Iterator[URL]:
    """What a URL says, and what is said of one that is of no use."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise StoreError(_UNUSABLE)
        yield parsed
    except (ArgumentError, NoSuchModuleError):
        raise StoreError(_UNUSABLE) from None
    except ModuleNotFoundError as error:
        raise StoreError(f"the database {_shown(url)} needs the package {error.name!r}, {_where_to_get(error.name)}") from None


def _look_for_asyncpg() -> None:
    """And for what SQLAlchemy needs beside it, of whose lack it tells without a name. Raises ModuleNotFoundError.

    Whoever opens a database looks: a start should fail over what control needs, and not only control."""
    for package in ("asyncpg", "greenlet"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _for_psycopg(url: URL) -> URL:
    """asyncpg says `ssl` where libpq says `sslmode`, and has sizes of caches."""
    if url.drivername not in _WAYS:
        return url
    query = dict(url.query)
    if "ssl" in query:
        query["sslmode"] = query.pop("ssl")
    for size in ("prepared_statement_cache_size", "statement_cache_size"):
        query.pop(size, None)
    return url.set(drivername="postgresql+psycopg", query=query)


def _for_asyncpg(url: URL) -> tuple[URL, dict[str, Any]]:
    """→ (where the server is, what is said of connecting to it)."""
    query = dict(_for_psycopg(url.set(drivername=_WAYS[0])).query)
    place: dict[str, str | tuple[str, ...]] = {name: query[name] for name in ("host", "port") if name in query}
    said: dict[str, Any] = {
        "dsn": f"postgresql://?{urlencode({name: query[name] for name in _FOR_ASYNCPG & query.keys()})}",
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
    }
    if (timeout := str(query.get("connect_timeout", ""))).isdigit() and int(timeout):
        said["timeout"] = float(timeout)
    return url.set(drivername="postgresql+asyncpg", query=place), said


def _shown(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)


def _where_to_get(package: str | None) -> str:
    if package in ("psycopg", "asyncpg", "greenlet"):
        return "which comes with Glasshouse's extra `postgres`: pip install asyncpg 'psycopg[binary]' 'sqlalchemy[asyncio]'"
    return "which isn't installed"


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    connection.execute("PRAGMA foreign_keys = ON")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switching needs the file alone for a moment, and SQLite doesn't apply `busy_timeout` to that. It is switched once, ever."""
    deadline = time.monotonic() + BUSY_MS / 1000
    while connection.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    reads_only = connection.get_execution_options().get("reads_only")
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("reads_only"):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {STATEMENT_MS}")


def _notice_the_vanished(_dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
    for name, value in _VANISHED.items():
        parameters.setdefault(name, value)
