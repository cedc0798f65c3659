"""Which periods are summed. (What the sums are: tests/unit/spend, and the ledger's sink.)"""

from __future__ import annotations

import pytest

from collectors.records.spent import Spent
from proxy.journal import Checkpoint
from proxy.settings import Settings
from proxy.spend import Amounts, Period
from proxy.spend.file import PeriodWindows, Row, WindowRows
from proxy.spend.tally import QUARTER_NS, Who
from proxy.spend.windows import periods_of
from tests.unit.collectors.made import DAY, make_record

DAY_NS = 96 * QUARTER_NS


def test_every_period_that_somebody_has_a_budget_for() -> None:
    settings = Settings.of(
        {
            "everyone": {"budgets": [{"money": 5, "per": "day"}, {"tokens": 5, "per": "day"}]},
            "teams": {"red": {"budgets": [{"gpu_seconds": 5, "per": "week", "time_zone": "Asia/Kathmandu"}]}, "blue": {}},
            "keys": {"alice": {"budgets": [{"money": 5, "per": "total", "soft": True}]}, "bob": {"requests_per_minute": 5}},
        }
    )
    assert periods_of(settings) == [Period("day"), Period("total"), Period("week", "Asia/Kathmandu")]
    assert periods_of(Settings()) == []


def test_without_budgets_there_is_a_position_and_nothing_else() -> None:
    spent = Spent([], "USD", Checkpoint())
    spent.add([make_record(1)], Checkpoint({"segment": 5}))
    assert spent.file(DAY).periods == []
    assert spent.file(DAY).checkpoint == Checkpoint({"segment": 5})


def test_the_ledger_is_asked_for_the_windows_that_may_have_something() -> None:
    """The one before, the current one, and those after it in which there is something."""
    asked = list[tuple[int, int]]()

    def sums(since: int, until: int) -> list[tuple[Who, Amounts]]:
        asked.append((since, until))
        return [(("w", "key_1", "", "ann", "p"), Amounts(1, 2, 3))] * 2 if since == DAY else []

    def first(since: int) -> int | None:
        return next((at for at in (DAY + 5, DAY + 9 * DAY_NS + 5) if at >= since), None)

    spent = Spent([Period("day")], "USD", Checkpoint())
    spent.read(sums, first, DAY + 7)
    assert asked == [(DAY - DAY_NS, DAY), (DAY, DAY + DAY_NS), (DAY + 9 * DAY_NS, DAY + 10 * DAY_NS)]
    rows = [Row("w", "key_1", "", 2, 4, 6, "ann", "p")]
    assert spent.file(DAY).periods == [PeriodWindows("day", "UTC", DAY - DAY_NS, [WindowRows(DAY, rows)])]


@pytest.mark.parametrize("times", [1, 2])
def test_what_was_added_is_added_once(times: int) -> None:
    spent = Spent([Period("total")], "USD", Checkpoint())
    spent.add([make_record(1, worker="w")], Checkpoint())
    for _ in range(times):
        [period] = spent.file(DAY).periods
    assert period.windows == [WindowRows(0, [Row("w", "key_1", "", 30_000, 605, 0)])]
