"""`prefix_affinity`: prompts that begin alike go to the same backend, unless it has much more to do than others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from proxy.routing.policies.least_loaded import LeastLoaded
from proxy.routing.policies.policy import draws
from proxy.routing.prefixes import leading
from proxy.routing.route import Route
from proxy.routing.standing import Standing

BOUND: Final = 1.25
"""Times the mean load that a backend may have before its prompts go elsewhere. Source: Mirrokni, Thorup and Zadimoghaddam,
"Consistent Hashing with Bounded Loads", 2016."""
WITHIN: Final = -1e12
"""Less than any draw: where the one that is drawn has too much, those that haven't come before all that have."""


class PrefixAffinity(LeastLoaded):
    """It remembers nothing, so that all workers of all hosts agree."""

    reads_prompt: ClassVar[bool] = True

    def scores(self, route: Route, candidates: Sequence[Standing]) -> list[float]:
        if not route.marks:
            return super().scores(route, candidates)
        even = route.lane.even
        lots = draws(leading(route.marks), candidates, even)
        # As in the paper a backend may have what exceeds its part by less than one request: else one at a time would be too much.
        loads: list[float] = [each.load for each in candidates]
        most = BOUND * (sum(loads) + route.prompt + route.answer)
        if even:
            most /= len(loads)
        else:
            most /= sum([each.weight for each in candidates])
            loads = [load / each.weight for load, each in zip(loads, candidates, strict=True)]
        if loads[lots.index(min(lots))] <= most:
            return lots
        return [WITHIN + lot if load <= most else lot for load, lot in zip(loads, lots)]  # noqa: B905  (it takes time)

    def why(self, route: Route, standing: Standing, score: float) -> str:
        if not route.marks:
            return "load"
        return "spilled" if score < 0 else "prefix"
