"""Who has which limits, and a Permit for each request.

A worker decides by what it knows: its own standings, and of others what the journal says. With Redis the decision is made there,
and the standings are its mirror; while it is away each worker keeps to its part of the limits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any

from proxy.admission.elsewhere import EVERYONE, Elsewhere
from proxy.admission.estimate import costs_of, input_tokens, output_tokens
from proxy.admission.permit import Permit
from proxy.admission.standing import Costs, Plan, Standing, Window
from proxy.errors import Forbidden, PromptTooLong
from proxy.exchange import Exchange
from proxy.reply import Reply
from proxy.snapshot import UNLIMITED, Allowance, Model, Principal, Snapshot
from proxy.wire.operation import FORM, EngineOperation

if TYPE_CHECKING:
    from proxy.admission.shared import Shared


class _Known:
    """What holds for one key, for as long as the snapshot says so."""

    __slots__ = ("free", "max_input", "operations", "plan", "principal")

    def __init__(self, principal: Principal, levels: list[tuple[str, Allowance]], plan: Plan) -> None:
        self.principal = principal
        self.plan = plan
        self.operations = _common(allowance.operations for _, allowance in levels)
        self.max_input = min(
            ((allowance.max_input_tokens, level) for level, allowance in levels if allowance.max_input_tokens is not None),
            default=None,
        )
        self.free = not plan.standings and self.operations is None and self.max_input is None


class Admission:
    """`in_flight` are the exchanges that were admitted and haven't ended. `incarnation` is this worker's. `shared`: where several
    workers share their limits."""

    def __init__(self, incarnation: str = "", shared: Shared | None = None) -> None:
        self.in_flight: set[Exchange] = set()
        self.incarnation = incarnation
        self.shared = shared
        self.reservations = 0
        """Requests that hold something of a limit."""
        self._elsewhere = Elsewhere()
        self._known: dict[str, _Known] = {}
        self._standings: dict[str, Standing] = {}

    # -- a request --

    def admit(
        self,
        exchange: Exchange,
        principal: Principal,
        operation: EngineOperation[Any],
        model: Model,
        snapshot: Snapshot,
        reply: Reply,
    ) -> Permit | None:
        """The right to run; None where nothing is limited. One that `waits` has to be `decided` yet. To be released in any case.
        Raises Forbidden, PromptTooLong, RateLimited, QuotaExceeded."""
        record = exchange.record
        record.admitted_ns = record.authenticated_ns  # nothing was waited for
        self.in_flight.add(exchange)
        known = self._known.get(principal.key_id)
        if known is None or known.principal is not principal:
            known = self._learn(principal, snapshot)
        if known.free:
            return None
        if known.operations is not None and operation.name not in known.operations:
            raise Forbidden(f"This key may not use {operation.path.decode()}.", code="operation_not_allowed")
        prompt = answer = 0
        if operation.counted:
            if operation.media is not FORM:  # a recording's bytes say nothing of its tokens
                prompt = input_tokens(exchange.body, model)
                if known.max_input is not None and prompt > known.max_input[0]:
                    raise PromptTooLong(prompt, *known.max_input)
            if operation.generates:
                answer = output_tokens(record, model, prompt)
        if not known.plan.standings:
            return None
        return self._permit(exchange, known.plan, prompt, answer, model, reply)

    def _permit(self, exchange: Exchange, plan: Plan, prompt: int, answer: int, model: Model, reply: Reply) -> Permit:
        windows: tuple[Window, ...] = ()
        costs: Costs = (0, 0, 0)
        shared = self.shared
        if plan.accounts:
            costs = costs_of(prompt, answer, model)
            unix_ns = exchange.record.received_unix_ns
            if shared is not None:
                unix_ns += shared.clock_offset_ns
            windows = tuple([account.at(unix_ns) for account in plan.accounts])
        permit = exchange.permit = Permit(exchange, reply, plan, (1, prompt, answer, prompt + answer), costs, windows, shared)
        self.reservations += 1
        if shared is None:
            permit.decide(1)
        elif shared.up:
            permit.waits = True
            shared.ask(permit)
        else:
            permit.decide(shared.parts)
        return permit

    def release(self, exchange: Exchange) -> None:
        """The request has ended and is recorded."""
        self.in_flight.discard(exchange)
        permit = exchange.permit
        if permit is not None:
            exchange.permit = None
            self.reservations -= 1
            permit.close()

    # -- who has which limits --

    def _learn(self, principal: Principal, snapshot: Snapshot) -> _Known:
        levels = [("key", principal.allowance)]
        standings = [self._standing("key", f"key:{principal.key_id}", f"key '{principal.key_name}'", principal.allowance)]
        if principal.team:
            allowance = snapshot.team(principal)
            levels.append(("team", allowance))
            standings.append(self._standing("team", f"team:{principal.team}", f"team '{principal.team}'", allowance))
        levels.append((EVERYONE, snapshot.everyone))
        standings.append(self._standing(EVERYONE, EVERYONE, EVERYONE, snapshot.everyone))
        plan = Plan([each for each in standings if each is not None])
        known = self._known[principal.key_id] = _Known(principal, levels, plan)
        return known

    def _standing(self, level: str, subject: str, label: str, allowance: Allowance) -> Standing | None:
        standing = self._standings.get(subject)
        if standing is None:
            if allowance == UNLIMITED:
                return None
            standing = self._standings[subject] = Standing(level, subject, label)
            standing.elsewhere = self._elsewhere.concurrent(subject)
        standing.follow(allowance, self._enter)
        return standing

    def standings(self) -> list[Standing]:
        """All that have limits here."""
        return list(self._standings.values())

    # -- what others have --

    def learn(self, elsewhere: Elsewhere) -> None:
        """What the journal says of others. With Redis it counts only until that says more."""
        self._elsewhere = elsewhere
        if self.shared is not None and self.shared.up:
            return
        for standing in self._standings.values():
            standing.elsewhere = elsewhere.concurrent(standing.subject)
            for account in standing.accounts:
                self._enter(account.window)

    def _enter(self, window: Window) -> None:
        account = window.account
        taken = self._elsewhere.taken(account.standing.subject, account.period, window.start_ns, window.end_ns)
        window.elsewhere = taken[account.unit]


def _common(allowed: Iterable[tuple[str, ...] | None]) -> frozenset[str] | None:
    """What all of them allow; None: everything."""
    sets = [frozenset(each) for each in allowed if each is not None]
    return reduce(frozenset.intersection, sets) if sets else None
