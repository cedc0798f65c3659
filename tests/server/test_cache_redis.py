"""Answers that are kept in Redis, with a real one: found where they are; whatever happens to Redis, they are only not found."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import pytest
from redis.exceptions import RedisError

from proxy import redis_line
from proxy.cache import redis as module
from proxy.cache import sweep as sweep_module
from proxy.cache.entry import Entry
from proxy.cache.redis import FAILURES, LONGEST, Remote
from proxy.cache.sealed import seal, unseal
from proxy.cache.sweep import sweep
from proxy.redis_line import Command, Line
from proxy.settings import RedisSettings
from proxy.snapshot import Purge
from tests.support.redis import Redis, redis_server
from tests.unit.cache.test_sealed import entry
from tests.unit.test_redis_line import serving

PATIENCE: Final = 60.0
"""Seconds that a look-up waits where a test isn't about waiting."""
MOST: Final = 1024 * 1024
SECRET: Final = b"a secret of this installation"
PREFIX: Final = "{glasshouse}:cache:"
DAY: Final = 86_400.0


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not look():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


async def failed(remote: Remote, times: int) -> None:
    await until(lambda: remote.failures >= times)


class Looked:
    """A look-up. `said`: what `done` was called with, each time."""

    def __init__(self, remote: Remote, *keys: bytes, after: Callable[[], None] | None = None) -> None:
        self.said: list[list[bytes | None]] = []
        self._after = after
        self.cancel = remote.look(keys, self._done)

    def _done(self, values: list[bytes | None]) -> None:
        self.said.append(values)
        if self._after is not None:
            self._after()

    async def values(self) -> list[bytes | None]:
        await until(lambda: self.said)
        (said,) = self.said
        return said


async def look(remote: Remote, *keys: bytes) -> list[bytes | None]:
    return await Looked(remote, *keys).values()


def keep(remote: Remote, key: bytes, value: bytes, ttl_s: float = DAY) -> None:
    remote.keep(key, len(value), lambda: value, ttl_s)


async def kept(remote: Remote, **values: bytes) -> None:
    before = remote.stored
    for key, value in values.items():
        keep(remote, key.encode(), value)
    await until(lambda: remote.stored == before + len(values))


def remote_of(url: str, timeout: float = PATIENCE, most_bytes: int = MOST) -> Remote:
    return Remote(RedisSettings(url=url, timeout=timeout), most_bytes)


@asynccontextmanager
async def running(remote: Remote) -> AsyncIterator[Remote]:
    """It runs, whether Redis does or not."""
    task = asyncio.create_task(remote.run())
    try:
        yield remote
    finally:
        await remote.close()
        assert task.done()


@asynccontextmanager
async def connected(url: str, **more: Any) -> AsyncIterator[Remote]:
    async with running(remote_of(url, **more)) as remote:
        await until(lambda: remote.up)
        yield remote


def calls(redis: Redis, command: str) -> int:
    """How often Redis was told that since its figures were reset."""
    return int(redis.client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def by_hand(redis: Redis, key: bytes, value: bytes) -> None:
    redis.client.set(PREFIX + key.hex(), value)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == module.__name__]


DOWN: Final = "Redis can't be used: answers are kept in memory alone"
AGAIN: Final = "Redis can be used again for answers"
REFUSES: Final = "Redis refuses to keep answers"


# -- what is kept is found --


@pytest.mark.parametrize("way", ["tcp", "socket"])
def test_what_one_worker_keeps_another_finds(redis: Redis, way: str) -> None:
    async def scenario() -> None:
        url = redis.url if way == "tcp" else redis.unix_url
        async with connected(url) as one, connected(url) as other:
            assert await look(one, b"a") == [None]
            await kept(one, a=b"\x00\xffanswer", b=b"another")
            assert await look(other, b"b", b"missing", b"a") == [b"another", None, b"\x00\xffanswer"]
            assert (one.failures, one.stored, one.dropped) == (0, 2, 0)
            assert set(redis.client.keys()) == {PREFIX + b"a".hex(), PREFIX + b"b".hex()}

    run(scenario())


