"""A person's requests are forgotten: first their traces, then what the ledger says; a real database, a scripted Phoenix."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from sqlalchemy import select

from proxy.control.database import Database
from proxy.control.forget import SETTLED_SECONDS, Forgotten, Traces, forget
from proxy.errors import NotReady
from proxy.exchange import Record, new_id
from proxy.settings import PhoenixSettings
from proxy.store import Author, audit_rows, insert_records, open_database, reader
from proxy.store.forget import Whose
from proxy.store.tables import requests

AUTHOR = Author("root", "admin", idempotency_key="once")


class Phoenix(ThreadingHTTPServer):
    """Knows traces by their ids, and how to delete one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.traces: set[str] = set()
        self.status = 0
        """What it answers whatever it is asked; 0: what is right."""
        self.after = 0
        """It does so once it has deleted so many."""
        self.authorizations: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Phoenix

    def do_DELETE(self) -> None:
        phoenix, trace = self.server, self.path.removeprefix("/v1/traces/")
        phoenix.authorizations.add(self.headers["authorization"])
        if phoenix.status and phoenix.after <= 0:
            return self._answer(phoenix.status)
        phoenix.after -= 1
        if trace not in phoenix.traces:
            return self._answer(404)
        phoenix.traces.remove(trace)
        return self._answer(204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("location", "/elsewhere")
        if status != 204:
            self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Phoenix]:
    with Phoenix() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def phoenix() -> Iterator[Phoenix]:
    with running() as server:
        yield server


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'glasshouse.db'}"


def ask(url: str, phoenix: str | None, whose: Whose = "user", name: str = "ada", key_env: str | None = None) -> Forgotten:
    async def go() -> Forgotten:
        database = Database(url)
        try:
            return await forget(database, PhoenixSettings(url=phoenix, api_key_env=key_env), whose, name, AUTHOR)
        finally:
            await database.close()

    return asyncio.run(go())


def made(count: int, ago_seconds: int, **fields: str) -> list[Record]:
    received = time.time_ns() - ago_seconds * 10**9
    records = []
    for number in range(count):
        identity = new_id(received // 10**6)
        records.append(Record(identity, identity, 5, received + number, client_address="192.0.2.1", **fields))  # type: ignore[arg-type]
    return records


def store(url: str, phoenix: Phoenix | None, *records: Record) -> None:
    engine = open_database(url)
    with engine.begin() as connection:
        insert_records(connection, records)
    engine.dispose()
    if phoenix is not None:
        phoenix.traces |= {record.trace_id.hex() for record in records}


def left(url: str) -> list[str]:
    """The users of requests that still say something."""
    engine = open_database(url)
    with reader(engine).connect() as connection:
        found = connection.execute(select(requests.c.user_name).where(requests.c.client_address != "")).scalars().all()
    engine.dispose()
    return sorted(found)


def log(url: str) -> list[tuple[str, str, object]]:
    engine = open_database(url)
    with reader(engine).connect() as connection:
        rows = [(row.action, row.name, row.after) for row in audit_rows(connection)]
    engine.dispose()
    return rows[::-1]


def test_traces_go_and_then_what_the_ledger_says(url: str, phoenix: Phoenix) -> None:
    hers = [*made(450, 10, user_name="ada"), *made(5, 86_400 * 3, user_name="ada")]
    others = made(3, 10, user_name="bob", user="ada")
    store(url, phoenix, *hers, *others)
    done = ask(url, phoenix.url)
    assert done == Forgotten(requests=455, traces=455, pending=0)
    assert phoenix.traces == {record.trace_id.hex() for record in others}
    assert left(url) == ["bob"] * 3
    assert log(url) == [("forget", "ada", {}), ("forget", "ada", {"requests": 455, "traces": 455, "pending": 0})]


def test_whom_callers_named(url: str, phoenix: Phoenix) -> None:
    store(url, phoenix, *made(3, 10, user="ada", user_name="bob"), *made(2, 10, user_name="ada"))
    assert ask(url, phoenix.url, "end_user") == Forgotten(requests=3, traces=3)
    assert left(url) == ["ada", "ada"]


def test_a_trace_that_may_be_on_its_way_keeps_its_request_findable(url: str, phoenix: Phoenix) -> None:
    store(url, phoenix, *made(2, 10, user_name="ada"))
    waiting, never = made(3, 20, user_name="ada"), made(4, SETTLED_SECONDS + 60, user_name="ada")
    store(url, None, *waiting, *never)
    assert ask(url, phoenix.url) == Forgotten(requests=6, traces=2, pending=3)
    assert left(url) == ["ada"] * 3
    phoenix.traces |= {record.trace_id.hex() for record in waiting}  # now they have come
    assert ask_again(url, phoenix.url) == Forgotten(requests=3, traces=3)
    assert (left(url), phoenix.traces) == ([], set())


def ask_again(url: str, phoenix: str) -> Forgotten:
    """Under no idempotency key: the first was for the first time."""

    async def go() -> Forgotten:
        database = Database(url)
        try:
            return await forget(database, PhoenixSettings(url=phoenix), "user", "ada", AUTHOR._replace(idempotency_key=""))
        finally:
            await database.close()

    return asyncio.run(go())


def test_where_there_are_no_traces_nobody_waits_for_them(url: str) -> None:
    store(url, None, *made(3, 10, user_name="ada"))
    assert ask(url, None) == Forgotten(requests=3)
    assert left(url) == []


@pytest.mark.parametrize("status", [302, 401, 500, 503])
def test_what_phoenix_refuses_stays_and_is_found_again(url: str, phoenix: Phoenix, status: int) -> None:
    store(url, phoenix, *made(5, 10, user_name="ada"))
    phoenix.status, phoenix.after = status, 2
    with pytest.raises(NotReady, match=f"status {status}"):
        ask(url, phoenix.url)
    assert left(url) == ["ada"] * 5
    assert [row[2] for row in log(url)] == [{}], "that it was asked is known"
    phoenix.status = 0
    store(url, None, *made(2, SETTLED_SECONDS + 60, user_name="ada"))
    done = ask(url, phoenix.url)
    assert (done.traces, done.requests + done.pending) == (3, 7)
    assert phoenix.traces == set()


def test_a_phoenix_that_is_away(url: str) -> None:
    with running() as server:
        gone = server.url
    store(url, None, *made(2, 86_400, user_name="ada"))
    with pytest.raises(NotReady, match="reached"):
        ask(url, gone)
    assert left(url) == ["ada", "ada"]


def test_it_shows_its_key(url: str, phoenix: Phoenix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOENIX_KEY", "secret-1")
    store(url, phoenix, *made(1, 10, user_name="ada"))
    ask(url, phoenix.url, key_env="PHOENIX_KEY")
    assert phoenix.authorizations == {"Bearer secret-1"}


def test_each_trace_once(phoenix: Phoenix) -> None:
    """Requests may share the one that their caller began."""
    phoenix.traces = {"a" * 32}

    async def go() -> set[str]:
        async with Traces(PhoenixSettings(url=phoenix.url)) as traces:
            return await traces.delete(["a" * 32, "b" * 32, "a" * 32])

    assert asyncio.run(go()) == {"a" * 32}
