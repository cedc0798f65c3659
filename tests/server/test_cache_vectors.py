"""What questions mean, in a real Redis that searches vectors: found where it is near; whatever happens, it is only not found."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import numpy as np
import pytest
from msgspec.structs import replace

from proxy.cache import vectors as module
from proxy.cache.redis import prefix_of
from proxy.cache.sealed import seal
from proxy.cache.semantic import NEIGHBOURS, Meaning, Neighbour, vector_of
from proxy.cache.sweep import sweep
from proxy.cache.vectors import Vectors, _seal
from proxy.settings import RedisSettings
from proxy.snapshot import Purge
from tests.support.redis import Redis, redis_server
from tests.support.redisearch import redisearch_server
from tests.unit.cache.test_sealed import entry

SECRET: Final = b"a secret of this installation"
PATIENCE: Final = 10.0
"""Seconds that a look-up waits where a test isn't about waiting."""
TTL: Final = 600.0
NOW: Final = 10**18
SPACE: Final = "0123456789abcdef"
GROUP, OTHER_GROUP = bytes(range(32)), bytes(range(32, 64))


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redisearch_server() as server:
        yield server


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not look():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


def settings(redis: Redis, timeout: float = PATIENCE) -> RedisSettings:
    return RedisSettings(url=redis.unix_url, timeout=timeout)


@asynccontextmanager
async def running(redis: Redis, within: float = PATIENCE, *, up: bool = True) -> AsyncIterator[Vectors]:
    vectors = Vectors(settings(redis, within))
    task = asyncio.create_task(vectors.run())
    try:
        if up:
            await until(lambda: vectors.up)
        yield vectors
    finally:
        await vectors.close()
        assert task.cancelled() or task.exception() is None


def meaning(degrees: float = 0.0, group: bytes = GROUP, space: str = SPACE, size: int = 2) -> Meaning:
    angle = math.radians(degrees)
    vector = vector_of([math.cos(angle), math.sin(angle), *[0.0] * (size - 2)])
    assert vector is not None
    return Meaning(space, group, vector)


def key(number: int) -> bytes:
    return bytes([number]) * 33


async def look(vectors: Vectors, asked: Meaning, secret: bytes = SECRET) -> list[Neighbour]:
    said: list[list[Neighbour]] = []
    vectors.look(asked, secret, said.append)
    await until(lambda: said)
    [neighbours] = said
    return neighbours


def documents(redis: Redis) -> list[str]:
    return sorted(redis.client.scan_iter("*:semantic:*"))


async def kept(redis: Redis, vectors: Vectors, degrees: float = 0.0, number: int = 1, **more: Any) -> Meaning:
    """One that Redis has and finds."""
    asked = meaning(degrees, **more)
    vectors.keep(asked, key(number), SECRET, TTL)
    await until(lambda: any(name.endswith(key(number).hex()) for name in documents(redis)))
    return asked


def test_the_nearest_comes_first(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as one, running(redis) as other:
            for number, degrees in enumerate((40, 10, 5, 170)):
                await kept(redis, one, degrees, number)
            found = await look(other, meaning())
            assert [each.key for each in found] == [key(2), key(1), key(0), key(3)]
            cosines = [math.cos(math.radians(degrees)) for degrees in (5, 10, 40, 170)]
            assert [each.similarity for each in found] == pytest.approx(cosines, abs=1e-6)

    run(scenario())


def test_no_more_than_are_tried(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            for number in range(NEIGHBOURS + 3):
                await kept(redis, vectors, number, number)
            assert [each.key for each in await look(vectors, meaning())] == [key(number) for number in range(NEIGHBOURS)]

    run(scenario())


@pytest.mark.parametrize("other", [{"group": OTHER_GROUP}, {"space": "fedcba9876543210"}, {"size": 3}], ids=str)
def test_what_has_nothing_to_do_with_it(redis: Redis, other: dict[str, Any]) -> None:
    """Another group, another model's embeddings, another length."""

    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors)
            await kept(redis, vectors, number=2, **other)
            assert [each.key for each in await look(vectors, meaning())] == [key(1)]
            assert [each.key for each in await look(vectors, meaning(**other))] == [key(2)]

    run(scenario())


def test_those_of_others_are_not_in_the_way(redis: Redis) -> None:
    """However many of them are nearer."""

    async def scenario() -> None:
        async with running(redis) as vectors:
            for number in range(2 * NEIGHBOURS):
                await kept(redis, vectors, number=number, group=OTHER_GROUP)
            await kept(redis, vectors, 20, 99)
            assert [each.key for each in await look(vectors, meaning())] == [key(99)]

    run(scenario())


def test_it_ends_with_its_answer(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors)
            [name] = documents(redis)
            assert TTL - 60 < redis.client.ttl(name) <= TTL
            vectors.keep(meaning(), key(1), SECRET, 0.05)
            await until(lambda: not documents(redis))
            assert await look(vectors, meaning()) == []

    run(scenario())


def test_no_text_of_anybody_s_is_in_it(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors)
            [name] = documents(redis)
            assert sorted(redis.client.hkeys(name)) == ["group", "seal", "vector"]

    run(scenario())


def forge(redis: Redis, name: str = key(9).hex(), **fields: bytes) -> None:
    """Somebody who can write to Redis, but hasn't the secret, says that this question is in that group."""
    said: Any = {"group": GROUP.hex(), "vector": meaning().vector.tobytes(), "seal": bytes(16), **fields}
    redis.client.hset(f"{{glasshouse}}:semantic:{SPACE}:2:{name}", mapping=said)


def test_what_was_not_written_here_is_not_believed(redis: Redis) -> None:
    """Failure 58: an answer of one tenant's that another one is led to, or a vector that has been damaged."""

    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors, 30)
            forge(redis)
            forge(redis, key(8).hex(), seal=_seal(GROUP, key(8), meaning().vector.tobytes(), b"a guess"))
            found = await look(vectors, meaning())
            assert [each.key for each in found] == [key(1)]
            assert await look(vectors, meaning(), b"another secret") == []

    run(scenario())


