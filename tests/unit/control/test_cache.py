"""What isn't to be given again: who may say so of what, and what Redis loses by it. Real databases, a real Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import update

from proxy.cache.entry import Entry
from proxy.cache.redis import prefix_of
from proxy.cache.sealed import seal
from proxy.control import sweep as sweeping
from proxy.control.discovery import Answer as Discovered
from proxy.control.sweep import Sweeper
from proxy.snapshot import Purge
from proxy.store import MODELS, marks, swept
from proxy.store.purges import LONGEST_NS
from proxy.store.tables import purges
from tests.support.control import Answer, ControlApi
from tests.support.postgresql import PostgreSQL, postgresql_server
from tests.support.redis import Redis, redis_server
from tests.unit.control.test_nouns_api import refused

NOW = 1_795_176_000_000_000_000
CONFIG: dict[str, Any] = {
    "backends": [
        {"name": "a", "url": "http://127.0.0.1:8001"},
        {"name": "b", "url": "http://127.0.0.1:8002", "models": ["gpt-*"]},
    ],
    "models": {"m": {"aliases": ["best"]}, "gone": {"aliases": ["was"]}},
    "keys": {"declared": {"hash": "sha256:" + "ab" * 32, "team": "b"}},
    "teams": {"b": {}},
}


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ControlApi]:
    """Its backend `a` serves `m` and `free`."""
    config = dict(CONFIG)
    if request.param == "postgresql":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        config["database"] = server.url_of(server.new_database())
    with ControlApi(tmp_path, **config) as api:
        served = {name: msgspec.json.encode({"id": name}) for name in ("m", "free")}
        api.state.inventory.known["a"].answered(Discovered("vllm", served), NOW)
        yield api


def purged(answer: Answer) -> dict[str, Any]:
    """What was withdrawn."""
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return {name: body[name] for name in ("model", "key", "team", "user") if body[name] is not None}


def held(api: ControlApi) -> list[Purge]:
    with api.engine.connect() as connection:
        return [each.purge for each in marks(connection)]


def test_what_was_withdrawn_is_told(api: ControlApi) -> None:
    since = time.time_ns()
    made = api.post("/cache/purge", {"model": "m", "user": "zoe", "older_than": 3600}, key=api.admin)
    assert purged(made) == {"model": "m", "user": "zoe"}
    body = made.json()
    assert (body["object"], body["author"], body["deleted"]) == ("purge", "root", None)
    [mark] = held(api)
    assert abs(mark.before_unix_ns + 3600 * 10**9 - since) < 600 * 10**9, "of an hour ago"
    assert body["before"] < body["made_at"]
    assert api.get("/cache", key=api.viewer).json()["data"] == [body]
    assert purged(api.post("/cache/purge", {}, key=api.admin)) == {}
    assert [each["model"] for each in api.get("/cache", key=api.viewer).json()["data"]] == [None]
    newest = api.get("/audit", key=api.admin, noun="cache").json()["data"]
    assert [(row["action"], row["after"].get("model")) for row in newest] == [("purge", None), ("purge", "m")]


@pytest.mark.parametrize(
    ("name", "model"),
    [("m", "m"), ("best", "m"), ("free", "free"), ("gone", "gone"), ("was", "gone"), ("gpt-5", "gpt-5")],
)
def test_a_model_is_known_by_all_its_names(api: ControlApi, name: str, model: str) -> None:
    assert purged(api.post("/cache/purge", {"model": name}, key=api.admin)) == {"model": model}


def test_a_key_is_known_by_its_id(api: ControlApi) -> None:
    for name in (api.key.id, "holder-a"):
        assert purged(api.post("/cache/purge", {"key": name}, key=api.admin)) == {"key": api.key.id}
    declared = api.get("/keys/declared", key=api.admin).json()["id"]
    assert purged(api.post("/cache/purge", {"key": "declared"}, key=api.admin)) == {"key": declared}
    api.delete("/keys/holder-a", key=api.admin)
    assert held(api)[0] == Purge(held(api)[0].before_unix_ns, key_id=api.key.id), "revoked: withdrawn"
    assert purged(api.post("/cache/purge", {"key": api.key.id}, key=api.admin)) == {"key": api.key.id}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "nobody"}, "model: there is no model 'nobody'"),
        ({"model": "gpt-*"}, "model: there is no model 'gpt-*'"),
        ({"key": "nobody"}, "key: there is no key 'nobody'"),
        ({"team": "nobody"}, "team: there is no team 'nobody'"),
        ({"model": ""}, "model: "),
        ({"user": "z\0"}, "user: "),
        ({"user": "z" * 257}, "user: "),
        ({"older_than": -1}, "older_than: -1"),
        ({"older_than": 2_592_001}, "older_than: 2592001"),
        ({"older_than": 0.5}, "older_than: "),
        ({"models": "m"}, "there is no setting 'models' here; allowed: key, model, older_than, team, user"),
        ([], "the body"),
    ],
)
def test_what_is_not_understood_withdraws_nothing(api: ControlApi, body: Any, words: str) -> None:
    assert words in refused(api.post("/cache/purge", body, key=api.admin), 400)
    assert held(api) == []


def test_a_manager_withdraws_what_his_teams_keys_had(api: ControlApi) -> None:
    for body, said in (
        ({}, {}),
        ({"team": "a"}, {}),
        ({"model": "m"}, {"model": "m"}),
        ({"user": "zoe"}, {"user": "zoe"}),
        ({"key": "holder-a"}, {"key": api.key.id}),
    ):
        assert purged(api.post("/cache/purge", body, key=api.manager)) == {"team": "a", **said}
    for field, other in (("team", "b"), ("key", "declared")):
        there = refused(api.post("/cache/purge", {field: other}, key=api.manager), 400)
        nowhere = refused(api.post("/cache/purge", {field: "nobody"}, key=api.manager), 400)
        assert there == nowhere.replace("nobody", other), "as if it weren't there"  # failure 83
    refused(api.post("/cache/purge", {}, key=api.team_viewer), 403)
    refused(api.post("/cache/purge", {}, key=api.viewer), 403)
    api.patch("/teams/a", {"models": ["free"]}, key=api.admin)
    refused(api.post("/cache/purge", {"model": "m"}, key=api.manager), 400)
    assert purged(api.post("/cache/purge", {"model": "free"}, key=api.manager)) == {"model": "free", "team": "a"}


def test_who_is_of_a_team_sees_its_purges(api: ControlApi) -> None:
    api.post("/cache/purge", {"team": "b"}, key=api.admin)
    api.post("/cache/purge", {"user": "zoe"}, key=api.admin)
    api.post("/cache/purge", {"team": "a"}, key=api.admin)
    for key, teams in (
        (api.viewer, ["a", None, "b"]),
        (api.manager, ["a"]),
        (api.team_viewer, ["a"]),
        (api.other_manager, ["b"]),
    ):
        assert [each["team"] for each in api.get("/cache", key=key).json()["data"]] == teams


def test_the_list_goes_on(api: ControlApi) -> None:
    made = [api.post("/cache/purge", {"user": name}, key=api.admin).json() for name in ("u", "v", "w")]
    first = api.get("/cache", key=api.viewer, limit=2).json()
    assert (first["data"], first["has_more"]) == ([made[2], made[1]], True)
    rest = api.get("/cache", key=api.viewer, limit=2, after=first["next"]).json()
    assert (rest["data"], rest["has_more"]) == ([made[0]], False)
    assert api.get("/cache", key=api.viewer, after="eA").json()["data"] == [], "no number"


def test_what_is_sent_twice_is_done_once(api: ControlApi) -> None:
    once = {"idempotency-key": "k"}
    made = api.post("/cache/purge", {"model": "m", "key": "holder-a"}, key=api.admin, headers=once)
    with api.engine.begin() as connection:
        swept(connection, [made.json()["id"]], 3)
    again = api.post("/cache/purge", {"model": "m", "key": "holder-a"}, key=api.admin, headers=once)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == made.json() | {"deleted": 3}
    assert len(held(api)) == 1
    api.post("/cache/purge", {}, key=api.admin)
    assert api.post("/cache/purge", {"model": "m"}, key=api.admin, headers=once).json() == made.json(), "covered by now"
    refused(api.put("/teams/c", {}, key=api.admin, headers=once), 422, "idempotency_key_reused")


def test_whom_somebody_forgets_is_withdrawn(api: ControlApi) -> None:
    api.put("/users/zoe", {"team": "a"}, key=api.admin)
    assert api.delete("/users/zoe/content", key=api.manager).status_code == 200
    assert [each.user for each in held(api)] == ["zoe"]
    assert api.delete("/users/ada/content", key=api.admin, whose="end_user").status_code == 200
    assert [each.user for each in held(api)] == ["ada", "zoe"]


def test_it_is_told_for_as_long_as_it_matters(api: ControlApi) -> None:
    api.post("/cache/purge", {}, key=api.admin)
    with api.engine.begin() as connection:
        connection.execute(update(purges).values(before_at=purges.c.before_at - LONGEST_NS))
    assert api.get("/cache", key=api.viewer).json()["data"] == []


def test_a_model_of_the_database_is_known_too(api: ControlApi) -> None:
    api.put(f"/{MODELS.name}/org/large", {"aliases": ["large"]}, key=api.admin)
    assert purged(api.post("/cache/purge", {"model": "large"}, key=api.admin)) == {"model": "org/large"}


# -- Redis --


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


class Swept:
    """A control process's parts, with a sweeper, and answers of two models in Redis."""

    def __init__(self, api: ControlApi, redis: Redis) -> None:
        self.api, self.redis, self.state = api, redis, api.state
        assert api.settings.redis is not None
        self.prefix = prefix_of(api.settings.redis)
        self.sweeper = Sweeper(api.settings.redis, api.state.database, api.state.publisher)
        self.publish()

    def publish(self) -> None:
        self.state.feed.poll()
        assert self.state.feed.error == ""
        file = self.state.publisher.due(10**12, time.time_ns())
        assert file is not None
        assert self.state.publisher.write(file)

    def keep(self, model: str) -> None:
        now, key = time.time_ns(), model.encode().ljust(33, b"\0")
        entry = Entry("chat", model, 0, b"", False, b"{}", b"", now, now + 3600 * 10**9, key_id="k", team="t")
        published = self.state.publisher.published
        assert published is not None
        sealed = seal(entry, key, published.cache_secret)
        self.redis.client.set(f"{self.prefix}{key.hex()}", sealed)

    @property
    def left(self) -> int:
        return len(list(self.redis.client.scan_iter(f"{self.prefix}*")))

    def run(self, enough: Callable[[], object]) -> None:
        """Until there is enough."""
        self.api.client.portal.call(self._run, enough)

    async def _run(self, enough: Callable[[], object]) -> None:
        running = asyncio.get_running_loop().create_task(self.sweeper.run())
        try:
            async with asyncio.timeout(30):
                while not await asyncio.to_thread(enough):
                    assert not running.done(), running
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()

    def deleted(self) -> list[int | None]:
        return [each["deleted"] for each in self.api.get("/cache", key=self.api.admin).json()["data"]]


