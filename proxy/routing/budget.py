"""How many requests may be tried again because an engine said no: a fifth of all, and a few more.

Without it engines that are overloaded would get twice the requests, when they can bear them least.
"""

from __future__ import annotations

from typing import Final

SHARE: Final = 0.2
FLOOR: Final = 10.0
"""Tries that there always are, again after a quiet while."""
FLOOR_NS: Final = 1_000_000_000
"""In how much time one of them comes back."""


class RetryBudget:
    def __init__(self) -> None:
        self.requests = 0
        """Since the last one was tried again; whoever sends one counts it here."""
        self._left = FLOOR
        self._at_ns = 0

    def take(self, now_ns: int) -> bool:
        """True: this one may be tried again, and is counted."""
        self._left = min(10 * FLOOR, self._left + SHARE * self.requests)
        self.requests = 0
        if self._left < FLOOR:
            self._left = min(FLOOR, self._left + (now_ns - self._at_ns) / FLOOR_NS)
        self._at_ns = now_ns
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
