"""A connection to Redis that is there whole, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from redis.exceptions import ResponseError

from proxy.redis_line import FAILED, Line
from proxy.settings import RedisSettings
from tests.support.redis import Redis, redis_server


@asynccontextmanager
async def serving(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """Somebody else's server → its host and port. At the end those who were connected have to have left."""
    left: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            left.add(task)
        with suppress(OSError):
            await talk(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*left)


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


def line_to(url: str) -> Line:
    return Line(RedisSettings(url=url))


def test_each_command_has_its_reply_and_an_error_is_one(redis: Redis) -> None:
    async def scenario() -> None:
        line = line_to(redis.url)
        await line.connect()
        replies = await line.ask_all([("SET", "a", b"\xff"), ("LPUSH", "a", 1), ("GET", "a"), ("STRLEN", "b")])
        assert replies[::2] == [b"OK", b"\xff"]
        assert isinstance(replies[1], ResponseError)
        assert replies[3] == 0
        with pytest.raises(ResponseError):
            await line.ask(("LPUSH", "a", 1))
        assert await line.ask(("GET", "a")) == b"\xff", "the connection is as it was"
        await line.drop()

    asyncio.run(scenario())


def test_without_a_connection_there_is_nobody_to_ask() -> None:
    async def scenario() -> None:
        line = line_to("redis://127.0.0.1:1")
        assert await line.ask_all([]) == []
        with pytest.raises(FAILED):
            await line.ask(("PING",))
        with pytest.raises(FAILED):
            await line.connect()
        assert not line.connected
        await line.drop()

    asyncio.run(scenario())


def test_half_a_connection_is_none() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario() -> None:
        async with serving(hold) as address:
            line = line_to(f"redis://:word@{address}")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await line.connect()
            assert not line.connected

    asyncio.run(scenario())