@pytest.fixture
def there(tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swept]:
    monkeypatch.setattr(sweeping, "EVERY_S", 0.01)
    monkeypatch.setattr(sweeping, "PAUSES_S", (0.01, 0.01))
    with ControlApi(tmp_path, redis={"url": redis.url}, cache={}, models={"m": {}, "n": {}}) as api:
        yield Swept(api, redis)


def marked(there: Swept) -> list[int | None]:
    """What was deleted for each mark, as the database has it."""
    with there.api.engine.connect() as connection:
        return [each.deleted for each in marks(connection)]


def test_redis_loses_it_once_workers_know(there: Swept) -> None:
    for model in "mno":
        there.keep(model)
    there.api.post("/cache/purge", {"model": "m"}, key=there.api.admin)
    there.api.client.portal.call(there.sweeper._once)
    assert (there.left, there.deleted()) == (3, [None]), "not before that is published"
    there.publish()
    there.run(lambda: marked(there) == [1])
    assert (there.left, there.deleted()) == (2, [1])
    there.keep("m")
    there.api.post("/cache/purge", {"model": "n"}, key=there.api.admin)
    there.publish()
    there.run(lambda: marked(there) == [1, 1])
    assert there.left == 2, "what was made since stays"


def test_what_is_still_to_be_deleted_when_control_starts(there: Swept) -> None:
    there.keep("m")
    there.api.post("/cache/purge", {}, key=there.api.admin)
    there.publish()
    again = Sweeper(there.sweeper._redis, there.state.database, there.state.publisher)
    there.sweeper = again
    there.run(lambda: marked(there) == [1])
    assert there.left == 0
    there.redis.stop()
    there.api.client.portal.call(again._once)  # it asks for nothing that is done


