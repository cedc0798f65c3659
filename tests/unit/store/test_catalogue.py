"""Teams, users, projects, models, backends: what was said is what is there, and who changed it is known."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from msgspec import Struct
from sqlalchemy import Connection, Engine, text

from proxy.nouns import (
    AllowanceSettings,
    BackendSettings,
    BoundsSettings,
    BudgetSettings,
    DatedPriceSettings,
    KeySettings,
    ModelSettings,
    PriceSettings,
    ProjectSettings,
    TeamSettings,
    UserSettings,
)
from proxy.store import (
    BACKENDS,
    MODELS,
    PROJECTS,
    TEAMS,
    USERS,
    Author,
    InUse,
    NoSuch,
    NotAllowed,
    Noun,
    StoreError,
    UnknownName,
    UnusableName,
    audit_rows,
    create_admin_key,
    create_key,
    entries,
    everyone,
    find,
    open_database,
    put,
    put_everyone,
    reader,
    remove,
    revision,
    revoke_admin_key,
    revoke_key,
    said,
)
from tests.support.postgresql import PostgreSQL
from tests.unit.store.conftest import Store

ALICE = Author("alice", "admin", "192.0.2.1")

_LIMITS: dict[str, Any] = {
    "requests_per_minute": 60,
    "max_input_tokens": 2**40,
    "models": ("qwen*", "über[a-z]"),
    "operations": ("chat", "embeddings"),
    "expires": datetime(2027, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=1))),
    "budgets": (
        BudgetSettings(money=Decimal("0.10"), per="day"),
        BudgetSettings(tokens=10**15, per="total", soft=True, time_zone="Europe/Vienna"),
    ),
    "blocked": True,
}
VALUES: list[tuple[Noun[Any], Struct, Struct]] = [
    (TEAMS, TeamSettings(**_LIMITS), TeamSettings()),
    (USERS, UserSettings(**_LIMITS), UserSettings(blocked=True)),
    (PROJECTS, ProjectSettings(**_LIMITS), ProjectSettings(concurrent_requests=1)),
    (
        MODELS,
        ModelSettings(
            price=PriceSettings(),
            prices=(DatedPriceSettings(valid_from=datetime(2027, 1, 1, tzinfo=UTC), input=Decimal("0.1"), from_="x/y"),),
            aliases=("gpt-4o", "größer"),
            defaults={"temperature": 0.1, "stop": ["\0", "é"], "n": True, "deep": {"z": 1, "a": None}},
            bounds=BoundsSettings(n=4),
        ),
        ModelSettings(),
    ),
    (
        BACKENDS,
        BackendSettings(url="https://gpu.example:8000/v1", kind="vllm", models=["a", "b"], api_key_env="KEY", ca_file="/ca.pem"),
        BackendSettings(url="http://127.0.0.1:8000"),
    ),
]
every_noun = pytest.mark.parametrize(("noun", "full", "other"), VALUES, ids=[noun.name for noun, _, _ in VALUES])


def named(noun: Noun[Any], name: str, value: Any) -> Any:
    """As it comes back: a backend knows its name."""
    fields = {field: getattr(value, field) for field in value.__struct_fields__}
    return type(value)(**fields | {"name": name}) if noun is BACKENDS else value


# -- one --


@every_noun
def test_what_was_said_is_there_to_the_letter(store: Store, noun: Noun[Any], full: Struct, other: Struct) -> None:
    entry, created = store.write(put, noun, "one", full, ALICE)
    assert created
    assert entry == store.read(find, noun, "one")
    assert (entry.name, entry.value) == ("one", named(noun, "one", full))
    assert repr(entry.value) == repr(named(noun, "one", full)), "the same types, too"
    assert entry.created_at == entry.changed_at > 1.7e18
    changed, created = store.write(put, noun, "one", other, ALICE)
    assert not created
    assert changed.value == named(noun, "one", other)
    assert changed.created_at == entry.created_at < changed.changed_at
    assert store.read(find, noun, "one") == changed
    assert store.write(remove, noun, "one", ALICE) == changed
    assert store.read(find, noun, "one") is None
    assert store.read(entries, noun) == []


@every_noun
def test_each_change_is_counted_and_noted(store: Store, noun: Noun[Any], full: Struct, other: Struct) -> None:
    assert store.read(revision) == 0
    store.write(put, noun, "one", full, ALICE)
    assert store.read(revision) == 1
    store.write(put, noun, "one", other, Author("bob", "manager"))
    assert store.read(revision) == 2
    store.write(remove, noun, "one", ALICE)
    assert store.read(revision) == 3
    first, second = said(named(noun, "one", full)), said(named(noun, "one", other))
    rows = [(row.author, row.role, row.address, row.action, row.before, row.after) for row in store.read(audit_rows)]
    assert rows[::-1] == [
        ("alice", "admin", "192.0.2.1", "create", None, first),
        ("bob", "manager", "", "change", first, second),
        ("alice", "admin", "192.0.2.1", "remove", second, None),
    ]
    assert {(row.noun, row.name) for row in store.read(audit_rows)} == {(noun.name, "one")}


@every_noun
def test_the_same_again_is_no_change(store: Store, noun: Noun[Any], full: Struct, other: Struct) -> None:
    entry, _ = store.write(put, noun, "one", full, ALICE)
    assert store.write(put, noun, "one", full, ALICE) == (entry, False)
    assert store.read(revision) == len(store.read(audit_rows)) == 1


def test_one_is_not_true_and_not_a_float(store: Store) -> None:
    """They are equal to Python, and not to an engine."""
    for number, value in enumerate([1, True, 1.0]):
        store.write(put, MODELS, "one", ModelSettings(defaults={"n": value}), ALICE)
        assert store.read(revision) == number + 1
        entry = store.read(find, MODELS, "one")
        assert entry is not None
        assert repr(entry.value.defaults) == repr({"n": value})


def test_what_is_as_by_default_is_not_stored(store: Store) -> None:
    """So that a default means the same in every row, and an older version can read what says nothing new."""
    store.write(put, TEAMS, "one", TeamSettings(budgets=(BudgetSettings(tokens=1, per="day"),)), ALICE)

    def row(connection: Connection) -> str:
        return str(connection.execute(text("SELECT settings FROM teams")).scalar_one())

    assert store.read(row) == '{"budgets":[{"tokens":1,"per":"day"}]}'


def test_nothing_is_committed_for_the_caller(engine: Engine) -> None:
    with engine.connect() as connection:
        put(connection, TEAMS, "one", TeamSettings(), ALICE)
    with engine.begin() as connection:
        assert revision(connection) == 0
        assert entries(connection, TEAMS) == []
        assert audit_rows(connection) == []


# -- names --


def test_names_that_are_none(engine: Engine) -> None:  # failure 78
    nobodys = ["", "-a", "a b", "a\n", "ä", "a/b", "x" * 65, "\ud800", "a\0", "=1+1", "gh-" + "x" * 43]
    no_models = ["", "a b", "a\n", "a\x1b[31m", "x" * 257, "\ud800", "a\0", "gha-" + "x" * 43]
    with engine.begin() as connection:
        for noun, value, _ in VALUES:
            for name in no_models if noun is MODELS else nobodys:
                with pytest.raises(UnusableName) as caught:
                    put(connection, noun, name, value, ALICE)
                assert "x" * 43 not in str(caught.value)
        assert revision(connection) == 0


def test_names_that_are_fine(engine: Engine) -> None:
    with engine.begin() as connection:
        for name in ("a", "A.b_c-9", "x" * 64, "gh-actions"):
            assert put(connection, TEAMS, name, TeamSettings(), ALICE)[0].name == name
        for name in ("Qwen/Qwen3-0.6B", "größer", "x" * 256, "' OR 1=1 --".replace(" ", "")):
            assert put(connection, MODELS, name, ModelSettings(), ALICE)[0].name == name


def test_a_backend_has_one_name(store: Store) -> None:
    with pytest.raises(UnusableName, match="called otherwise"):
        store.write(put, BACKENDS, "one", BackendSettings(url="http://h", name="other"), ALICE)
    store.write(put, BACKENDS, "one", BackendSettings(url="http://h"), ALICE)
    _, created = store.write(put, BACKENDS, "one", BackendSettings(url="http://h", name="one"), ALICE)
    assert not created
    assert store.read(revision) == 1


def test_what_is_not_there(store: Store) -> None:  # failure 70, 71
    store.write(put, TEAMS, "one", TeamSettings(), ALICE)
    for name in ("nobody", "", "%", "on_", "' OR 1=1 --", "\0", "\ud800", "x" * 100_000):
        assert store.read(find, TEAMS, name) is None
        with pytest.raises(NoSuch):
            store.write(remove, TEAMS, name, ALICE)
    assert store.read(revision) == 1


def test_a_secret_given_for_a_name_is_not_repeated(store: Store) -> None:  # failure 76
    secret, _ = store.write(create_key, "alice")
    with pytest.raises(NoSuch) as caught:
        store.write(remove, TEAMS, secret, ALICE)
    with pytest.raises(UnknownName) as unknown:
        store.write(put, USERS, "zoe", UserSettings(team=secret), ALICE)
    assert secret not in str(caught.value) + str(unknown.value)


# -- several --

_ODD = ["a", "B", "_", "a_b", "a%b", "aXb", "a\\b", "ab", "Zoë", "ä", "é", "z", "10", "9", "-", "\U0001f600", "\uffee"]


def _odd_models(connection: Connection) -> None:
    for name in _ODD:
        put(connection, MODELS, name, ModelSettings(), ALICE)


def test_entries_come_by_name_and_in_pages(store: Store) -> None:
    store.write(_odd_models)
    names = [entry.name for entry in store.read(entries, MODELS)]
    assert names == sorted(_ODD)
    pages: list[str] = []
    while page := store.read(entries, MODELS, after=pages[-1] if pages else "", limit=3):
        assert len(page) <= 3
        pages += [entry.name for entry in page]
    assert pages == names


def test_the_order_is_pythons_whatever_the_databases_language(postgresql: PostgreSQL) -> None:
    """What a file declares is merged into pages by the same order."""
    postgresql.execute("CREATE DATABASE swedish TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'sv'")
    engine = open_database(postgresql.url_of("swedish"))
    with engine.begin() as connection:
        assert connection.execute(text("SELECT 'a' < 'B' AND 'z' < 'ä'")).scalar_one(), "this is a dictionary's order"
        _odd_models(connection)
        assert [entry.name for entry in entries(connection, MODELS)] == sorted(_ODD)
        assert [entry.name for entry in entries(connection, MODELS, after="B")] == sorted(name for name in _ODD if name > "B")
        assert [entry.name for entry in entries(connection, MODELS, containing="ä")] == ["ä"]
        for name in _ODD:
            create_key(connection, name)
        rows = connection.execute(text("SELECT name FROM keys ORDER BY name")).scalars()
        assert list(rows) == sorted(_ODD)
    engine.dispose()


def test_a_search_means_what_it_says(store: Store) -> None:  # failure 71
    store.write(_odd_models)
    for part in ("", "a", "A", "%", "_", "a_b", "a%", "\\", "b", "ë", "%%%%%%%%%", "'", "\0", "\ud800", "a" * 100_000):
        found = [entry.name for entry in store.read(entries, MODELS, containing=part)]
        assert found == sorted(name for name in _ODD if part in name), part[:10]


def test_of_a_team(store: Store) -> None:
    def make(connection: Connection) -> None:
        for team in ("red", "blue"):
            put(connection, TEAMS, team, TeamSettings(), ALICE)
            put(connection, USERS, f"u-{team}", UserSettings(team=team), ALICE)
        put(connection, USERS, "nobodys", UserSettings(), ALICE)
        put(connection, MODELS, "m", ModelSettings(), ALICE)

    store.write(make)
    assert [entry.name for entry in store.read(entries, USERS, team="red")] == ["u-red"]
    assert [entry.name for entry in store.read(entries, TEAMS, team="red")] == ["red"]
    others: list[Noun[Any]] = [PROJECTS, MODELS, BACKENDS]
    for noun in others:
        assert store.read(entries, noun, team="red") == []
    for team in ("", "re_", "%", "\0", "\ud800"):
        assert store.read(entries, USERS, team=team) == []
    assert {row.name for row in store.read(audit_rows, team="red")} == {"red", "u-red"}


# -- what refers to what --


def test_a_team_that_is_not_there(store: Store) -> None:
    with pytest.raises(UnknownName, match="no team named 'red'; create it first"):
        store.write(put, USERS, "zoe", UserSettings(team="red"), ALICE)
    assert issubclass(UnknownName, NotAllowed)
    store.write(put, USERS, "zoe", UserSettings(team="red"), ALICE, known={"teams": {"red"}})
    with pytest.raises(UnknownName):
        store.write(put, PROJECTS, "p", ProjectSettings(team="red"), ALICE, known={"users": {"red"}})
    store.write(put, TEAMS, "red", TeamSettings(), ALICE)
    store.write(put, PROJECTS, "p", ProjectSettings(team="red"), ALICE)


def test_what_others_refer_to_stays(store: Store) -> None:
    def make(connection: Connection) -> None:
        put(connection, TEAMS, "red", TeamSettings(), ALICE)
        put(connection, USERS, "zoe", UserSettings(team="red"), ALICE)
        put(connection, PROJECTS, "search", ProjectSettings(team="red"), ALICE)
        for number in range(5):
            create_key(connection, f"key{number}", KeySettings(team="red", user="zoe", project="search"))
        create_admin_key(connection, "boss", "manager", "red")

    store.write(make)
    before = store.read(revision)
    used: list[tuple[Noun[Any], str, str]] = [
        (
            TEAMS,
            "red",
            r"the users 'zoe', the projects 'search', the keys 'key0', 'key1', 'key2' and more, the admin keys 'boss'",
        ),
        (USERS, "zoe", "the keys 'key0'"),
        (PROJECTS, "search", "the keys 'key0'"),
    ]
    for noun, name, said_of in used:
        with pytest.raises(InUse, match=said_of):
            store.write(remove, noun, name, ALICE)
    assert store.read(revision) == before
    for number in range(5):
        store.write(revoke_key, f"key{number}")
    store.write(remove, USERS, "zoe", ALICE)
    store.write(remove, PROJECTS, "search", ALICE)
    with pytest.raises(InUse, match=r"in use by the admin keys 'boss'; "):
        store.write(remove, TEAMS, "red", ALICE)
    store.write(revoke_admin_key, "boss")
    assert store.write(remove, TEAMS, "red", ALICE).name == "red"


# -- everyone --


def test_everyone(store: Store) -> None:
    assert store.read(everyone) == AllowanceSettings()
    limits = {name: value for name, value in _LIMITS.items() if name != "blocked"}
    value = AllowanceSettings(**limits)
    assert store.write(put_everyone, value, ALICE) == store.read(everyone) == value
    assert store.write(put_everyone, value, ALICE) == value
    assert store.read(revision) == 1
    row = store.read(audit_rows)[0]
    assert (row.action, row.noun, row.name, row.team, row.before) == ("change", "everyone", "everyone", "", {})
    assert row.after == said(value)
    assert store.write(put_everyone, AllowanceSettings(), ALICE) == store.read(everyone) == AllowanceSettings()


# -- rows of others --


def test_a_row_that_a_newer_version_wrote(store: Store) -> None:
    """Half understood it could let somebody in; it is told of instead."""
    store.write(put, TEAMS, "red", TeamSettings(), ALICE)

    def newer(connection: Connection) -> None:
        connection.execute(text("""UPDATE teams SET settings = '{"mood":"good"}'"""))

    store.write(newer)
    with pytest.raises(StoreError, match=r"team 'red' can't be read; perhaps a newer version.*`mood`"):
        store.read(find, TEAMS, "red")


def test_changes_at_the_same_time_come_one_after_another(engine: Engine) -> None:
    """Each sees what the one before it has left: the log is a chain."""
    together = threading.Barrier(8)
    errors: list[BaseException] = []

    def change(number: int) -> None:
        try:
            together.wait(30)
            with engine.begin() as connection:
                put(connection, TEAMS, "red", TeamSettings(concurrent_requests=number + 1), ALICE)
        except BaseException as error:  # told of by the test
            errors.append(error)

    threads = [threading.Thread(target=change, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with reader(engine).begin() as connection:
        rows = audit_rows(connection)[::-1]
        assert revision(connection) == len(rows) == 8
        assert [row.before for row in rows] == [None, *(row.after for row in rows[:-1])]
        entry = find(connection, TEAMS, "red")
        assert entry is not None
        assert said(entry.value) == rows[-1].after
