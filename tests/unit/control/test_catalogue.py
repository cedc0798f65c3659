"""What holds: the file's declarations over the database's rows, on both kinds of database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from proxy.control.catalogue import (
    Catalogue,
    Held,
    HeldKey,
    everyone,
    file_key_id,
    holding,
    key,
    key_page,
    laid_over,
    one,
    page,
    said_fields,
    stored,
)
from proxy.nouns import AllowanceSettings, BackendSettings, BudgetSettings, KeySettings, ModelSettings, TeamSettings, UserSettings
from proxy.settings import Settings
from proxy.store import (
    BACKENDS,
    GLASSHOUSE,
    MODELS,
    PROJECTS,
    TEAMS,
    USERS,
    create_key,
    hash_key,
    open_database,
    put,
    put_everyone,
    revoke_key,
    rotate_key,
)
from tests.support.postgresql import PostgreSQL, postgresql_server

HASH = "5f" * 32


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def connection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connection]:
    url = f"sqlite:///{tmp_path / 'glasshouse.db'}"
    if request.param == "postgresql":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        url = server.url_of(server.new_database())
    engine = open_database(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def team(limit: int | None = None) -> TeamSettings:
    return TeamSettings(requests_per_minute=limit)


# -- one noun --


def test_the_files_object_is_the_one_that_holds(connection: Connection) -> None:
    for name in ("a", "b"):
        put(connection, TEAMS, name, team(1), GLASSHOUSE)
    settings = Settings(teams={"b": team(2), "c": team(3)})
    a, b, c, d = (one(connection, settings, TEAMS, name) for name in "abcd")
    assert a is not None
    assert (a.name, a.value, a.source) == ("a", team(1), "database")
    assert 0 < a.created_at <= a.changed_at <= time.time_ns()
    assert b == Held("b", team(2), "file", 0, 0)
    assert c == Held("c", team(3), "file")
    assert d is None


def test_a_page_is_in_the_order_of_names_whoever_has_them(connection: Connection) -> None:
    for name in ("a", "c", "e", "f"):
        put(connection, TEAMS, name, team(), GLASSHOUSE)
    settings = Settings(teams={"b": team(), "c": team(), "f": team(), "z": team()})
    everything = page(connection, settings, TEAMS)
    assert [(each.name, each.source) for each in everything] == [
        ("a", "database"),
        ("b", "file"),
        ("c", "file"),
        ("e", "database"),
        ("f", "file"),
        ("z", "file"),
    ]
    seen: list[Held[TeamSettings]] = []
    while part := page(connection, settings, TEAMS, after=seen[-1].name if seen else "", limit=2):
        assert len(part) <= 2
        seen += part
    assert seen == everything


def test_a_page_of_a_team(connection: Connection) -> None:
    """What the database says of the team of one that the file declares doesn't count."""
    put(connection, TEAMS, "x", team(), GLASSHOUSE)
    for name in ("ann", "bob", "dan"):
        put(connection, USERS, name, UserSettings(team="x"), GLASSHOUSE)
    settings = Settings(teams={"y": team()}, users={"bob": UserSettings(team="y"), "cid": UserSettings(team="y")})
    assert [each.name for each in page(connection, settings, USERS, team="x")] == ["ann", "dan"]
    assert [each.name for each in page(connection, settings, USERS, team="x", after="ann", limit=1)] == ["dan"]
    assert [each.name for each in page(connection, settings, USERS, team="y")] == ["bob", "cid"]
    assert [each.name for each in page(connection, settings, TEAMS, team="y")] == ["y"]
    assert page(connection, settings, PROJECTS, team="y") == []


def test_a_part_of_a_name_is_meant_literally(connection: Connection) -> None:
    for name in ("a.b", "axb", "a"):
        put(connection, TEAMS, name, team(), GLASSHOUSE)
    settings = Settings(teams={"b.a.b": team(), "other": team()})
    assert [each.name for each in page(connection, settings, TEAMS, containing="a.b")] == ["a.b", "b.a.b"]
    assert page(connection, settings, TEAMS, containing="%") == []


