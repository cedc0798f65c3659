"""What questions mean whose answers all workers keep together: in Redis, where it searches vectors (RediSearch).

Each is a hash of its own, with the lifetime of the answer that its name leads to, and there is an index for each model that
embeds and each length of its vectors. What is found is believed only as far as it was written with this installation's secret,
for this group; how similar it is is computed here.

One connection, and on it one round trip at a time, which carries whatever has gathered meanwhile. Nobody waits for longer than
`RedisSettings.timeout`; what fails costs the connection, and its look-ups have found nothing. What is to be kept may be lost.
"""

from __future__ import annotations

import asyncio
import logging
from binascii import unhexlify
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from hmac import compare_digest
from typing import Final, NamedTuple

import numpy as np
from redis.exceptions import ResponseError

from proxy.cache.redis import meanings_prefix_of, prefix_of
from proxy.cache.semantic import NEIGHBOURS, Meaning, Neighbour, similarity_of
from proxy.redis_line import FAILED, Command, Line, text_of
from proxy.settings import RedisSettings

log = logging.getLogger(__name__)

_CONNECT: Final = 1.0
"""Seconds."""
_PAUSES: Final = (0.1, 2.0)
"""Seconds between attempts to connect: the first, the longest."""
_WITHOUT: Final = 60.0
"""Seconds after which a server that can't search is asked whether it can now."""
_MOST_LOOKS: Final = 32
"""In one round trip: Redis does nothing else meanwhile."""
_MOST_WRITES: Final = 64
_QUEUE: Final = 2000
"""Writes that may wait."""
_YOUNG_MS: Final = 5000
"""Its answer may still be on its way."""
_PURPOSE: Final = b"cache vector"
_MAC: Final = 16

_KEEP = b"""
redis.call('HSET', KEYS[1], 'group', ARGV[1], 'vector', ARGV[2], 'seal', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
"""
_DROP = b"""
if redis.call('EXISTS', KEYS[2]) == 0 and redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('DEL', KEYS[1]) end
"""

Done = Callable[[list[Neighbour]], None]


class _Look(NamedTuple):
    meaning: Meaning
    secret: bytes
    done: Done
    timer: asyncio.TimerHandle


class _Write(NamedTuple):
    space: str
    size: int
    """Numbers of the vectors in whose index it is."""
    command: Command


