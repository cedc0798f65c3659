"""Requests are found by whatever is known of them, page by page, each once."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, Engine, event

from proxy.errors import Outcome
from proxy.exchange import Attempt, Record, new_id
from proxy.store import BadCursor, Order, RequestRow, cursor_of, insert_records, reader, request_of, requests_found
from proxy.store.ledger import day_of
from proxy.store.search import MOST
from tests.unit.store.test_ledger import HOUR, NOON, seeded

S = 10**9


def made(count: int = 300) -> list[Record]:
    """Of four days; ids tell the time, as a worker's do."""
    chance = random.Random(11)
    records = seeded(count)
    for number, each in enumerate(records):
        each.id = new_id(each.received_unix_ns // 10**6)
        each.trace_id = each.id if number % 3 else bytes([number % 7]) * 16
        each.status = chance.choice([200, 200, 400, 429, 502, 0])
        each.error_code = "" if each.status == 200 else chance.choice(["rate_limit_exceeded", "upstream_error"])
        each.ended_ns = chance.choice([0, S, S, chance.randrange(60 * S)])
        each.client_request_id = f"theirs-{number % 5}"
        each.user = chance.choice(["", "u1"])
    return records


@pytest.fixture
def records(engine: Engine) -> list[Record]:
    records = made()
    with engine.begin() as connection:
        insert_records(connection, records, "me")
    return records


def order_of(records: list[Record], order: Order) -> list[str]:
    def key(each: Record) -> tuple[Any, ...]:
        place = (day_of(each), each.hex_id)
        return place if order == "newest" else (each.ended_ns, *place)

    return [each.hex_id for each in sorted(records, key=key, reverse=True)]


def found(engine: Engine, **wanted: Any) -> list[str]:
    with reader(engine).connect() as connection:
        return [row.id for row in requests_found(connection, **{"limit": MOST, **wanted})]


CASES: list[tuple[dict[str, Any], Callable[[Record], bool]]] = [
    ({}, lambda each: True),
    ({"key_id": "key_1"}, lambda each: each.key_id == "key_1"),
    ({"key_name": "alice", "team": "red"}, lambda each: (each.key_name, each.team) == ("alice", "red")),
    ({"user": "ada"}, lambda each: each.user_name == "ada"),
    ({"end_user": "u1"}, lambda each: each.user == "u1"),
    ({"project": "demo", "model": "small"}, lambda each: (each.project, each.model) == ("demo", "small")),
    ({"backend": "backend-1"}, lambda each: each.backend == "backend-1"),
    ({"operation": "embeddings"}, lambda each: each.operation == "embeddings"),
    ({"cache": "hit"}, lambda each: each.cache == "hit"),
    ({"cache": "", "model": "small"}, lambda each: (each.cache, each.model) == ("", "small")),
    ({"outcome": "client_gone"}, lambda each: each.outcome == Outcome.CLIENT_GONE),
    ({"error_code": "upstream_error"}, lambda each: each.error_code == "upstream_error"),
    ({"trace_id": "03" * 16}, lambda each: each.trace_id == bytes([3]) * 16),
    ({"request_id": "theirs-2"}, lambda each: each.client_request_id == "theirs-2"),
    ({"status_from": 400, "status_to": 499}, lambda each: 400 <= each.status <= 499),
    ({"min_duration_ns": 2 * S}, lambda each: each.ended_ns >= 2 * S),
    ({"min_first_token_ns": S // 2}, lambda each: each.first_token_ns >= S // 2),
    ({"min_duration_ns": 2**80, "status_to": 2**80}, lambda each: False),
    ({"min_duration_ns": -(2**80), "status_from": -(2**80)}, lambda each: True),
    ({"status_to": -(2**80)}, lambda each: False),
    ({"since": datetime(2026, 11, 20, 3, 30, tzinfo=UTC)}, lambda each: each.received_unix_ns >= NOON - 17 * HOUR // 2),
    (
        {"since": datetime(2026, 11, 19, 12, tzinfo=UTC), "until": datetime(2026, 11, 20, 12, tzinfo=UTC)},
        lambda each: NOON - 24 * HOUR <= each.received_unix_ns < NOON,
    ),
    # failure 70, failure 71
    ({"model": "%"}, lambda each: False),
    ({"team": "red' OR '1'='1"}, lambda each: False),
    ({"key_name": "a\0"}, lambda each: False),
    ({"user": "\ud800"}, lambda each: False),
]


@pytest.mark.parametrize("order", ["newest", "slowest"])
def test_what_is_wanted_is_found_in_order(engine: Engine, records: list[Record], order: Order) -> None:
    for wanted, holds in CASES:
        mine = [each for each in records if holds(each)]
        assert found(engine, order=order, **wanted) == order_of(mine, order), wanted


@pytest.mark.parametrize("order", ["newest", "slowest"])
@pytest.mark.parametrize("wanted", [{}, {"team": "red"}])
def test_pages_make_up_the_whole(engine: Engine, records: list[Record], order: Order, wanted: dict[str, Any]) -> None:
    """Also while new requests come in, which belong before the first page."""
    seen: list[str] = []
    cursor = ""
    for number in range(1000):
        with engine.begin() as connection:
            page = requests_found(connection, order=order, before=cursor, limit=17, **wanted)
            seen += [row.id for row in page]
            if not page:
                break
            cursor = cursor_of(page[-1], order)
            now = NOON + 40 * HOUR + number
            new = Record(new_id(now // 10**6), bytes(16), 1, now, team="red", ended_ns=S * 999)
            insert_records(connection, [new])
    mine = [each for each in records if wanted.get("team", each.team) == each.team]
    assert seen == order_of(mine, order)


def test_a_page_has_a_limit(engine: Engine, records: list[Record]) -> None:
    assert len(found(engine, limit=5)) == 5
    assert len(found(engine, limit=10**9)) == len(records)
    assert found(engine, limit=0) == found(engine, limit=-1) == []


@pytest.mark.parametrize("order", ["newest", "slowest"])
@pytest.mark.parametrize(
    "cursor", ["x", "%%%", "é", "AAAA", "W10", "bnVsbA", "W10=", "=", "\0", "'; DROP TABLE requests; --", "1" * 10_000]
)
def test_what_is_no_cursor_is_refused(engine: Engine, order: Order, cursor: str) -> None:
    with pytest.raises(BadCursor, match="cursor"):
        found(engine, order=order, before=cursor)


def test_a_cursor_of_another_order_is_refused(engine: Engine, records: list[Record]) -> None:
    with reader(engine).connect() as connection:
        [row] = requests_found(connection, limit=1)
    for order, other in (("newest", "slowest"), ("slowest", "newest")):
        with pytest.raises(BadCursor):
            found(engine, order=other, before=cursor_of(row, order))  # type: ignore[arg-type]
    forged = cursor_of(msgspec.structs.replace(row, ended_ns=2**70), "slowest")
    with pytest.raises(BadCursor):
        found(engine, order="slowest", before=forged)
    with pytest.raises(BadCursor):
        found(engine, before=cursor_of(msgspec.structs.replace(row, id="\0")))


def test_a_request_is_known_by_its_id_alone(engine: Engine, records: list[Record]) -> None:
    with reader(engine).connect() as connection:
        for each in records[:20]:
            row = request_of(connection, each.hex_id)
            assert row is not None
            assert (row.id, row.received_at, row.key_id) == (each.hex_id, each.received_unix_ns, each.key_id)
            assert [hit.id for hit in requests_found(connection, request_id=each.hex_id)] == [each.hex_id]


@pytest.mark.parametrize("nobody", ["", "0" * 32, "f" * 32, "x" * 32, "\0" * 32, "\ud800", "٣" * 32, "%" * 32])
def test_an_id_that_nobody_has(engine: Engine, records: list[Record], nobody: str) -> None:  # failure 70
    with reader(engine).connect() as connection:
        assert request_of(connection, nobody) is None
        assert requests_found(connection, request_id=nobody) == []


def test_a_row_says_what_the_ledger_knows(engine: Engine) -> None:
    record = made(1)[0]
    record.attempts = [Attempt("a", 1, 2, 3, 4, 503, False, "refused"), Attempt("b", 5, 6, 7, 8, 200, True)]
    record.finish_reasons, record.stream, record.max_tokens = ["stop"], True, 50
    record.queued_ns, record.routed_by, record.fallback_of = 1, "auto.prefix", "larger"
    record.scores = [("a", 900), ("b", -32)]
    with engine.begin() as connection:
        insert_records(connection, [record])
        [row] = requests_found(connection)
    assert (row.day, row.stream, row.max_tokens, row.temperature) == (day_of(record), True, 50, None)
    assert (row.queued_ns, row.routed_by, row.fallback_of) == (1, "auto.prefix", "larger")
    assert row.scores == [{"backend": "a", "score": 900}, {"backend": "b", "score": -32}]
    assert (row.finish_reasons, [attempt["backend"] for attempt in row.attempts]) == (["stop"], ["a", "b"])
    assert msgspec.json.decode(msgspec.json.encode(row), type=RequestRow) == row


def plan(connection: Connection, search: Callable[[Connection], object]) -> list[str]:
    """How the database goes about it."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, sql: str, parameters: Any, *_: object) -> None:
        asked.append((sql, parameters))

    event.listen(connection, "before_cursor_execute", note)
    search(connection)
    event.remove(connection, "before_cursor_execute", note)
    sql, parameters = asked[-1]
    how = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
    return [str(row[-1]) for row in connection.exec_driver_sql(how + sql, parameters)]


def days_in(steps: list[str]) -> set[str]:
    return set(re.findall(r"\brequests_(\d{8})\b", " ".join(steps)))


def test_only_the_days_of_the_range_are_looked_at(engine: Engine) -> None:
    """By the key of SQLite's table, and by the tables of PostgreSQL's days."""
    now = datetime.now(UTC)
    with engine.begin() as connection:
        for ago in range(6):
            at = int((now - timedelta(ago)).timestamp() * 10**9)
            insert_records(connection, [Record(new_id(at // 10**6), bytes(16), 1, at)])
    with reader(engine).connect() as connection:
        since = now - timedelta(1)
        steps = plan(connection, lambda connection: requests_found(connection, since=since, until=now))
        by_id = plan(connection, lambda connection: request_of(connection, new_id(int(now.timestamp() * 1000)).hex()))
    if engine.dialect.name == "sqlite":
        assert any("SEARCH requests USING PRIMARY KEY (day>" in step for step in steps)
        assert not any("TEMP B-TREE" in step for step in steps)
        assert any("SEARCH requests USING PRIMARY KEY (day=? AND id=?)" in step for step in by_id)
    else:
        assert days_in(steps) == {f"{day:%Y%m%d}" for day in (now, since)}
        assert days_in(by_id) == {f"{now:%Y%m%d}"}


def test_a_day_is_a_date(engine: Engine, records: list[Record]) -> None:
    with reader(engine).connect() as connection:
        assert all(type(row.day) is date for row in requests_found(connection))
