"""Who waits for an engine, and who is next.

Requests wait here and not in the engine, where the first one in is served first. Here the classes of priority come one after the
other, and within a class the keys share by *deficit round robin*: in each round every key that waits is credited the same number
of tokens, and whose credit covers its next request is served. What is charged is what had to be computed, cached input apart: a
guess at first, set right when it is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from proxy.routing.route import Route
    from proxy.routing.standing import Standing

QUANTUM: Final = 1_000
"""Tokens of a round, for each key."""

LATELY: Final = 64
"""Turns by which it is told how fast the line goes."""

Bind = Callable[["Route", int], bool]
"""Give a request its place, if there is one for it now."""


class Line:
    """Those who wait for the same backends. Priority 0 comes first."""

    def __init__(self, standings: Sequence[Standing]) -> None:
        self.standings = standings
        self.waiting = 0
        self._classes: dict[int, dict[str, deque[Route]]] = {}
        self._credit: dict[str, float] = {}
        """A book that is closed when nobody waits any more: nobody is owed anything then."""
        self._turns: deque[int] = deque(maxlen=1 + LATELY)
        """When it began to form, or a turn was; and when the turns after that were."""

    def __iter__(self) -> Iterator[Route]:
        for keys in self._classes.values():
            for routes in keys.values():
                yield from routes

    def of(self, key: str) -> int:
        """How many of a key's requests wait."""
        return sum(len(keys[key]) for keys in self._classes.values() if key in keys)

    def drained_in(self, now_ns: int) -> float:
        """Seconds until all who wait will have had their turn, if it goes on as it went lately."""
        turns = self._turns
        if not turns:
            return 0.0
        passed_s = (now_ns - turns[0]) / 1e9
        return self.waiting * passed_s / (len(turns) - 1) if len(turns) > 1 else passed_s

    def enter(self, route: Route, now_ns: int) -> None:
        if not self.waiting:
            self._turns.append(now_ns)
        if route.priority not in self._classes:
            self._classes[route.priority] = {}
            self._classes = dict(sorted(self._classes.items()))
        self._classes[route.priority].setdefault(route.key, deque()).append(route)
        self.waiting += 1

    def leave(self, route: Route) -> bool:
        """It waits no longer; False if it didn't."""
        keys = self._classes.get(route.priority, {})
        routes = keys.get(route.key)
        if not routes or route not in routes:
            return False
        routes.remove(route)
        self._left(keys, route)
        return True

    def settle(self, route: Route, computed: float) -> None:
        """What it took is known now, and was a guess when it had its turn here. If it had one since the line began to form."""
        if route.book is self._credit:
            self._credit[route.key] = self._credit.get(route.key, 0.0) + route.cost - computed

    def admit(self, now_ns: int, bind: Bind) -> list[Route]:
        """Those for whom there is room now, each bound, in the order in which it is their turn."""
        admitted: list[Route] = []
        for keys in list(self._classes.values()):
            while keys and (route := self._next(keys, now_ns, bind)) is not None:
                admitted.append(route)
        return admitted

    def _next(self, keys: dict[str, deque[Route]], now_ns: int, bind: Bind) -> Route | None:
        credit = self._credit
        ranked = sorted(
            (max(0, -int((credit.get(key, 0.0) - routes[0].cost) // QUANTUM)), at, key)
            for at, (key, routes) in enumerate(keys.items())
        )
        for rounds, _, key in ranked:
            route = keys[key][0]
            if not bind(route, now_ns):
                continue
            if rounds:
                for each in keys:
                    credit[each] = min(credit.get(each, 0.0) + rounds * QUANTUM, keys[each][0].cost + QUANTUM)
            credit[key] = credit.get(key, 0.0) - route.cost
            route.book = credit
            self._turns.append(now_ns)
            routes = keys.pop(key)
            routes.popleft()
            keys[key] = routes  # its turn comes again when all others had theirs
            self._left(keys, route)
            return route
        return None

    def _left(self, keys: dict[str, deque[Route]], route: Route) -> None:
        self.waiting -= 1
        if not keys[route.key]:
            del keys[route.key]
            if self._credit.get(route.key, 0.0) > 0:
                del self._credit[route.key]  # credit is for those who wait; a debt stays
        if not self.waiting:
            self._credit = {}
            self._classes.clear()
            self._turns.clear()
