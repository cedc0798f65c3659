"""How a key, a user, a project, a team or everyone stands against its limits, as far as this worker knows. Pure: time is passed
in, nothing waits.

Rates are token buckets that hold a minute's worth and fill evenly, kept as GCRA does: one number, the time at which the bucket
will be full again. Budgets are kept by window (a day, a month): what this worker incarnation spent and has set aside in it, and
what is known of everybody else. Concurrency is a count.

With Redis these are its mirror: what it said last, and what it is to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from proxy.snapshot import Allowance, Budget
from proxy.spend.windows import Period
from proxy.spend.windows import window as window_of

MINUTE = 60.0
_ROUNDING = 1e-4
"""Seconds by which the sum of many fractions may miss."""


class Kind(IntEnum):
    """What a bucket counts; the index of its amount in `Amounts`."""

    REQUESTS = 0
    INPUT = 1
    OUTPUT = 2
    TOKENS = 3

    @property
    def limit_name(self) -> str:
        return LIMIT_NAMES[self]


LIMIT_NAMES = ("requests_per_minute", "input_tokens_per_minute", "output_tokens_per_minute", "tokens_per_minute")
_UNITS = ("money", "tokens", "gpu_seconds")
"""What a budget counts; the index of its amount in `Costs`."""

Amounts = tuple[int, int, int, int]
"""By `Kind`: 1, input, output and all tokens."""
Costs = tuple[int, int, int]
"""By unit: nano-units of money, tokens, ns of a GPU."""


class Bucket:
    """So many per minute. `full_at`: when it will be full again (monotonic seconds); before now: it is."""

    __slots__ = ("each_second", "full_at", "kind", "limit", "owed", "seconds_each")

    def __init__(self, kind: Kind, limit: int) -> None:
        self.kind = int(kind)  # it is an index many times a request, and of plain integers the interpreter knows that at once
        self.limit = limit
        self.seconds_each = MINUTE / limit
        self.each_second = limit / MINUTE
        self.full_at = 0.0
        self.owed = 0
        """Taken (or, if negative, given back) since Redis was last told."""

    @property
    def limit_name(self) -> str:
        return LIMIT_NAMES[self.kind]

    def remaining(self, now: float) -> int:
        """What may be taken now."""
        return min(self.limit, max(0, int((MINUTE - max(0.0, self.full_at - now) + _ROUNDING) / self.seconds_each)))


class Window:
    """One period of a budget. Whoever holds something of it keeps it, so that what ends after its end is still booked in it."""

    __slots__ = ("account", "elsewhere", "end_ns", "known", "reserved", "spent", "start_ns")

    def __init__(self, account: Account, start_ns: int, end_ns: int) -> None:
        self.account = account
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.spent = 0
        """By this incarnation; it only grows."""
        self.reserved = 0
        """By this incarnation, for requests under way."""
        self.elsewhere = 0
        """Spent and reserved by all others, as far as known."""
        self.known = 0
        """Spent and reserved by this incarnation when that was learned."""

    def used_up_before(self, reserved: int) -> bool:
        """There is a soft budget, and nothing was left of it before so much was set aside."""
        return 0 <= self.account.soft <= self.elsewhere + self.spent + self.reserved - reserved

    def room(self, amount: int, parts: int) -> int:
        """What may still be set aside: all that is left or, while nobody knows of the others, this worker's part of what was left
        when they were last heard of."""
        own = self.spent + self.reserved
        if parts == 1:
            return amount - self.elsewhere - own
        return (amount - self.elsewhere - self.known) // parts - (own - self.known)


class Account:
    """The budgets of one unit and period: the tightest hard one and the tightest soft one; -1 where there is none."""

    __slots__ = ("_enter", "_former", "hard", "period", "soft", "standing", "unit", "window")

    def __init__(self, standing: Standing, unit: int, period: Period, enter: Callable[[Window], None]) -> None:
        self.standing = standing
        self.unit = unit
        self.period = period
        self.hard = -1
        self.soft = -1
        self.window = self._former = Window(self, 0, 0)
        self._enter = enter

    @property
    def unit_name(self) -> str:
        return _UNITS[self.unit]

    @property
    def name(self) -> str:
        """Of its place in Redis."""
        return f"{self.unit_name}:{self.period.per}:{self.period.time_zone}"

    def take_over(self, former: Account) -> None:
        """Go on with what another one has counted."""
        self.window, self._former = former.window, former._former
        self.window.account = self._former.account = self

    def at(self, unix_ns: int) -> Window:
        """The window of that time."""
        current = self.window
        if current.start_ns <= unix_ns < current.end_ns:
            return current
        former, self._former = self._former, current
        if former.start_ns <= unix_ns < former.end_ns:  # a clock was set back
            self.window = former
            return former
        current = self.window = Window(self, *window_of(self.period, unix_ns))
        self._enter(current)
        return current


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit said no. `wait`: seconds after which it may say yes; None: that depends on others."""

    standing: Standing
    limit: str
    allowed: int
    used: int
    requested: int
    wait: float | None
    account: Account | None = None


