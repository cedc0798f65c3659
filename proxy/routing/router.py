"""The step itself: from a model to a backend that has room, now or in a while."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from proxy.engines import EngineLoad
from proxy.errors import NotReady, Overloaded, ProxyError, RateLimited
from proxy.routing.budget import RetryBudget
from proxy.routing.health import Health, State
from proxy.routing.policies import POLICIES, Policy
from proxy.routing.prefixes import PLACES, Prefixes, marks_of
from proxy.routing.route import Route
from proxy.routing.standing import OTHERS_TOKENS, Standing
from proxy.routing.waiting import Line
from proxy.settings import Settings
from proxy.snapshot import Backend, Model, Snapshot, SnapshotError
from proxy.wire.operation import FORM
from proxy.wire.prompt import BYTES_A_TOKEN, FILE_TOKENS, prompt_tokens

if TYPE_CHECKING:
    from proxy.exchange import Exchange
    from proxy.wire.body import Request
    from proxy.wire.operation import EngineOperation

CONTESTED_NS: Final = 10_000_000_000
"""For so long after requests of different keys have met, none of them may fill an engine."""
SLOW_DEPTH: Final = 256
"""What an engine without a bound has while it comes back, whole."""
UNBOUNDED: Final = 1 << 30
FIRST_ANSWER: Final = 256.0
"""Tokens of an answer, of a model of which none was seen."""
RATED_TOKENS: Final = 256
"""Fewer prompt tokens tell nothing of how fast an engine computes them."""
FULL_CACHE: Final = 0.9
"""Of an engine's KV cache: from here on it may have to give up requests to go on with others."""
ELSEWHERE_NS: Final = 30_000_000_000
"""For so long a backend isn't asked for a model that it said it hasn't got."""
PLACES_A_FREE_ONE: Final = 7
"""So many of one key may wait for each place in line that is free: it leaves others an eighth, and what those leave is shared in
the same way. Source: Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998."""
SOON_S: Final = 10
"""The longest that a client is told to wait for a backend that is out: requests, too, find out whether it is back."""
ONLY: Final = "only"
"""What records have for a choice that wasn't one."""
LARGE: Final = 32 * 1024
"""Bytes of a request; in a smaller one a file does no harm if it is taken for text."""
MOST_SCORES: Final = 8
"""That are kept of one request."""
MOST_ANSWERS: Final = 10_000
"""Of which it is remembered who gave them."""


class Lane:
    """One model's backends here, in the catalogue's order, and the line of those who wait for one of them."""

    def __init__(self, router: Router, model: Model, standings: Sequence[Standing], policy: str, line: Line) -> None:
        self.router = router
        self.model = model
        self.standings = standings
        self.policy: Policy = POLICIES[policy]()
        self.policy_name = policy
        self.reasons: dict[str, str] = {}
        """What records have for a policy's reasons."""
        self.line = line
        self.seed = crc32(model.name.encode())
        self.elsewhere: dict[str, int] = {}
        """Backends that turned out not to serve it, each until then (ns) or until the catalogue says more."""
        self.answer = FIRST_ANSWER
        """Tokens of an answer, as they were lately."""
        self.usable: list[Standing] = []
        """Those that may be chosen: the ones that are up, else the suspects, else all that aren't drained."""
        self.only: Standing | None = None
        """The one that has it all, as long as it isn't out: there is nothing to choose."""
        self.desperate = False
        """None of them is up or suspect."""
        self.last = -1
        """Where in the row the last choice was: of equals the next one after it has its turn."""
        self.gone = False
        """The catalogue has changed: there is another one for this model."""
        self.even = True
        """None has more weight than another."""
        self.version = -1

    def look(self, version: int) -> None:
        self.version = version
        there = [each for each in self.standings if not each.drained and each.name not in self.elsewhere]
        best = min((each.health.state for each in there), default=State.OUT)
        self.usable = [each for each in there if each.health.state is best]
        self.desperate = best is State.OUT
        self.even = len({each.weight for each in there}) < 2
        self.only = self.usable[0] if len(self.standings) == 1 and self.usable and not self.desperate else None

    def left(self, tried: Collection[str]) -> tuple[list[Standing], bool]:
        """Without those that were tried: the ones that are doing best, and whether even they are out."""
        there = [each for each in self.standings if not (each.drained or each.name in self.elsewhere or each.name in tried)]
        best = min((each.health.state for each in there), default=State.OUT)
        return [each for each in there if each.health.state is best], best is State.OUT

    def home_of(self, route: Route) -> Standing | None:
        """Who alone has what this one goes on from, if it may be asked. A suspect may: all others would only say that they don't
        have it."""
        for each in self.standings:
            if each.name == route.home:
                gone = each.drained or each.health.state is State.OUT or each.name in self.elsewhere
                return None if gone or each.name in route.tried else each
        return None