@pytest.mark.parametrize("change", ["vector", "group", "key"])
def test_nor_what_was_written_for_something_else(redis: Redis, change: str) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors, 30)
            [name] = documents(redis)
            if change == "vector":
                redis.client.hset(name, "vector", meaning().vector.tobytes())
            elif change == "group":
                redis.client.hset(name, "group", OTHER_GROUP.hex())
            else:
                redis.client.rename(name, name[:-4] + "0000")
            asked = meaning(group=OTHER_GROUP) if change == "group" else meaning()
            assert await look(vectors, asked) == []

    run(scenario())


@pytest.mark.parametrize("name", ["x", "0", "zz"])
def test_nor_what_has_no_key(redis: Redis, name: str) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors, 30)
            forge(redis, name)
            assert [each.key for each in await look(vectors, meaning())] == [key(1)]

    run(scenario())


def test_several_make_the_index_at_once(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as one, running(redis) as two, running(redis) as three:
            assert await asyncio.gather(*(look(each, meaning()) for each in (one, two, three))) == [[], [], []]
            assert [one.failures, two.failures, three.failures] == [0, 0, 0]
            await kept(redis, one)
            assert len(await look(three, meaning())) == 1

    run(scenario())


def test_after_redis_was_emptied(redis: Redis) -> None:
    """Failure 57: the index went with the rest."""

    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors)
            assert len(await look(vectors, meaning())) == 1
            redis.flush()
            assert await look(vectors, meaning()) == []
            assert await look(vectors, meaning()) == [], "the index is made again"
            await kept(redis, vectors)
            assert len(await look(vectors, meaning())) == 1
            assert vectors.failures == 0

    run(scenario())


# --- what is gone ---


