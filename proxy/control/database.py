"""The database for an event loop: functions of `proxy.store`, which take a `Connection` and wait, without the loop waiting.

    await database.read(list_keys, limit=100)
    await database.write(revoke_key, "alice", author)

Each call is one transaction. A `read` sees one moment and changes nothing; a `write` is committed when the function returns and
undone when it raises. Whatever is asked has an end: after `DEADLINE_S`, or when who asked is cancelled, it is broken off and
undone; a commit that is under way then may succeed or not. What a function returns must be whole: what still reads from the
connection is of no use afterwards.

PostgreSQL is asked by asyncpg, in the loop. SQLite waits for a disk and for other processes, in a few threads of its own: one for
what writes, because only one can write anyway, and others for what reads, so that neither holds up the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from proxy.store import StoreError, open_async_engine, open_database, open_engine, reader
from proxy.store.engine import is_sqlite
from proxy.store.migrations import HEAD, current, upgrade

DEADLINE_S = 60.0
READERS = 4
_LOOK_EVERY = 50_000
"""Steps of SQLite's machine, of which it does some fifty million a second."""

T = TypeVar("T")
P = ParamSpec("P")


class Unavailable(StoreError):
    """The database doesn't answer, or not so that it is of use. Later it may."""


class Database:
    """A database at `url`, opened (and brought up to date) at the first use that succeeds. Raises StoreError for a URL that can't
    be one."""

    def __init__(self, url: str, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._way: _Way = _Threads(url) if is_sqlite(url) else _Asyncpg(url)
        self._opening = asyncio.Lock()
        self._open = False

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function(connection, ...)` returns. Raises what it raises, and Unavailable."""
        return await self._run(lambda connection: function(connection, *args, **kwargs), reads_only=True)

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function(connection, ...)` returns, and what it changed is committed. Raises what it raises, and Unavailable."""
        return await self._run(lambda connection: function(connection, *args, **kwargs), reads_only=False)

    async def close(self) -> None:
        """When nothing more is asked."""
        await self._way.close()

    async def _run(self, work: Callable[[Connection], T], *, reads_only: bool) -> T:
        try:
            async with asyncio.timeout(self._deadline_s) as deadline:
                async with self._opening:
                    if not self._open:
                        await self._way.open()
                        self._open = True
                return await self._way.run(work, reads_only=reads_only)
        except (IntegrityError, DataError):
            raise  # the question was wrong, not the database
        except DBAPIError as error:
            raise Unavailable(f"the database can't be used: {error.orig}") from error
        except TimeoutError as error:
            why = f"no answer for {self._deadline_s:.0f} s" if deadline.expired() else "connecting takes too long"
            raise Unavailable(f"the database can't be used: {why}") from error
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(f"the database can't be used: {error}") from error


class _Way(Protocol):
    """How a kind of database is asked."""

    async def open(self) -> None: ...
    async def run(self, work: Callable[[Connection], T], *, reads_only: bool) -> T: ...
    async def close(self) -> None: ...


class _Asyncpg:
    def __init__(self, url: str) -> None:
        self._url = url
        self._engine = open_async_engine(url)
        self._reader = self._engine.execution_options(reads_only=True)

    async def open(self) -> None:
        if await self.run(current, reads_only=True) != HEAD:
            await asyncio.to_thread(lambda: open_database(self._url).dispose())

    async def run(self, work: Callable[[Connection], T], *, reads_only: bool) -> T:
        async with (self._reader if reads_only else self._engine).begin() as connection:
            return await connection.run_sync(work)

    async def close(self) -> None:
        await self._engine.dispose()


class _Threads:
    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self._reading = ThreadPoolExecutor(READERS, "database-reader")
        self._writing = ThreadPoolExecutor(1, "database-writer")

    async def open(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writing, upgrade, self._engine)

    async def run(self, work: Callable[[Connection], T], *, reads_only: bool) -> T:
        threads = self._reading if reads_only else self._writing
        job = _Job(reader(self._engine) if reads_only else self._engine, work)
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, job)
        except asyncio.CancelledError:
            job.break_off()
            raise

    async def close(self) -> None:
        for threads in (self._reading, self._writing):
            threads.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()


class _Job(Generic[T]):
    """One transaction in a thread, which can be broken off from another."""

    def __init__(self, engine: Engine, work: Callable[[Connection], T]) -> None:
        self._engine = engine
        self._work = work
        self._broken_off = False

    def __call__(self) -> T:
        with self._engine.begin() as connection:
            driver: Any = connection.connection.driver_connection
            driver.set_progress_handler(self._look, _LOOK_EVERY)
            try:
                result = self._work(connection)
            finally:
                driver.set_progress_handler(None, 0)
            if self._broken_off:
                raise Unavailable("broken off")
            return result

    def break_off(self) -> None:
        """Nobody waits for it any more."""
        self._broken_off = True

    def _look(self) -> bool:
        """SQLite asks in between whether to give up. (Its `interrupt` does nothing to a statement that is about to begin.)"""
        return self._broken_off
