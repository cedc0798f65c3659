"""`session`: what belongs together stays together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar
from zlib import crc32

from proxy.routing.policies.least_loaded import LeastLoaded
from proxy.routing.policies.policy import draws
from proxy.routing.route import Route
from proxy.routing.standing import Standing


class Session(LeastLoaded):
    """By what the request names: the header `x-session-id`, `previous_response_id`, or `user`. Where it names nothing, the load
    decides."""

    reads_session: ClassVar[bool] = True

    def scores(self, route: Route, candidates: Sequence[Standing]) -> list[float]:
        if not route.session:
            return super().scores(route, candidates)
        return draws(crc32(route.session), candidates, route.lane.even)

    def why(self, route: Route, standing: Standing, score: float) -> str:
        return "session" if route.session else "load"
