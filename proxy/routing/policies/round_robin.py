"""`round_robin`: one after the other."""

from __future__ import annotations

from proxy.routing.policies.weighted import Weighted
from proxy.routing.standing import Standing


class RoundRobin(Weighted):
    """But for one that has just returned, which has fewer turns for a while."""

    def weight(self, standing: Standing) -> float:
        return standing.part