def test_it_is_kept_for_so_long(redis: Redis) -> None:
    async def scenario() -> None:
        async with connected(redis.url) as remote:
            keep(remote, b"long", b"value", 3600.4)
            keep(remote, b"short", b"value", 0.05)
            keep(remote, b"over", b"value", 0.0)
            await until(lambda: remote.stored == 3)
            assert 3_500_000 < redis.client.pttl(PREFIX + b"long".hex()) <= 3_600_400
            await until(lambda: redis.client.keys() == [PREFIX + b"long".hex()])
            assert await look(remote, b"short", b"long", b"over") == [None, b"value", None]

    run(scenario())


def test_what_is_kept_again_is_the_newer(redis: Redis) -> None:
    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"older")
            await kept(remote, a=b"newer")
            assert await look(remote, b"a") == [b"newer"]

    run(scenario())


def test_look_ups_and_writes_have_a_connection_each(redis: Redis) -> None:
    async def scenario() -> None:
        clients = len(redis.client.client_list())
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            assert len(redis.client.client_list()) == clients + 2

    run(scenario())


# -- many at once --


def test_a_thousand_look_ups_at_once_are_a_few_round_trips(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "HEARTBEAT", PATIENCE)
        async with connected(redis.url) as remote:
            await kept(remote, **{f"even{number}": b"%d" % number for number in range(0, 1000, 2)})
            redis.client.config_resetstat()
            looked = [Looked(remote, f"even{number}".encode(), f"odd{number}".encode()) for number in range(1000)]
            for number, each in enumerate(looked):
                assert await each.values() == [None if number % 2 else b"%d" % number, None]
            assert calls(redis, "evalsha") == 8, "2,000 keys, 256 at a time"
            assert remote.failures == 0

    run(scenario())


