"""Keeping an Admission informed of what others on this host have spent.

Alone: once before it serves, and for as long as another incarnation lives, whose place this one takes or who takes this one's.
With Redis, which hears of it from each worker itself, only what one leaves behind who can't tell any more has to be told.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from proxy.admission.admission import Admission
from proxy.admission.elsewhere import Elsewhere
from proxy.journal import read_heartbeats
from proxy.settings import Settings
from proxy.snapshot import Model
from proxy.spend.reader import Spend, SpendReader
from proxy.spend.windows import periods_of, window

if TYPE_CHECKING:
    from proxy.admission.shared import Shared

log = logging.getLogger(__name__)


class Others:
    """`models`: those of the snapshot, for what is set aside for requests that others have under way."""

    def __init__(self, settings: Settings, admission: Admission, models: Callable[[], Mapping[str, Model]]) -> None:
        self._admission = admission
        self._models = models
        self._reader = SpendReader(settings.spend_path, settings.journal_path, settings.currency)
        self._reading = threading.Lock()
        self._journal_path = settings.journal_path
        self._periods = periods_of(settings)
        self._wanted = bool(self._periods) or any(each.concurrent_requests for each in settings.allowances)
        self._due = True
        self._alive: set[str] = set()
        self._looking: asyncio.Task[None] | None = None

    def spend(self) -> Spend:
        """The truth, as the journal has it now. It blocks; from any thread."""
        with self._reading:
            return self._reader.look()

    def look(self) -> None:
        """Look and tell. It blocks: for a worker that doesn't serve yet."""
        if self._wanted:
            try:
                self._admission.learn(self._ask())
            except OSError as error:
                log.warning("what others have spent can't be read", extra={"error": str(error)})

    def tend(self, *, leaving: bool) -> None:
        """Once a second. `leaving`: somebody else takes this one's place."""
        if not self._wanted or self._looking is not None:
            return
        if self._admission.shared is not None:
            self._looking = asyncio.create_task(self._watch(self._admission.shared), name="others")
        elif self._due or leaving:
            self._looking = asyncio.create_task(self._follow(), name="others")

    async def _watch(self, shared: Shared) -> None:
        """For those who have died: before their leases run out, somebody has to tell what their last requests took."""
        try:
            beats = await asyncio.to_thread(read_heartbeats, self._journal_path)
            alive = {beat.incarnation for beat in beats if beat.alive}
            if self._alive - alive:
                shared.others_ended()
            self._alive = alive
        except OSError as error:
            log.warning("the other workers' heartbeats can't be read", extra={"error": str(error)})
        except Exception:
            log.exception("a bug in watching the other workers")
        finally:
            self._looking = None

    async def _follow(self) -> None:
        try:
            self._admission.learn(await asyncio.to_thread(self._ask))
        except OSError as error:
            log.warning("what others have spent can't be read", extra={"error": str(error)})
        except Exception:
            log.exception("a bug in reading what others have spent")
        finally:
            self._looking = None

    def _ask(self) -> Elsewhere:
        own = self._admission.incarnation
        alive = any(beat.alive and beat.incarnation != own for beat in read_heartbeats(self._journal_path))
        spend = self.spend()
        now = time.time_ns()
        self._due = alive or any(spend.totals(period, window(period, now)[0]) is None for period in self._periods)
        return Elsewhere(spend, own, self._models())
