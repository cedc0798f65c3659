"""Who of several backends is to answer: one file a policy, and this table.

A policy gives each candidate a score; the lowest has it, and of equals one after the other. It is arithmetic over what is known:
nothing is asked, nothing waits, and the time comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from proxy.routing.policies.auto import Auto
from proxy.routing.policies.least_loaded import LeastLoaded
from proxy.routing.policies.policy import Policy
from proxy.routing.policies.prefix_affinity import PrefixAffinity
from proxy.routing.policies.round_robin import RoundRobin
from proxy.routing.policies.session import Session
from proxy.routing.policies.weighted import Weighted

POLICIES: Final[Mapping[str, Callable[[], Policy]]] = {
    "auto": Auto,
    "least_loaded": LeastLoaded,
    "prefix_affinity": PrefixAffinity,
    "round_robin": RoundRobin,
    "session": Session,
    "weighted": Weighted,
}

__all__ = ["POLICIES", "Policy"]
