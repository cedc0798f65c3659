"""What a policy is."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import ClassVar, Protocol

from proxy.routing.route import Route
from proxy.routing.standing import Standing


class Policy(Protocol):
    """One of them for each model. `reads_prompt`: it wants `Route.marks` and `Route.reach`; `reads_session`: `Route.session`."""

    reads_prompt: ClassVar[bool]
    reads_session: ClassVar[bool]

    def scores(self, route: Route, candidates: Sequence[Standing]) -> list[float]:
        """One for each candidate, in order; the lowest is the best. Asking changes nothing."""

    def chosen(self, standing: Standing) -> None:
        """This one has it."""

    def why(self, route: Route, standing: Standing, score: float) -> str:
        """What spoke for this one, in a word. `score`: its own.

        load: it has the least to do. prefix: what the prompt begins with is there, or belongs there. spilled: that is elsewhere,
        where it would have to wait, or can't be had. session: what the request belongs to is there. turn: it was its turn.
        """


class Stateless:
    """What a policy needn't say that remembers nothing."""

    reads_prompt: ClassVar[bool] = False
    reads_session: ClassVar[bool] = False

    def chosen(self, standing: Standing) -> None:
        pass

    def why(self, route: Route, standing: Standing, score: float) -> str:
        return "load"


def draws(mark: int, candidates: Sequence[Standing], even: bool) -> list[float]:
    """Weighted rendezvous hashing: numbers that only this mark and those backends have; the lowest has it. Each is drawn as often
    as its weight says, and one that comes, goes or is weighed anew moves nothing between the others. The same in every process.
    `even`: all have the same weight.

    They are times, in thousandths, of a race: its fastest is the one with the weight 1. Source: Thaler and Ravishankar,
    "Using Name-Based Mappings to Increase Hit Rates", 1998; with weights: Efraimidis and Spirakis, "Weighted Random Sampling with
    a Reservoir", 2006.
    """
    number = float(mark)
    if even:
        return [number * each.salt % 1000.0 for each in candidates]  # the same order, without the logarithms
    return [-1000.0 * log(1.0 - number * each.salt % 1000.0 / 1000.0) / each.weight for each in candidates]
