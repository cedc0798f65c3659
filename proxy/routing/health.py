"""How a backend is doing, as one worker sees it. Times come in as monotonic ns; nothing here waits or asks anybody.

    UP ──a failure, silence──► SUSPECT ──a probe fails, failures in a row──► OUT
     ▲                            │ a probe or a request succeeds             │ its time is over, and a probe succeeds
     └────────────────────────────┴───────────────────────────────────────────┘ (slowly: `part`)

A suspect is asked for a token, and takes requests only where nobody else can. One that is out takes none, unless all of a model's
are: then those that at least say no at once are asked as ever, and of those that hang one request a second finds out. Each time
that it has to leave again soon after its return, it stays out twice as long.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from proxy.settings import HealthSettings

WINDOW_NS: Final = 10_000_000_000
"""Of the success rate: this window and the one before count."""
FEWEST: Final = 20
"""Answers of which a rate says something."""
FIRST_PART: Final = 0.1
"""Of its usual load, on the day of its return."""
HANGS: Final = frozenset({"first_byte_timeout", "probe_timeout"})
"""Reasons why asking it takes long."""


class State(IntEnum):
    UP = 0
    SUSPECT = 1
    OUT = 2

    @property
    def label(self) -> str:
        return self.name.lower()


class Health:
    """`state` changes in the methods that say so. `reason`: the error code of what was wrong last."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self.state = State.UP
        self.reason = ""
        self.failures = 0
        """Requests that failed in a row."""
        self.ejections = 0
        """How often it had to leave, lately."""
        self.until_ns = 0
        """When an OUT one may be probed, and a SUSPECT one again."""
        self.probing = False
        self.returned_ns = 0
        """Since when it has been coming back; 0: it has all of its load."""
        self._back_ns = 0
        self._good = self._bad = self._good_before = self._bad_before = 0
        self._window_ns = 0
        self._tried_ns = 0

    # -- what its answers say --

    def succeeded(self, now_ns: int) -> bool:
        """It has begun to answer a request. True if that changed its state."""
        self.failures = 0
        self._good += 1
        if not self.state:  # UP, said in the cheapest way: this is asked for every answer
            return False
        self._return(now_ns)
        return True

    def failed(self, now_ns: int, reason: str, *, certain: bool = False) -> bool:
        """It has not answered, or not to the end. `certain`: nothing will come of it until it is started anew. True if that
        changed its state."""
        self._turn(now_ns)
        self.failures += 1
        self._bad += 1
        self.reason = reason
        if self.state is State.OUT:
            return False
        if certain or self.failures >= self._settings.failures or self._mostly_fails():
            self._eject(now_ns)
            return True
        return self.suspect(now_ns, reason)

    def suspect(self, now_ns: int, reason: str) -> bool:
        """Something is odd: a probe shall tell. True if that changed its state."""
        if self.state is not State.UP:
            return False
        self.state, self.reason, self.until_ns = State.SUSPECT, reason, now_ns
        return True

    # -- probes --

    def probe_due(self, now_ns: int) -> bool:
        return self.state is not State.UP and not self.probing and now_ns >= self.until_ns

    def hurry(self, now_ns: int) -> None:
        """It was started anew: what it did before says nothing."""
        self.until_ns = min(self.until_ns, now_ns)

    def probed(self, now_ns: int, reason: str | None) -> bool:
        """`reason`: why it failed; None: it answered. True if that changed its state."""
        self.probing = False
        if self.state is State.UP:
            return False  # a request was quicker
        if reason is not None:
            self.reason = reason
            was_out = self.state is State.OUT
            self._eject(now_ns)
            return not was_out
        self._return(now_ns)
        return True

    # -- what follows --

    def part(self, now_ns: int) -> float:
        """How much of its usual load it may have: all of it, or less for a while after its return."""
        if not self.returned_ns:
            return 1.0
        whole_ns = self._settings.slow_start * 1e9
        part = (now_ns - self.returned_ns) / whole_ns if whole_ns else 1.0
        if part >= 1.0:
            self.returned_ns = 0
            return 1.0
        return max(FIRST_PART, part)

    def may_be_tried(self, now_ns: int) -> bool:
        """One that is OUT, where there is no other. What hangs is tried once a second."""
        return self.reason not in HANGS or now_ns - self._tried_ns >= 1_000_000_000

    def tried(self, now_ns: int) -> None:
        """One that is OUT was given a request."""
        self._tried_ns = now_ns

    def _return(self, now_ns: int) -> None:
        if self.state is State.OUT:
            self.returned_ns = self._back_ns = now_ns
            self._good = self._bad = self._good_before = self._bad_before = 0
            self.failures = 0
        self.state = State.UP

    def _eject(self, now_ns: int) -> None:
        base_s, longest_s = self._settings.ejection, self._settings.longest_ejection
        if self.state is not State.OUT and now_ns - self._back_ns > 4e9 * min(base_s * 2.0**self.ejections, longest_s):
            self.ejections = 0  # it did well for long enough
        self.state = State.OUT
        self.until_ns = now_ns + int(min(base_s * 2.0**self.ejections, longest_s) * 1e9)
        self.ejections = min(self.ejections + 1, 32)

    def _turn(self, now_ns: int) -> None:
        if now_ns - self._window_ns >= WINDOW_NS:
            stale = now_ns - self._window_ns >= 2 * WINDOW_NS
            self._good_before, self._bad_before = (0, 0) if stale else (self._good, self._bad)
            self._good = self._bad = 0
            self._window_ns = now_ns

    def _mostly_fails(self) -> bool:
        good, bad = self._good + self._good_before, self._bad + self._bad_before
        return good + bad >= FEWEST and bad > good
