"""`auto`: where the first token will come soonest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from proxy.routing.policies.policy import Stateless, draws
from proxy.routing.prefixes import leading
from proxy.routing.route import Route
from proxy.routing.standing import Standing
from proxy.wire.prompt import BYTES_A_TOKEN

HELD: Final = 1 / 16
"""Of what a token to be computed costs: a token that is held while answers grow. They are decoded together."""
AGAIN: Final = 2
"""Times that a token of the prompt counts which would have to be computed: it keeps those waiting who come later, and takes the
place of others' in the cache. (Two engines whose caches held all talks only together, as in tests/engine/test_routing.py: 81 % of
the input was cached with 2, and 70 to 76 % with 1.)"""
HOME: Final = 32
"""Tokens by which a prompt that is new here has one backend preferred: workers that know nothing of one another agree on it."""


class Auto(Stateless):
    """The prompt tokens that a backend has to compute before it comes to this one, and those that it would have to compute for
    it: fewer where its beginning was sent before. So a prefix draws, as long as the way there isn't longer than twice what it
    saves."""

    reads_prompt: ClassVar[bool] = True

    def scores(self, route: Route, candidates: Sequence[Standing]) -> list[float]:
        prompt, reach = route.prompt, route.reach
        if reach:
            known = reach.get
            return [
                (each.prefilling + each.load * HELD + AGAIN * (prompt - known(each.bit, 0) // BYTES_A_TOKEN)) / each.weight
                for each in candidates
            ]
        prompt *= AGAIN
        scores = [(each.prefilling + each.load * HELD + prompt) / each.weight for each in candidates]
        if route.marks:
            lots = draws(leading(route.marks), candidates, route.lane.even)
            scores[lots.index(min(lots))] -= HOME
        return scores

    def why(self, route: Route, standing: Standing, score: float) -> str:
        reach = route.reach
        if not reach:
            return "load"
        return "prefix" if reach.get(standing.bit) == max(reach.values()) else "spilled"
