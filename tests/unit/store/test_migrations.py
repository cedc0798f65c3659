"""A migrated database is what `tables.py` says, whoever migrates it and how often."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, MetaData, Table, create_engine, insert, select, text

from proxy.store import StoreError, list_keys, migrations, open_database, usage
from proxy.store.engine import open_engine
from proxy.store.migrations import HEAD, current
from proxy.store.tables import metadata, requests


def test_the_migrated_schema_is_the_metadata(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_on_sqlite_to_the_letter(tmp_path: Path) -> None:
    """alembic doesn't compare conditions of indexes, checks or storage options; SQLite keeps the text of what made each table."""
    made = create_engine(f"sqlite:///{tmp_path / 'made'}")
    metadata.create_all(made)
    migrated = open_database(f"sqlite:///{tmp_path / 'migrated'}")
    query = text("SELECT name, sql FROM sqlite_master WHERE name != 'alembic_version' AND sql IS NOT NULL ORDER BY name")

    def schema(engine: Engine) -> dict[str, str]:
        with engine.connect() as connection:
            return {name: " ".join(sql.split()) for name, sql in connection.execute(query)}

    try:
        assert schema(migrated) == schema(made)
        assert "WITHOUT ROWID" in schema(made)["requests"]
    finally:
        made.dispose()
        migrated.dispose()


def test_head_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


@pytest.mark.parametrize("version", ["0001", "0002"])
def test_what_an_older_version_wrote_and_goes_on_writing_stays(database_url: str, version: str) -> None:
    """Several hosts on one PostgreSQL are not upgraded at the same moment."""
    engine = open_engine(database_url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)
        older = Table("requests", MetaData(), autoload_with=connection)
        connection.execute(insert(older).values(_row_of(older, "before")))
    open_database(database_url).dispose()
    with engine.begin() as connection:
        connection.execute(insert(older).values(_row_of(older, "after")))
        assert {row.requests for row in usage(connection)} == {2}
        later = [column for column in requests.c if column.name not in older.c]
        told = connection.execute(select(*later))
        assert {tuple(row) for row in told} == {tuple(column.type.python_type() for column in later)}
    engine.dispose()


def _row_of(table: Table, identity: str) -> dict[str, object]:
    """Something in every column."""
    values: dict[type, object] = {str: "x", int: 1, bool: True, float: 1.0, date: date(2026, 11, 20), object: {}}
    return {column.name: values[column.type.python_type] for column in table.columns} | {"id": identity}


def test_again_is_nothing(engine: Engine, database_url: str) -> None:
    again = open_database(database_url)
    with again.connect() as connection:
        assert current(connection) == HEAD
    again.dispose()


def test_processes_that_start_at_once(database_url: str) -> None:
    """Each waits at its standard input, so that all of them are ready to go before the first one goes."""
    program = "import sys; from proxy.store import open_database; sys.stdin.read(); open_database(sys.argv[1])"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, database_url], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    engine = open_database(database_url)
    with engine.connect() as connection:
        assert current(connection) == HEAD
        assert list_keys(connection) == []
        assert connection.execute(text("SELECT count(*) FROM catalogue")).scalar_one() == 1
    engine.dispose()


def test_a_newer_database_is_left_alone(engine: Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"'9999'.*newer version"):
        open_database(database_url)


def test_the_command_for_developers(tmp_path: Path) -> None:
    ini = Path(migrations.__file__).parent / "alembic.ini"
    url = f"sqlite:///{tmp_path / 'by command.db'}"
    subprocess.run([sys.executable, "-m", "alembic", "-c", ini, "-x", f"url={url}", "upgrade", "head"], check=True)
    engine = open_database(url)
    with engine.connect() as connection:
        assert current(connection) == HEAD
    engine.dispose()
