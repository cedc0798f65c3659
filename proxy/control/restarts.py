"""Which engines have begun anew, as the file `engines` tells once a second: they may serve other models now, or longer prompts.

It decides; the file's contents come in as arguments. Where nobody writes the file, control's own questions find out.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.engines import EngineLoad


class Restarts:
    """What was seen of each engine last, and whether it was there."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._gone: set[str] = set()

    def look(self, loads: Mapping[str, EngineLoad]) -> list[str]:
        """The engines that another process runs than before, or that are back. One that is seen for the first time isn't among
        them."""
        known = self._started.keys() & loads.keys()
        again = [name for name in sorted(known) if name in self._gone or loads[name].started_unix_s != self._started[name]]
        self._gone = self._started.keys() - loads.keys()
        self._started |= {name: load.started_unix_s for name, load in loads.items()}
        return again