def test_what_has_no_answer_any_more_is_dropped(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            asked = await kept(redis, vectors)
            redis.client.pexpire(documents(redis)[0], round(TTL * 1000) - 6000)
            vectors.drop(asked, key(1), TTL)
            await until(lambda: not documents(redis))

    run(scenario())


@pytest.mark.parametrize("there", [True, False])
def test_what_may_have_one_is_not(redis: Redis, there: bool) -> None:
    """Its answer is there, or may be on its way."""

    async def scenario() -> None:
        async with running(redis) as vectors:
            asked = await kept(redis, vectors)
            if there:
                redis.client.set(prefix_of(settings(redis)) + key(1).hex(), "an answer")
                redis.client.pexpire(documents(redis)[0], round(TTL * 1000) - 6000)
            vectors.drop(asked, key(1), TTL)
            await kept(redis, vectors, number=2)
            assert len(documents(redis)) == 2

    run(scenario())


# --- what goes wrong with Redis ---


def test_one_that_hangs_is_not_waited_for(redis: Redis) -> None:
    """Failure 57."""

    async def scenario() -> None:
        async with running(redis, 0.2) as vectors:
            await kept(redis, vectors)
            redis.pause()
            try:
                async with asyncio.timeout(PATIENCE):
                    assert await look(vectors, meaning()) == []
                await until(lambda: vectors.failures and not vectors.up)
                vectors.keep(meaning(), key(2), SECRET, TTL)
            finally:
                redis.resume()
            await until(lambda: vectors.up)
            assert [each.key for each in await look(vectors, meaning())] == [key(1)]

    run(scenario())


def test_nobody_waits_for_what_others_have_asked(redis: Redis) -> None:
    """A round trip that isn't late is none of his business who has waited for long enough."""

    async def scenario() -> None:
        async with running(redis, 0.05) as vectors:
            said: list[list[Neighbour]] = []
            redis.pause()
            try:
                vectors.look(meaning(), SECRET, said.append)
                vectors._timeout = 1000.0
                await until(lambda: said)
                assert (said, vectors.up, vectors.failures) == ([[]], True, 0)
            finally:
                redis.resume()
            assert await look(vectors, meaning()) == []
            assert said == [[]]

    run(scenario())


def test_one_that_dies_and_comes_back(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors)
            redis.restart()
            assert await look(vectors, meaning()) == []
            await until(lambda: vectors.up)
            await kept(redis, vectors)
            assert len(await look(vectors, meaning())) == 1

    run(scenario())


def test_who_waits_when_it_ends(redis: Redis) -> None:
    async def scenario() -> None:
        said: list[list[Neighbour]] = []
        async with running(redis) as vectors:
            redis.pause()
            vectors.look(meaning(), SECRET, said.append)
            await asyncio.sleep(0)
        redis.resume()
        assert said == [[]]

    run(scenario())


def test_who_has_left_is_told_nothing(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            said: list[list[Neighbour]] = []
            vectors.look(meaning(), SECRET, said.append)()
            assert await look(vectors, meaning()) == []
            assert said == []

    run(scenario())


def test_a_bug_in_one_is_none_of_the_others_business(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            await kept(redis, vectors)

            def buggy(neighbours: list[Neighbour]) -> None:
                raise RuntimeError("a bug")

            vectors.look(meaning(), SECRET, buggy)
            assert len(await look(vectors, meaning())) == 1
            assert vectors.up

    run(scenario())
    assert "a bug" in caplog.text


def test_no_more_wait_to_be_written_than_there_may(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE", 3)

    async def scenario() -> None:
        async with running(redis) as vectors:
            for number in range(5):
                vectors.keep(meaning(), key(number), SECRET, TTL)
            assert len(vectors._writes) == 3

    run(scenario())


def test_many_at_once(redis: Redis) -> None:
    """More than go in one round trip."""

    async def scenario() -> None:
        async with running(redis) as vectors:
            for number in range(150):
                vectors.keep(meaning(number), key(number), SECRET, TTL)
            await until(lambda: len(documents(redis)) == 150)
            found = await asyncio.gather(*(look(vectors, meaning(number)) for number in range(100)))
            assert [each[0].key for each in found] == [key(number) for number in range(100)]

    run(scenario())


def test_as_precise_as_a_scan(redis: Redis) -> None:
    async def scenario() -> None:
        random = np.random.default_rng(3)
        async with running(redis) as vectors:
            made = [vector_of(list(random.standard_normal(32))) for _ in range(200)]
            for number, vector in enumerate(made):
                assert vector is not None
                vectors.keep(Meaning(SPACE, GROUP, vector), key(number), SECRET, TTL)
            await until(lambda: len(documents(redis)) == 200)
            for number in range(0, 200, 20):
                near = made[number]
                assert near is not None
                found = await look(vectors, Meaning(SPACE, GROUP, near))
                assert found[0] == Neighbour(key(number), 1.0)

    run(scenario())


# --- a Redis without search ---


def test_a_redis_without_search_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WITHOUT", 0.01)

    async def scenario() -> None:
        with redis_server() as redis:
            async with running(redis, up=False) as vectors:
                connections = redis.client.info("stats")["total_connections_received"]
                await until(lambda: redis.client.info("stats")["total_connections_received"] > connections + 3)
                assert (vectors.up, vectors.failures) == (False, 0)
                vectors.keep(meaning(), key(1), SECRET, TTL)
            assert redis.client.dbsize() == 0

    with caplog.at_level(logging.INFO):
        run(scenario())
    assert caplog.text.count("Redis has no search") == 1


# --- a purge ---


def test_a_purge_takes_what_the_questions_meant_with_it(redis: Redis) -> None:
    async def scenario() -> None:
        async with running(redis) as vectors:
            for number in (1, 2):
                await kept(redis, vectors, number=number)
            given = replace(entry(), expires_unix_ns=2 * NOW, made_unix_ns=NOW)
            redis.client.set(prefix_of(settings(redis)) + key(2).hex(), seal(given, key(2), SECRET))
            assert await sweep(settings(redis), SECRET, (Purge(NOW, model="another"),), NOW) == 0
            [left] = documents(redis)
            assert left.endswith(key(2).hex())

    run(scenario())
