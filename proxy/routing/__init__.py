"""5 route: from a model to a backend that has room, now or in a while. `router.py` is the step itself."""

from proxy.routing.health import Health, State
from proxy.routing.route import Route
from proxy.routing.router import Router
from proxy.routing.standing import Standing

__all__ = ["Health", "Route", "Router", "Standing", "State"]
