"""Old rows become sums: whatever is asked of them is told as before, whenever it is interrupted."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args
from zoneinfo import ZoneInfo

import msgspec
import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import OperationalError

from proxy.exchange import Record
from proxy.store import (
    SpentRow,
    UsageRow,
    first_since,
    insert_records,
    load_checkpoint,
    oldest_day,
    open_database,
    reader,
    remove_expired,
    retention,
    spent,
    steady,
    summed_days,
    usage,
)
from proxy.store.engine import open_engine
from proxy.store.ledger import By, day_of
from proxy.store.partitions import days_kept_apart
from proxy.store.tables import request_sums, requests
from tests.support.postgresql import PostgreSQL
from tests.unit.store.test_ledger import FOREVER, record, seeded

HOUR_NS = 3_600 * 10**9
TODAY = datetime.now(UTC).date()
DAYS = 12
"""Over so many days requests are spread, so that on PostgreSQL each day has a table of its own."""
FIRST_KEPT = TODAY - timedelta(4)


def unix_ns(day: date) -> int:
    return (day - date(1970, 1, 1)).days * 24 * HOUR_NS


def midnight(day: date) -> datetime:
    return datetime.combine(day, datetime.min.time(), UTC)


def spread(count: int, seed: int = 5) -> list[Record]:
    """Many of them differ in nothing but what they took, so that they are summed together."""
    chance = random.Random(seed)
    kinds = seeded(10)
    made = [msgspec.structs.replace(chance.choice(kinds)) for _ in range(count)]
    for number, each in enumerate(made):
        each.input_tokens = chance.randrange(1000)
        each.id = (seed << 64 | number).to_bytes(16)
        each.received_unix_ns = unix_ns(TODAY - timedelta(chance.randrange(DAYS))) + chance.randrange(24 * HOUR_NS)
        each.worker, each.gpu_ns = chance.choice(["", "w1", "w2"]), chance.randrange(10**12)
        each.currency, each.cost_nano = chance.choice(["EUR", "USD"]), chance.choice([0, 1, 132_000])
    return made


def without_waits(rows: list[UsageRow]) -> list[UsageRow]:
    for row in rows:
        row.first_token_p50_ns = row.first_token_p95_ns = None
    return rows


def told(engine: Engine) -> dict[str, object]:
    """All that can be asked of the ledger's sums, over days in UTC."""
    bounds = [(TODAY - timedelta(first), TODAY - timedelta(last)) for first, last in ((9, 2), (DAYS, 5), (6, 5))]
    found: dict[str, object] = {}
    with reader(engine).connect() as connection:
        for by in get_args(By):
            found[by] = without_waits(usage(connection, by))
            for since, until in bounds:
                found[f"{by} {since} {until}"] = without_waits(usage(connection, by, midnight(since), midnight(until)))
        found["team red"] = without_waits(usage(connection, "model", team="red", key_ids=["key_0", "key_1"]))
        for collector in ("me", "them", "nobody"):
            for since, until in bounds:
                of = spent(connection, collector, "EUR", unix_ns(since), unix_ns(until))
                found[f"spent {collector} {since}"] = sorted(of)
            found[f"spent {collector}"] = sorted(spent(connection, collector, "EUR", 0, FOREVER))
            first_ever = first_since(connection, collector, 0)
            found[f"first {collector}"] = first_ever and first_ever // (24 * HOUR_NS)
    return found


def counts(engine: Engine) -> tuple[int, int]:
    """Rows, and requests that are only counted."""
    with reader(engine).connect() as connection:
        rows = connection.execute(select(func.count()).select_from(requests)).scalar_one()
        return rows, int(connection.execute(select(func.coalesce(func.sum(request_sums.c.requests), 0))).scalar_one())


def remove_all(engine: Engine, before: date = FIRST_KEPT, most: int = 25) -> int:
    """→ steps."""
    steps = 0
    while True:
        with engine.begin() as connection:
            step = remove_expired(connection, before, most)
        if step is None:
            return steps
        steps += 1


@pytest.fixture
def full(engine: Engine) -> Engine:
    with engine.begin() as connection:
        insert_records(connection, spread(300, 5), "me")
        insert_records(connection, spread(200, 6), "them")
        insert_records(connection, spread(50, 7), "")
    return engine


def test_whatever_is_asked_is_told_as_before_after_each_step(full: Engine) -> None:
    before, (rows, _) = told(full), counts(full)
    while True:
        with full.begin() as connection:
            step = remove_expired(connection, FIRST_KEPT, 25)
        if step is None:
            break
        assert step.day < FIRST_KEPT
        assert step.rows > 0
        assert told(full) == before
        left, summed = counts(full)
        assert left + summed == rows
    with reader(full).connect() as connection:
        assert oldest_day(connection) == FIRST_KEPT
        assert summed_days(connection, "me") == {TODAY - timedelta(ago) for ago in range(5, DAYS)}
        if full.dialect.name == "postgresql":
            assert days_kept_apart(connection) == [FIRST_KEPT + timedelta(ahead) for ahead in range(6)]


