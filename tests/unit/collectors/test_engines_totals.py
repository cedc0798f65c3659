"""Counters that only go up, of engines whose own begin anew."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from collectors.engines.totals import Totals
from proxy.engines import EngineLoad


def told(prompt: int, generation: int = 0, started: float = 0.0) -> EngineLoad:
    return EngineLoad(prompt_tokens=prompt, generation_tokens=generation, started_unix_s=started)


@pytest.mark.parametrize(
    ("loads", "prompt"),
    [
        ([told(5000, started=1)], 0),  # what was before isn't this process' to count
        ([told(5000, started=1), told(5000, started=1), told(5007, started=1)], 7),
        ([told(100, started=1), told(40, started=2)], 40),
        ([told(100, started=1), told(400, started=2)], 400),  # it has more already than it had before
        ([told(100, started=1), told(110, started=1), told(5, started=2), told(6, started=2)], 10 + 5 + 1),
        ([told(100), told(40)], 40),  # it doesn't say when it was started
        ([told(100, 50), told(100, 10)], 100),  # nor has it less of everything
        ([told(100, started=1), told(110)], 10),  # not to say when it was started is no start
    ],
)
def test_what_was_computed_since_it_was_first_heard_of(loads: Sequence[EngineLoad], prompt: int) -> None:
    totals = Totals()
    for second, load in enumerate(loads):
        totals.hear(load, float(second))
    assert totals.sums["prompt_tokens"] == prompt


def test_everything_is_counted() -> None:
    totals = Totals()
    totals.hear(EngineLoad(0, 0, 0, 1, 2, 9.0, 3, 4), 0)
    totals.hear(EngineLoad(0, 0, 0, 11, 102, 9.0, 1003, 10004), 1)
    assert totals.sums == {"prompt_tokens": 10, "generation_tokens": 100, "prefix_queries": 1000, "prefix_hits": 10000}


def test_a_start_that_is_told_stays_as_it_is() -> None:
    totals = Totals()
    assert [totals.hear(told(count, started=start), 1000.0).started_unix_s for count, start in ((9, 5.5), (1, 7.25))] == [
        5.5,
        7.25,
    ]


def test_a_start_that_is_not_told_is_noticed() -> None:
    totals = Totals()
    heard = [totals.hear(told(count), 1000.0 + second).started_unix_s for second, count in enumerate([5, 6, 2, 3, 1])]
    assert heard == [0, 0, 1002, 1002, 1004]
