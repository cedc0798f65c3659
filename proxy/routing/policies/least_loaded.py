"""`least_loaded`: where the fewest tokens are in flight."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.routing.policies.policy import Stateless
from proxy.routing.route import Route
from proxy.routing.standing import Standing


class LeastLoaded(Stateless):
    """Tokens and not requests: a long prompt is more than a short one. What the engine says it has of others counts too, and so
    does this request itself: weights would say nothing of backends that are idle."""

    def scores(self, route: Route, candidates: Sequence[Standing]) -> list[float]:
        cost = route.cost
        return [(each.load + cost) / each.weight for each in candidates]
