"""The right to run: what a request holds of all limits that count for it, from admission to its last byte."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from proxy.admission.refusals import error_of, over_budget_line, rate_lines
from proxy.admission.standing import Amounts, Costs, Plan, Refusal, Window

if TYPE_CHECKING:
    from proxy.admission.shared import Shared
    from proxy.exchange import Exchange
    from proxy.reply import Reply


class Permit:
    """`waits`: nobody has decided yet; `decided` is to be awaited then. `close` it in any case, when the record is complete."""

    waits = False
    abandoned = False
    """The client has left before anything was decided."""
    _held = False
    _by_redis = False
    _parts = 1
    _refusal: Refusal | None = None

    def __init__(
        self,
        exchange: Exchange,
        reply: Reply,
        plan: Plan,
        amounts: Amounts,
        costs: Costs,
        windows: tuple[Window, ...],
        shared: Shared | None,
    ) -> None:
        """`windows`: of the plan's accounts, in their order."""
        self._exchange = exchange
        self._reply = reply
        self._shared = shared
        self.plan = plan
        self.amounts = amounts
        self.costs = costs
        self.windows = windows

    # -- deciding --

    def decide(self, parts: int) -> None:
        """At once, by what this worker knows. Raises what the request is refused with."""
        now = self._look(parts)
        self._tell(now)

    async def decided(self) -> None:
        """Until Redis has said, or this worker instead. Raises what the request is refused with, or interrupted."""
        exchange = self._exchange
        await exchange.flow.wait()
        exchange.record.admitted_ns = exchange.elapsed_ns()
        self._tell(time.monotonic())

    def granted(self) -> None:
        """Redis has set it aside."""
        self.waits = False
        if not self.abandoned:
            self._by_redis = True
            self._hold()
            self._exchange.flow.wake()

    def refused(self, refusal: Refusal) -> None:
        """Redis has no room for it."""
        self.waits = False
        if not self.abandoned:
            self._refusal = refusal
            self._exchange.flow.wake()

    def undecided(self, parts: int) -> None:
        """Redis doesn't say: this worker does, for its part of the limits."""
        self.waits = False
        if not self.abandoned:
            self._look(parts)
            self._exchange.flow.wake()

    def _look(self, parts: int) -> float:
        """Decide; → the time for which that holds."""
        now = time.monotonic()
        unix_ns = self._exchange.record.received_unix_ns
        refusal = self.plan.refuse(self.amounts, self.costs, self.windows, now, unix_ns, parts)
        if refusal is None:
            self._hold()
        else:
            self._refusal = refusal
        if parts > 1:
            self._parts = parts
        return now

    def _tell(self, now: float) -> None:
        reply = self._reply
        if self.plan.buckets:
            reply.lines += rate_lines(self.plan, now)
        for window in self.windows:
            if window.used_up_before(self.costs[window.account.unit] if self._held else 0):
                reply.lines += over_budget_line(window)
                self._exchange.record.over_budget = window.account.standing.level
                break
        if self._refusal is not None:
            raise error_of(self._refusal)

    # -- holding --

    def _hold(self) -> None:
        self._held = True
        for gauge in self.plan.gauges:
            gauge.concurrent += 1
        costs = self.costs
        for window in self.windows:
            window.reserved += costs[window.account.unit]

    def close(self) -> None:
        """The request has ended: what was set aside is let go, and what it took is booked."""
        if self.waits:
            self.waits = False
            self.abandoned = True
        if not self._held:
            return
        self._held = False
        plan, costs, record = self.plan, self.costs, self._exchange.record
        used_tokens = record.input_tokens + record.output_tokens
        for gauge in plan.gauges:
            gauge.concurrent -= 1
        if self.windows:
            used = (record.cost_nano, used_tokens, record.gpu_ns)
            for window in self.windows:
                unit = window.account.unit
                window.reserved -= costs[unit]
                window.spent += used[unit]
        amounts = (1, record.input_tokens, record.output_tokens, used_tokens)
        if self._shared is None:
            plan.settle(self.amounts, amounts, self._parts)
        else:
            self._settle_shared(self._shared, amounts)

    def _settle_shared(self, shared: Shared, used: Amounts) -> None:
        """Tell Redis, now or when it is there again. It counts anew what was decided without it."""
        if not shared.up:
            self.plan.settle(self.amounts, used, self._parts)
        else:
            taken = self.amounts
            for bucket in self.plan.buckets:
                kind = bucket.kind
                bucket.owed += used[kind] - (min(taken[kind], bucket.limit) if self._by_redis else 0)
        for standing in self.plan.standings:
            shared.changed(standing)
        for window in self.windows:
            shared.changed(window.account.standing, window)