def test_a_redis_that_is_down_for_a_moment(there: Swept, caplog: pytest.LogCaptureFixture) -> None:  # failure 45
    """It is tried again; and again with the next purge, for all that is left."""
    there.redis.stop()
    there.api.post("/cache/purge", {"model": "m"}, key=there.api.admin)
    there.publish()

    def told(level: int) -> int:
        return sum(record.levelno == level and record.name == sweeping.log.name for record in caplog.records)

    there.run(lambda: told(logging.ERROR))
    assert (told(logging.WARNING), told(logging.ERROR)) == (2, 1)
    assert there.deleted() == [None]
    there.redis.start()
    there.keep("n")
    there.keep("m")
    there.api.post("/cache/purge", {"model": "n"}, key=there.api.admin)
    there.publish()
    there.run(lambda: marked(there) == [1, 1])
    assert there.left == 1, "made since"


def test_nothing_is_asked_where_nothing_is_withdrawn(there: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    rounds: list[int] = []

    async def once() -> None:
        looked.append(1)

    def purges() -> tuple[Purge, ...]:
        rounds.append(1)
        published = there.state.publisher.published
        return () if published is None else published.purges

    monkeypatch.setattr(there.sweeper, "_once", once)
    monkeypatch.setattr(there.sweeper, "_purges", purges)
    there.run(lambda: len(rounds) >= 5)
    assert looked == []
    there.api.post("/cache/purge", {}, key=there.api.admin)
    there.publish()
    rounds.clear()
    there.run(lambda: len(rounds) >= 5)
    assert looked == [1], "once, not again and again"
