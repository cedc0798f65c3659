"""A line to Redis: one connection at a time, and one exchange at a time on it.

Who asks says how long that may take. Who gives an exchange up, or fails in one, has to `drop` the connection: there a late reply
would be taken for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

import hiredis
from redis.asyncio import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from proxy.settings import RedisSettings

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

Command = tuple[str | bytes | int, ...]

FAILED: Final = (RedisError, OSError, TimeoutError)
"""What `Line` raises, and what a caller's own timeout does."""

_pack = cast("Callable[[Command], bytes]", hiredis.pack_command)  # as its stub has it, of a single argument


class Line:
    """It connects when it is told to. All methods but `drop` raise one of FAILED."""

    def __init__(self, settings: RedisSettings) -> None:
        # Nothing of a pool is needed but its reading of the address.
        self._pool = ConnectionPool.from_url(
            settings.url, protocol=2, driver_info=None, socket_timeout=None, socket_connect_timeout=None
        )
        self._connection: AbstractConnection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def connect(self) -> None:
        """Nothing if it is."""
        if self._connection is None:
            self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await self._connection.connect()
            except BaseException:
                await self.drop()
                raise

    async def drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    async def ask(self, command: Command) -> object:
        """The reply. A ResponseError is one too: it leaves the connection as it was."""
        connection = await self._send([_pack(command)])
        return await connection.read_response(disable_decoding=True)

    async def ask_all(self, commands: Iterable[Command]) -> list[object]:
        """The replies, each by itself: a ResponseError stands where there was one."""
        packed = [_pack(each) for each in commands]
        if not packed:
            return []
        connection = await self._send(packed)
        replies: list[object] = []
        for _ in packed:
            try:
                replies.append(await connection.read_response(disable_decoding=True))
            except ResponseError as error:
                replies.append(error)
        return replies

    async def _send(self, packed: list[bytes]) -> AbstractConnection:
        connection = self._connection
        if connection is None:
            raise RedisConnectionError("not connected")
        await connection.send_packed_command(packed, check_health=False)
        return connection


def is_late(error: Exception) -> bool:
    """There was no answer in time; otherwise there was a bad one, or none will come."""
    return isinstance(error, TimeoutError | RedisTimeout)


def text_of(error: Exception) -> str:
    return str(error) or type(error).__name__
