"""How a database becomes what `tables.py` says.

`upgrade` is what the program runs, at every start; the revisions in `versions/` are small files that alembic finds there.
To write one, with a database at the revision before:

    alembic -c proxy/store/migrations/alembic.ini -x url=sqlite:////tmp/before.db revision --autogenerate -m "what changes"

then set `HEAD` here. What other versions of the program may go on writing meanwhile (PostgreSQL, several hosts), the rows of the
ledger, a revision only ever adds to.

The program never goes back; who wants an older version again does, with everything stopped and a copy of the database made:

    alembic -c proxy/store/migrations/alembic.ini -x url=URL downgrade 0003

Each revision's `downgrade` says what is lost by it.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, func, inspect, select, text

from proxy.store.engine import StoreError, reader, without_deadline

HEAD = "0008"
"""The newest revision. Known here so that a database that is up to date costs one look and not the import of alembic."""

_LOCK = 0x676C617373  # "glass"; any number that nobody else takes


def upgrade(engine: Engine) -> None:
    """Bring the tables up to date; two processes that do it at once come out the same. Raises StoreError for a newer database."""
    with reader(engine).connect() as connection:
        if current(connection) == HEAD:
            return
    with engine.begin() as connection:
        without_deadline(connection)
        _lock(connection)
        _run(connection)


def current(connection: Connection) -> str | None:
    """The revision of the database; None if it has none yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _lock(connection: Connection) -> None:
    """One process at a time, until the transaction ends. On SQLite a transaction that may write is that already."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def _run(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(
            f"the database is at revision {current(connection)!r}, which this version ({HEAD!r}) doesn't know; "
            "a newer version has written it"
        ) from error
