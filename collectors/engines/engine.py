"""One engine: what it said last, and how often it was asked."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Final

from collectors.engines.http import ScrapeError, get
from collectors.engines.kinds import Kind
from collectors.engines.totals import Totals
from collectors.records.metrics import EngineView
from proxy.engines import EngineLoad
from proxy.snapshot import Backend

log = logging.getLogger(__name__)

SCRAPE_SECONDS: Final = 2.0
STALE_SECONDS: Final = 3.5
"""From when on what it said counts as nothing, though it is being asked: a second, a question that takes as long as it may, and a
little. Only a resolver that hangs takes longer."""


class Engine:
    """`address`: what makes it this engine and no other."""

    def __init__(self, backend: Backend, kind: Kind) -> None:
        self.address = address(backend)
        self._backend = backend
        self._kind = kind
        self._totals = Totals()
        self._scrapes: Counter[str] = Counter()
        self._heard: tuple[EngineLoad, float] | None = None
        self._last = "ok"
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Begin, unless the last question is under way still."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._ask, name=f"engine {self._backend.name}", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until it has answered or failed to, or so long."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))

    def load(self, now: float) -> EngineLoad | None:
        """What it said when it was last asked, `now` being time.monotonic(); None if it said nothing then."""
        heard = self._heard
        return heard[0] if heard is not None and now - heard[1] <= STALE_SECONDS else None

    def view(self, now: float) -> EngineView:
        return EngineView(self._backend.name, self.load(now), dict(self._totals.sums), self._scrapes.copy())

    # -- the thread of one question --

    def _ask(self) -> None:
        began = time.monotonic()
        heard, outcome, text = None, "ok", ""
        try:
            heard = self._totals.hear(self._said(), time.time()), began
        except ScrapeError as error:
            outcome, text = error.outcome, str(error)
        except Exception:
            log.exception("a bug in what asks an engine")
            outcome = "internal_error"
        self._heard = heard
        self._scrapes[outcome] += 1
        self._tell(outcome, text)

    def _said(self) -> EngineLoad:
        """Raises ScrapeError."""
        load = self._kind.read(get(self._backend, self._kind.path, SCRAPE_SECONDS))
        if load is None:
            raise ScrapeError("unreadable", "an answer that doesn't tell a load")
        return load

    def _tell(self, outcome: str, text: str) -> None:
        """Of a change; it is asked every second."""
        before, self._last = self._last, outcome
        if outcome == before:
            return
        if outcome == "ok":
            log.info("an engine tells its load again", extra={"backend": self._backend.name})
        else:
            log.warning(
                "an engine doesn't tell its load", extra={"backend": self._backend.name, "error": text, "outcome": outcome}
            )


def address(backend: Backend) -> tuple[object, ...]:
    """What a question to it depends on."""
    return backend.kind, backend.host, backend.port, backend.base_path, backend.api_key_env, backend.tls, backend.ca_file
