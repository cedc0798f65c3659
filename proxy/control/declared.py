"""What holds for keys, users, projects, teams and everyone → what workers know of it.

What the file says of a key without a `hash` is for the key in use that has its name. Where no key has it, it stands for nothing,
most likely because it is spelt differently; the feed tells of that.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from proxy.control.catalogue import Catalogue, holding, laid_over
from proxy.nouns import AllowanceSettings, BudgetSettings, KeySettings, TeamSettings
from proxy.settings import Settings
from proxy.snapshot import FIRST, LAST, NEVER_NS, USUAL, Allowance, Budget, Principal

_NANO = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PRIORITIES = {"high": FIRST, "normal": USUAL, "low": LAST}
_NOTHING = KeySettings()
_EMPTY = Catalogue()


class Declared:
    """`everyone`, `teams`, `users` and `projects` as in the snapshot: the file's, and where that has none the `database`'s."""

    def __init__(self, settings: Settings, database: Catalogue = _EMPTY) -> None:
        self.held = holding(settings, database)
        self.everyone = allowance(self.held.everyone)
        self.teams = {name: allowance(each) for name, each in self.held.teams.items()}
        self.users = {name: allowance(each) for name, each in self.held.users.items()}
        self.projects = {name: allowance(each) for name, each in self.held.projects.items()}
        self._over = {name: each for name, each in settings.keys.items() if each.hash is None}

    def allowances(self) -> list[Allowance]:
        """All of them."""
        return [self.everyone, *self.teams.values(), *self.users.values(), *self.projects.values()]

    def of_key(self, name: str, stored: KeySettings = _NOTHING) -> KeySettings:
        """What holds for the key in use of that name, for which the database has `stored`."""
        over = self._over.get(name)
        return stored if over is None else laid_over(over, stored)

    def principal(self, key_id: str, key_name: str, stored: KeySettings = _NOTHING) -> Principal:
        return principal(key_id, key_name, self.of_key(key_name, stored))

    def again(self, known: Principal) -> Principal:
        """A key of the database of which nothing else is known any more, with what the file now says of it."""
        over = self._over.get(known.key_name)
        if over is None:
            return known
        said = principal(known.key_id, known.key_name, over)
        return msgspec.structs.replace(laid_over(said, known), allowance=laid_over(said.allowance, known.allowance))


def principal(key_id: str, key_name: str, said: KeySettings) -> Principal:
    """Whose key it is and what it may do by itself."""
    if said == _NOTHING:
        return Principal(key_id, key_name)
    return Principal(key_id, key_name, said.team or "", allowance(said), said.user or "", said.project or "")


def allowance(said: AllowanceSettings) -> Allowance:
    """Money in nano-units, GPU time in ns, moments in ns since 1970."""
    return Allowance(
        requests_per_minute=said.requests_per_minute,
        input_tokens_per_minute=said.input_tokens_per_minute,
        output_tokens_per_minute=said.output_tokens_per_minute,
        tokens_per_minute=said.tokens_per_minute,
        concurrent_requests=said.concurrent_requests,
        max_input_tokens=said.max_input_tokens,
        models=said.models,
        operations=said.operations,
        expires_unix_ns=0 if said.expires is None else unix_ns(said.expires),
        budgets=tuple(map(_budget, said.budgets)),
        blocked=isinstance(said, TeamSettings) and said.blocked,
        priority=_PRIORITIES[said.priority],
        cache=said.cache or "",
        engine_parameters=said.engine_parameters,
    )


def unix_ns(moment: datetime) -> int:
    """Exact, where a float of seconds would not be. What is over since before 1970 is over: 0 would mean never. What is after
    2262 doesn't come: it has no room in 63 bits."""
    since = moment - _EPOCH
    return min(max(1, (since.days * 86_400 + since.seconds) * _NANO + since.microseconds * 1000), NEVER_NS)


def _budget(said: BudgetSettings) -> Budget:
    if said.money is not None:
        unit, amount = "money", max(1, round(said.money * _NANO))
    elif said.tokens is not None:
        unit, amount = "tokens", said.tokens
    else:
        unit, amount = "gpu_seconds", (said.gpu_seconds or 0) * _NANO
    return Budget(unit, amount, said.per, said.time_zone, said.soft)
