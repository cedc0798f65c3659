"""Answers that all workers keep together, on any number of hosts: in Redis.

Look-ups and writes have a connection each, so that nobody who waits for an answer waits for one that is being written. While a
round trip is under way the next look-ups gather; all of them go out as one script call (`_SCRIPT`), whose reply is bounded: short
values are always in it, and so many long ones; of the rest it says that they are there, and they are asked for again.

A look-up waits for `RedisSettings.timeout` at most; then it has found nothing. A round trip that is late or fails costs the
connection, so that a late reply is never taken for another's. After five in a row, or if there is nobody to connect to, nobody
waits any more until Redis answers again; what is to be kept meanwhile isn't.

Values are bytes here. Whether they are answers, and whose, only `sealed.py` can tell.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Final, NamedTuple

from redis.exceptions import NoScriptError, RedisError

from proxy.redis_line import FAILED, Command, Line, is_late, text_of
from proxy.settings import RedisSettings

log = logging.getLogger(__name__)

FAILURES: Final = 5
"""In a row; then nobody waits any more."""
HEARTBEAT: Final = 1.0
"""Seconds without look-ups, after which one without keys tells how Redis is."""
LONGEST: Final = 4 * 1024 * 1024
"""Bytes of a value: at 1 Gbit/s they take a third of the time that others would wait for."""
_OVERHEAD: Final = 64 * 1024
"""Bytes that a value may have more than the answer in it."""
_CONNECT: Final = 1.0
"""Seconds; while nobody waits."""
_WRITE: Final = 1.0
"""Seconds for a batch of writes: nobody waits for them."""
_PAUSES: Final = (0.1, 2.0)
"""Seconds between attempts: the first, the longest."""
_MOST: Final = 256
"""Keys of one round trip: Redis does nothing else meanwhile."""
_SHORT: Final = 8 * 1024
_LONG_ONES: Final = 1024 * 1024
"""Bytes of long values in one reply; the last of them may go beyond."""
_BATCH: Final = 64 * 1024
"""Bytes that are written at once. What is longer is made in a thread, and written alone."""
_QUEUE: Final = 16 * 1024 * 1024
"""Bytes that may wait to be written, at least."""
_SAID_FOR: Final = 60.0
"""Seconds for which it needn't be said again that Redis refuses to keep anything."""

_SCRIPT = b"""
local most, short, room = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local values = {}
for i, key in ipairs(KEYS) do
  local length = redis.pcall('STRLEN', key)
  if type(length) ~= 'number' or length == 0 or length > most then
    values[i] = false
  elseif length <= short then
    values[i] = redis.call('GET', key)
  elseif room > 0 then
    values[i] = redis.call('GET', key)
    room = room - length
  else
    values[i] = length
  end
end
return values
"""
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()

Done = Callable[[list[bytes | None]], None]


def prefix_of(settings: RedisSettings) -> str:
    """Of the keys of all answers; what follows is an answer's own, in hex. In a cluster all are in one slot, `{PREFIX}:`'s."""
    return f"{{{settings.prefix}}}:cache:"


def meanings_prefix_of(settings: RedisSettings) -> str:
    """Of what their questions mean (`vectors.py`); what follows ends with the answer's own."""
    return f"{{{settings.prefix}}}:semantic:"


class _Look:
    """Keys that are looked for together."""

    __slots__ = ("done", "missing", "values")

    def __init__(self, count: int, done: Done) -> None:
        self.values: list[bytes | None] = [None] * count
        self.missing = count
        self.done = done


class _Ask(NamedTuple):
    look: _Look
    place: int
    key: str


class _Write(NamedTuple):
    key: str
    size: int
    make: Callable[[], bytes]
    ttl_ms: int