class Standing:
    """One key, user, project, team, or everyone. `subject`: its name in Redis; `label`: its name for people."""

    __slots__ = ("accounts", "allowance", "buckets", "concurrent", "elsewhere", "label", "level", "limit", "subject")

    def __init__(self, level: str, subject: str, label: str) -> None:
        self.level = level
        self.subject = subject
        self.label = label
        self.allowance = Allowance()
        self.limit = 0
        """Requests at the same time; 0: any number."""
        self.concurrent = 0
        """Of this incarnation."""
        self.elsewhere = 0
        """Of all others, as far as known."""
        self.buckets: tuple[Bucket, ...] = ()
        self.accounts: tuple[Account, ...] = ()

    def follow(self, allowance: Allowance, enter: Callable[[Window], None]) -> None:
        """Have these limits from now on; what is used of those that stay is kept."""
        if allowance == self.allowance:
            return
        self.allowance = allowance
        self.limit = allowance.concurrent_requests or 0
        self.buckets = tuple(_buckets(allowance, {bucket.kind: bucket for bucket in self.buckets}))
        self.accounts = tuple(self._new_accounts(allowance.budgets, enter))

    def _new_accounts(self, budgets: Iterable[Budget], enter: Callable[[Window], None]) -> Iterable[Account]:
        former = {account.name: account for account in self.accounts}
        accounts: dict[str, Account] = {}
        for budget in budgets:
            made = Account(self, _UNITS.index(budget.unit), Period(budget.per, budget.time_zone), enter)
            account = accounts.setdefault(made.name, made)
            which = "soft" if budget.soft else "hard"
            tightest = getattr(account, which)
            setattr(account, which, budget.amount if tightest < 0 else min(tightest, budget.amount))
        for name, account in accounts.items():
            if name in former:
                account.take_over(former[name])
        return accounts.values()

    @property
    def limits_anything(self) -> bool:
        return bool(self.limit or self.buckets or self.accounts)


def _buckets(allowance: Allowance, former: dict[int, Bucket]) -> Iterable[Bucket]:
    for kind in Kind:
        limit: int | None = getattr(allowance, LIMIT_NAMES[kind])
        if limit is not None:
            bucket = Bucket(kind, limit)
            if kind in former:
                bucket.full_at, bucket.owed = former[kind].full_at, former[kind].owed
            yield bucket


class Plan:
    """All that one key has to fit into, its standings from the narrowest to the widest, and their parts side by side."""

    __slots__ = ("_settled", "_taken", "accounts", "buckets", "gauges", "requests", "standings", "tokens")

    def __init__(self, standings: Iterable[Standing]) -> None:
        self.standings = tuple(each for each in standings if each.limits_anything)
        self.buckets = tuple(bucket for each in self.standings for bucket in each.buckets)
        requests = [bucket for bucket in self.buckets if bucket.kind == Kind.REQUESTS]
        tokens = [bucket for bucket in self.buckets if bucket.kind != Kind.REQUESTS]
        # What of a bucket never changes stands beside it: a request goes over all of them three times.
        self.requests = tuple((bucket, bucket.each_second) for bucket in requests)
        self.tokens = tuple((bucket, bucket.each_second) for bucket in tokens)
        self._taken = tuple((bucket, bucket.kind, bucket.seconds_each) for bucket in self.buckets)
        self._settled = tuple((bucket, bucket.kind, bucket.seconds_each) for bucket in tokens)
        self.gauges = tuple(each for each in self.standings if each.limit)
        self.accounts = tuple(account for each in self.standings for account in each.accounts)

    def refuse(
        self, amounts: Amounts, costs: Costs, windows: Iterable[Window], now: float, unix_ns: int, parts: int
    ) -> Refusal | None:
        """Take what the request needs of every bucket, if there is room for it everywhere; otherwise nothing, and say where there
        isn't. `windows`: of the accounts, in their order. `parts`: one in so many parts of each limit is ours."""
        for gauge in self.gauges:
            if gauge.concurrent >= (gauge.limit - gauge.elsewhere if parts == 1 else max(1, gauge.limit // parts)):
                return Refusal(gauge, "concurrent_requests", gauge.limit, gauge.limit, 1, None)
        for window in windows:
            account = window.account
            if account.hard >= 0 and window.room(account.hard, parts) < costs[account.unit]:
                return _over_budget(window, costs, unix_ns, parts)
        horizon = now + MINUTE + _ROUNDING
        for bucket, kind, each in self._taken:
            needed = amounts[kind] * each
            if parts != 1:
                needed *= parts
            full_at = bucket.full_at
            if full_at < now:
                full_at = now
            full_at += needed if needed < MINUTE else MINUTE  # more than the bucket holds has to wait until it is full
            if full_at > horizon:
                return self._over_rate(bucket, amounts, full_at - horizon, now, parts)
            bucket.full_at = full_at
        return None

    def settle(self, amounts: Amounts, used: Amounts, parts: int) -> None:
        """Give back to the buckets what was taken too much, or take the rest."""
        for bucket, kind, each in self._settled:
            if parts != 1:
                each *= parts
            taken = amounts[kind] * each
            bucket.full_at += used[kind] * each - (taken if taken < MINUTE else MINUTE)

    def _over_rate(self, refusing: Bucket, amounts: Amounts, wait: float, now: float, parts: int) -> Refusal:
        for bucket in self.buckets:
            if bucket is refusing:
                break
            bucket.full_at -= min(MINUTE, amounts[bucket.kind] * bucket.seconds_each * parts)
        standing = next(each for each in self.standings if refusing in each.buckets)
        used = refusing.limit - refusing.remaining(now)
        return Refusal(standing, refusing.limit_name, refusing.limit, used, amounts[refusing.kind], wait)


def _over_budget(window: Window, costs: Costs, unix_ns: int, parts: int) -> Refusal:
    account = window.account
    room = window.room(account.hard, parts)
    wait = None if account.period.per == "total" else max(0.0, (window.end_ns - unix_ns) / 1e9)
    return Refusal(account.standing, "budget", account.hard, account.hard - room, costs[account.unit], wait, account)
