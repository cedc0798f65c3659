"""Keeping an Admission informed of what others on this host have spent, and of what was spent here before somebody asked.

Alone: once before it serves, and for as long as another incarnation lives, whose place this one takes or who takes this one's.
With Redis, which hears of it from each worker itself, only what one leaves behind who can't tell any more has to be told.

A budget may come at any time. What was spent before is in the journal, and in the `spend` file as soon as the collector sums its
period: until that is known somebody looks once a second.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from proxy.admission.admission import Admission
from proxy.admission.elsewhere import Elsewhere, Own
from proxy.journal import read_heartbeats
from proxy.settings import Settings
from proxy.snapshot import Model
from proxy.spend.periods import Counted, read_counted
from proxy.spend.reader import Spend, SpendReader
from proxy.spend.windows import Period, periods_of, window

if TYPE_CHECKING:
    from proxy.admission.shared import Shared

log = logging.getLogger(__name__)


class _Look(NamedTuple):
    """What one look has found. `number`: of all looks of this worker."""

    spend: Spend
    number: int


class Others:
    """`models`: those of the snapshot, for what is set aside for requests that others have under way."""

    def __init__(self, settings: Settings, admission: Admission, models: Callable[[], Mapping[str, Model]]) -> None:
        self._admission = admission
        self._models = models
        self._reader = SpendReader(settings.spend_path, settings.journal_path, settings.currency)
        self._reading = threading.Lock()
        self._looks = 0
        self._journal_path = settings.journal_path
        counted = _read_counted(settings)
        self._periods = {*periods_of(settings), *(() if counted is None else counted.periods)}
        self._wanted = bool(counted is None or counted or self._periods) or _concurrency(settings)
        """There may be something that counts for somebody."""
        self._asked: set[Period] = set()
        """Periods of budgets that the last look was for."""
        self._due = True
        self._alive: set[str] = set()
        self._looking: asyncio.Task[None] | None = None

    def spend(self) -> Spend:
        """The truth, as the journal has it now. It blocks; from any thread."""
        return self._look().spend

    def look(self) -> None:
        """Look and tell. It blocks: for a worker that doesn't serve yet."""
        if self._wanted:
            try:
                self._admission.learn(self._elsewhere(self._ask()))
            except OSError as error:
                log.warning("what others have spent can't be read", extra={"error": str(error)})

    def tend(self, *, leaving: bool) -> None:
        """Once a second. `leaving`: somebody else takes this one's place."""
        admission = self._admission
        if self._looking is not None or not (self._wanted or admission.limits_anybody):
            return
        if admission.shared is not None:
            self._looking = asyncio.create_task(self._watch(admission.shared), name="others")
        elif self._due or leaving or admission.late or admission.periods - self._asked:
            self._looking = asyncio.create_task(self._follow(), name="others")

    async def _watch(self, shared: Shared) -> None:
        """For those who have died: before their leases run out, somebody has to tell what their last requests took."""
        try:
            beats = await asyncio.to_thread(read_heartbeats, self._journal_path)
            alive = {beat.incarnation for beat in beats if beat.alive}
            if self._alive - alive:
                shared.others_ended()
            self._alive = alive
            if self._admission.late:
                self._catch_up(await asyncio.to_thread(self._look))
        except OSError as error:
            log.warning("the other workers' heartbeats can't be read", extra={"error": str(error)})
        except Exception:
            log.exception("a bug in watching the other workers")
        finally:
            self._looking = None

    async def _follow(self) -> None:
        try:
            found = await asyncio.to_thread(self._ask)
            self._admission.learn(self._elsewhere(found))
            if self._admission.late:
                self._catch_up(found)
        except OSError as error:
            log.warning("what others have spent can't be read", extra={"error": str(error)})
        except Exception:
            log.exception("a bug in reading what others have spent")
        finally:
            self._looking = None

    def _look(self) -> _Look:
        with self._reading:
            self._looks += 1
            return _Look(self._reader.look(), self._looks)

    def _ask(self) -> _Look:
        own = self._admission.incarnation
        alive = any(beat.alive and beat.incarnation != own for beat in read_heartbeats(self._journal_path))
        self._asked = set(self._admission.periods)
        found = self._look()
        now = time.time_ns()
        wanted = self._asked | self._periods
        self._due = alive or any(found.spend.totals(period, window(period, now)[0]) is None for period in wanted)
        return found

    def _elsewhere(self, found: _Look) -> Elsewhere:
        return Elsewhere(found.spend, self._admission.incarnation, self._models())

    def _catch_up(self, found: _Look) -> None:
        """What has ended since the look is read here, where no request ends meanwhile: so nothing is missed or counted twice."""
        if not self._reading.acquire(blocking=False):
            return  # somebody looks just now; the next second is as good
        try:
            since = self._reader.since_look() if found.number == self._looks else None
        finally:
            self._reading.release()
        if since is not None:
            self._admission.catch_up(Own(found.spend, self._admission.incarnation, since))


def _read_counted(settings: Settings) -> Counted | None:
    try:
        return read_counted(settings.periods_path)
    except OSError as error:
        log.warning("which budgets there are can't be read", extra={"error": str(error)})
        return None


def _concurrency(settings: Settings) -> bool:
    return any(each.concurrent_requests for each in settings.allowances)
