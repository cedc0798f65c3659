"""What records cost, added up by quarter of an hour: wherever a day begins, it begins at one, so that sums over any window can be
made of it, and it stays small however many records there were. Pure.

A request counts in the window in which it was received.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from proxy.exchange import Record

QUARTER_NS = 900 * 1_000_000_000
_MOST = 2**63 - 1

Who = tuple[str, str, str, str, str]
"""Worker (an incarnation of the journal), and whose spending it is: as a Holder."""


class Holder(NamedTuple):
    """Key, and the team, user and project that it had then: as the record says, "" for none."""

    key_id: str
    team: str = ""
    user: str = ""
    project: str = ""


def holder_of(record: Record) -> Holder:
    return Holder(record.key_id, record.team, record.user_name, record.project)


class Amounts(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Money in nano-units, tokens (input and output), ns of a GPU's time."""

    cost_nano: int = 0
    tokens: int = 0
    gpu_ns: int = 0


Rows = dict[Who, Amounts]


def bounded(cost_nano: int, tokens: int, gpu_ns: int) -> Amounts:
    """A total is at most what a ledger can hold, whatever an engine claims."""
    return Amounts(min(cost_nano, _MOST), min(tokens, _MOST), min(gpu_ns, _MOST))


def add(rows: Rows, who: Who, more: Amounts) -> None:
    have = rows.get(who)
    if have is None:
        rows[who] = more
    else:
        rows[who] = bounded(have.cost_nano + more.cost_nano, have.tokens + more.tokens, have.gpu_ns + more.gpu_ns)


class Tally:
    """Adds up records. Money counts only in one currency."""

    def __init__(self, currency: str) -> None:
        self._currency = currency
        self._quarters: dict[int, dict[Who, list[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._quarters)

    def add(self, records: Iterable[Record]) -> None:
        currency, quarters = self._currency, self._quarters
        for record in records:
            cost = record.cost_nano if record.currency == currency else 0
            tokens = record.input_tokens + record.output_tokens
            gpu_ns = record.gpu_ns
            if cost or tokens or gpu_ns:
                received = record.received_unix_ns
                rows = quarters.setdefault(received - received % QUARTER_NS, {})
                who = (record.worker, record.key_id, record.team, record.user_name, record.project)
                sums = rows.setdefault(who, [0, 0, 0])
                sums[0] += cost
                sums[1] += tokens
                sums[2] += gpu_ns

    def quarters(self) -> dict[int, Rows]:
        """By the beginning of each quarter of an hour in which something was spent. A copy."""
        return {start: {who: bounded(*sums) for who, sums in rows.items()} for start, rows in self._quarters.items()}
