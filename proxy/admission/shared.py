"""The same limits for all workers, on any number of hosts: kept in Redis, which decides.

A worker says what it has and asks for what it wants in *batches*, each of them one script call (batch.lua). While one is under
way the next gathers, so that the more requests there are, the less each of them costs. What a worker says of itself is absolute
(so much spent, so much set aside, so many requests), so nothing is wrong for good if a batch or its reply is lost: the next one
says it again. It holds a lease; when that has run out its requests and reservations no longer count, but what it has spent does.

A request waits for `RedisSettings.timeout` at most; then its worker decides by itself. A batch that is late or fails costs the
connection, so that a late reply is never taken for another's. After five in a row, or if there is nobody to connect to, nobody
waits any more until Redis answers again.

What was spent is the ledger's to say (`seeds`): at first, after each connection and when Redis has lost its data every worker
tells Redis what its host's journal says of the current windows. Totals are per incarnation and merged by maximum: nothing counts
twice.

In a cluster all keys are in one slot, that of `{PREFIX}:`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha1
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec
from redis.exceptions import NoScriptError

from proxy.admission.elsewhere import subjects_of
from proxy.admission.standing import Amounts, Bucket, Costs, Plan, Refusal, Standing, Window
from proxy.redis_line import FAILED, Command, Line, is_late, text_of
from proxy.settings import RedisSettings
from proxy.spend.windows import FOREVER_NS, Period

if TYPE_CHECKING:
    from proxy.spend.reader import Spend
    from proxy.spend.tally import Amounts as SpentAmounts
    from proxy.spend.tally import Holder

log = logging.getLogger(__name__)

LEASE: Final = 10.0
"""Seconds."""
HEARTBEAT: Final = 1.0
REPEAT: Final = 60.0
"""Seconds after which what is held is said again: what nobody speaks of is forgotten after ten minutes."""
FAILURES: Final = 5
"""In a row; then nobody waits any more."""
_CONNECT = 1.0
"""Seconds; while nobody waits."""
_PAUSES = (0.1, 2.0)
"""Seconds between attempts: the first, the longest."""
_MOST = 256
"""Admissions, and standings and windows, of one batch: Redis does nothing else meanwhile."""
_FRESH = 1.0
"""Seconds for which a look into the journal is as good as a new one."""
_KEPT_MS = 2 * 86_400_000
"""For which a window is kept after its end."""

_SCRIPT = files(__package__).joinpath("batch.lua").read_bytes()
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()


class Verdicts(Protocol):
    """An admission that waits. One of the three is called, once, unless it was abandoned."""

    plan: Plan
    amounts: Amounts
    costs: Costs
    windows: tuple[Window, ...]
    """Of the plan's accounts, in their order."""
    abandoned: bool

    def granted(self) -> None:
        """It is set aside: count it in its standings and windows."""

    def refused(self, refusal: Refusal) -> None:
        """There is no room for it."""

    def undecided(self, parts: int) -> None:
        """Redis doesn't say in time: decide for one in so many parts of the limits."""


class _Reply(msgspec.Struct, array_like=True):
    now_us: int
    leases: int
    lapsed: bool
    """Our lease wasn't there: nothing that we have said of ourselves may be there any more."""
    verdicts: list[int | list[float]]
    standings: list[list[float]]
    """By standing: requests of others, then µs until each bucket is full."""
    windows: list[int]
    """By window: spent and set aside by others; -1 where the ledger hasn't said yet what was spent."""


