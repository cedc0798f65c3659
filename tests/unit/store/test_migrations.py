"""A migrated database is what `tables.py` says, whoever migrates it and how often."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Column, Connection, Engine, MetaData, Table, create_engine, insert, select, text
from sqlalchemy.exc import IntegrityError

from proxy.nouns import KeySettings, ProjectSettings, TeamSettings, UserSettings
from proxy.store import (
    PROJECTS,
    TEAMS,
    USERS,
    Author,
    StoreError,
    change_key,
    hash_key,
    list_keys,
    live_keys,
    migrations,
    open_database,
    put,
    revision,
    rotate_key,
    usage,
)
from proxy.store.engine import open_engine
from proxy.store.migrations import HEAD, current
from proxy.store.partitions import is_partition
from proxy.store.tables import metadata, requests
from tests.support.postgresql import PostgreSQL


def _default_differs(_context: object, _found: object, column: Column[Any], found: str | None, *said: str | None) -> bool | None:
    """PostgreSQL compares no JSON, and alembic asks it to. None: as alembic does."""
    if not isinstance(column.type, JSON) or found is None:
        return None
    return found.removesuffix("::json") != said[-1]


def test_the_migrated_schema_is_the_metadata(engine: Engine) -> None:
    opts = {
        "compare_type": True,
        "compare_server_default": _default_differs,
        "include_name": lambda name, kind, _: kind != "table" or not is_partition(name),
    }
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, metadata) == []


def test_on_sqlite_to_the_letter(tmp_path: Path) -> None:
    """alembic doesn't compare conditions of indexes, checks or storage options; SQLite keeps the text of what made each table
    (with quotes around the name of one that was made anew)."""
    made = create_engine(f"sqlite:///{tmp_path / 'made'}")
    metadata.create_all(made)
    migrated = open_database(f"sqlite:///{tmp_path / 'migrated'}")
    query = text("SELECT name, sql FROM sqlite_master WHERE name != 'alembic_version' AND sql IS NOT NULL ORDER BY name")

    def schema(engine: Engine) -> dict[str, str]:
        with engine.connect() as connection:
            return {name: " ".join(sql.replace('"', "").split()) for name, sql in connection.execute(query)}

    try:
        assert schema(migrated) == schema(made)
        assert "WITHOUT ROWID" in schema(made)["requests"]
    finally:
        made.dispose()
        migrated.dispose()


def test_head_is_the_newest_revision() -> None:
    assert ScriptDirectory.from_config(_config()).get_current_head() == HEAD


@pytest.mark.parametrize("version", ["0001", "0002"])
def test_what_an_older_version_wrote_and_goes_on_writing_stays(database_url: str, version: str) -> None:
    """Several hosts on one PostgreSQL are not upgraded at the same moment."""
    engine = open_engine(database_url)
    migrate(engine, command.upgrade, version)
    with engine.begin() as connection:
        older = Table("requests", MetaData(), autoload_with=connection)
        connection.execute(insert(older).values(_row_of(older, "before")))
    open_database(database_url).dispose()
    with engine.begin() as connection:
        connection.execute(insert(older).values(_row_of(older, "after")))
        assert {row.requests for row in usage(connection)} == {2}
        later = [column for column in requests.c if column.name not in older.c]
        told = connection.execute(select(*later))
        nothing = [_nothing(column) for column in later]
        assert [list(row) for row in told] == [nothing, nothing]
    engine.dispose()


def _nothing(column: Column[Any]) -> object:
    if column.nullable:
        return None
    return [] if isinstance(column.type, JSON) else column.type.python_type()


def _row_of(table: Table, identity: str) -> dict[str, object]:
    """Something in every column."""
    return _something(table) | {"id": identity}


def _something(table: Table) -> dict[str, object]:
    day, digest = date(2026, 11, 20), bytes(range(32))
    values: dict[type, object] = {str: "x", int: 1, bool: True, float: 1.0, date: day, bytes: digest, object: {}}
    row = {column.name: values[column.type.python_type] for column in table.columns}
    return row | {name: "{}" for name in ("settings", "before", "after") if name in row}


def migrate(engine: Engine, how: Callable[[Config, str], None], revision: str) -> None:
    """With alembic, up or down."""
    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        how(config, revision)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


# -- up and down --

Rows = dict[str, list[dict[str, object]]]


def _tables(connection: Connection) -> list[Table]:
    found = MetaData()
    found.reflect(connection, only=lambda name, _: name != "alembic_version" and not is_partition(name))
    return list(found.tables.values())


def _fill(engine: Engine) -> None:
    """A row in each table that has none."""
    with engine.begin() as connection:
        for table in _tables(connection):
            if not connection.execute(select(table)).all():
                connection.execute(insert(table).values(_something(table)))


def _contents(engine: Engine) -> Rows:
    """But for how often the catalogue changed."""
    with engine.connect() as connection:
        rows = {table.name: [dict(row) for row in connection.execute(select(table)).mappings()] for table in _tables(connection)}
    for row in rows.get("catalogue", []):
        del row["revision"]
    return rows


def test_up_and_down_with_rows_in_every_table(database_url: str) -> None:
    """Going down a revision takes away what it brought, and nothing else."""
    engine = open_engine(database_url)
    chain = [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]
    kept: dict[str, Rows] = {}
    for reached in chain:
        migrate(engine, command.upgrade, reached)
        _fill(engine)
        kept[reached] = _contents(engine)
        assert all(kept[reached].values()), "rows in every table"
    assert chain[-1] == HEAD
    assert kept[HEAD].keys() == metadata.tables.keys()
    for reached in chain[-2::-1]:
        migrate(engine, command.downgrade, reached)
        assert _contents(engine) == kept[reached], reached
    migrate(engine, command.upgrade, "head")
    again = _contents(engine)
    for table, rows in kept[chain[0]].items():
        shared = again[table][0].keys() & rows[0].keys()
        assert [{name: row[name] for name in shared} for row in again[table]] == [
            {name: row[name] for name in shared} for row in rows
        ]
    test_the_migrated_schema_is_the_metadata(engine)
    migrate(engine, command.downgrade, "base")
    assert _contents(engine) == {}
    engine.dispose()


_KEY_OF_BEFORE = text(
    "INSERT INTO keys (id, name, prefix, hash, created_at, revoked_at) "
    "VALUES (:id, :name, :prefix, :hash, :created_at, :revoked_at)"
)


def test_keys_that_were_there_before(database_url: str) -> None:
    """Up: every secret works as it did. Down: the newest secret of a key, and what didn't work doesn't begin to."""
    engine = open_engine(database_url)
    migrate(engine, command.upgrade, "0003")
    names = ["fine", "rotated", "blocked", "expired", "of a team", "of a user", "of a project", "to come"]
    before: list[dict[str, Any]] = [
        *({"name": name, "created_at": 5, "revoked_at": None} for name in names),
        {"name": "fine", "created_at": 3, "revoked_at": 4},
    ]
    for number, row in enumerate(before):
        row |= {"id": f"key_{number}", "prefix": f"gh-{number}", "hash": hash_key(f"gh-{number}")}
    with engine.begin() as connection:
        connection.execute(_KEY_OF_BEFORE, before)
    open_database(database_url).dispose()
    with engine.begin() as connection:
        told = [(row.id, row.name, row.prefix, row.created_at, row.revoked_at, row.value) for row in list_keys(connection)]
        assert sorted(told) == [
            (row["id"], row["name"], row["prefix"], row["created_at"], row["revoked_at"], KeySettings()) for row in before
        ]
        assert {key.hash: key.name for key in live_keys(connection)} == {
            hash_key(f"gh-{n}"): each for n, each in enumerate(names)
        }
        ended, to_come = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
        author = Author("alice", "admin")
        put(connection, TEAMS, "t", TeamSettings(blocked=True), author)
        put(connection, USERS, "u", UserSettings(expires=ended), author)
        put(connection, PROJECTS, "p", ProjectSettings(blocked=True), author)
        rotated, _ = rotate_key(connection, "rotated", 3600)
        change_key(connection, "blocked", KeySettings(blocked=True))
        change_key(connection, "expired", KeySettings(expires=ended))
        change_key(connection, "to come", KeySettings(expires=to_come, requests_per_minute=1))
        change_key(connection, "of a team", KeySettings(team="t"))
        change_key(connection, "of a user", KeySettings(user="u"))
        change_key(connection, "of a project", KeySettings(project="p"))
        changes = revision(connection)
    migrate(engine, command.downgrade, "0003")
    with engine.begin() as connection:
        rows = [dict(row) for row in connection.execute(text("SELECT * FROM keys ORDER BY id")).mappings()]
        assert connection.execute(text("SELECT revision FROM catalogue")).scalar_one() > changes, "so that who looks sees it"
    assert {row["name"] for row in rows if row["revoked_at"] is None} == {"fine", "rotated", "to come"}
    for was, now in zip(before, rows, strict=True):
        if was["name"] == "rotated":
            was |= {"prefix": rotated[:7], "hash": hash_key(rotated)}
        assert now | {"revoked_at": None} == was | {"revoked_at": None}
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(_KEY_OF_BEFORE, {**before[0], "id": "key_x", "name": "another"})
    open_database(database_url).dispose()
    with engine.begin() as connection:
        assert {key.name for key in live_keys(connection)} == {"fine", "rotated", "to come"}
    engine.dispose()


def test_a_collector_of_before_goes_on_during_a_migration(postgresql: PostgreSQL) -> None:
    """It waits for a moment at most; every row that it was told is stored is there."""
    url = postgresql.url_of(postgresql.new_database())
    engine = open_engine(url)
    migrate(engine, command.upgrade, "0003")
    with engine.begin() as connection:
        older = Table("requests", MetaData(), autoload_with=connection)
    stored: list[str] = []
    begun, over = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def collect() -> None:
        try:
            while not over.is_set() or len(stored) < 20:
                with engine.begin() as connection:
                    connection.execute(insert(older).values(_row_of(older, f"{len(stored)}")))
                stored.append(f"{len(stored)}")
                begun.set()
        except BaseException as error:  # told of by the test
            errors.append(error)
            begun.set()

    collector = threading.Thread(target=collect)
    collector.start()
    assert begun.wait(60)
    open_database(url).dispose()
    over.set()
    collector.join()
    assert errors == []
    with engine.connect() as connection:
        assert set(connection.execute(select(requests.c.id)).scalars()) == set(stored)
    engine.dispose()


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
    by_command = [sys.executable, "-m", "alembic", "-c", str(ini), "-x", f"url={url}"]
    subprocess.run([*by_command, "upgrade", "head"], check=True)
    engine = open_database(url)
    with engine.connect() as connection:
        assert current(connection) == HEAD
    subprocess.run([*by_command, "downgrade", "0003"], check=True)
    with engine.connect() as connection:
        assert current(connection) == "0003"
    engine.dispose()
