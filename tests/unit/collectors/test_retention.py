"""What is too old goes, and nobody is kept waiting by it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, select, text

from collectors import retention
from collectors.retention import Retention
from proxy.settings import RetentionSettings
from proxy.store import audit_rows, insert_records, oldest_day, open_database, reader, remove_expired, usage
from proxy.store.ledger import day_of
from proxy.store.tables import audit, requests
from tests.unit.collectors.made import make_record

DAY_NS = 86_400 * 10**9
FIRST = day_of(make_record())
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LEAST_PAUSE", 0.0)
    monkeypatch.setattr(retention, "MOST", 7)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    """Twenty requests on each of forty days."""
    engine = open_database(url)
    with engine.begin() as connection:
        for ago in range(40):
            at = make_record().received_unix_ns + ago * DAY_NS
            insert_records(connection, [make_record(ago * 20 + number, received_unix_ns=at) for number in range(20)], "me")
    yield engine
    engine.dispose()


def on_day(number: int) -> date:
    return FIRST + timedelta(number)


def told(engine: Engine) -> tuple[date | None, int]:
    """The oldest day, and how many requests are counted."""
    with reader(engine).connect() as connection:
        return oldest_day(connection), sum(row.requests for row in usage(connection))


def test_so_many_days_are_kept_and_all_are_counted(url: str, database: Engine) -> None:
    work = Retention(url, RetentionSettings(requests_days=32), lambda: on_day(39))
    view = work.view()
    assert view is not None
    assert view.removed == {"requests": 0, "audit": 0}
    work.work()
    assert told(database) == (on_day(7), 800)
    view = work.view()
    assert view is not None
    assert (view.removed, view.overdue_days) == ({"requests": 140, "audit": 0}, 0)
    work.work()
    assert told(database) == (on_day(7), 800)


def test_what_is_overdue_is_said(url: str, database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Retention(url, RetentionSettings(requests_days=32), lambda: on_day(39))

    def refuse(*_: object) -> None:
        raise StopIteration

    with monkeypatch.context() as patched:
        patched.setattr(retention, "remove_expired", refuse)
        with pytest.raises(StopIteration):
            work.work()
    view = work.view()
    assert view is not None
    assert view.overdue_days == 7


def test_where_everything_is_kept_nothing_is_done(tmp_path: Path) -> None:
    work = Retention(f"sqlite:///{tmp_path / 'never.db'}", RetentionSettings())
    assert work.view() is None
    work.start()
    work.stop(1.0)
    assert list(tmp_path.iterdir()) == []


def test_old_changes_are_forgotten_too(url: str, database: Engine) -> None:
    now = time.time_ns()
    with database.begin() as connection:
        for ago in range(40):
            row = dict.fromkeys(("author", "role", "address", "idempotency_key", "action", "noun", "name", "team"), "")
            connection.execute(insert(audit).values(at=now - ago * DAY_NS - DAY_NS // 2, **row))
    work = Retention(url, RetentionSettings(audit_days=10), lambda: on_day(1000))
    work.work()
    with reader(database).connect() as connection:
        assert len(audit_rows(connection, limit=1000)) == 10
    assert told(database) == (on_day(0), 800)
    view = work.view()
    assert view is not None
    assert (view.removed, view.overdue_days) == ({"requests": 0, "audit": 30}, 0)


def test_a_thread_of_its_own_does_it_and_stops_when_told(url: str, database: Engine) -> None:
    work = Retention(url, RetentionSettings(requests_days=32), lambda: on_day(39))
    work.start()
    deadline = time.monotonic() + PATIENCE
    while told(database)[0] != on_day(7):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    work.stop(PATIENCE)
    assert not any(thread.name == "retention" for thread in threading.enumerate())


# failure 65
def test_a_database_that_is_locked_is_asked_again(
    url: str, database: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr("proxy.store.engine.BUSY_MS", 20)
    work = Retention(url, RetentionSettings(requests_days=32), lambda: on_day(39))
    with database.begin() as connection:
        connection.execute(text("DELETE FROM checkpoints"))  # whoever writes has the file
        work.start()
        deadline = time.monotonic() + PATIENCE
        while "can't be taken away" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(connection.execute(select(requests.c.id)).all()) == 800
    while told(database)[0] != on_day(7):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    work.stop(PATIENCE)
    assert caplog.text.count("can't be taken away") == 1, "it is said once"
    assert told(database) == (on_day(7), 800)


# failure 65
def test_a_writer_finds_the_file_free_between_two_steps(url: str, database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses are longer than the steps, however long those are."""
    pauses: list[float] = []
    steps: list[float] = []
    work = Retention(url, RetentionSettings(requests_days=32), lambda: on_day(39))
    began = 0.0
    step = remove_expired

    def timed(*arguments: object) -> object:
        nonlocal began
        began = time.monotonic()
        found = step(*arguments)  # type: ignore[arg-type]
        steps.append(time.monotonic() - began)
        return found

    monkeypatch.setattr(retention, "remove_expired", timed)
    monkeypatch.setattr(work._stop, "wait", pauses.append)
    work.work()
    assert len(pauses) == len(steps) - 1 == 7 * 3, "each step but the last, which found nothing"
    assert all(pause >= retention.SHARE * took for pause, took in zip(pauses, steps, strict=False))


def test_the_day_is_that_of_utc() -> None:
    work = Retention("sqlite://", RetentionSettings(requests_days=40))
    assert work._first_kept() in (datetime.now(UTC).date() - timedelta(40), datetime.now(UTC).date() - timedelta(39))