_Seeds = list[str | int]
"""Incarnation, its total, and so on."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Reply).decode

_FAILED = (*FAILED, msgspec.DecodeError)


class _Batch:
    """What is asked and said at once; the positions of it in the message."""

    def __init__(self) -> None:
        self.permits: list[Verdicts] = []
        self.asks: list[tuple[int, Amounts, Costs]] = []
        self.plans: dict[tuple[Plan, tuple[Window, ...]], int] = {}
        self.plans_said: list[tuple[list[int], list[int]]] = []
        self.standings: dict[Standing, int] = {}
        self.buckets: list[tuple[Bucket, ...]] = []
        self.windows: dict[Window, int] = {}
        self.seeds: dict[Window, _Seeds] = {}

    def ask(self, permit: Verdicts) -> None:
        which = (permit.plan, permit.windows)
        plan = self.plans.get(which)
        if plan is None:
            plan = self.plans[which] = len(self.plans) + 1
            accounts: list[int] = []
            for window in permit.windows:
                account = window.account
                accounts += (self.window(window), account.unit, account.hard)
            self.plans_said.append(([self.standing(each) for each in permit.plan.standings], accounts))
        self.permits.append(permit)
        self.asks.append((plan, permit.amounts, permit.costs))

    def standing(self, standing: Standing) -> int:
        place = self.standings.get(standing)
        if place is None:
            place = self.standings[standing] = len(self.standings) + 1
            self.buckets.append(standing.buckets)
        return place

    def window(self, window: Window) -> int:
        place = self.windows.get(window)
        if place is None:
            self.standing(window.account.standing)
            place = self.windows[window] = len(self.windows) + 1
        return place


class Shared:
    """`incarnation`: this worker's. `host`: what the workers have in common whose spending `look` tells (it blocks, and is called
    from another thread). `workers`: of this host. `own`: the standings that this worker has.

    up                asking makes sense; otherwise every worker decides by itself, for one in `parts` parts
    parts             workers that live, on all hosts, as far as known
    failures          batches and connections that failed or were late
    clock_offset_ns   what Redis' clock is ahead of this host's: windows go by Redis'
    """

    def __init__(
        self,
        settings: RedisSettings,
        incarnation: str,
        host: str,
        workers: int,
        look: Callable[[], Spend],
        own: Callable[[], Iterable[Standing]],
    ) -> None:
        self.up = False
        self.parts = workers
        self.failures = 0
        self.clock_offset_ns = 0
        self._shown = settings.shown
        self._timeout = settings.timeout
        self._incarnation = incarnation
        self._host = host
        self._workers = workers
        self._own = own
        self._prefix = f"{{{settings.prefix}}}:"
        self._line = Line(settings)
        self._running: asyncio.Task[None] | None = None
        self._sequence = 0
        self._heard = False
        self._in_a_row = 0
        self._said_down = False
        self._restating = True
        self._repeat_at = 0.0
        # What is to be asked, and who waits until when: the same time for all, so the first is the first to give up.
        self._queue: deque[Verdicts] = deque()
        self._waiting: dict[Verdicts, float] = {}
        self._changed: dict[Standing, None] = {}
        self._changed_windows: dict[Window, None] = {}
        self._wanted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._truth = _Truth(look)
        self._windows: set[Window] = set()
        """Those that Redis has heard of, or is to, since the last connection."""
        self._unseeded: dict[Window, None] = {}
        """What the ledger says of them is to be looked up."""
        self._seeds: dict[Window, _Seeds | None] = {}
        """What it says, to be told; None: it doesn't know (yet), and nobody waits for it."""
        self._unseeded_permits: list[Verdicts] = []
        self._looking: asyncio.Task[None] | None = None

    # -- from requests --

    def ask(self, permit: Verdicts) -> None:
        """Into the next batch. Only while `up`."""
        self._queue.append(permit)
        loop = asyncio.get_running_loop()
        self._waiting[permit] = deadline = loop.time() + self._timeout
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._give_up)
        self._wanted.set()

    def changed(self, standing: Standing, window: Window | None = None) -> None:
        """What is counted or owed there is to be told, as soon as possible."""
        if window is None:
            self._changed[standing] = None
        else:
            self._changed_windows[window] = None
        self._wanted.set()

    def others_ended(self) -> None:
        """Another worker of this host lives no more. What its last requests took, only the journal can tell."""
        self._truth.forget()
        self._unseeded.update(dict.fromkeys(self._windows))
        self._look()

    def _give_up(self) -> None:
        """Those that have waited for too long decide by themselves."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        overdue = []
        for permit, deadline in self._waiting.items():
            if deadline > now:
                self._timer = loop.call_at(deadline, self._give_up)
                break
            overdue.append(permit)
        self._leave_undecided(overdue)

    def _leave_undecided(self, permits: Iterable[Verdicts]) -> None:
        for permit in permits:
            if self._waiting.pop(permit, None) is not None and not permit.abandoned:
                self._tell(permit.undecided, self.parts)
                self._permit_changed(permit)

    def _permit_changed(self, permit: Verdicts) -> None:
        for standing in permit.plan.standings:
            self.changed(standing)
        for window in permit.windows:
            self.changed(window.account.standing, window)

    def _tell(self, verdict: Callable[..., None], *more: Any) -> None:
        """A request goes on; what becomes of it there is none of the others' business."""
        try:
            verdict(*more)
        except Exception:
            log.exception("a bug in a request that was waiting for its admission")

    # -- life --

    async def run(self) -> None:
        """Until `close`, or until it is cancelled."""
        self._running = asyncio.current_task()
        pause, longest = _PAUSES
        heart = asyncio.create_task(self._beat(), name="redis-heartbeat")
        try:
            while True:
                if await self._round():
                    pause = _PAUSES[0]
                    await self._wanted.wait()
                elif not self.up:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
        finally:
            self.up = False
            heart.cancel()
            if self._looking is not None:
                self._looking.cancel()
            self._leave_undecided(list(self._waiting))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            if self._unseeded:
                self._look()
            self._wanted.set()

    async def close(self) -> None:
        """End `run`, say what there is still to say and give the lease back. Nobody may ask any more."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        try:
            if self._heard and not self._said_down:
                async with asyncio.timeout(self._timeout):
                    await self._connect()
                    while self._changed or self._changed_windows:
                        await self._exchange(self._compose())
                    await self._exchange(self._compose(), leaving=True)
        except _FAILED as error:
            log.warning("Redis wasn't told of the end", extra={"redis": self._shown, "error": text_of(error)})
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._line.drop()

    # -- a batch --

    async def _round(self) -> bool:
        """One batch, connecting first if need be. False: that failed."""
        batch = None
        connected = False
        try:
            async with asyncio.timeout(self._timeout if self.up else _CONNECT):
                await self._connect()
            connected = True
            self._wanted.clear()
            batch = self._compose()
            async with asyncio.timeout(self._timeout):
                reply = await self._exchange(batch)
        except _FAILED as error:
            self._failed(error, batch, at_once=not (connected or is_late(error)))
            await self._line.drop()
            return False
        except BaseException:
            if batch is not None:
                self._take_back(batch)
                await self._line.drop()
            raise
        self._succeeded(batch, reply)
        return True

    async def _connect(self) -> None:
        """Nothing if it is."""
        if not self._line.connected:
            await self._line.connect()
            self._restating = True

    def _compose(self) -> _Batch:
        batch = _Batch()
        waiting, queue = self._waiting, self._queue
        while queue and len(batch.permits) < _MOST:
            permit = queue.popleft()
            if permit.abandoned:
                waiting.pop(permit, None)
            elif permit in waiting:
                batch.ask(permit)
        for window in list(self._changed_windows)[:_MOST]:
            batch.window(window)
        for standing in list(self._changed)[:_MOST]:
            batch.standing(standing)
        for window in batch.windows:
            self._changed_windows.pop(window, None)
        for standing in batch.standings:
            self._changed.pop(standing, None)
        if queue or self._changed or self._changed_windows:
            self._wanted.set()
        return batch

    async def _exchange(self, batch: _Batch, *, leaving: bool = False) -> _Reply:
        """Raises one of _FAILED."""
        self._sequence += 1
        prefix = self._prefix
        keys = [f"{prefix}leases", f"{prefix}sequences"]
        keys += [f"{prefix}standing:{standing.subject}" for standing in batch.standings]
        keys += [
            f"{prefix}spent:{window.account.standing.subject}:{window.account.name}@{window.start_ns}" for window in batch.windows
        ]
        arguments: Command = (len(keys), *keys, self._message(batch, leaving))
        try:
            answer = await self._line.ask(("EVALSHA", _SHA, *arguments))
        except NoScriptError:
            answer = await self._line.ask(("EVAL", _SCRIPT, *arguments))
        if not isinstance(answer, bytes):
            raise msgspec.DecodeError(f"{answer!r} is no reply: another worker has the same name, or a newer batch was executed")
        return _decode(answer)

    def _message(self, batch: _Batch, leaving: bool) -> bytes:
        standings = []
        for standing, buckets in zip(batch.standings, batch.buckets, strict=True):
            said = []
            for bucket in buckets:
                said.append((bucket.kind, bucket.limit, bucket.owed))
                bucket.owed = 0
            standings.append((standing.concurrent, standing.limit, said))
        windows = []
        for window in batch.windows:
            end_ms = 0 if window.end_ns == FOREVER_NS else window.end_ns // 1_000_000 + _KEPT_MS
            seeds = self._seeds.get(window)
            if seeds is not None:
                batch.seeds[window] = seeds
            windows.append(
                (
                    batch.standings[window.account.standing],
                    f"{window.account.name}@{window.start_ns}",
                    window.spent,
                    window.reserved,
                    end_ms,
                    window in self._seeds,
                    False if seeds is None else seeds,
                )
            )
        return _encode(
            (
                self._incarnation,
                self._sequence,
                self._host,
                round(LEASE * 1000),
                leaving,
                standings,
                windows,
                batch.plans_said,
                batch.asks,
            )
        )

    def _take_back(self, batch: _Batch) -> None:
        """Whether Redis has executed it or not: what holds is told by the next one."""
        self._changed.update(dict.fromkeys(batch.standings))
        self._changed_windows.update(dict.fromkeys(batch.windows))

    def _failed(self, error: Exception, batch: _Batch | None, *, at_once: bool) -> None:
        self.failures += 1
        self._in_a_row += 1
        if batch is not None:
            self._take_back(batch)
        self.up = self.up and not at_once and self._in_a_row < FAILURES
        if not self.up:
            self._queue.clear()
            self._unseeded_permits.clear()
            self._leave_undecided(list(self._waiting))
            if not self._said_down:
                self._said_down = True
                log.error("Redis can't be used: this worker keeps to its part of the limits", extra=self._extra(error))
        elif batch is not None:
            self._leave_undecided(batch.permits)

    def _extra(self, error: Exception) -> dict[str, object]:
        return {"redis": self._shown, "error": text_of(error), "parts": self.parts}

    def _succeeded(self, batch: _Batch, reply: _Reply) -> None:
        self._in_a_row = 0
        self.up = self._heard = True
        if self._said_down:
            self._said_down = False
            log.info("Redis can be used again", extra={"redis": self._shown})
        self.clock_offset_ns = reply.now_us * 1000 - time.time_ns()
        self.parts = max(self._workers, reply.leases)
        self._mirror(batch, reply)
        for permit, verdict in zip(batch.permits, reply.verdicts, strict=True):
            self._decide(batch, permit, verdict)
        for window, elsewhere in zip(batch.windows, reply.windows, strict=True):
            if elsewhere >= 0:
                window.known = window.spent + window.reserved
        for window, seeds in batch.seeds.items():
            if self._seeds.get(window) is seeds:
                del self._seeds[window]
        if self._restating or reply.lapsed:
            self._restating = False
            self._restate()
        elif time.monotonic() > self._repeat_at:
            self._repeat()
        if new := batch.windows.keys() - self._windows:
            self._windows |= new
            self._unseeded.update(dict.fromkeys(new))
            self._look()

    def _mirror(self, batch: _Batch, reply: _Reply) -> None:
        now = time.monotonic()
        for standing, buckets, told in zip(batch.standings, batch.buckets, reply.standings, strict=True):
            standing.elsewhere = int(told[0])
            for bucket, full_in_us in zip(buckets, told[1:], strict=True):
                bucket.full_at = now + full_in_us / 1e6
        for window, elsewhere in zip(batch.windows, reply.windows, strict=True):
            if elsewhere >= 0:
                window.elsewhere = elsewhere

    def _decide(self, batch: _Batch, permit: Verdicts, verdict: int | list[float]) -> None:
        if verdict == -1:
            self._unseeded_permits.append(permit)
            self._unseeded.update(dict.fromkeys(permit.windows))
            self._look()
        elif self._waiting.pop(permit, None) is None or permit.abandoned:
            self._permit_changed(permit)  # it is set aside for nobody
        elif isinstance(verdict, list):
            self._tell(permit.refused, self._refusal(batch, permit, verdict))
        else:
            self._tell(permit.granted)

    def _refusal(self, batch: _Batch, permit: Verdicts, verdict: list[float]) -> Refusal:
        which, place, *more = verdict
        if which == 2:
            window = permit.windows[int(place)]
            account = window.account
            wait = None if window.end_ns == FOREVER_NS else max(0.0, (window.end_ns - self._now_ns()) / 1e9)
            return Refusal(account.standing, "budget", account.hard, int(more[0]), permit.costs[account.unit], wait, account)
        standing = list(batch.standings)[int(place) - 1]
        if which == 1:
            return Refusal(standing, "concurrent_requests", standing.limit, standing.limit, 1, None)
        bucket = batch.buckets[int(place) - 1][int(more[0])]
        kind = bucket.kind
        return Refusal(standing, bucket.limit_name, bucket.limit, int(more[1]), permit.amounts[kind], more[2] / 1e6)

    # -- what Redis may have lost, or never heard of --

    def _restate(self) -> None:
        """All that this worker has, and what the ledger says of it."""
        self._repeat_at = time.monotonic() + REPEAT
        now_ns = self._now_ns()
        for standing in self._own():
            self.changed(standing)
            self._windows.update(account.at(now_ns) for account in standing.accounts)
        self._forget_ended()
        self._changed_windows.update(dict.fromkeys(self._windows))
        self._unseeded.update(dict.fromkeys(self._windows))
        self._look()

    def _repeat(self) -> None:
        """What is held, before Redis forgets it."""
        self._repeat_at = time.monotonic() + REPEAT
        self._forget_ended()
        for standing in self._own():
            if standing.concurrent:
                self.changed(standing)
        for window in self._windows:
            if window.reserved:
                self.changed(window.account.standing, window)

    def _forget_ended(self) -> None:
        now_ns = self._now_ns()
        self._windows = {window for window in self._windows if window.end_ns > now_ns or window.reserved}
        self._seeds = {window: seeds for window, seeds in self._seeds.items() if window in self._windows}

    def _now_ns(self) -> int:
        return time.time_ns() + self.clock_offset_ns

    def _look(self) -> None:
        if self._unseeded and self._looking is None:
            self._looking = asyncio.create_task(self._seed(), name="redis-seeds")

    async def _seed(self) -> None:
        """Find out what the ledger says; then ask again for those that wait for it."""
        windows, permits = list(self._unseeded), self._unseeded_permits
        self._unseeded, self._unseeded_permits = {}, []
        places = [
            _Place(each.account.standing.subject, each.account.unit, each.account.period, each.start_ns) for each in windows
        ]
        found: list[_Seeds | None] = [None] * len(places)
        try:
            found = await asyncio.to_thread(self._truth.seeds, places)
        except OSError as error:
            log.warning("what was spent can't be read", extra={"error": str(error)})
        except Exception:
            log.exception("a bug in reading what was spent")
        finally:
            self._looking = None
        for window, seeds in zip(windows, found, strict=True):
            self._seeds[window] = seeds
            self._changed_windows[window] = None
            if seeds is None and window in self._windows:
                self._unseeded[window] = None  # asked again with the next heartbeat
        self._queue.extendleft(reversed(permits))
        self._wanted.set()
        if self._unseeded_permits:
            self._look()


class _Place(NamedTuple):
    """Of a window."""

    subject: str
    unit: int
    period: Period
    start_ns: int


def _place(window: Window) -> _Place:
    account = window.account
    return _Place(account.standing.subject, account.unit, account.period, window.start_ns)


class _Truth:
    """What the journal says, by subject and incarnation. For one thread at a time."""

    def __init__(self, look: Callable[[], Spend]) -> None:
        self._look = look
        self._until = 0.0
        self._spend: Spend | None = None
        self._known: dict[tuple[Period, int], dict[str, dict[str, list[int]]] | None] = {}

    def seeds(self, places: Iterable[_Place]) -> list[_Seeds | None]:
        """None: it isn't known. Raises OSError."""
        if self._spend is None or time.monotonic() > self._until:
            self._spend = self._look()
            self._until = time.monotonic() + _FRESH
            self._known.clear()
        return [self._seeds(self._spend, place) for place in places]

    def forget(self) -> None:
        """What was found so far isn't all any more."""
        self._until = 0.0

    def _seeds(self, spend: Spend, place: _Place) -> _Seeds | None:
        window = (place.period, place.start_ns)
        if window not in self._known:
            self._known[window] = _by_subject(spend.totals(*window))
        known = self._known[window]
        if known is None:
            return None
        seeds: _Seeds = []
        for worker, totals in known.get(place.subject, {}).items():
            if total := totals[place.unit]:
                seeds += (worker, total)
        return seeds


def _by_subject(
    totals: Mapping[str, Mapping[Holder, SpentAmounts]] | None,
) -> dict[str, dict[str, list[int]]] | None:
    """Subject → incarnation → amounts by unit."""
    if totals is None:
        return None
    sums: dict[str, dict[str, list[int]]] = {}
    for worker, rows in totals.items():
        for holder, amounts in rows.items():
            for subject in subjects_of(holder):
                sum_ = sums.setdefault(subject, {}).setdefault(worker, [0, 0, 0])
                sum_[0] += amounts.cost_nano
                sum_[1] += amounts.tokens
                sum_[2] += amounts.gpu_ns
    return sums
