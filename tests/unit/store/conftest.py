"""Real databases: SQLite in a file, and PostgreSQL where its server and a driver are installed.

The driver decides: with it installed a missing server is a skipped test; without it (psycopg is no dependency of ours yet) there
are no tests on PostgreSQL, and the run's summary says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from proxy.store import open_database

DRIVER = importlib.util.find_spec("psycopg") is not None
_numbers = count(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not DRIVER:
        terminalreporter.write_line("The store was NOT tried on PostgreSQL: the driver psycopg isn't installed.", yellow=True)


def _program(name: str) -> Path | None:
    """Debian keeps the server's programs off the PATH, in a folder per version."""
    if (found := shutil.which(name)) is not None:
        return Path(found)
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), default=None)


@contextmanager
def _cluster(initdb: Path, pg_ctl: Path) -> Iterator[str]:
    """A server of its own on a Unix socket → the URL of its `postgres` database. It refuses to run as root."""
    user = "postgres" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="glasshouse-pg-"))
    if user is not None:
        shutil.chown(home, user, user)
    data = home / "data"

    def run(*command: object) -> None:
        log = home / "log"
        done = subprocess.run([str(part) for part in command], user=user, cwd=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")

    try:
        run(initdb, "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C", data)
        options = f"-k {home} -c listen_addresses='' -c fsync=off -c max_connections=30"
        run(pg_ctl, "--pgdata", data, "--log", home / "log", "--options", options, "--wait", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={home}"
        finally:
            run(pg_ctl, "--pgdata", data, "--mode", "immediate", "--wait", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server's own database."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("the server of PostgreSQL isn't installed (Debian: postgresql)")
    with _cluster(initdb, pg_ctl) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"] if DRIVER else ["sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'glasshouse.db'}"
    server: str = request.getfixturevalue("postgresql")
    name = f"test_{next(_numbers)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A database with its tables."""
    engine = open_database(database_url)
    yield engine
    engine.dispose()
