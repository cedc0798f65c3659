"""What others than this worker incarnation have spent, set aside and under way, as the journal says: those before it, and one
whose place it is just taking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from proxy.admission.estimate import costs_of, output_tokens
from proxy.exchange import Record
from proxy.snapshot import Model
from proxy.spend.tally import Holder, holder_of
from proxy.spend.windows import Period

if TYPE_CHECKING:
    from proxy.spend.reader import Spend


def subject_of(level: str, name: str = "") -> str:
    """Whose limits these are, in one word. Of everyone there is one."""
    return f"{level}:{name}" if name else level


def subjects_of(holder: Holder) -> Iterable[str]:
    """Those whose limits a request is counted against."""
    yield subject_of("key", holder.key_id)
    if holder.user:
        yield subject_of("user", holder.user)
    if holder.project:
        yield subject_of("project", holder.project)
    if holder.team:
        yield subject_of("team", holder.team)
    yield subject_of("everyone")


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
            for subject in subjects_of(holder_of(record)):
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
                for holder, amounts in rows.items():
                    _add(sums, holder, (amounts.cost_nano, amounts.tokens, amounts.gpu_ns))
        for record in self._open:
            if start_ns <= record.received_unix_ns < end_ns:
                _add(sums, holder_of(record), self._reserved(record))
        return sums

    def _reserved(self, record: Record) -> tuple[int, ...]:
        model = self._models.get(record.model, Model(record.model))
        prompt = record.input_tokens or record.request_bytes // 4 + 1
        if model.context_tokens:
            prompt = min(prompt, model.context_tokens)
        return costs_of(prompt, output_tokens(record, model, prompt), model, record.received_unix_ns)


class Own:
    """What this incarnation itself has spent, as the journal says: `spend` at a look, and `since` then."""

    def __init__(self, spend: Spend, incarnation: str, since: Iterable[Record]) -> None:
        self._spend = spend
        self._incarnation = incarnation
        self._since = [record for record in since if record.worker == incarnation]
        self._spent: dict[tuple[Period, int], dict[str, list[int]] | None] = {}

    def spent(self, subject: str, period: Period, start_ns: int, end_ns: int) -> tuple[int, ...] | None:
        """By unit; None: it isn't known."""
        window = (period, start_ns)
        if window not in self._spent:
            self._spent[window] = self._sum_up(period, start_ns, end_ns)
        spent = self._spent[window]
        return None if spent is None else tuple(spent.get(subject, (0, 0, 0)))

    def _sum_up(self, period: Period, start_ns: int, end_ns: int) -> dict[str, list[int]] | None:
        totals = self._spend.totals(period, start_ns)
        if totals is None:
            return None
        sums: dict[str, list[int]] = {}
        for holder, amounts in totals.get(self._incarnation, {}).items():
            _add(sums, holder, (amounts.cost_nano, amounts.tokens, amounts.gpu_ns))
        for record in self._since:
            if start_ns <= record.received_unix_ns < end_ns:
                _add(sums, holder_of(record), (record.cost_nano, record.input_tokens + record.output_tokens, record.gpu_ns))
        return sums


def _add(sums: dict[str, list[int]], holder: Holder, amounts: Iterable[int]) -> None:
    amounts = tuple(amounts)
    for subject in subjects_of(holder):
        sum_ = sums.setdefault(subject, [0, 0, 0])
        for unit, amount in enumerate(amounts):
            sum_[unit] += amount