def test_a_day_counts_in_the_window_that_has_its_noon(full: Engine) -> None:
    """A month that begins at midnight somewhere else: a day of sums is in one window, and none is in two."""
    remove_all(full)
    zones = [ZoneInfo(name) for name in ("America/Los_Angeles", "Asia/Kathmandu", "Europe/Vienna")]
    with reader(full).connect() as connection:
        for zone in zones:
            days = [datetime.combine(TODAY - timedelta(ago), datetime.min.time(), zone) for ago in range(DAYS, 5, -1)]
            for start in days:
                bounds = [int(when.timestamp()) * 10**9 for when in (start, start + timedelta(1))]
                found = [row.group for row in usage(connection, "day", start, start + timedelta(1))]
                amounts = [row[5:] for row in spent(connection, "me", "EUR", bounds[0], bounds[1])]
                utc = unix_ns(start.date())
                assert amounts == [row[5:] for row in spent(connection, "me", "EUR", utc, utc + 24 * HOUR_NS)]
                assert found == ([start.date().isoformat()] if start.date() > TODAY - timedelta(DAYS) else [])
                assert (first_since(connection, "me", bounds[0]) == utc + 12 * HOUR_NS) == bool(amounts)


def test_first_token_times_are_those_of_rows_that_are_there(full: Engine) -> None:
    remove_all(full)
    with reader(full).connect() as connection:
        rows = {row.group: row.first_token_p50_ns for row in usage(connection, "day")}
    assert {date.fromisoformat(day) for day, wait in rows.items() if wait is None} == {
        TODAY - timedelta(ago) for ago in range(5, DAYS)
    }


def test_a_step_that_is_undone_has_changed_nothing(full: Engine) -> None:
    before, rows = told(full), counts(full)

    def remove_and_die() -> None:
        with full.begin() as connection:
            assert remove_expired(connection, FIRST_KEPT, 25) is not None
            raise InterruptedError

    with pytest.raises(InterruptedError):
        remove_and_die()
    assert counts(full) == rows
    assert told(full) == before


def test_what_comes_late_is_counted_once(full: Engine) -> None:
    remove_all(full)
    before, (_, summed) = told(full), counts(full)
    late = record(2**70, received_unix_ns=unix_ns(TODAY - timedelta(8)) + 1, input_tokens=7, key_id="key_1", currency="EUR")
    for _ in range(2):
        with full.begin() as connection:
            insert_records(connection, [late], "me")
    now = told(full)
    assert now != before
    assert remove_all(full) == 1
    assert told(full) == now
    assert counts(full)[1] == summed + 1


def test_what_no_63_bits_hold_stops_nothing(engine: Engine) -> None:  # failure 37
    claimed = {
        "input_tokens": FOREVER,
        "cost_nano": FOREVER,
        "currency": "EUR",
        "received_unix_ns": unix_ns(TODAY - timedelta(8)),
    }
    for number in range(3):
        with engine.begin() as connection:
            insert_records(connection, [record(number, **claimed)], "me")
        assert remove_all(engine) == 1
    with reader(engine).connect() as connection:
        assert list(spent(connection, "me", "EUR", 0, FOREVER)) == [SpentRow("", "", "", "", "", FOREVER, FOREVER, 0)]
        assert [row.requests for row in usage(connection)] == [3]


def test_texts_of_any_length_and_kind_have_sums(engine: Engine) -> None:
    """Callers choose what a model is called; an index of PostgreSQL takes no long key."""
    names = ["", "x" * 100_000, "a, b", "a", "\x1f", "\U0001f600"]
    made = [record(number, model=name, received_unix_ns=unix_ns(TODAY - timedelta(8))) for number, name in enumerate(names)]
    with engine.begin() as connection:
        insert_records(connection, made, "me")
    remove_all(engine)
    with reader(engine).connect() as connection:
        assert {row.group: row.requests for row in usage(connection, "model")} == dict.fromkeys(names, 1)


def test_where_no_day_has_a_table_of_its_own_rows_go_in_steps(engine: Engine) -> None:
    """On SQLite always; on PostgreSQL what is in the default partition."""
    made = [record(number, received_unix_ns=unix_ns(TODAY - timedelta(60 + number % 2)) + number) for number in range(100)]
    with engine.begin() as connection:
        insert_records(connection, made, "me")
    steps = []
    while True:
        with engine.begin() as connection:
            step = remove_expired(connection, TODAY - timedelta(32), 30)
        if step is None:
            break
        steps.append(step)
    assert [step.rows for step in steps] == [30, 20, 30, 20]
    assert [step.day for step in steps] == [TODAY - timedelta(61)] * 2 + [TODAY - timedelta(60)] * 2
    assert counts(engine) == (0, 100)