def test_backends_are_known_by_their_place_where_they_have_no_name(connection: Connection) -> None:
    put(connection, BACKENDS, "backend-0", BackendSettings(url="http://db"), GLASSHOUSE)
    put(connection, BACKENDS, "gpu", BackendSettings(url="http://gpu"), GLASSHOUSE)
    settings = Settings(backends=[BackendSettings(url="http://file")])
    assert [(each.name, each.value.url, each.source) for each in page(connection, settings, BACKENDS)] == [
        ("backend-0", "http://file", "file"),
        ("gpu", "http://gpu", "database"),
    ]


def test_everyone_is_the_files_if_it_says_anything(connection: Connection) -> None:
    assert everyone(connection, Settings()) == Held("everyone", AllowanceSettings(), "database")
    put_everyone(connection, AllowanceSettings(tokens_per_minute=5), GLASSHOUSE)
    assert everyone(connection, Settings()).value.tokens_per_minute == 5
    said = AllowanceSettings(requests_per_minute=7)
    assert everyone(connection, Settings(everyone=said)) == Held("everyone", said, "file")


# -- keys --


def test_what_the_file_says_of_a_key_lies_over_what_the_database_says(connection: Connection) -> None:
    put(connection, TEAMS, "db", team(), GLASSHOUSE)
    value = KeySettings(team="db", requests_per_minute=1, tokens_per_minute=2, blocked=True, tags=("old",))
    _, row = create_key(connection, "alice", value)
    settings = Settings(teams={"file": team()}, keys={"alice": KeySettings(team="file", requests_per_minute=9)})
    held = key(connection, settings, "alice")
    assert held is not None
    assert held.value == KeySettings(team="file", requests_per_minute=9, tokens_per_minute=2, blocked=True, tags=("old",))
    assert (held.id, held.source, held.declared) == (row.id, "database", ("requests_per_minute", "team"))
    assert key(connection, settings, row.id) == held
    assert held.secrets == row.secrets


def test_budgets_are_said_together(connection: Connection) -> None:
    day, month = (BudgetSettings(tokens=1, per="day"), BudgetSettings(tokens=1, per="month"))
    assert laid_over(KeySettings(budgets=(day,)), KeySettings(budgets=(month,), team="t")) == KeySettings(
        budgets=(day,), team="t"
    )
    assert said_fields(KeySettings(budgets=(day,), blocked=False)) == ("budgets",)


def test_a_key_that_was_revoked_is_not_the_one_that_the_file_means(connection: Connection) -> None:
    _, former = create_key(connection, "alice")
    revoke_key(connection, "alice")
    _, row = create_key(connection, "alice")
    settings = Settings(keys={"alice": KeySettings(requests_per_minute=9)})
    revoked = key(connection, settings, former.id)
    assert revoked is not None
    assert (revoked.value, revoked.declared) == (KeySettings(), ())
    in_use = key(connection, settings, "alice")
    assert in_use is not None
    assert (in_use.id, in_use.value.requests_per_minute) == (row.id, 9)
    listed = key_page(connection, settings)
    assert {(each.id, each.value.requests_per_minute) for each in listed} == {(former.id, None), (row.id, 9)}


def test_a_key_with_a_hash_is_a_key_without_the_database(connection: Connection) -> None:
    said = KeySettings(hash=f"sha256:{HASH}", requests_per_minute=3)
    settings = Settings(keys={"ci": said})
    held = key(connection, settings, "ci")
    assert isinstance(held, HeldKey)
    assert (held.id, held.name, held.value, held.source) == ("key_5f5f5f5f5f5f5f5f", "ci", said, "file")
    assert {"requests_per_minute", "team", "blocked"} <= set(held.declared), "all of it is the file's"
    assert held.secrets == ()
    assert key(connection, settings, held.id) == held
    assert key_page(connection, settings) == [held]
    assert key(connection, settings, "other") is None


