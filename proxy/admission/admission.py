"""Who has which limits, and a Permit for each request.

A worker decides by what it knows: its own standings, and of others what the journal says. With Redis the decision is made there,
and the standings are its mirror; while it is away each worker keeps to its part of the limits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import reduce
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from proxy.admission.elsewhere import Elsewhere, Own, subject_of
from proxy.admission.estimate import costs_of, input_tokens, output_tokens
from proxy.admission.permit import Permit
from proxy.admission.standing import Costs, Plan, Standing, Window
from proxy.errors import Forbidden, InvalidRequest, PromptTooLong
from proxy.exchange import Exchange
from proxy.reply import Reply
from proxy.snapshot import UNLIMITED, Allowance, Model, Principal, Snapshot
from proxy.spend.windows import Period
from proxy.wire.body import Request
from proxy.wire.operation import FORM, EngineOperation

if TYPE_CHECKING:
    from proxy.admission.shared import Shared


_MOST_KNOWN = 100_000
"""Callers of whom it is remembered what holds for them."""
_MOST_SEEN = 500_000
"""Callers, teams and so on of whom it is remembered that they were here."""
_BEFORE = b""
"""In the place of a request's id: all that had ended."""


class _Known:
    """What holds for one key, for as long as the snapshot says so."""

    __slots__ = ("free", "max_input", "operations", "parameters", "plan", "principal")

    def __init__(self, principal: Principal, levels: list[tuple[str, str, Allowance]], plan: Plan) -> None:
        self.principal = principal
        self.plan = plan
        self.operations = _common(allowance.operations for _, _, allowance in levels)
        self.parameters = frozenset(name for _, _, allowance in levels for name in allowance.engine_parameters)
        self.max_input = min(
            ((allowance.max_input_tokens, level) for level, _, allowance in levels if allowance.max_input_tokens is not None),
            default=None,
            key=itemgetter(0),
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
        self._learned_from: Snapshot | None = None
        self._standings: dict[str, Standing] = {}
        self._seen: set[str] | None = set()
        """Subjects of which somebody was here; None: too many to tell, so everybody may have been."""
        self.periods: set[Period] = set()
        """Those for which somebody who was here has a budget."""
        self._late: dict[tuple[str, str], frozenset[bytes]] = {}
        """Accounts, by subject and name, that came when their subject may have spent something here already; and the requests
        that weren't counted in them: those that were under way then, and `_BEFORE` for what had ended."""

    # -- a request --

    def check_parameters(self, request: Request, principal: Principal, snapshot: Snapshot) -> None:
        """Raises InvalidRequest for what steers an engine from inside (`request.internal`), unless one of the caller's levels
        allows it: with it one could jump the queue, read another's prefixes, or bring an engine down."""
        allowed = self._learn(principal, snapshot).parameters
        for name in request.internal:
            if name not in allowed:
                raise InvalidRequest(
                    f"`{name}` is for whoever runs the engine to set: this key may not.", param=name, code="parameter_not_allowed"
                )

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
            unix_ns = exchange.record.received_unix_ns
            costs = costs_of(prompt, answer, model, unix_ns)
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
        if snapshot is not self._learned_from or len(self._known) >= _MOST_KNOWN:
            self._learned_from = snapshot
            self._known.clear()
        known = self._known.get(principal.key_id)
        if known is None or known.principal != principal:
            levels = snapshot.levels(principal)
            standings = [self._standing(principal, *each) for each in levels]
            plan = Plan([each for each in standings if each is not None])
            known = self._known[principal.key_id] = _Known(principal, levels, plan)
            self._see(subject_of(level, principal.key_id if level == "key" else name) for level, name, _ in levels)
        return known

    def _see(self, subjects: Iterable[str]) -> None:
        if self._seen is not None:
            self._seen.update(subjects)
            if len(self._seen) > _MOST_SEEN:
                self._seen = None

    def _standing(self, principal: Principal, level: str, name: str, allowance: Allowance) -> Standing | None:
        subject = subject_of(level, principal.key_id if level == "key" else name)
        standing = self._standings.get(subject)
        if standing is None:
            if allowance == UNLIMITED:
                return None
            label = f"{level} '{name}'" if name else level
            standing = self._standings[subject] = Standing(level, subject, label)
            standing.elsewhere = self._elsewhere.concurrent(subject)
        if standing.allowance != allowance:
            self._follow(standing, allowance)
        return standing

    def _follow(self, standing: Standing, allowance: Allowance) -> None:
        former = {account.name for account in standing.accounts}
        standing.follow(allowance, self._enter)
        if self._seen is None or standing.subject in self._seen:
            for account in standing.accounts:
                if account.name not in former:
                    account.at(self._now_ns())
                    self._late[standing.subject, account.name] = self._under_way() | {_BEFORE}

    def _under_way(self) -> frozenset[bytes]:
        return frozenset(exchange.record.id for exchange in self.in_flight)

    def _now_ns(self) -> int:
        return time.time_ns() + (0 if self.shared is None else self.shared.clock_offset_ns)

    @property
    def limits_anybody(self) -> bool:
        """Somebody who was here has limits."""
        return bool(self._standings)

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

    @property
    def late(self) -> bool:
        """There is something that was spent here and isn't counted in a budget that came later."""
        return bool(self._late) and not all(uncounted <= self._under_way() for uncounted in self._late.values())

    def catch_up(self, own: Own) -> None:
        """What was spent here up to now, all that has ended included."""
        under_way = self._under_way()
        for (subject, name), uncounted in list(self._late.items()):
            account = next((each for each in self._standings[subject].accounts if each.name == name), None)
            if account is None or self._caught_up(account.window, own):
                self._late[subject, name] = left = frozenset() if account is None else uncounted & under_way
                if not left:
                    del self._late[subject, name]

    def _caught_up(self, window: Window, own: Own) -> bool:
        account = window.account
        spent = own.spent(account.standing.subject, account.period, window.start_ns, window.end_ns)
        if spent is None:
            return False
        if spent[account.unit] > window.spent:
            window.spent = spent[account.unit]
            if self.shared is not None:
                self.shared.changed(account.standing, window)
        return True

    def _enter(self, window: Window) -> None:
        account = window.account
        self.periods.add(account.period)
        taken = self._elsewhere.taken(account.standing.subject, account.period, window.start_ns, window.end_ns)
        window.elsewhere = taken[account.unit]


def _common(allowed: Iterable[tuple[str, ...] | None]) -> frozenset[str] | None:
    """What all of them allow; None: everything."""
    sets = [frozenset(each) for each in allowed if each is not None]
    return reduce(frozenset.intersection, sets) if sets else None
