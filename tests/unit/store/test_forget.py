"""What requests say of a person goes, in the ledger; what they took stays."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from sqlalchemy import Engine, select

from proxy.exchange import Record
from proxy.store import Author, audit_rows, insert_records, reader, spent, usage
from proxy.store.forget import BEGINNING, BLANKED, Said, Whose, blank, note_forgetting, said_of
from proxy.store.ledger import By
from proxy.store.tables import requests
from tests.unit.store.test_ledger import FOREVER, HOUR, NOON, seeded


def made(count: int = 120) -> list[Record]:
    records = seeded(count)
    for number, each in enumerate(records):
        each.user = ("u1", "u2", "")[number % 3]
        each.trace_id, each.parent_span_id = number.to_bytes(16), 7
        each.client_address, each.client_request_id, each.error = "192.0.2.1", "theirs", "what it said"
        each.received_unix_ns = NOON - number % 4 * 24 * HOUR
    return records


@pytest.fixture
def records(engine: Engine) -> list[Record]:
    records = made()
    with engine.begin() as connection:
        insert_records(connection, records, "me")
    return records


def all_said(engine: Engine, whose: Whose, name: str, most: int = 7) -> list[Said]:
    every: list[Said] = []
    place = BEGINNING
    while place is not None:
        with reader(engine).connect() as connection:
            found, place = said_of(connection, whose, name, place, most)  # type: ignore[assignment]
        assert len(found) <= most
        every += found
    return every


def told(engine: Engine) -> list[Any]:
    with reader(engine).connect() as connection:
        return [usage(connection, by) for by in get_args(By)] + [sorted(spent(connection, "me", "EUR", 0, FOREVER))]


def rows(engine: Engine) -> dict[str, Any]:
    with reader(engine).connect() as connection:
        return {row["id"]: dict(row) for row in connection.execute(select(requests)).mappings()}


@pytest.mark.parametrize(("whose", "name"), [("user", "ada"), ("end_user", "u1")])
def test_what_is_said_goes_and_what_was_taken_stays(engine: Engine, records: list[Record], whose: Whose, name: str) -> None:
    before, rows_before = told(engine), rows(engine)
    mine = {each.hex_id: each.trace_id.hex() for each in records if (each.user_name if whose == "user" else each.user) == name}
    found = all_said(engine, whose, name)
    assert {said.id: said.trace_id for said in found} == mine
    assert len(found) == len(mine)
    assert rows(engine) == rows_before, "to look changes nothing"
    with engine.begin() as connection:
        assert blank(connection, found) == len(mine)
    assert told(engine) == before
    for identity, row in rows(engine).items():
        if identity in mine:
            assert {name: row.pop(name) for name in BLANKED} == dict.fromkeys(BLANKED, "")
            rows_before[identity] = {key: value for key, value in rows_before[identity].items() if key not in BLANKED}
        assert row == rows_before[identity]
    assert all_said(engine, whose, name) == [], "what was done isn't done again"


def test_who_is_interrupted_goes_on(engine: Engine, records: list[Record]) -> None:
    mine = [each.hex_id for each in records if each.user_name == "ada"]
    found = all_said(engine, "user", "ada")
    with engine.begin() as connection:
        blank(connection, found[:5])
    rest = all_said(engine, "user", "ada")
    assert sorted(said.id for said in rest) == sorted(set(mine) - {said.id for said in found[:5]})


@pytest.mark.parametrize("nobody", ["", "%", "ada' OR '1'='1", "a\0", "\ud800"])
@pytest.mark.parametrize("whose", ["user", "end_user"])
def test_nobody_is_not_everybody(engine: Engine, records: list[Record], whose: Whose, nobody: str) -> None:  # failure 70, 71
    """Most requests name no user."""
    assert all_said(engine, whose, nobody) == []


def test_nothing_to_forget(engine: Engine) -> None:
    assert all_said(engine, "user", "ada") == []
    with engine.begin() as connection:
        assert blank(connection, []) == 0


def test_it_is_in_the_audit_log_and_names_nobody_anew(engine: Engine) -> None:
    author = Author("root", "admin")
    with engine.begin() as connection:
        note_forgetting(connection, "user", "ada", author, {})
        note_forgetting(connection, "end_user", "someone@example.com", author, {"requests": 3})
        log = audit_rows(connection)
    assert [(row.action, row.noun, row.name, row.after) for row in reversed(log)] == [
        ("forget", "users", "ada", {}),
        ("forget", "requests", "", {"requests": 3}),
    ]
    assert "example.com" not in repr(log)
