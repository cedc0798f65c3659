"""What is older than the settings want is taken out of the database: rows of requests, of which sums stay, and the audit log.

A thread of its own, with a connection of its own, in steps: between two of them it waits several times as long as the step took,
so that a sink which wants to write to the same SQLite file finds it free. Nothing is lost by stopping or killing it anywhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from collectors.records.metrics import RetentionView
from proxy.settings import RetentionSettings
from proxy.store import StoreError, oldest_day, open_database, prune_audit, reader, remove_expired

log = logging.getLogger(__name__)

MOST: Final = 500
"""Rows of a step, where it doesn't take a whole day: less than 0.1 s on SQLite."""
LOOK_SECONDS: Final = 600.0
AGAIN_SECONDS: Final = 60.0
SHARE: Final = 4
"""A step is followed by a pause of so many times its own length."""
LEAST_PAUSE: Final = 0.05


class Retention:
    """Runs between `start` and `stop`; does nothing where everything is kept for ever. `today`: UTC."""

    def __init__(self, url: str, settings: RetentionSettings, today: Callable[[], date] | None = None) -> None:
        self._url = url
        self._settings = settings
        self._today = today or _today
        self._engine: Engine | None = None
        self._removed = {"requests": 0, "audit": 0}
        self._oldest: date | None = None
        self._well = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    @property
    def wanted(self) -> bool:
        return self._settings.requests_days is not None or self._settings.audit_days is not None

    def start(self) -> None:
        """May be called again."""
        if self.wanted and self._thread.ident is None:
            self._thread.start()

    def stop(self, timeout: float) -> None:
        """Waits so many seconds for a step that is under way. One that isn't done then is undone by the database."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def view(self) -> RetentionView | None:
        """None where everything is kept."""
        if not self.wanted:
            return None
        first = self._first_kept()
        overdue = max(0, (first - self._oldest).days) if first is not None and self._oldest is not None else 0
        return RetentionView(dict(self._removed), overdue)

    def _first_kept(self) -> date | None:
        days = self._settings.requests_days
        return None if days is None else self._today() - timedelta(days)

    # -- the thread --

    def _run(self) -> None:
        while not self._stop.is_set():
            self._stop.wait(LOOK_SECONDS if self._tried() else AGAIN_SECONDS)
        if self._engine is not None:
            self._engine.dispose()

    def _tried(self) -> bool:
        """Whether all is gone that is to go."""
        try:
            self.work()
        except (StoreError, SQLAlchemyError) as error:
            if self._well:
                said = f"{type(error).__name__}: {getattr(error, 'orig', None) or error}"[:500]
                log.warning("old rows can't be taken away now; tried again every minute", extra={"error": said})
            self._well = False
        except Exception:
            log.exception("a bug in retention")
            self._well = False
        else:
            self._well = True
        return self._well

    def work(self) -> None:
        """All that is to go now, step by step, until there is no more or `stop` is called. Raises StoreError, SQLAlchemyError."""
        if self._engine is None:
            self._engine = open_database(self._url)
        with reader(self._engine).connect() as connection:
            self._oldest = oldest_day(connection)
        while self._step(self._remove_requests) or self._step(self._remove_audit):
            pass
        with reader(self._engine).connect() as connection:
            self._oldest = oldest_day(connection)

    def _step(self, remove: Callable[[Engine], int | None]) -> bool:
        """True if there may be more."""
        if self._engine is None or self._stop.is_set():
            return False
        began = time.monotonic()
        if remove(self._engine) is None:
            return False
        self._stop.wait(max(LEAST_PAUSE, SHARE * (time.monotonic() - began)))
        return True

    def _remove_requests(self, engine: Engine) -> int | None:
        first = self._first_kept()
        if first is None:
            return None
        with engine.begin() as connection:
            step = remove_expired(connection, first, MOST)
        if step is None:
            return None
        self._oldest = step.day
        self._removed["requests"] += step.rows
        return step.rows

    def _remove_audit(self, engine: Engine) -> int | None:
        days = self._settings.audit_days
        if days is None:
            return None
        with engine.begin() as connection:
            removed = prune_audit(connection, time.time_ns() - days * 86_400 * 10**9, MOST)
        self._removed["audit"] += removed
        return removed or None


def _today() -> date:
    return datetime.now(UTC).date()
