"""5 route: which backends may take a request, in what order. The one with the fewest requests in flight first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from proxy.snapshot import Model


class Router:
    """Orders backends by what this worker has in flight there. Equals take turns, so an idle pair shares the work."""

    def __init__(self) -> None:
        self.in_flight: defaultdict[str, int] = defaultdict(int)
        """Requests in flight by backend; a backend that had any stays, with 0."""
        self._turn = 0

    def candidates(self, model: Model) -> Sequence[str]:
        """Names of backends, best first; the next is for when one can't be reached."""
        names = model.backends
        if len(names) < 2:
            return names
        self._turn += 1
        turn = self._turn % len(names)
        load = self.in_flight
        return sorted((*names[turn:], *names[:turn]), key=lambda name: load.get(name, 0))
