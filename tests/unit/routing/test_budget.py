"""How many tries again there are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.budget import FLOOR, RetryBudget

S = 1_000_000_000
START = 1_000 * S


def taken(budget: RetryBudget, now_ns: int, most: int = 1000) -> int:
    return next((number for number in range(most) if not budget.take(now_ns)), most)


def test_a_few_there_always_are() -> None:
    assert taken(RetryBudget(), START) == FLOOR


def test_a_fifth_of_many() -> None:  # failure 51
    budget, again = RetryBudget(), 0
    for _ in range(10_000):
        budget.requests += 1
        again += budget.take(START)
    assert 10_000 / 5 <= again <= 10_000 / 5 + FLOOR


def test_after_a_quiet_while_a_few_are_back_and_not_more() -> None:
    budget = RetryBudget()
    taken(budget, START)
    assert taken(budget, START + 3 * S) == 3
    assert taken(budget, START + 3600 * S) == FLOOR


def test_what_was_saved_is_bounded() -> None:
    budget = RetryBudget()
    for _ in range(100_000):
        budget.requests += 1
    assert taken(budget, START) == 10 * FLOOR


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5 * S)), max_size=50))
def test_never_more_than_a_fifth_the_floor_and_one_a_second(steps: list[tuple[int, int, int]]) -> None:
    budget, now, requests, again = RetryBudget(), START, 0, 0
    for asked, failed, passed_ns in steps:
        now += passed_ns
        for _ in range(asked):
            budget.requests += 1
        requests += asked
        again += sum(budget.take(now) for _ in range(failed))
        assert again <= requests / 5 + FLOOR + (now - START) / S + 1e-6