KILLED = """
import sys
from datetime import date
from proxy.store import remove_expired
from proxy.store.engine import open_engine
engine = open_engine(sys.argv[1])
while True:
    with engine.begin() as connection:
        step = remove_expired(connection, date.fromisoformat(sys.argv[2]), 20)
    if step is not None:
        print("a step", flush=True)
"""


# failure 48
def test_who_takes_away_is_killed_again_and_again(full: Engine, database_url: str) -> None:
    before, (rows, _) = told(full), counts(full)
    dice = random.Random(48)
    last = 0
    for _ in range(5):
        command = [sys.executable, "-c", KILLED, database_url, FIRST_KEPT.isoformat()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "a step\n"
            time.sleep(dice.random() * 0.01)  # any moment of the next ones
            process.send_signal(signal.SIGKILL)
        left, summed = counts(full)
        assert left + summed == rows
        assert summed > last
        last = summed
        if min(rows_left(full)) == FIRST_KEPT:
            break
    assert told(full) == before
    remove_all(full)
    assert told(full) == before


def rows_left(engine: Engine) -> list[date]:
    with reader(engine).connect() as connection:
        return list(connection.execute(select(requests.c.day)).scalars())


# -- PostgreSQL: others at the same time --


@pytest.fixture
def pg_url(postgresql: PostgreSQL) -> str:
    return postgresql.url_of(postgresql.new_database())


@pytest.fixture
def pg(pg_url: str) -> Iterator[Engine]:
    engine = open_database(pg_url)
    with engine.begin() as connection:
        insert_records(connection, spread(300, 5), "me")
    yield engine
    engine.dispose()


def test_collectors_that_take_away_at_once(pg: Engine, pg_url: str) -> None:
    before = told(pg)
    engines = [open_engine(pg_url) for _ in range(5)]

    def go(engine: Engine) -> int:
        steps = 0
        while any(day < FIRST_KEPT for day in rows_left(pg)):
            with engine.begin() as connection:
                steps += remove_expired(connection, FIRST_KEPT, 25) is not None
        return steps

    with ThreadPoolExecutor(len(engines)) as threads:
        assert sum(threads.map(go, engines)) == DAYS - 5
    assert told(pg) == before
    for engine in engines:
        engine.dispose()


def test_a_report_sees_each_request_once_whatever_goes_meanwhile(pg: Engine) -> None:
    before = told(pg)

    def step() -> None:
        with pg.begin() as connection:
            remove_expired(connection, FIRST_KEPT, 25)

    with reader(pg).connect() as report:
        steady(report)
        with pytest.raises(OperationalError, match="lock timeout"):
            step()  # it waits half a second, and leaves everything as it was
        load_checkpoint(report, "me", "ledger")  # from here on the report sees this moment
        assert report.execute(select(func.count()).select_from(requests)).scalar_one() == 300
        used = usage(report, "day")
    assert sum(row.requests for row in used) == 300
    step()
    assert counts(pg)[1] > 0
    assert told(pg) == before


def test_a_row_that_comes_while_its_day_goes_is_not_lost(pg: Engine, pg_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer comes when the day has been summed and isn't gone yet: it keeps the day from going."""
    other = open_engine(pg_url)
    late = record(2**80, received_unix_ns=unix_ns(TODAY - timedelta(DAYS - 1)) + 5)
    add_up = retention._add_up

    def write() -> int:
        with other.begin() as connection:
            return insert_records(connection, [late], "me")

    def step() -> None:
        with pg.begin() as connection:
            remove_expired(connection, FIRST_KEPT, 25)

    with ThreadPoolExecutor(1) as thread:
        writing: list[Future[int]] = []

        def meanwhile(*arguments: Any) -> None:
            add_up(*arguments)
            writing.append(thread.submit(write))
            wait(writing, 0.3)

        with monkeypatch.context() as patched:
            patched.setattr(retention, "_add_up", meanwhile)
            with pytest.raises(OperationalError, match="lock timeout"):
                step()
        assert writing[0].result(30) == 1
    assert counts(pg) == (301, 0)
    remove_all(pg)
    assert sum(counts(pg)) == 301
    other.dispose()


def test_a_row_that_comes_when_its_day_has_gone_is_counted_later(pg: Engine) -> None:
    with pg.begin() as connection:
        assert remove_expired(connection, FIRST_KEPT, 25) is not None
    oldest = unix_ns(TODAY - timedelta(DAYS - 1))
    with pg.begin() as connection:
        insert_records(connection, [record(2**80, received_unix_ns=oldest + 5)], "me")
    assert sum(counts(pg)) == 301
    remove_all(pg)
    assert sum(counts(pg)) == 301


def test_the_day_of_a_record_is_the_one_it_is_kept_under(engine: Engine) -> None:
    made = spread(50)
    with engine.begin() as connection:
        insert_records(connection, made)
    assert Counter(rows_left(engine)) == Counter(map(day_of, made))
