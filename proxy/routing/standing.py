"""What one worker knows of one backend: what it has there, what the engine says of itself, and how it is doing."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Final

from proxy.routing.health import Health
from proxy.snapshot import Backend

if TYPE_CHECKING:
    from proxy.routing.route import Route

USUAL_PREFILL: Final = 2_000
"""Tokens a second, of an engine of which nothing is known yet."""
OTHERS_TOKENS: Final = 500
"""What a request of somebody else's is taken to have."""
EIGHTH: Final = 8
"""The part of its depth that several keys leave to others, each."""


class Share:
    """What one key has on one backend."""

    __slots__ = ("prefilling", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.prefilling = 0


class Standing:
    """`tokens` are those of this worker's requests there: of prompts, as far as they aren't in its cache, and of answers, as long
    as they are expected to become. `prefilling`: of these, the prompts' that wait for their first token."""

    def __init__(self, backend: Backend, health: Health, bit: int) -> None:
        self.backend = backend
        self.name = backend.name
        self.salt = int.from_bytes(sha256(backend.name.encode()).digest()[:8], "big") / 2**64
        """What its name puts into draws, 0 to 1."""
        self.health = health
        self.bit = bit
        """By which `Prefixes` knows what its cache may hold."""
        self.in_flight = 0
        self.load = 0
        """`tokens` and `others` together: what policies compare."""
        self.prefilling = 0
        self.keys: dict[str, Share] = {}
        self.depth = 0
        """Requests that it may have of this worker at present."""
        self.prefill_depth = 0
        """Prompt tokens that one of several keys may have it compute at a time."""
        self.weight = self.part = 1.0
        """Against others', at present; and how much of what it usually has that is."""
        self.drained = False
        self.started_unix_s: float | None = None
        """When its engine began, see `EngineLoad`; None: it hasn't said anything."""
        self.others_requests = 0
        """That its engine had when it was last heard, and this worker hadn't."""
        self._others = 0
        self.prefill_rate = float(USUAL_PREFILL)
        """Tokens a second, as it was seen lately."""
        self.last_byte_ns = 0
        """When it last sent anything."""
        self.served: tuple[str, str] | None = None
        """Operation and model of what it answered last."""
        self.ejections = self.probes = self.failed_probes = 0
        """Totals."""
        self._unseen: dict[Route, None] = {}
        """Requests whose first token can't be seen, in the order in which they came. None stays in it longer than here: what is
        kept of a request keeps all of it in memory."""

    @property
    def address(self) -> tuple[str, int, str]:
        return self.backend.host, self.backend.port, self.backend.base_path

    @property
    def tokens(self) -> int:
        return self.load - self._others

    @property
    def others(self) -> int:
        """Tokens that it is taken to have of others."""
        return self._others

    @others.setter
    def others(self, tokens: int) -> None:
        self.load += tokens - self._others
        self._others = tokens

    def leaves_room(self, route: Route, now_ns: int) -> bool:
        """With this request too its key leaves something to the others who are at work."""
        share = self.keys.get(route.key)
        if share is None:
            return True
        if share.requests >= self.depth - self.depth // EIGHTH:
            return False
        if not share.prefilling:
            return True
        self.age(now_ns)
        return share.prefilling + route.prompt <= self.prefill_depth

    def take(self, route: Route, uncached: int, now_ns: int) -> None:
        """`uncached`: tokens of its prompt that have to be computed here."""
        self.in_flight += 1
        self.load += uncached + route.answer
        route.ahead = self.prefilling = self.prefilling + uncached
        share = self.keys.get(route.key)
        if share is None:
            share = self.keys[route.key] = Share()
        share.requests += 1
        share.prefilling += uncached
        route.standing = self
        route.share = share
        route.uncached = route.prefilling = uncached
        route.sent_ns = now_ns
        if not route.exchange.record.stream:
            self._unseen[route] = None

    def computed(self, route: Route) -> None:
        """Its prompt."""
        tokens = route.prefilling
        if tokens and route.share is not None:
            route.prefilling = 0
            self.prefilling -= tokens
            route.share.prefilling -= tokens

    def leave(self, route: Route) -> None:
        share, tokens = route.share, route.prefilling
        route.standing = route.share = None
        self.in_flight -= 1
        self.load -= route.uncached + route.answer
        if tokens:
            route.prefilling = 0
            self.prefilling -= tokens
        if share is not None:
            share.requests -= 1
            share.prefilling -= tokens
            if not share.requests:
                del self.keys[route.key]
        if route in self._unseen:
            del self._unseen[route]

    def age(self, now_ns: int) -> None:
        """Take for computed what should be by now. Where a first token can't be seen, an engine is taken to compute as fast as it
        did lately."""
        unseen = self._unseen
        while unseen:
            route = next(iter(unseen))
            if route.sent_ns + route.ahead * 1e9 / self.prefill_rate > now_ns:
                return
            del unseen[route]
            self.computed(route)
