"""What others than this worker incarnation have spent, set aside and under way, as the journal says: those before it, and one
whose place it is just taking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from proxy.admission.estimate import costs_of, output_tokens
from proxy.exchange import Record
from proxy.snapshot import Model
from proxy.spend.windows import Period

if TYPE_CHECKING:
    from proxy.spend.reader import Spend

EVERYONE = "everyone"


def subjects_of(key_id: str, team: str) -> Iterable[str]:
    """Those whose limits a request of this key is counted against."""
    yield f"key:{key_id}"
    if team:
        yield f"team:{team}"
    yield EVERYONE


class Elsewhere:
    """By subject and window. `own`: the incarnation that isn't among them."""

    def __init__(self, spend: Spend | None = None, own: str = "", models: Mapping[str, Model] | None = None) -> None:
        self._spend = spend
        self._own = own
        self._models = models or {}
        self._spent: dict[tuple[Period, int], dict[str, list[int]]] = {}
        self._open = [] if spend is None else [record for record in spend.open if record.worker != own]
        self._concurrent: dict[str, int] = {}
        for record in self._open:
            for subject in subjects_of(record.key_id, record.team):
                self._concurrent[subject] = self._concurrent.get(subject, 0) + 1

    def concurrent(self, subject: str) -> int:
        return self._concurrent.get(subject, 0)

    def taken(self, subject: str, period: Period, start_ns: int, end_ns: int) -> tuple[int, ...]:
        """Spent and set aside, by unit."""
        spent = self._spent.get((period, start_ns))
        if spent is None:
            spent = self._spent[(period, start_ns)] = self._sum_up(period, start_ns, end_ns)
        return tuple(spent.get(subject, (0, 0, 0)))

    def _sum_up(self, period: Period, start_ns: int, end_ns: int) -> dict[str, list[int]]:
        sums: dict[str, list[int]] = {}
        totals = None if self._spend is None else self._spend.totals(period, start_ns)
        for worker, rows in (totals or {}).items():
            if worker != self._own:
                for (key_id, team), amounts in rows.items():
                    _add(sums, key_id, team, (amounts.cost_nano, amounts.tokens, amounts.gpu_ns))
        for record in self._open:
            if start_ns <= record.received_unix_ns < end_ns:
                _add(sums, record.key_id, record.team, self._reserved(record))
        return sums

    def _reserved(self, record: Record) -> tuple[int, ...]:
        model = self._models.get(record.model, Model(record.model))
        prompt = record.input_tokens or record.request_bytes // 4 + 1
        if model.context_tokens:
            prompt = min(prompt, model.context_tokens)
        return costs_of(prompt, output_tokens(record, model, prompt), model)


def _add(sums: dict[str, list[int]], key_id: str, team: str, amounts: Iterable[int]) -> None:
    amounts = tuple(amounts)
    for subject in subjects_of(key_id, team):
        sum_ = sums.setdefault(subject, [0, 0, 0])
        for unit, amount in enumerate(amounts):
            sum_[unit] += amount