class Remote:
    """`most_bytes`: of an answer. For the event loop's thread.

    up        asking makes sense
    failures  round trips and connections that failed or were late
    stored    values that Redis has taken
    dropped   values that it hasn't: it was down or refused, too many were waiting, or they were too long
    """

    def __init__(self, settings: RedisSettings, most_bytes: int) -> None:
        self.up = False
        self.failures = 0
        self.stored = 0
        self.dropped = 0
        self._shown = settings.shown
        self._timeout = settings.timeout
        self._prefix = prefix_of(settings)
        self._longest = min(most_bytes + _OVERHEAD, LONGEST)
        self._running: asyncio.Task[None] | None = None
        self._in_a_row = 0
        self._said_down = False
        self._say_refused_at = 0.0
        # What is to be asked, and who waits until when: the same time for all, so the first is the first to give up.
        self._reads = Line(settings)
        self._asks: deque[_Ask] = deque()
        self._waiting: dict[_Look, float] = {}
        self._asked = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        # What is to be written; the first of them may be under way.
        self._writes = Line(settings)
        self._queue: deque[_Write] = deque()
        self._queued = 0
        self._most_queued = max(_QUEUE, 4 * most_bytes)
        self._to_write = asyncio.Event()

    # -- from requests --

    def look(self, keys: Sequence[bytes], done: Done) -> Callable[[], None]:
        """Ask for one or more keys. `done` is called once, later and within `RedisSettings.timeout`, with a value for each key:
        None where Redis has none, or doesn't say. Not if what is returned here was called before. Only while `up`."""
        look = _Look(len(keys), done)
        self._asks.extend(_Ask(look, place, self._prefix + key.hex()) for place, key in enumerate(keys))
        loop = asyncio.get_running_loop()
        self._waiting[look] = deadline = loop.time() + self._timeout
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._give_up)
        self._asked.set()

        def cancel() -> None:
            self._waiting.pop(look, None)

        return cancel

    def keep(self, key: bytes, size: int, make: Callable[[], bytes], ttl_s: float) -> None:
        """Have a value written in a while, for so many seconds. `make` makes it when its turn comes, in a thread where it is
        large; `size`: bytes of memory that it holds until then, about. Waits for nothing and raises nothing."""
        if not self.up or self._queued + size > self._most_queued:
            self.dropped += 1
            return
        self._queue.append(_Write(self._prefix + key.hex(), size, make, max(1, round(ttl_s * 1000))))
        self._queued += size
        self._to_write.set()

    def _give_up(self) -> None:
        """Those that have waited for too long have found nothing."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        overdue = []
        for look, deadline in self._waiting.items():
            if deadline > now:
                self._timer = loop.call_at(deadline, self._give_up)
                break
            overdue.append(look)
        self._end(overdue)

    def _end(self, looks: Sequence[_Look]) -> None:
        """With the values that are known. A request goes on; what becomes of it there is none of the others' business."""
        for look in looks:
            if self._waiting.pop(look, None) is not None:
                try:
                    look.done(look.values)
                except Exception:
                    log.exception("a bug in a request that was waiting for a kept answer")

    # -- life --

    async def run(self) -> None:
        """Until `close`, or until it is cancelled."""
        self._running = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._read_on(), name="redis-cache-reads")
                both.create_task(self._write_on(), name="redis-cache-writes")
        finally:
            self.up = False
            self._asks.clear()
            self._end(list(self._waiting))
            await self._reads.drop()

    async def close(self) -> None:
        """End `run`, and write what there is still to write, as far as `RedisSettings.timeout` allows."""
        up = self.up
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        try:
            if up:
                async with asyncio.timeout(self._timeout):
                    while self._queue and await self._write():
                        pass
        except TimeoutError:
            pass
        finally:
            self._forget_writes()
            if self._timer is not None:
                self._timer.cancel()
            await self._writes.drop()

    # -- look-ups --

    async def _read_on(self) -> None:
        pause, longest = _PAUSES
        while True:
            if await self._round():
                pause = _PAUSES[0]
                await self._until_asked()
            elif not self.up:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _until_asked(self) -> None:
        """Or until it's time to see how Redis is."""
        try:
            async with asyncio.timeout(HEARTBEAT):
                await self._asked.wait()
        except TimeoutError:
            pass

    async def _round(self) -> bool:
        """One round trip, connecting first if need be. False: that failed."""
        asks: list[_Ask] = []
        connected = False
        try:
            async with asyncio.timeout(self._timeout if self.up else _CONNECT):
                await self._reads.connect()
            connected = True
            asks = self._take_asks()
            async with asyncio.timeout(self._timeout):
                values = await self._values([ask.key for ask in asks])
        except FAILED as error:
            await self._reads.drop()
            self._failed(error, asks, at_once=not (connected or is_late(error)))
            return False
        self._succeeded(asks, values)
        return True

    def _take_asks(self) -> list[_Ask]:
        """Those whose look-up still waits."""
        asks: list[_Ask] = []
        while self._asks and len(asks) < _MOST:
            ask = self._asks.popleft()
            if ask.look in self._waiting:
                asks.append(ask)
        if not self._asks:
            self._asked.clear()
        return asks

    async def _values(self, keys: list[str]) -> list[bytes | int | None]:
        """One for each key; a number: so long, ask again. Raises one of FAILED."""
        arguments: Command = (len(keys), *keys, self._longest, _SHORT, _LONG_ONES)
        try:
            values = await self._reads.ask(("EVALSHA", _SHA, *arguments))
        except NoScriptError:
            values = await self._reads.ask(("EVAL", _SCRIPT, *arguments))
        if not isinstance(values, list) or len(values) != len(keys):
            raise RedisError("that is no reply to what was asked")
        return values

    def _failed(self, error: Exception, asks: list[_Ask], *, at_once: bool) -> None:
        self.failures += 1
        self._in_a_row += 1
        self.up = self.up and not at_once and self._in_a_row < FAILURES
        if self.up:
            self._end([ask.look for ask in asks])
            return
        self._asks.clear()
        self._end(list(self._waiting))
        if not self._said_down:
            self._said_down = True
            log.warning("Redis can't be used: answers are kept in memory alone", extra=self._extra(error))

    def _succeeded(self, asks: list[_Ask], values: list[bytes | int | None]) -> None:
        self._in_a_row = 0
        self.up = True
        if self._said_down:
            self._said_down = False
            log.info("Redis can be used again for answers", extra={"redis": self._shown})
        for ask, value in zip(asks, values, strict=True):
            look = ask.look
            if look not in self._waiting:
                continue
            if isinstance(value, int):
                self._asks.append(ask)
                self._asked.set()
                continue
            look.values[ask.place] = value if isinstance(value, bytes) else None  # whatever it is that answers there
            look.missing -= 1
            if not look.missing:
                self._end([look])

    # -- writes --

    async def _write_on(self) -> None:
        pause, longest = _PAUSES
        while True:
            await self._to_write.wait()
            if not self.up:
                self._forget_writes()
            elif await self._write():
                pause = _PAUSES[0]
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _write(self) -> bool:
        """Some of what waits. False: that failed, and they are lost."""
        batch = self._next_writes()
        known = self._writes.connected
        commands = [command for each in batch if (command := await self._command(each)) is not None]
        try:
            async with asyncio.timeout(_WRITE):
                await self._writes.connect()
                replies = await self._writes.ask_all(commands)
        except FAILED as error:
            self.failures += 1
            await self._writes.drop()
            if known and not is_late(error):
                return True  # it was closed meanwhile: they get a new one
            self._written(batch, [])
            return False
        except BaseException:
            await self._writes.drop()  # they are still to be written
            raise
        self._written(batch, replies)
        return True

    def _next_writes(self) -> list[_Write]:
        batch: list[_Write] = []
        size = 0
        for write in self._queue:
            size += write.size
            if batch and size > _BATCH:
                break
            batch.append(write)
        return batch

    async def _command(self, write: _Write) -> Command | None:
        """None: it's too long for anybody to ask for it."""
        try:
            value = write.make() if write.size <= _BATCH else await asyncio.to_thread(write.make)
        except Exception:
            log.exception("a bug in making what is to be kept")
            return None
        return ("SET", write.key, value, "PX", write.ttl_ms) if len(value) <= self._longest else None

    def _written(self, batch: list[_Write], replies: list[object]) -> None:
        for write in batch:
            self._queue.popleft()
            self._queued -= write.size
        if not self._queue:
            self._to_write.clear()
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        stored = len(replies) - len(refused)
        self.stored += stored
        self.dropped += len(batch) - stored
        if refused and time.monotonic() > self._say_refused_at:
            self._say_refused_at = time.monotonic() + _SAID_FOR
            log.warning("Redis refuses to keep answers", extra=self._extra(refused[0]))

    def _forget_writes(self) -> None:
        self._written(list(self._queue), [])

    def _extra(self, error: Exception) -> dict[str, object]:
        return {"redis": self._shown, "error": text_of(error)}