class Router:
    """This worker's backends, who may have which, and who waits."""

    def __init__(self, settings: Settings, waits: Callable[[Exchange], None] = lambda exchange: None) -> None:
        self._settings = settings
        self._waits = waits
        self.standings: dict[str, Standing] = {}
        self.budget = RetryBudget()
        self.waiting = 0
        self._snapshot: Snapshot | None = None
        self._version = 0
        self._prefixes = Prefixes()
        self._lanes: dict[str, Lane] = {}
        self._lines: dict[tuple[str, ...], Line] = {}
        self._last_key: str | None = None
        self._contested_until_ns = 0
        self._turn = 0
        """Of lines."""
        self._gave: dict[str, str] = {}
        """Answers that requests may go on from, by id, and the backend that gave each: it alone may have it."""

    # -- one request --

    def route(
        self, exchange: Exchange, operation: EngineOperation[Any], request: Request, model: Model, snapshot: Snapshot
    ) -> Route:
        """The way of one request to the backends of `model`."""
        lane = self._lanes.get(model.name)
        if lane is None:
            lane = self._lanes[model.name] = self._lane(model, snapshot)
        record, principal = exchange.record, exchange.principal
        key = "" if principal is None else principal.key_id
        length = len(exchange.body)
        prompt = length // BYTES_A_TOKEN + 1
        if length > LARGE:
            prompt = prompt_tokens(exchange.body) if operation.media is not FORM else FILE_TOKENS
        answer = 0
        if operation.generates:
            answer, most = int(lane.answer), record.max_tokens
            if most is not None and most < answer:
                answer = most
            answer *= record.choices
        route = Route(exchange, lane, key, prompt, answer)
        if len(lane.standings) > 1:
            policy = lane.policy
            if policy.reads_prompt and operation.prompt is not None:
                route.marks = marks_of(operation.prompt(request), lane.seed)
                if length > LARGE:  # a file in it has more bytes than its tokens would have
                    route.marks = route.marks[: bisect(PLACES, prompt * BYTES_A_TOKEN)]
            if policy.reads_session:
                route.session = exchange.headers.get(b"x-session-id", b"") or record.user.encode()
            if operation.continues is not None and (previous := operation.continues(request)):
                route.home = self._gave.get(previous, "")
        if key != self._last_key:
            if self._last_key is not None:
                self._contested_until_ns = monotonic_ns() + CONTESTED_NS
            self._last_key = key
        self.budget.requests += 1
        return route

    def enter(self, route: Route, now_ns: int) -> Standing | None:
        """A backend for it, if there is one that has room and nobody waits for it; else it is to `wait`."""
        lane = route.lane
        only = lane.only
        usual = not lane.line.waiting and now_ns >= self._contested_until_ns and not route.tried
        if usual and only is not None and lane.version == self._version and only.in_flight < only.depth:
            # Where a model has one backend most requests go this way, without what is made for choosing.
            route.exchange.record.routed_by = ONLY
            only.take(route, route.prompt, now_ns)
            return only
        if lane.gone:
            self._move(route)
            lane = route.lane
        return route.standing if not lane.line.waiting and self.bind(route, now_ns) else None

    def bind(self, route: Route, now_ns: int) -> bool:
        """Give it the best backend that has room for it; False if none has."""
        lane = route.lane
        if lane.version != self._version:
            lane.look(self._version)
        home = lane.home_of(route) if route.home else None
        usable, desperate = lane.left(route.tried) if route.tried else (lane.usable, lane.desperate)
        candidates = [each for each in (usable if home is None else (home,)) if each.in_flight < each.depth]
        if now_ns < self._contested_until_ns:
            candidates = [each for each in candidates if each.leaves_room(route, now_ns)]
        if desperate:
            candidates = [each for each in candidates if each.health.may_be_tried(now_ns)]
        if not candidates:
            return False
        if route.marks:
            route.reach = self._prefixes.reach(route.marks)
        if len(candidates) == 1:
            standing, record = candidates[0], route.exchange.record
            record.routed_by, record.scores = ONLY if home is None else f"{lane.policy_name}.previous_response", []
        else:
            standing = self._choose(route, candidates)
        if desperate:
            standing.health.tried(now_ns)
        uncached = route.prompt
        if route.reach:
            uncached -= route.reach.get(standing.bit, 0) // BYTES_A_TOKEN
        standing.take(route, uncached, now_ns)
        if route.marks:
            self._prefixes.sent(route.marks, standing.bit)
        return True

    def let_go(self, route: Route, output_tokens: int = 0, computed_tokens: int = 0) -> None:
        """It is done with its backend. `computed_tokens`: of its input, what was computed there. Where neither is known, what was
        guessed stays."""
        standing = route.standing
        if standing is None:
            return
        standing.leave(route)
        lane = route.lane
        if output_tokens:
            lane.answer += (output_tokens / route.exchange.record.choices - lane.answer) / 32
        if self.waiting:
            if took := computed_tokens + output_tokens:
                lane.line.settle(route, took)
            self.admit(monotonic_ns())

    def first_token(self, route: Route, now_ns: int) -> None:
        """It has come. How fast prompts are computed is learnt from it."""
        standing = route.standing
        if standing is None or not route.prefilling:
            return
        took_ns = now_ns - route.sent_ns
        if route.ahead >= RATED_TOKENS and took_ns > 0:
            standing.prefill_rate += (route.ahead * 1e9 / took_ns - standing.prefill_rate) / 8
        standing.computed(route)
        if self.waiting:
            self.admit(now_ns)

    def others_for(self, route: Route) -> bool:
        """Somebody other than the backend that it has could serve it."""
        if route.lane.gone and route.standing is None:
            self._move(route)
        lane = route.lane
        if lane.version != self._version:
            lane.look(self._version)
        usable, desperate = lane.left(route.tried if route.standing is None else (*route.tried, route.standing.name))
        return not desperate and bool(usable)

    def misrouted(self, route: Route) -> None:
        """Its backend doesn't serve its model, whatever the catalogue says."""
        if route.standing is not None:
            route.lane.elsewhere[route.standing.name] = monotonic_ns() + ELSEWHERE_NS
            self.changed()

    def gave(self, route: Route, answer: str) -> None:
        """Its backend gave this answer, from which another request may go on."""
        if route.standing is not None and len(route.lane.standings) > 1:
            gave = self._gave
            gave[answer] = route.standing.name
            if len(gave) > MOST_ANSWERS:
                del gave[next(iter(gave))]

    # -- who waits --

    async def wait(self, route: Route, now_ns: int) -> Standing:
        """For a backend that has room. Raises NotReady where none serves it now; Overloaded and RateLimited if it would wait for
        too long, or has; and what interrupts its flow."""
        if not self.others_for(route):  # which may move it to another line
            raise self.nobody(route)
        line, exchange = route.lane.line, route.exchange
        self._check_line(route, line, now_ns)
        route.deadline_ns = route.deadline_ns or now_ns + int(self._settings.waiting.timeout * 1e9)
        route.kept_ns = now_ns
        if self._snapshot is not None and exchange.principal is not None:
            route.priority = self._snapshot.priority(exchange.principal)
        line.enter(route, now_ns)
        self.waiting += 1
        try:
            self._admit(line, now_ns, entering=route)
            if route.standing is None and not exchange.record.queued_ns and not exchange.record.attempts:
                exchange.record.queued_ns = now_ns - exchange.origin_ns
                self._waits(exchange)
            while route.standing is None:
                await exchange.flow.wait()
        except BaseException:
            self.let_go(route)  # it had got in, and was to go on in a moment
            raise
        finally:
            if route.lane.line.leave(route):
                self.waiting -= 1
        return route.standing

    def nobody(self, route: Route) -> NotReady:
        lane = route.lane
        now = monotonic_ns()
        error = NotReady(f"No backend serves the model `{lane.model.name}` right now.", code="no_backend")
        again_ns = min((each.health.until_ns for each in lane.standings if not each.drained), default=0)
        error.retry_after_s = min(max(1, math.ceil((again_ns - now) / 1e9)), SOON_S)
        return error

    def _check_line(self, route: Route, line: Line, now_ns: int) -> None:
        """Raises Overloaded and RateLimited."""
        free = self._settings.waiting.requests - self.waiting
        if free <= 0:
            raise Overloaded("Too many requests wait for an engine.", code="queue_full", wait_s=self._drained_in(line, now_ns))
        if sum(each.of(route.key) for each in self._lines.values()) >= PLACES_A_FREE_ONE * free:
            raise RateLimited("Too many requests of this key wait for an engine.", wait_s=self._drained_in(line, now_ns))

    def _drained_in(self, line: Line, now_ns: int) -> float:
        """Seconds after which another try makes sense."""
        return min(max(1.0, line.drained_in(now_ns)), self._settings.waiting.timeout)

    def admit(self, now_ns: int) -> None:
        """Let in everybody for whom there is room. Lines may have backends in common: each is first in its turn."""
        lines = [line for line in self._lines.values() if line.waiting]
        if len(lines) > 1:
            self._turn += 1
            at = self._turn % len(lines)
            lines = lines[at:] + lines[:at]
        for line in lines:
            self._admit(line, now_ns)

    def _admit(self, line: Line, now_ns: int, entering: Route | None = None) -> None:
        """They go on in the loop's next turn: no request runs inside another one's end. `entering` is running already."""
        if all(each.in_flight >= each.depth for each in line.standings):
            return  # the usual case needn't look at who waits
        admitted = line.admit(now_ns, self.bind)
        self.waiting -= len(admitted)
        for route in admitted:
            if route is not entering:
                asyncio.get_running_loop().call_soon(route.exchange.flow.wake)

    # -- from the worker's sweep --

    def sweep(self, now_ns: int) -> None:
        """What time does: requests that waited for too long, prompts that are taken to be computed, engines that come back."""
        for standing in self.standings.values():
            self._weigh(standing, now_ns)
            standing.age(now_ns)
        for lane in self._lanes.values():
            if lane.elsewhere and min(lane.elsewhere.values()) <= now_ns:
                lane.elsewhere = {name: until_ns for name, until_ns in lane.elsewhere.items() if until_ns > now_ns}
                self.changed()
        if not self.waiting:
            return
        self.admit(now_ns)
        wait_s, keep_s = self._settings.waiting.timeout, self._settings.waiting.keep_alive
        for route in self.in_line():
            error: ProxyError
            if route.standing is not None:
                continue  # let in by the end of one before it
            if now_ns >= route.deadline_ns:
                text = f"No engine had room for this request within {wait_s:g} s."
                error = Overloaded(text, code="queue_timeout", wait_s=self._drained_in(route.lane.line, now_ns))
            elif not self.others_for(route):
                error = self.nobody(route)
            else:
                if keep_s is not None and route.reply is not None and now_ns - route.kept_ns >= keep_s * 1e9:
                    route.kept_ns = now_ns
                    route.reply.keep_waiting()
                continue
            route.exchange.flow.interrupt(error)

    def in_line(self) -> list[Route]:
        """Those that wait."""
        return [route for line in self._lines.values() for route in line]

    def follow(self, snapshot: Snapshot) -> None:
        """The catalogue has changed."""
        self._snapshot = snapshot
        backends = snapshot.backends
        for name in [name for name in self.standings if name not in backends]:
            self._prefixes.leave(self.standings.pop(name).bit)
        for backend in backends.values():
            standing = self._standing(backend)
            if standing.backend is not backend:
                self._describe(standing, backend)
        self.changed()
        waiting, former = self.in_line(), self._lanes
        self._lanes, self._lines = {}, {}
        for lane in former.values():
            lane.gone, lane.only = True, None
            model = snapshot.models.get(lane.model.name)
            if model is not None:
                self._lanes[model.name] = self._lane(model, snapshot)
                self._lanes[model.name].answer = lane.answer
        now = monotonic_ns()
        for route in waiting:
            self._move(route)
            route.lane.line.enter(route, now)

    def _move(self, route: Route) -> None:
        """It goes on to those who have its model now; to nobody if its key may not use it any more."""
        snapshot, principal, model = self._snapshot, route.exchange.principal, route.lane.model
        try:
            found = None if snapshot is None or principal is None else snapshot.model(principal, model.name)
        except SnapshotError:
            found = None
        if snapshot is None or found is None:
            route.lane = Lane(self, model, (), route.lane.policy_name, self._lines.setdefault((), Line(())))
            return
        lane = self._lanes.get(found.name)
        if lane is None:
            lane = self._lanes[found.name] = self._lane(found, snapshot)
        route.lane = lane

    def learn(self, loads: Mapping[str, EngineLoad], now_ns: int) -> None:
        """What engines say of themselves. One that was started anew has an empty cache, and is asked how it is at once."""
        for name, standing in self.standings.items():
            load = loads.get(name)
            if load is None:
                standing.others = standing.others_requests = 0
                continue
            if load.started_unix_s != standing.started_unix_s:
                if standing.started_unix_s is not None:
                    self.restarted(standing)
                    standing.health.hurry(now_ns)
                standing.started_unix_s = load.started_unix_s
            # It said so up to two seconds ago: who has gone since is still in it. What it has of others it has twice in a row.
            before, standing.others_requests = standing.others_requests, load.running + load.waiting - standing.in_flight
            others = max(0, min(before, standing.others_requests))
            # What has to be given up for want of room is computed again.
            lost = max(0.0, load.kv_usage - FULL_CACHE) / (1 - FULL_CACHE) * standing.tokens
            standing.others = others * OTHERS_TOKENS + int(lost)

    def model_of(self, standing: Standing) -> Model | None:
        """What a probe may ask it for: what it answered last, or else its first model; None if the catalogue has none of it."""
        models = {} if self._snapshot is None else self._snapshot.models
        if standing.served is not None and (model := models.get(standing.served[1])) is not None:
            return model
        return next((model for model in models.values() if standing.name in model.backends), None)

    def restarted(self, standing: Standing) -> None:
        """Its cache is empty."""
        self._prefixes.leave(standing.bit)
        standing.bit = self._prefixes.enter()

    def changed(self) -> None:
        """A backend has become usable, or unusable."""
        self._version += 1

    # -- inside --

    def _lane(self, model: Model, snapshot: Snapshot) -> Lane:
        backends = [backend for name in model.backends if (backend := snapshot.backends.get(name)) is not None]
        standings = [self._standing(backend) for backend in backends]
        line = self._lines.setdefault(tuple(each.name for each in standings), Line(standings))
        return Lane(self, model, standings, model.policy or self._settings.routing.policy, line)

    def _standing(self, backend: Backend) -> Standing:
        standing = self.standings.get(backend.name)
        if standing is None:
            standing = Standing(backend, Health(self._settings.health), self._prefixes.enter())
            self.standings[backend.name] = standing
            self._describe(standing, backend)
        return standing

    def _describe(self, standing: Standing, backend: Backend) -> None:
        if (backend.host, backend.port, backend.base_path) != standing.address:
            standing.health = Health(self._settings.health)
            self.restarted(standing)
        standing.backend = backend
        standing.drained = backend.drained
        self._weigh(standing, monotonic_ns())

    def _weigh(self, standing: Standing, now_ns: int) -> None:
        backend = standing.backend
        part = standing.part = standing.health.part(now_ns)
        weight = backend.weight * part
        if weight != standing.weight:
            standing.weight = weight
            self.changed()
        depth = backend.depth
        if part < 1.0:
            depth = math.ceil((depth or SLOW_DEPTH) * part)
        standing.depth = max(1, depth // self._settings.workers) if depth else UNBOUNDED
        standing.prefill_depth = max(1, backend.prefill_tokens // self._settings.workers)

    def _choose(self, route: Route, candidates: list[Standing]) -> Standing:
        lane, record = route.lane, route.exchange.record
        policy = lane.policy
        scores = policy.scores(route, candidates)
        best = min(scores)
        at = scores.index(best)
        if at <= lane.last and scores.count(best) > 1 and best in (after := scores[lane.last + 1 :]):
            at = lane.last + 1 + after.index(best)
        lane.last = at
        standing = candidates[at]
        why = policy.why(route, standing, best)
        record.routed_by = lane.reasons.get(why) or lane.reasons.setdefault(why, f"{lane.policy_name}.{why}")
        if len(scores) > MOST_SCORES:
            shown = slice(max(0, at + 1 - MOST_SCORES), max(MOST_SCORES, at + 1))
            candidates, scores = candidates[shown], scores[shown]
        record.scores = [(each.name, int(score)) for each, score in zip(candidates, scores)]  # noqa: B905  (it takes time)
        policy.chosen(standing)
        return standing