def test_a_secret_that_the_file_and_the_database_have_opens_one_key(connection: Connection) -> None:
    """As after `glasshouse export`: its id stays, and with it what it has spent."""
    secret, row = create_key(connection, "alice", KeySettings(requests_per_minute=1))
    settings = Settings(keys={"ann": KeySettings(hash=f"sha256:{hash_key(secret).hex()}")})
    held = key(connection, settings, "ann")
    assert held is not None
    assert (held.id, held.name, held.value.requests_per_minute, held.source) == (row.id, "ann", None, "file")
    assert key_page(connection, settings) == [held]
    rotate_key(connection, "alice", 0)
    again = key(connection, settings, "ann")
    assert again is not None
    assert again.id == file_key_id(hash_key(secret)), "the database knows it no more; the file says that it works"


def test_two_keys_of_one_name(connection: Connection) -> None:
    """The name means the file's. The other is known by its id, and is not limited by what the file says of its own."""
    _, row = create_key(connection, "ci")
    settings = Settings(keys={"ci": KeySettings(hash=f"sha256:{HASH}", requests_per_minute=3)})
    held, other = key(connection, settings, "ci"), key(connection, settings, row.id)
    assert held is not None
    assert other is not None
    assert (held.source, other.source, other.value) == ("file", "database", KeySettings())
    assert {each.id for each in key_page(connection, settings)} == {held.id, row.id}


def test_a_page_of_keys_goes_on_where_it_ended(connection: Connection) -> None:
    for name in ("a", "c", "d", "d2"):
        create_key(connection, name)
    settings = Settings(
        keys={
            "b": KeySettings(hash=f"sha256:{HASH}"),
            "c": KeySettings(tags=("x",)),
            "d": KeySettings(tags=("x",)),
            "none": KeySettings(),
        }
    )
    everything = key_page(connection, settings)
    assert [each.name for each in everything] == ["a", "b", "c", "d", "d2"]
    seen: list[HeldKey] = []
    while part := key_page(connection, settings, after=f"{seen[-1].name}\0{seen[-1].id}" if seen else "", limit=2):
        assert len(part) <= 2
        seen += part
    assert seen == everything


def test_keys_are_found_by_what_holds_for_them(connection: Connection) -> None:
    for name in ("x", "y"):
        put(connection, TEAMS, name, team(), GLASSHOUSE)
    for name in ("a", "b"):
        create_key(connection, name, KeySettings(team="x", tags=("old",)))
    create_key(connection, "c", KeySettings(team="x"))
    revoke_key(connection, "c")
    settings = Settings(
        teams={"y": team()},
        users={"u": UserSettings()},
        keys={"b": KeySettings(team="y", tags=("new",)), "f": KeySettings(hash=f"sha256:{HASH}", team="y", user="u")},
    )

    def found(**wanted: str | bool) -> list[str]:
        return [each.name for each in key_page(connection, settings, **wanted)]  # type: ignore[arg-type]

    assert found(team="x") == ["a", "c"]
    assert found(team="x", revoked=False) == ["a"]
    assert found(team="y") == ["b", "f"]
    assert found(tag="old") == ["a"]
    assert found(tag="new") == ["b"]
    assert found(user="u") == ["f"]
    assert found(project="p") == []
    assert found(containing="f") == ["f"]


# -- everything --


def test_everything_at_one_moment(connection: Connection) -> None:
    put(connection, TEAMS, "t", team(1), GLASSHOUSE)
    put(connection, MODELS, "m", ModelSettings(aliases=("n",)), GLASSHOUSE)
    put(connection, BACKENDS, "gpu", BackendSettings(url="http://gpu"), GLASSHOUSE)
    put_everyone(connection, AllowanceSettings(tokens_per_minute=5), GLASSHOUSE)
    database = stored(connection)
    assert database.teams == {"t": team(1)}
    settings = Settings(
        teams={"t": team(2)},
        models={"o": ModelSettings()},
        backends=[BackendSettings(url="http://x"), BackendSettings(url="http://y", name="gpu")],
    )
    held = holding(settings, database)
    assert held.teams == {"t": team(2)}
    assert list(held.models) == ["o", "m"], "the file's are first"
    assert {name: each.url for name, each in held.backends.items()} == {"backend-0": "http://x", "gpu": "http://y"}
    assert held.everyone == AllowanceSettings(tokens_per_minute=5)
    assert holding(Settings(), Catalogue()) == Catalogue()
