"""Rows written once, whatever is repeated; sums that are exact."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, get_args

import msgspec
import pytest
from sqlalchemy import Engine, select

from proxy.errors import Outcome
from proxy.exchange import Attempt, EngineTimings, Record, UsageSource
from proxy.store import SpentRow, first_since, insert_records, load_checkpoint, reader, save_checkpoint, spent, usage
from proxy.store.ledger import By
from proxy.store.tables import requests

NOON = int(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()) * 10**9
HOUR = 3_600 * 10**9


def record(number: int = 1, **fields: Any) -> Record:
    made = Record(number.to_bytes(16, "big"), bytes(range(16)), 0xABC, NOON)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def stored(engine: Engine) -> list[dict[str, Any]]:
    with reader(engine).connect() as connection:
        return [dict(row) for row in connection.execute(select(requests).order_by(requests.c.id)).mappings()]


def test_every_field_of_a_record_gets_into_its_column(engine: Engine) -> None:
    """Each integer field holds a number of its own, so that no two can be mixed up without being seen."""
    made = record(
        0x1F,
        operation="chat",
        parent_span_id=2**64 - 1,
        client_request_id="theirs",
        client_address="192.0.2.7",
        key_id="key_1",
        key_name="alice",
        model="smollm2",
        stream=True,
        max_tokens=50,
        temperature=0.5,
        top_p=0.25,
        user="u1",
        status=200,
        outcome=Outcome.CLIENT_GONE,
        error_code="client_disconnected",
        error="gone",
        finish_reasons=["stop", "length"],
        usage_source=UsageSource.ENGINE,
        currency="EUR",
        inter_token_counts=[0, 3, 1],
        attempts=[Attempt("a", 1, 2, 3, 4, 503, False, "refused"), Attempt("b", 5, 6, 7, 8, 200, True)],
        engine=EngineTimings(1.5, 2.5, 3.5, 4.5, 5.5),
        team="search",
        refused_by="team.budget",
        over_budget="key",
        worker="incarnation",
        user_name="ada",
        project="demo",
        requested_model="default",
        routed_by="auto.load",
        scores=[("a", 900), ("b", -32)],
        fallback_of="larger",
        cache="hit",
        similarity=0.96875,
        source_id=bytes([7]) * 16,
        source_trace_id=bytes([8]) * 16,
    )
    numbered = [name for name in Record.__struct_fields__ if name.endswith(("_ns", "_bytes", "_tokens", "_nano", "_seconds"))]
    numbered = [
        name for name in (*numbered, "choices", "chunks", "trace_flags") if name not in ("received_unix_ns", "max_tokens")
    ]
    for value, name in enumerate(numbered, 1000):
        setattr(made, name, value)
    with engine.begin() as connection:
        assert insert_records(connection, [made], "host") == 1
    assert stored(engine) == [
        {
            **{name: getattr(made, name) for name in numbered},
            **{name: getattr(made, name) for name in ("operation", "client_request_id", "key_id", "key_name", "model", "stream")},
            **{name: getattr(made, name) for name in ("max_tokens", "temperature", "top_p", "status", "error_code", "error")},
            **{name: getattr(made, name) for name in ("finish_reasons", "currency", "inter_token_counts", "client_address")},
            **{name: getattr(made, name) for name in ("team", "refused_by", "over_budget", "worker", "user_name", "project")},
            **{name: getattr(made, name) for name in ("routed_by", "fallback_of", "cache", "similarity")},
            "source_id": "07" * 16,
            "source_trace_id": "08" * 16,
            "requested_model": "default",
            "scores": [{"backend": "a", "score": 900}, {"backend": "b", "score": -32}],
            "collector": "host",
            "day": date(2026, 11, 20),
            "id": "0000000000000000000000000000001f",
            "trace_id": "000102030405060708090a0b0c0d0e0f",
            "span_id": "0000000000000abc",
            "parent_span_id": "ffffffffffffffff",
            "received_at": NOON,
            "backend": "b",
            "end_user": "u1",
            "outcome": "client_gone",
            "usage_source": "engine",
            "proxy_added_ns": made.proxy_added_ns(),
            "attempts": [msgspec.structs.asdict(attempt) for attempt in made.attempts],
            "engine_queue_ms": 1.5,
            "engine_time_to_first_token_ms": 2.5,
            "engine_prefill_ms": 3.5,
            "engine_decode_ms": 4.5,
            "engine_mean_inter_token_ms": 5.5,
        }
    ]


def test_every_field_has_a_column() -> None:
    """A field that is new in the Record is decided on here, not forgotten."""
    elsewhere = {"received_unix_ns": "received_at", "user": "end_user", "engine": "engine_queue_ms"}
    elsewhere |= {"source_span_id": "source_trace_id"}  # within its trace it is the root, and the row of `source_id` has it
    assert {elsewhere.get(name, name) for name in Record.__struct_fields__} <= set(requests.c.keys())


def test_what_the_proxy_asks_for_itself_is_no_team_s(engine: Engine) -> None:
    """Probes are booked to the key `system`."""
    with engine.begin() as connection:
        insert_records(connection, [record(1, key_name="system", input_tokens=1), record(2, key_name="alice", team="research")])
        by_team = {row.group: (row.requests, row.input_tokens) for row in usage(connection, "team")}
        by_key = {row.label for row in usage(connection, "key")}
    assert by_team == {"": (1, 1), "research": (1, 0)}
    assert "system" in by_key


def test_a_bare_record(engine: Engine) -> None:
    with engine.begin() as connection:
        insert_records(connection, [record()])
    [row] = stored(engine)
    assert row["parent_span_id"] == row["backend"] == row["model"] == ""
    assert row["max_tokens"] is row["engine_queue_ms"] is None
    assert row["finish_reasons"] == row["attempts"] == row["scores"] == []
    assert row["routed_by"] == row["fallback_of"] == row["cache"] == row["source_id"] == row["source_trace_id"] == ""
    assert row["looked_up_ns"] == row["age_ns"] == 0
    assert row["similarity"] is None


def test_the_same_again_changes_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        assert insert_records(connection, [record(1, model="first"), record(2)]) == 2
    with engine.begin() as connection:
        assert insert_records(connection, [record(1, model="again"), record(2), record(3)]) == 1
        assert insert_records(connection, [record(4), record(4)]) == 1
        assert insert_records(connection, []) == 0
    assert [(row["id"][-1], row["model"]) for row in stored(engine)] == [("1", "first"), ("2", ""), ("3", ""), ("4", "")]


@pytest.mark.parametrize("received", [NOON - 12 * HOUR, NOON + 12 * HOUR - 1])
def test_the_day_is_the_one_in_utc(engine: Engine, received: int) -> None:
    with engine.begin() as connection:
        insert_records(connection, [record(received_unix_ns=received)])
    assert stored(engine)[0]["day"] == date(2026, 11, 20)


def test_what_no_database_can_hold_is_made_to_fit(engine: Engine) -> None:  # failure 37, 70
    """One unstorable record must not keep the ledger from going on."""
    made = record(
        gpu_ns=2**63,
        saved_ns=2**63,
        saved_input_tokens=2**64,
        saved_output_tokens=2**64,
        saved_cost_nano=2**64,
        model="a\0b'; DROP TABLE requests; --",
        requested_model="\0",
        fallback_of="\0",
        user="\0",
        error="\0\n\r\x1b",
        client_request_id="\0",
        finish_reasons=["\0"],
        max_tokens=2**63,
        input_tokens=2**64 - 1,
        temperature=1e300,
        outcome=77,
        usage_source=99,
    )
    with engine.begin() as connection:
        assert insert_records(connection, [made, record(2)]) == 2
    row = stored(engine)[0]
    assert row["model"] == "a\ufffdb'; DROP TABLE requests; --"
    assert row["end_user"] == row["client_request_id"] == "\ufffd"
    assert row["max_tokens"] == row["input_tokens"] == 2**63 - 1
    assert {row[f"saved_{name}"] for name in ("ns", "input_tokens", "output_tokens", "cost_nano")} == {2**63 - 1}
    assert (row["outcome"], row["usage_source"]) == ("77", "99")


# -- checkpoints --


def test_a_checkpoint_per_collector_and_sink(engine: Engine) -> None:
    with engine.begin() as connection:
        assert load_checkpoint(connection, "host-a", "ledger") is None
        save_checkpoint(connection, "host-a", "ledger", b"\x00\xff first")
        save_checkpoint(connection, "host-a", "spans", b"spans")
        save_checkpoint(connection, "host-b", "ledger", b"b")
        save_checkpoint(connection, "host-a", "ledger", b"second")
    with reader(engine).connect() as connection:
        assert load_checkpoint(connection, "host-a", "ledger") == b"second"
        assert load_checkpoint(connection, "host-a", "spans") == b"spans"
        assert load_checkpoint(connection, "host-b", "ledger") == b"b"


def test_rows_and_checkpoint_come_together_or_not_at_all(engine: Engine) -> None:  # failure 48
    def store_and_die() -> None:
        with engine.begin() as connection:
            insert_records(connection, [record()])
            save_checkpoint(connection, "host", "ledger", b"1")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store_and_die()
    assert stored(engine) == []
    with engine.begin() as connection:
        assert load_checkpoint(connection, "host", "ledger") is None


# -- sums --


def seeded(count: int) -> list[Record]:
    """Requests of three days, three keys (two of one name), two models, two currencies; some cost more than a float can hold."""
    chance = random.Random(20261120)
    return [
        record(
            number,
            received_unix_ns=NOON + chance.randrange(-30, 30) * HOUR + chance.randrange(10**9),
            key_id=f"key_{chance.randrange(3)}",
            key_name=chance.choice(["alice", "bob"]),
            team=chance.choice(["", "red", "blue"]),
            user_name=chance.choice(["", "ada", "bob"]),
            project=chance.choice(["", "demo"]),
            operation=chance.choice(["chat", "embeddings"]),
            model=chance.choice(["small", "large", ""]),
            outcome=chance.choice(list(Outcome)),
            input_tokens=chance.randrange(1000),
            cached_tokens=chance.randrange(100),
            output_tokens=chance.randrange(1000),
            reasoning_tokens=chance.randrange(10),
            audio_seconds=chance.choice([0, 0, chance.randrange(60)]),
            cost_nano=chance.choice([0, 1, 132_000, 2**54 + 1]),
            currency=chance.choice(["USD", "EUR"]),
            first_token_ns=chance.choice([0, chance.randrange(1, 10**9)]),
            attempts=[Attempt(f"backend-{chance.randrange(2)}")] if chance.random() < 0.9 else [],
            cache=chance.choice(["", "hit", "miss", "coalesced", "bypass"]),
            saved_input_tokens=chance.randrange(1000),
            saved_output_tokens=chance.randrange(1000),
            saved_cost_nano=chance.choice([0, 3, 264_000, 2**54 + 1]),
            saved_ns=chance.randrange(10**10),
        )
        for number in range(count)
    ]


def group_of(by: By, made: Record) -> str:
    day = datetime.fromtimestamp(made.received_unix_ns // 10**9, UTC).date().isoformat()
    groups = {"key": made.key_id, "team": made.team, "user": made.user_name, "project": made.project, "model": made.model}
    outcome = Outcome(made.outcome).label
    groups |= {"backend": made.backend, "operation": made.operation, "cache": made.cache}
    return {**groups, "outcome": outcome, "day": day}[by]


def nearest_rank(values: list[int], percent: int) -> int | None:
    return sorted(values)[-(-len(values) * percent // 100) - 1] if values else None


def classed(made: Record) -> str:
    ok = dict.fromkeys([Outcome.OK, Outcome.CACHED, Outcome.COALESCED], "ok")
    return {**ok, Outcome.CLIENT_GONE: "client_gone", Outcome.CRASHED: "crashed"}.get(Outcome(made.outcome), "errors")


@pytest.mark.parametrize("by", get_args(By))
@pytest.mark.parametrize(
    ("since", "until"),
    [
        (None, None),
        (datetime(2026, 11, 20, 3, 30, tzinfo=UTC), None),
        (None, datetime(2026, 11, 20, 15, tzinfo=UTC)),
        (datetime(2026, 11, 20, 1, tzinfo=timezone(timedelta(hours=14))), datetime(2026, 11, 20, 23, 59, tzinfo=UTC)),
        (datetime(2030, 1, 1, tzinfo=UTC), None),
    ],
)
def test_the_sums_are_the_records_own(engine: Engine, by: By, since: datetime | None, until: datetime | None) -> None:
    records = seeded(300)
    with engine.begin() as connection:
        insert_records(connection, records)
        rows = usage(connection, by, since, until)
    low = NOON - 99 * HOUR if since is None else int(since.timestamp()) * 10**9
    high = NOON + 99 * HOUR if until is None else int(until.timestamp()) * 10**9
    inside = [made for made in records if low <= made.received_unix_ns < high]
    groups = sorted({group_of(by, made) for made in inside})
    assert [row.group for row in rows] == groups
    for row in rows:
        mine = [made for made in inside if group_of(by, made) == row.group]
        classes = Counter(classed(made) for made in mine)
        assert row.requests == len(mine)
        assert (row.ok, row.errors) == (classes["ok"], classes["errors"])
        assert (row.client_gone, row.crashed) == (classes["client_gone"], classes["crashed"])
        results = Counter(made.cache for made in mine)
        assert (row.cache_hits, row.cache_misses, row.coalesced) == (results["hit"], results["miss"], results["coalesced"])
        for name in (
            *("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds"),
            *("saved_input_tokens", "saved_output_tokens", "saved_ns"),
        ):
            assert getattr(row, name) == sum(getattr(made, name) for made in mine)
        for name in ("cost_nano", "saved_cost_nano"):
            costs = Counter[str]()
            for made in mine:
                costs[made.currency] += getattr(made, name)
            assert getattr(row, name) == {currency: cost for currency, cost in costs.items() if cost}
            assert all(type(cost) is int for cost in getattr(row, name).values())
        waits = [made.first_token_ns for made in mine if made.first_token_ns]
        assert row.first_token_p50_ns == nearest_rank(waits, 50)
        assert row.first_token_p95_ns == nearest_rank(waits, 95)


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        ({"team": "red"}, lambda made: made.team == "red"),
        ({"user": "ada", "project": "demo"}, lambda made: (made.user_name, made.project) == ("ada", "demo")),
        ({"project": ""}, lambda made: made.project == ""),
        ({"key_id": "key_1", "model": "small"}, lambda made: (made.key_id, made.model) == ("key_1", "small")),
        ({"key_ids": ["key_0", "key_2", "key_9"]}, lambda made: made.key_id in ("key_0", "key_2")),
        ({"key_ids": []}, lambda made: False),
        ({"backend": "backend-1"}, lambda made: made.backend == "backend-1"),
        ({"team": "red' OR '1'='1"}, lambda made: False),
    ],
)
def test_of_all_that_only_what_is_wanted(engine: Engine, wanted: dict[str, Any], holds: Callable[[Record], bool]) -> None:
    records = seeded(300)
    with engine.begin() as connection:
        insert_records(connection, records)
        rows = usage(connection, "day", **wanted)
    mine = [made for made in records if holds(made)]
    assert {row.group: row.requests for row in rows} == Counter(group_of("day", made) for made in mine)
    assert sum(row.input_tokens for row in rows) == sum(made.input_tokens for made in mine)
    assert {row.first_token_p50_ns for row in rows} == {
        nearest_rank([made.first_token_ns for made in mine if group_of("day", made) == row.group and made.first_token_ns], 50)
        for row in rows
    }


def test_a_group_of_keys_is_the_key_and_not_its_name(engine: Engine) -> None:
    with engine.begin() as connection:
        insert_records(connection, [record(1, key_id="key_1", key_name="alice"), record(2, key_id="key_2", key_name="alice")])
        assert [(row.group, row.label) for row in usage(connection)] == [("key_1", "alice"), ("key_2", "alice")]


def test_a_time_without_a_zone_is_refused(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(ValueError, match="time zone"):
        usage(connection, since=datetime(2026, 11, 20))


def test_nothing_used(engine: Engine) -> None:
    with engine.connect() as connection:
        assert usage(connection) == []


# -- what was spent --

FOREVER = 2**63 - 1


def sums_of(records: list[Record], currency: str, since: int = 0, until: int = FOREVER) -> list[SpentRow]:
    rows: dict[tuple[str, ...], list[int]] = {}
    for made in records:
        if since <= made.received_unix_ns < until:
            row = rows.setdefault((made.worker, made.key_id, made.team, made.user_name, made.project), [0, 0, 0])
            row[0] += made.cost_nano * (made.currency == currency)
            row[1] += made.input_tokens + made.output_tokens
            row[2] += made.gpu_ns
    return sorted(SpentRow(who[0], who[1], who[2], who[3], who[4], *amounts) for who, amounts in rows.items())


@pytest.mark.parametrize(("since", "until"), [(0, FOREVER), (NOON - 5 * HOUR, NOON + 7 * HOUR), (NOON + 7 * HOUR, FOREVER)])
def test_what_was_spent_is_the_sum_of_a_collector_s_own_rows(engine: Engine, since: int, until: int) -> None:
    mine, theirs, old = seeded(200), seeded(200), seeded(50)
    for number, made in enumerate([*mine, *theirs, *old]):
        made.id, made.gpu_ns = number.to_bytes(16), number * 10**9
        made.worker = "" if number >= 400 else f"{'mine' if number < 200 else 'theirs'}-{number % 3}"
    with engine.begin() as connection:
        for records, collector in ((mine, "me"), (theirs, "them"), (old, "")):
            insert_records(connection, records, collector)
    with reader(engine).connect() as connection:
        for collector, records in (("me", mine), ("them", theirs), ("nobody", [])):
            rows = sorted(spent(connection, collector, "EUR", since, until))
            assert rows == sums_of([*records, *old], "EUR", since, until), "and what nobody knows whose it is"


def test_the_bounds_are_the_first_instant_and_the_one_after_the_last(engine: Engine) -> None:
    records = [record(at, received_unix_ns=NOON + at, input_tokens=10**at) for at in range(5)]
    with engine.begin() as connection:
        insert_records(connection, records, "me")
        assert [row.tokens for row in spent(connection, "me", "EUR", NOON + 1, NOON + 3)] == [110]
        found = [first_since(connection, "me", NOON + at) for at in (-1, 0, 4, 5)]
        assert found == [NOON, NOON, NOON + 4, None]
        assert first_since(connection, "them", 0) is None


def test_what_no_integer_of_a_database_holds_is_summed_all_the_same(engine: Engine) -> None:  # failure 37
    """What engines claim must not keep the ledger from knowing what was spent."""
    claimed = {"input_tokens": FOREVER, "output_tokens": FOREVER, "cost_nano": FOREVER, "gpu_ns": FOREVER, "currency": "EUR"}
    with engine.begin() as connection:
        insert_records(connection, [record(number, **claimed) for number in range(3)], "me")
        [row] = spent(connection, "me", "EUR", 0, FOREVER)
        [used] = usage(connection)
    assert (used.input_tokens, used.cost_nano) == (3 * FOREVER, {"EUR": 3 * FOREVER})
    assert row == SpentRow("", "", "", "", "", 3 * FOREVER, 6 * FOREVER, 3 * FOREVER)