class Vectors:
    """For the event loop's thread.

    up        asking makes sense
    failures  round trips and connections that failed or were late
    """

    def __init__(self, settings: RedisSettings) -> None:
        self.up = False
        self.failures = 0
        self._timeout = settings.timeout
        self._shown = settings.shown
        self._prefix = meanings_prefix_of(settings)
        self._answers = prefix_of(settings)
        self._line = Line(settings)
        self._looks: dict[int, _Look] = {}
        """That wait, by number; those with a number below `_asked` are under way."""
        self._next = self._asked = 0
        self._writes: deque[_Write] = deque()
        self._woken = asyncio.Event()
        self._indexes: set[tuple[str, int]] = set()
        """That are known to be there."""
        self._running: asyncio.Task[None] | None = None
        self._said_without = False

    # -- from requests --

    def look(self, meaning: Meaning, secret: bytes, done: Done) -> Callable[[], None]:
        """`done` is called once, later and within `RedisSettings.timeout`, with the nearest first; with none if Redis knows none,
        or doesn't say. Not if what is returned here was called before. Only while `up`."""
        number = self._next
        self._next += 1
        timer = asyncio.get_running_loop().call_later(self._timeout, self._end, number, [])
        self._looks[number] = _Look(meaning, secret, done, timer)
        self._woken.set()

        def withdraw() -> None:
            timer.cancel()
            self._looks.pop(number, None)

        return withdraw

    def keep(self, meaning: Meaning, key: bytes, secret: bytes, ttl_s: float) -> None:
        """Have it written in a while. Waits for nothing and raises nothing."""
        space, group, vector = meaning
        where, written = self._name(meaning, key), vector.astype("<f4").tobytes()
        seal = _seal(group, key, written, secret)
        ttl_ms = max(1, round(ttl_s * 1000))
        self._write(space, len(vector), ("EVAL", _KEEP, 1, where, group.hex(), written, seal, ttl_ms))

    def drop(self, meaning: Meaning, key: bytes, ttl_s: float) -> None:
        """Its answer is gone, as far as is known here."""
        least_ms = round(ttl_s * 1000) - _YOUNG_MS
        command: Command = ("EVAL", _DROP, 2, self._name(meaning, key), self._answers + key.hex(), least_ms)
        self._write(meaning.space, len(meaning.vector), command)

    def _write(self, space: str, size: int, command: Command) -> None:
        if self.up and len(self._writes) < _QUEUE:
            self._writes.append(_Write(space, size, command))
            self._woken.set()

    def _end(self, number: int, neighbours: list[Neighbour]) -> None:
        look = self._looks.pop(number, None)
        if look is not None:
            look.timer.cancel()
            try:
                look.done(neighbours)
            except Exception:
                log.exception("a bug in a request that was waiting for a question like its own")

    def _name(self, meaning: Meaning, key: bytes) -> str:
        return f"{self._index(meaning.space, len(meaning.vector))}:{key.hex()}"

    def _index(self, space: str, size: int) -> str:
        return f"{self._prefix}{space}:{size}"

    # -- life --

    async def run(self) -> None:
        """Until `close`, or until it is cancelled."""
        self._running = asyncio.current_task()
        pause, longest = _PAUSES
        try:
            while True:
                try:
                    await self._serve()
                    await asyncio.sleep(_WITHOUT)
                except FAILED as error:
                    if self.up:
                        pause = _PAUSES[0]
                        log.warning("Redis can't be asked for vectors", extra={"redis": self._shown, "error": text_of(error)})
                    self.failures += 1
                    await self._stop()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
        finally:
            await self._stop()

    async def close(self) -> None:
        """End `run`."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _stop(self) -> None:
        self.up = False
        self._indexes.clear()
        self._writes.clear()
        for number in list(self._looks):
            self._end(number, [])
        await self._line.drop()

    async def _serve(self) -> None:
        """For as long as it goes well. Returns where the server can't search; raises one of FAILED."""
        async with asyncio.timeout(_CONNECT):
            await self._line.connect()
            try:
                await self._line.ask(("FT._LIST",))
            except ResponseError as error:
                if not self._said_without:
                    self._said_without = True
                    extra = {"redis": self._shown, "error": text_of(error)}
                    log.warning("Redis has no search: each worker knows only its own questions", extra=extra)
                await self._line.drop()
                return
        self.up = True
        self._said_without = False
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._writes or self._asked < self._next:
                async with asyncio.timeout(self._timeout):
                    await self._round()

    async def _round(self) -> None:
        """One round trip, and one before it where an index isn't known to be there."""
        until = min(self._next, self._asked + _MOST_LOOKS)
        looks = [(number, self._looks[number]) for number in range(self._asked, until) if number in self._looks]
        writes = [self._writes.popleft() for _ in range(min(_MOST_WRITES, len(self._writes)))]
        self._asked = until
        wanted = {(look.meaning.space, len(look.meaning.vector)) for _, look in looks}
        wanted |= {(write.space, write.size) for write in writes}
        await self._make(wanted - self._indexes)
        commands = [write.command for write in writes] + [self._search(look.meaning) for _, look in looks]
        replies = await self._line.ask_all(commands)
        for (number, look), reply in zip(looks, replies[len(writes) :], strict=True):
            if isinstance(reply, ResponseError):
                self._indexes.discard((look.meaning.space, len(look.meaning.vector)))  # it may be that somebody emptied Redis
            self._end(number, self._neighbours(look, reply))

    async def _make(self, indexes: set[tuple[str, int]]) -> None:
        """Somebody else may have, before this or at the same time: that is an error that there is nothing to say of."""
        commands: list[Command] = []
        for space, size in indexes:
            name = self._index(space, size)
            schema = ("group", "TAG", "vector", "VECTOR", "HNSW", 6, "TYPE", "FLOAT32", "DIM", size, "DISTANCE_METRIC", "COSINE")
            commands.append(("FT.CREATE", name, "ON", "HASH", "PREFIX", 1, name + ":", "SCHEMA", *schema))
        await self._line.ask_all(commands)
        self._indexes |= indexes

    def _search(self, meaning: Meaning) -> Command:
        space, group, vector = meaning
        query = f"(@group:{{{group.hex()}}})=>[KNN {NEIGHBOURS} @vector $near AS distance]"
        return (
            *("FT.SEARCH", self._index(space, len(vector)), query, "PARAMS", 2, "near", vector.astype("<f4").tobytes()),
            *("SORTBY", "distance", "RETURN", 2, "vector", "seal", "LIMIT", 0, NEIGHBOURS, "DIALECT", 2),
        )

    def _neighbours(self, look: _Look, reply: object) -> list[Neighbour]:
        """What of a reply was written here, by whoever knows the secret, for this group."""
        if not isinstance(reply, list):
            return []
        found = [self._neighbour(look, name, fields) for name, fields in zip(reply[1::2], reply[2::2], strict=False)]
        return sorted((each for each in found if each is not None), key=lambda each: -each.similarity)

    def _neighbour(self, look: _Look, name: object, fields: object) -> Neighbour | None:
        if not isinstance(name, bytes) or not isinstance(fields, list):
            return None  # it has ended just now
        _, group, near = look.meaning
        said = dict(zip(fields[::2], fields[1::2], strict=False))
        vector, seal = said.get(b"vector"), said.get(b"seal")
        try:
            key = unhexlify(name.rpartition(b":")[2])
        except ValueError:
            return None
        if not isinstance(vector, bytes) or not isinstance(seal, bytes) or len(vector) != near.nbytes:
            return None
        if not compare_digest(seal, _seal(group, key, vector, look.secret)):
            return None
        return Neighbour(key, similarity_of(np.frombuffer(vector, "<f4"), near))


def _seal(group: bytes, key: bytes, vector: bytes, secret: bytes) -> bytes:
    return blake2b(
        b"%d:%b%d:%b%b" % (len(group), group, len(key), key, vector), digest_size=_MAC, key=secret, person=_PURPOSE
    ).digest()
