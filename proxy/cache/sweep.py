"""Delete from Redis what a purge has withdrawn. Nobody is given it any more; now it's gone too.

It goes through the keys a few at a time, so that neither Redis nor who else works here notices.
"""

from __future__ import annotations

import asyncio
from binascii import unhexlify
from collections.abc import Iterator, Sequence
from typing import Final, cast

from proxy.cache.redis import LONGEST, meanings_prefix_of, prefix_of
from proxy.cache.sealed import unseal
from proxy.redis_line import Line
from proxy.settings import RedisSettings
from proxy.snapshot import Purge

_KEYS: Final = 100
"""That Redis looks at in one go, about."""
_BYTES: Final = 1024 * 1024
"""Of values that are read in one go; or one value."""
_UNPACKED: Final = 64 * 1024 * 1024
"""Bytes that one entry may have."""
_TIMEOUT: Final = 10.0
"""Seconds for one answer."""
_UNREAD_NS: Final = 60 * 10**9
"""What was made since a purge of everything may go with the rest, for so long."""


async def sweep(settings: RedisSettings, secret: bytes, purges: tuple[Purge, ...], now_unix_ns: int) -> int:
    """Delete what is withdrawn, what has ended and what is no entry → how many that were. After a purge of everything nothing is
    read. Raises one of `redis_line.FAILED` when Redis fails; what is deleted stays so, and it can be done again."""
    sweeping = _Sweep(settings, secret, purges, now_unix_ns)
    try:
        return await sweeping.run()
    finally:
        await sweeping.line.drop()


class _Sweep:
    def __init__(self, settings: RedisSettings, secret: bytes, purges: tuple[Purge, ...], now_unix_ns: int) -> None:
        self.line = Line(settings)
        self._prefix = prefix_of(settings).encode()
        self._meanings = meanings_prefix_of(settings).encode()
        self._secret = secret
        self._purges = purges
        self._now_unix_ns = now_unix_ns
        self._unread = any(
            each == Purge(each.before_unix_ns) and each.before_unix_ns > now_unix_ns - _UNREAD_NS for each in purges
        )

    async def run(self) -> int:
        async with asyncio.timeout(_TIMEOUT):
            await self.line.connect()
        deleted = 0
        cursor = b"0"
        while True:
            scan = await self._ask("SCAN", cursor, "MATCH", self._prefix + b"*", "COUNT", _KEYS)
            cursor, keys = cast("tuple[bytes, list[bytes]]", scan)
            over = keys if self._unread else await self._over(keys)
            if over:
                deleted += cast(int, await self._ask("UNLINK", *over))
            if cursor == b"0":
                await self._drop_meanings()
                return deleted

    async def _drop_meanings(self) -> None:
        """Of questions whose answers are gone."""
        cursor = b"0"
        while True:
            scan = await self._ask("SCAN", cursor, "MATCH", self._meanings + b"*", "COUNT", _KEYS)
            cursor, keys = cast("tuple[bytes, list[bytes]]", scan)
            async with asyncio.timeout(_TIMEOUT):
                there = await self.line.ask_all([("EXISTS", self._prefix + key.rpartition(b":")[2]) for key in keys])
            if gone := [key for key, each in zip(keys, there, strict=True) if each == 0]:
                await self._ask("UNLINK", *gone)
            if cursor == b"0":
                return

    async def _over(self, keys: list[bytes]) -> list[bytes]:
        async with asyncio.timeout(_TIMEOUT):
            lengths = await self.line.ask_all([("STRLEN", key) for key in keys])
        right = [
            (key, length) for key, length in zip(keys, lengths, strict=True) if isinstance(length, int) and length <= LONGEST
        ]
        over = [*set(keys).difference(key for key, _ in right)]
        for some in _portions(right):
            values = cast("list[bytes | None]", await self._ask("MGET", *some))
            over += await asyncio.to_thread(self._over_of, some, values)
        return over

    def _over_of(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> list[bytes]:
        return [key for key, value in zip(keys, values, strict=True) if value is not None and self._is_over(key, value)]

    def _is_over(self, key: bytes, value: bytes) -> bool:
        try:
            entry = unseal(value, unhexlify(key[len(self._prefix) :]), self._secret, _UNPACKED)
        except ValueError:
            return True
        return entry is None or entry.over(self._now_unix_ns, self._purges)

    async def _ask(self, *command: str | bytes | int) -> object:
        async with asyncio.timeout(_TIMEOUT):
            return await self.line.ask(command)


def _portions(keys: Sequence[tuple[bytes, int]]) -> Iterator[list[bytes]]:
    """Of keys with the lengths of their values: those that are read together."""
    some: list[bytes] = []
    size = 0
    for key, length in keys:
        if some and size + length > _BYTES:
            yield some
            some, size = [], 0
        some.append(key)
        size += length
    if some:
        yield some
