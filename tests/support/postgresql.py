"""A PostgreSQL of a test's own: real, on a Unix socket and on a free port of loopback, in a temporary directory.

It refuses to run as root, so there it runs as Debian's user `postgres`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

_numbers = count(1)


class PostgreSQL:
    """A server. `url` is that of a database that is there from the beginning; `home` is a directory that it may read."""

    def __init__(self, home: Path, initdb: Path, pg_ctl: Path, user: str | None) -> None:
        self.home = home
        self._pg_ctl = pg_ctl
        self._user = user
        self._data = home / "data"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._run(initdb, "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C", self._data)
        self.url = self.url_of("postgres")

    def url_of(self, database: str, *, tcp: bool = False) -> str:
        """On its Unix socket or by TCP."""
        place = f"@127.0.0.1:{self.port}/{database}" if tcp else f"@/{database}?host={self.home}&port={self.port}"
        return f"postgresql+psycopg://postgres{place}"

    @property
    def owner(self) -> tuple[int, int]:
        """User and group as whom it runs."""
        info = self._data.stat()
        return info.st_uid, info.st_gid

    def new_database(self, like: str = "template1") -> str:
        """Its name. It has what the database `like` has, to which nobody may be connected."""
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {like}")
        return name

    def execute(self, statement: str, database: str = "postgres") -> None:
        """As the superuser, outside of any transaction."""
        with self.connect(database, autocommit=True) as connection:
            connection.execute(statement.encode())

    def rows(self, statement: str, database: str) -> list[dict[str, Any]]:
        with self.connect(database, row_factory=psycopg.rows.dict_row) as connection:
            return connection.execute(statement.encode()).fetchall()

    def connect(self, database: str, **more: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self.home), port=self.port, user="postgres", dbname=database, **more)

    # -- life --

    def start(self) -> None:
        options = f"-p {self.port} -k {self.home} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=30"
        self._control("--log", self.home / "log", "--options", options, "--wait", "start")

    def stop(self) -> None:
        """As a crash would: connections break off, nothing is finished."""
        self._control("--mode", "immediate", "--wait", "stop")

    def freeze(self) -> None:
        """It hangs: connections stay, nobody answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """The server and its children; those that ended meanwhile are none."""
        server = int((self._data / "postmaster.pid").read_text().split("\n", 1)[0])
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        for pid in (server, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _control(self, *arguments: object) -> None:
        self._run(self._pg_ctl, "--pgdata", self._data, *arguments)

    def _run(self, *command: object) -> None:
        log = self.home / "log"
        done = subprocess.run(
            [str(part) for part in command], user=self._user, cwd=self.home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


@contextmanager
def postgresql_server() -> Iterator[PostgreSQL]:
    """It runs until the end of the block. Where it isn't installed the test is skipped."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("the server of PostgreSQL isn't installed (Debian: postgresql)")
    user = "postgres" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="glasshouse-pg-"))
    if user is not None:
        shutil.chown(home, user, user)
    try:
        server = PostgreSQL(home, initdb, pg_ctl, user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home)


def _program(name: str) -> Path | None:
    """Debian keeps the server's programs off the PATH, in a folder per version."""
    if (found := shutil.which(name)) is not None:
        return Path(found)
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), default=None)
