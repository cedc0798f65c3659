"""What a request costs: integers, rounded once."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.accounting import price
from proxy.exchange import Record
from proxy.snapshot import LaterPrice, Model


def cost(tokens: tuple[int, int, int], prices: tuple[int, int, int]) -> int:
    """(input, cached, output) tokens at (input, cached, output) pico-units."""
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    record.input_tokens, record.cached_tokens, record.output_tokens = tokens
    price(record, Model("m", (), *prices), "EUR")
    assert record.currency == "EUR"
    return record.cost_nano


@pytest.mark.parametrize(
    ("tokens", "prices", "nano"),
    [
        ((0, 0, 0), (100_000, 20_000, 400_000), 0),
        ((31, 0, 8), (100_000, 20_000, 400_000), 3100 + 3200),
        ((100, 40, 0), (100_000, 20_000, 400_000), 6000 + 800),
        ((100, 100, 0), (100_000, 0, 400_000), 0),
        ((100, 100, 0), (100, 300, 0), 30),  # cached may even cost more
        ((8, 0, 0), (20_000, 20_000, 0), 160),  # an embedding of eight tokens at 0.02 per million is not nothing
        ((1, 0, 0), (499, 0, 0), 0),
        ((1, 0, 0), (500, 0, 0), 1),
        ((3, 0, 1), (400, 0, 300), 2),  # 1.5 rounded once, not 3 x 0.4 and 0.3
    ],
)
def test_what_it_costs(tokens: tuple[int, int, int], prices: tuple[int, int, int], nano: int) -> None:
    assert cost(tokens, prices) == nano


_prices = st.integers(0, 10**12)


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.tuples(_prices, _prices, _prices))
def test_it_is_exact_and_rounded_once(fresh: int, cached: int, output: int, prices: tuple[int, int, int]) -> None:
    exact = Fraction(fresh * prices[0] + cached * prices[1] + output * prices[2], 1000)
    nano = cost((fresh + cached, cached, output), prices)
    assert type(nano) is int
    assert abs(nano - exact) <= Fraction(1, 2)
    if exact.denominator == 1:
        assert nano == exact


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20), st.tuples(_prices, _prices))
def test_a_sum_of_rows_is_off_by_half_a_nano_each_at_most(rows: list[tuple[int, int]], prices: tuple[int, int]) -> None:
    made = (prices[0], prices[0], prices[1])
    total = sum(cost((fresh, 0, output), made) for fresh, output in rows)
    exact = Fraction(sum(fresh * prices[0] + output * prices[1] for fresh, output in rows), 1000)
    assert abs(total - exact) <= Fraction(len(rows), 2)


LATER = (LaterPrice(1_000, 10_000, 1_000, 20_000), LaterPrice(2_000, 0, 0, 0), LaterPrice(2_001, 7_000, 7_000, 0))


@pytest.mark.parametrize(
    ("received", "nano"),
    [
        (0, 5 * 100 + 1 * 20 + 2 * 400),
        (999, 5 * 100 + 1 * 20 + 2 * 400),
        (1_000, 5 * 10 + 1 * 1 + 2 * 20),
        (1_999, 5 * 10 + 1 * 1 + 2 * 20),
        (2_000, 0),
        (2_001, 6 * 7),
        (2**62, 6 * 7),
    ],
)
def test_it_costs_what_was_valid_when_it_was_received_to_the_nanosecond(received: int, nano: int) -> None:
    record = Record(b"i" * 16, b"t" * 16, 1, received, input_tokens=6, cached_tokens=1, output_tokens=2)
    price(record, Model("m", (), 100_000, 20_000, 400_000, later_prices=LATER), "EUR")
    assert record.cost_nano == nano
