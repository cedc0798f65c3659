"""`weighted`: in turn, each as often as its weight says."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.routing.policies.policy import Stateless
from proxy.routing.route import Route
from proxy.routing.standing import Standing


class Weighted(Stateless):
    """Stride scheduling: a turn moves a backend on by one over its weight, and who is furthest behind has the next. Who was away
    is owed nothing: it goes on from where the last turn was. Source: Waldspurger and Weihl, 1995."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._last = 0.0

    def scores(self, route: Route, candidates: Sequence[Standing]) -> list[float]:
        at, last = self._at, self._last
        return [at.get(each.name, last) for each in candidates]

    def chosen(self, standing: Standing) -> None:
        self._last = max(self._at.get(standing.name, 0.0), self._last)
        self._at[standing.name] = self._last + 1 / self.weight(standing)

    def why(self, route: Route, standing: Standing, score: float) -> str:
        return "turn"

    def weight(self, standing: Standing) -> float:
        return standing.weight
