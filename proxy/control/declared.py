"""What the settings declare for keys, teams and everyone → what workers know of it.

A declaration is for the key in use that has its name. One for a name that no key has stands for nothing, most likely because it
is spelt differently: it is told of.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from proxy.nouns import AllowanceSettings, BudgetSettings
from proxy.settings import Settings
from proxy.snapshot import Allowance, Budget, Principal

_NANO = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Declared:
    """`everyone` and `teams` as in the snapshot; `principal` makes what is there of a key."""

    def __init__(self, settings: Settings) -> None:
        self.everyone = allowance(settings.everyone)
        self.teams = {name: allowance(each) for name, each in settings.teams.items()}
        self._keys = {name: (key.team or "", allowance(key)) for name, key in settings.keys.items()}

    def principal(self, key_id: str, key_name: str) -> Principal:
        return Principal(key_id, key_name, *self._keys.get(key_name, ()))

    def without_key(self, names: Iterable[str]) -> list[str]:
        """The names that are declared and aren't among these, those of the keys in use."""
        return sorted(self._keys.keys() - set(names))


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
        expires_unix_ns=0 if said.expires is None else _unix_ns(said.expires),
        budgets=tuple(map(_budget, said.budgets)),
    )


def _budget(said: BudgetSettings) -> Budget:
    if said.money is not None:
        unit, amount = "money", max(1, round(said.money * _NANO))
    elif said.tokens is not None:
        unit, amount = "tokens", said.tokens
    else:
        unit, amount = "gpu_seconds", (said.gpu_seconds or 0) * _NANO
    return Budget(unit, amount, said.per, said.time_zone, said.soft)


def _unix_ns(moment: datetime) -> int:
    """Exact, where a float of seconds would not be. What is over since before 1970 is over: 0 would mean never."""
    since = moment - _EPOCH
    return max(1, (since.days * 86_400 + since.seconds) * _NANO + since.microseconds * 1000)