def test_a_thousand_writes_at_once_are_a_few_batches(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    ask_all = Line.ask_all

    async def count(self: Line, commands: Sequence[Command]) -> list[object]:
        batches.append(len(commands))
        return await ask_all(self, commands)

    async def scenario() -> None:
        monkeypatch.setattr(Line, "ask_all", count)
        async with connected(redis.url) as remote:
            await kept(remote, **{f"k{number}": bytes(1024) for number in range(1000)})
            assert sum(batches) == 1000
            assert len(batches) <= 17, "64 of a KiB are a batch"
            assert max(batches) == 64

    run(scenario())


class Replies:
    """What look-ups were answered, round trip by round trip."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[list[bytes | int | None]] = []
        self.keys: list[str] = []
        values = Remote._values

        async def remember(remote: Remote, keys: list[str]) -> list[bytes | int | None]:
            self.keys += keys
            self.values.append(said := await values(remote, keys))
            return said

        monkeypatch.setattr(Remote, "_values", remember)

    @property
    def bytes(self) -> list[int]:
        return [sum(len(value) for value in said if isinstance(value, bytes)) for said in self.values]


def test_long_values_come_a_few_at_a_time_and_short_ones_with_the_first(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        replies = Replies(monkeypatch)
        async with connected(redis.url) as remote:
            for number in range(20):
                by_hand(redis, b"long%d" % number, b"%d" % number * (MOST // 2 if number >= 10 else MOST))
            by_hand(redis, b"short", b"value")
            order: list[str] = []
            looked = [Looked(remote, b"long%d" % number, after=lambda: order.append("long")) for number in range(20)]
            short = Looked(remote, b"short", after=lambda: order.append("short"))
            assert await short.values() == [b"value"]
            assert order.index("short") <= 1, "it waits for one of the others at most"
            for number, each in enumerate(looked):
                assert await each.values() == [b"%d" % number * (MOST // 2 if number >= 10 else MOST)]
            assert max(replies.bytes) <= MOST + len(b"value")
            assert remote.failures == 0

    run(scenario())


def test_what_is_longer_than_any_answer_is_not_read(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 45"""

    async def scenario() -> None:
        replies = Replies(monkeypatch)
        async with connected(redis.url, most_bytes=1000) as remote, connected(redis.url, most_bytes=10 * LONGEST) as greedy:
            longest = 1000 + 64 * 1024
            by_hand(redis, b"long", b"x" * longest)
            by_hand(redis, b"too long", b"x" * (longest + 1))
            by_hand(redis, b"much too long", b"x" * (LONGEST + 1))
            assert await look(remote, b"too long", b"long", b"much too long") == [None, b"x" * longest, None]
            assert await look(greedy, b"much too long") == [None]
            assert max(replies.bytes) == longest
            keep(remote, b"kept", b"x" * longest)
            keep(remote, b"not kept", b"x" * (longest + 1))
            await until(lambda: remote.stored + remote.dropped == 2)
            assert (remote.stored, remote.dropped) == (1, 1)
            assert not redis.client.exists(PREFIX + b"not kept".hex())

    run(scenario())


def test_a_cancelled_look_up_hears_nothing_and_is_not_asked_for(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        replies = Replies(monkeypatch)
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value", b=b"value")
            early, other = Looked(remote, b"a"), Looked(remote, b"b")
            early.cancel()
            assert await other.values() == [b"value"]
            assert PREFIX + b"a".hex() not in replies.keys

            redis.pause()
            late, waits = Looked(remote, b"a"), Looked(remote, b"b")
            await until(lambda: not remote._asks)
            late.cancel()
            redis.resume()
            assert await waits.values() == [b"value"]
            waits.cancel()
            assert await look(remote, b"a") == [b"value"]
            assert early.said == late.said == []

    run(scenario())


def test_a_request_that_fails_over_its_answer_hurts_nobody_else(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            looked = [Looked(remote, b"a", after=fail if number == 1 else None) for number in range(3)]
            assert [await each.values() for each in looked] == [[b"value"]] * 3
            assert messages(caplog) == ["a bug in a request that was waiting for a kept answer"]

    run(scenario())


# -- making what is kept --


def test_what_is_large_is_made_in_a_thread(redis: Redis) -> None:
    threads: dict[str, int] = {}

    def make(name: str) -> Callable[[], bytes]:
        def made() -> bytes:
            threads[name] = threading.get_ident()
            return b"value"

        return made

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            remote.keep(b"small", 64 * 1024, make("small"), DAY)
            remote.keep(b"large", 64 * 1024 + 1, make("large"), DAY)
            assert threads == {}, "not while somebody waits"
            await until(lambda: remote.stored == 2)
            assert threads["small"] == threading.get_ident() != threads["large"]

    run(scenario())


def test_what_cannot_be_made_is_left_out(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with connected(redis.url) as remote:
            remote.keep(b"bug", 10, lambda: b"%d" % (1 // 0), DAY)
            await kept(remote, a=b"value")
            assert (remote.stored, remote.dropped, remote.failures) == (1, 1, 0)
            assert messages(caplog) == ["a bug in making what is to be kept"]

    run(scenario())


def test_no_more_waits_than_the_queue_may_hold(redis: Redis) -> None:
    made: list[int] = []

    def value() -> bytes:
        made.append(1)
        return bytes(100)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            redis.pause()
            for _ in range(100):
                remote.keep(b"a", MOST, value, DAY)
            assert (remote.dropped, remote._queued) == (84, 16 * MOST)
            redis.resume()
            await until(lambda: remote.stored == 16)
            assert (len(made), remote._queued) == (16, 0)
            await kept(remote, a=b"value")
        big = remote_of(redis.url, most_bytes=8 * MOST)
        assert big._most_queued == 32 * MOST

    run(scenario())


# -- what others have written there --


def test_a_value_that_is_no_entry_is_no_entry(redis: Redis) -> None:
    """failure 45"""

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            good = seal(entry(), b"a", SECRET)
            await kept(remote, a=good)
            for bad in (b"", b"x", b"\x80\x04\x95", good[:-1], good + b"x", good[:30] + b"?" + good[31:], b"9" * 100_000):
                by_hand(redis, b"b", bad)
                right, wrong = await look(remote, b"a", b"b")
                assert right is not None
                assert unseal(right, b"a", SECRET, MOST) == entry()
                assert wrong == (bad or None)
                assert unseal(wrong or b"", b"b", SECRET, MOST) is None
            by_hand(redis, b"b", good)
            assert await look(remote, b"b") == [good]
            assert unseal(good, b"b", SECRET, MOST) is None, "it was kept for another key"

    run(scenario())


def test_a_key_of_another_type_is_a_miss_and_hurts_no_other(redis: Redis) -> None:
    """failure 45"""

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            redis.client.hset(PREFIX + b"hash".hex(), "field", "value")
            redis.client.lpush(PREFIX + b"list".hex(), "value")
            await kept(remote, a=b"value")
            looked = Looked(remote, b"hash", b"a", b"list"), Looked(remote, b"a")
            assert [await each.values() for each in looked] == [[None, b"value", None], [b"value"]]
            await kept(remote, hash=b"value")
            assert await look(remote, b"hash") == [b"value"]
            assert remote.failures == 0

    run(scenario())


@pytest.mark.parametrize("reply", [b"*2\r\n*0\r\n$1\r\nb\r\n", b"*2\r\n*1\r\n$1\r\na\r\n$1\r\nb\r\n"])
def test_what_is_no_value_is_a_miss(reply: bytes) -> None:
    """failure 45"""
    asked = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.read(65536):
            asked += 1
            writer.write(b"*0\r\n" if asked == 1 else reply)

    async def scenario() -> None:
        async with serving(talk) as address, connected(f"redis://{address}") as remote:
            assert await look(remote, b"a", b"b") == [None, b"b"]

    run(scenario())


@pytest.mark.parametrize("reply", [b"*0\r\n", b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"-ERR no\r\n", b"\x00\xff\r\n"])
def test_a_server_that_talks_nonsense_is_no_redis(reply: bytes) -> None:
    """failure 45"""

    asked = connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked, connections
        connections += 1
        while await reader.read(65536):
            asked += 1
            writer.write(b"*0\r\n" if asked == 1 else reply)

    async def scenario() -> None:
        async with serving(talk) as address, connected(f"redis://{address}") as remote:
            assert await look(remote, b"a", b"b") == [None, None]
            await until(lambda: connections > 1)
            assert remote.failures >= 1, "which cost the connection"

    run(scenario())


# -- Redis isn't there, or slow --


def test_nobody_waits_for_a_redis_that_is_not_there(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """failure 42"""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        redis.stop()
        async with running(remote_of(redis.url)) as remote:
            await until(lambda: remote.failures >= 3)
            assert not remote.up
            keep(remote, b"a", b"value")
            assert (remote.dropped, remote._queued) == (1, 0)
            assert messages(caplog) == [DOWN]
            redis.start()
            await until(lambda: remote.up)
            await kept(remote, a=b"value")
            assert await look(remote, b"a") == [b"value"]
            assert messages(caplog) == [DOWN, AGAIN]

    run(scenario())


def test_a_redis_that_dies_is_a_miss_and_one_that_is_started_again_is_used(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """failure 42"""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.pause()
            asked = [Looked(remote, b"a") for _ in range(3)]
            await until(lambda: not remote._asks)
            later = Looked(remote, b"a")
            redis.kill()
            assert [await each.values() for each in (*asked, later)] == [[None]] * 4
            await until(lambda: not remote.up)
            assert remote.failures < FAILURES, "nobody to connect to: that's enough"
            redis.start()
            await until(lambda: remote.up)
            assert await look(remote, b"a") == [None]
            await kept(remote, a=b"value")
            assert await look(remote, b"a") == [b"value"]
            assert messages(caplog) == [DOWN, AGAIN]

    run(scenario())


def test_a_redis_that_was_started_again_while_nobody_asked_is_found_by_itself(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.restart()
            await until(lambda: remote.failures and remote.up)
            by_hand(redis, b"a", b"value")
            assert await look(remote, b"a") == [b"value"]
            redis.kill()
            await until(lambda: not remote.up)
            redis.start()

    run(scenario())


def test_a_flushed_redis_has_nothing_and_takes_what_comes(redis: Redis) -> None:
    """failure 44"""

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.flush()
            redis.client.script_flush()
            assert await look(remote, b"a") == [None]
            await kept(remote, a=b"value")
            assert await look(remote, b"a") == [b"value"]
            assert remote.failures == 0

    run(scenario())


def test_who_waits_too_long_has_found_nothing_and_the_connection_goes(redis: Redis) -> None:
    """failure 43"""

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"of a", b=b"of b")
            redis.slow_down(0.25)
            remote._timeout = 0.1
            said = await look(remote, b"a")
            assert said == [None]
            while said == [None]:
                await until(lambda: remote.up)
                said = await look(remote, b"b")
            assert said == [b"of b"], "never what was said to the one before"
            assert remote.failures >= 1

    run(scenario())


def test_who_waits_for_the_next_round_trip_waits_no_longer_than_others(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 43"""
    monkeypatch.setattr(module, "HEARTBEAT", PATIENCE)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            redis.pause()
            remote._timeout = 0.1
            failures: list[int] = []
            under_way = Looked(remote, b"a")
            await asyncio.sleep(0.05)
            gathers = Looked(remote, b"a", after=lambda: failures.append(remote.failures))
            assert await under_way.values() == await gathers.values() == [None]
            assert failures == [1], "its time is over before that of the round trip that it goes with"
            redis.resume()

    run(scenario())


def test_what_comes_too_late_changes_nothing_that_was_said() -> None:
    """failure 43"""

    async def scenario() -> None:
        remote = remote_of("redis://127.0.0.1:1", timeout=0.0)
        looked = Looked(remote, b"a")
        asks = remote._take_asks()
        assert await looked.values() == [None]
        remote._succeeded(asks, [b"late"])
        assert looked.said == [[None]]

    run(scenario())


def test_after_five_failures_nobody_waits_until_it_answers_again(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """failure 43"""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.pause()
            remote._timeout = 0.02
            while remote.up:
                assert await look(remote, b"a") == [None]
            assert remote.failures >= FAILURES
            keep(remote, b"b", b"value")
            assert remote.dropped == 1
            await failed(remote, FAILURES + 2)
            remote._timeout = PATIENCE
            redis.resume()
            await until(lambda: remote.up)
            assert await look(remote, b"a") == [b"value"]
            assert messages(caplog) == [DOWN, AGAIN]

    run(scenario())


def test_failures_count_that_are_in_a_row() -> None:
    """failure 43"""
    remote = remote_of("redis://127.0.0.1:1")
    for _ in range(2):
        remote._succeeded([], [])
        for _ in range(FAILURES - 1):
            remote._failed(TimeoutError(), [], at_once=False)
            assert remote.up
    remote._failed(TimeoutError(), [], at_once=False)
    assert not remote.up
    remote._failed(TimeoutError(), [], at_once=False)
    assert not remote.up
    remote._succeeded([], [])
    assert remote.up


def test_what_waits_to_be_written_is_given_up_with_redis(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WRITE", 0.1)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            redis.pause()
            remote._timeout = 0.02
            for _ in range(10):
                keep(remote, b"a", bytes(MOST))
            while remote.up:
                await look(remote, b"a")
            await until(lambda: remote.dropped == 10)
            assert (remote.stored, remote._queued) == (0, 0)
            remote._timeout = PATIENCE
            redis.resume()
            await until(lambda: remote.up)
            await kept(remote, a=b"value")
            assert remote.dropped == 10

    run(scenario())


def test_a_write_whose_connection_was_closed_gets_another(redis: Redis) -> None:
    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            (writes,) = [each["id"] for each in redis.client.client_list() if each["cmd"] == "set"]
            redis.client.client_kill_filter(_id=writes)
            await kept(remote, b=b"value")
            assert (remote.failures, remote.dropped, remote.up) == (1, 0, True)
            assert await look(remote, b"a", b"b") == [b"value", b"value"]

    run(scenario())


def test_a_write_that_gets_no_connection_is_lost(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 42"""
    monkeypatch.setattr(module, "HEARTBEAT", PATIENCE)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.kill()
            keep(remote, b"b", b"value")
            await until(lambda: remote.dropped == 1)
            assert (remote.failures, remote._queued) == (2, 0)
            assert remote.up, "nobody has looked"
            redis.start()
            await kept(remote, b=b"value")

    run(scenario())


def test_a_write_that_is_late_is_lost_and_no_look_up_is(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 43"""
    monkeypatch.setattr(module, "_WRITE", 0.05)

    async def scenario() -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.pause()
            waits = Looked(remote, b"a")
            await until(lambda: not remote._asks)
            keep(remote, b"a", b"later")
            await until(lambda: remote.dropped == 1)
            assert (remote.failures, remote.up) == (1, True)
            redis.resume()
            assert (await waits.values())[0] in (b"value", b"later")
            await kept(remote, b=b"value")
            assert await look(remote, b"b") == [b"value"]

    run(scenario())


def test_a_full_redis_keeps_nothing_more_and_still_answers(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(redis: Redis) -> None:
        async with connected(redis.url) as remote:
            await kept(remote, a=b"value")
            redis.client.config_set("maxmemory", 1)
            for number in range(3):
                keep(remote, b"b", b"value")
                await until(partial(lambda number: remote.dropped > number, number))
            assert await look(remote, b"a", b"b") == [b"value", None]
            redis.client.script_flush()
            assert await look(remote, b"a", b"b") == [b"value", None]
            assert (remote.up, remote.failures, remote.stored) == (True, 0, 1)
            assert messages(caplog) == [REFUSES]
            redis.client.config_set("maxmemory", 0)
            await kept(remote, b=b"value")

    with redis_server("--maxmemory-policy", "noeviction") as redis:
        run(scenario(redis))


def test_one_that_asks_for_another_password_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(redis: Redis) -> None:
        for user in ("", ":wrong-word@"):
            async with running(remote_of(redis.url.replace("//", f"//{user}"))) as remote:
                await failed(remote, 2)
                assert not remote.up
        assert messages(caplog) == [DOWN, DOWN]
        assert not [record for record in caplog.records if "wrong-word" in str(record.__dict__)]
        async with connected(redis.url.replace("//", "//:right-word@")) as remote:
            await kept(remote, a=b"value")

    with redis_server(password="right-word") as redis:
        run(scenario(redis))


@pytest.mark.parametrize("who", ["", ":word@"], ids=["asked", "greeted"])
def test_one_that_says_nothing_at_all_is_not_there(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 43: neither to a look-up nor while it is connected to."""
    monkeypatch.setattr(module, "_CONNECT", 0.05)

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario() -> None:
        async with serving(hold) as address, running(remote_of(f"redis://{who}{address}", timeout=0.01)) as remote:
            await failed(remote, 2)
            assert not remote.up

    run(scenario())


# -- the end --


def test_closing_tells_who_waits_and_writes_what_is_left(redis: Redis) -> None:
    async def scenario() -> None:
        async with connected(redis.url) as remote:
            redis.pause()
            waits = Looked(remote, b"a", b"b")
            await until(lambda: not remote._asks)
            keep(remote, b"under way", b"value")
            await asyncio.sleep(0)
            keep(remote, b"large", bytes(MOST))
            keep(remote, b"waits", b"value")
            closing = asyncio.create_task(remote.close())
            assert await waits.values() == [None, None]
            redis.resume()
            await closing
            assert not remote.up
            assert (remote.stored, remote.dropped) == (3, 0)
            assert left(redis) == {b"under way", b"large", b"waits"}
            keep(remote, b"later", b"value")
            assert remote.dropped == 1
        await until(lambda: len(redis.client.client_list()) == 1)

    run(scenario())


def test_closing_does_not_wait_for_a_redis_that_hangs(redis: Redis) -> None:
    async def scenario() -> None:
        async with connected(redis.url) as remote:
            redis.pause()
            remote._timeout = 0.05
            waits = Looked(remote, b"a")
            for _ in range(3):
                keep(remote, b"a", bytes(MOST))
            await remote.close()
            assert waits.said == [[None]]
            assert (remote.stored, remote.dropped, remote._queued) == (0, 3, 0)
            assert remote.failures == 0, "it didn't wait until a write failed"
            redis.resume()

    run(scenario())


def test_it_can_be_run_again(redis: Redis) -> None:
    async def scenario() -> None:
        remote = remote_of(redis.url)
        for _ in range(2):
            task = asyncio.create_task(remote.run())
            await until(lambda: remote.up)
            await kept(remote, a=b"value")
            assert await look(remote, b"a") == [b"value"]
            task.cancel()
            await asyncio.wait([task])
            assert not remote.up
        await remote.close()

    run(scenario())


# -- a purge --

NOW: Final = 1_700_000_030_000_000_000
"""Within the life of what `entry` makes."""


def swept(redis: Redis, *purges: Purge, now_unix_ns: int = NOW) -> int:
    return asyncio.run(sweep(RedisSettings(url=redis.url), SECRET, purges, now_unix_ns))


def put(redis: Redis, key: bytes, made: Entry) -> None:
    by_hand(redis, key, seal(made, key, SECRET))


def left(redis: Redis) -> set[bytes]:
    return {bytes.fromhex(str(key).removeprefix(PREFIX)) for key in redis.client.keys(f"{PREFIX}*")}


@pytest.mark.parametrize(
    ("purge", "goes"),
    [
        (Purge(NOW, model="m"), {b"m"}),
        (Purge(NOW, key_id="other"), {b"key"}),
        (Purge(NOW, team="other"), {b"team"}),
        (Purge(NOW, user="other"), {b"user", b"user name"}),
        (Purge(NOW, team="other", model="m"), set()),
        (Purge(NOW - 3600 * 10**9), set()),
    ],
    ids=["model", "key", "team", "user", "both", "older"],
)
def test_what_is_withdrawn_is_deleted_and_nothing_else(redis: Redis, purge: Purge, goes: set[bytes]) -> None:
    put(redis, b"m", entry(model="m"))
    put(redis, b"key", entry(key_id="other"))
    put(redis, b"team", entry(team="other"))
    put(redis, b"user", entry(user="other"))
    put(redis, b"user name", entry(user_name="other"))
    put(redis, b"long", entry(bytes(100_000)))
    redis.client.set("{glasshouse}:leases", "x")
    redis.client.set("cache:x", "x")
    before = left(redis)
    assert swept(redis, purge) == len(goes)
    assert left(redis) == before - goes
    assert redis.client.exists("{glasshouse}:leases", "cache:x") == 2


def test_what_is_no_entry_is_deleted_too(redis: Redis) -> None:
    """failure 45"""
    put(redis, b"good", entry())
    put(redis, b"ended", entry(expires_unix_ns=NOW))
    good = seal(entry(), b"good", SECRET)
    by_hand(redis, b"moved", good)
    by_hand(redis, b"cut", good[:-1])
    by_hand(redis, b"empty", b"")
    by_hand(redis, b"foreign secret", seal(entry(), b"foreign secret", b"another"))
    by_hand(redis, b"much too long", bytes(LONGEST + 1))
    redis.client.hset(PREFIX + "00", "field", "value")
    redis.client.set(PREFIX + "no hex", good)
    redis.client.set(PREFIX + "ümlaut", good)
    assert swept(redis) == 9
    assert left(redis) == {b"good"}


def test_all_of_many_are_looked_at_a_few_at_a_time(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    over_of = sweep_module._Sweep._over_of

    def count(self: Any, keys: Sequence[bytes], values: Sequence[bytes | None]) -> list[bytes]:
        read.append(sum(len(value) for value in values if value))
        return over_of(self, keys, values)

    monkeypatch.setattr(sweep_module._Sweep, "_over_of", count)
    for number in range(1000):
        put(redis, b"%d" % number, entry(model="m" if number % 3 else "n"))
    for number in range(8):
        put(redis, b"large%d" % number, entry(random.Random(number).randbytes(400_000), model="m"))
    by_hand(redis, b"much too long", bytes(LONGEST + 1))
    assert swept(redis, Purge(NOW, model="m")) == 666 + 8 + 1
    assert left(redis) == {b"%d" % number for number in range(0, 1000, 3)}
    assert max(read) <= 1024 * 1024
    assert len(read) >= 10


def test_what_ends_while_it_is_looked_at_is_gone_already(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_all = Line.ask_all

    async def measure(self: Line, commands: Sequence[Command]) -> list[object]:
        lengths = await ask_all(self, commands)
        redis.client.delete(PREFIX + b"ends".hex())
        return lengths

    monkeypatch.setattr(Line, "ask_all", measure)
    put(redis, b"ends", entry())
    put(redis, b"stays", entry())
    assert swept(redis, Purge(NOW, model="m")) == 0
    assert left(redis) == {b"stays"}


def test_after_a_purge_of_everything_nothing_is_read(redis: Redis) -> None:
    for number in range(300):
        put(redis, b"%d" % number, entry())
    redis.client.set("{glasshouse}:leases", "x")
    redis.client.config_resetstat()
    assert swept(redis, Purge(NOW - 10**9, model="m"), Purge(NOW - 10**9)) == 300
    assert redis.client.keys() == ["{glasshouse}:leases"]
    assert calls(redis, "mget") == calls(redis, "get") == 0


def test_an_earlier_purge_of_everything_takes_nothing_that_was_made_since(redis: Redis) -> None:
    minute = 60 * 10**9
    put(redis, b"old", entry(made_unix_ns=NOW - 1, expires_unix_ns=NOW + 2 * minute))
    put(redis, b"new", entry(made_unix_ns=NOW, expires_unix_ns=NOW + 2 * minute))
    put(redis, b"m", entry(made_unix_ns=NOW, expires_unix_ns=NOW + 2 * minute, model="m"))
    assert swept(redis, Purge(NOW), Purge(NOW + 1, model="m"), now_unix_ns=NOW + minute) == 2
    assert left(redis) == {b"new"}


def test_without_redis_it_says_so(redis: Redis) -> None:
    redis.stop()
    with pytest.raises(redis_line.FAILED):
        swept(redis, Purge(NOW))
    assert issubclass(RedisError, redis_line.FAILED)
