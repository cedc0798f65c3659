"""An engine's counters begin anew with it, and it is away now and then. What is exposed only goes up, and begins at nothing."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from proxy.engines import EngineLoad

COUNTED: Final = ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits")
_NOTHING: Final = EngineLoad()


class Totals:
    """`sums`: what one engine has computed since it was first heard of, by the names in `COUNTED`."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(COUNTED, 0)
        self._before: EngineLoad | None = None
        self._anew_unix_s = 0.0

    def hear(self, load: EngineLoad, unix_s: float) -> EngineLoad:
        """The engine's next load, heard at `unix_s`; → the same, with a start also where it doesn't say any but has less than it
        had."""
        before, self._before = self._before, load
        if before is not None:
            anew = _began_anew(load, before)
            since = _NOTHING if anew else before
            for name in COUNTED:
                self.sums[name] += getattr(load, name) - getattr(since, name)
            if anew:
                self._anew_unix_s = unix_s
        return load if load.started_unix_s else replace(load, started_unix_s=self._anew_unix_s)


def _began_anew(load: EngineLoad, before: EngineLoad) -> bool:
    """It says so, or it has less than it had."""
    if load.started_unix_s and before.started_unix_s and load.started_unix_s != before.started_unix_s:
        return True
    return any(getattr(load, name) < getattr(before, name) for name in COUNTED)
