"""Prices are exact, or rounded once, half to even."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.control.rates import per_million_tokens, pico_per_token


@pytest.mark.parametrize(
    ("price", "pico"),
    [
        ("0", 0),
        ("1", 1_000_000),
        ("0.05", 50_000),
        ("0.000001", 1),
        ("1000000", 1_000_000_000_000),
        ("0.0000005", 0),  # half: to even
        ("0.0000015", 2),
        ("0.0000025", 2),
        ("0.00000250000000000000000000000000000001", 3),  # more digits than Decimal's arithmetic keeps
        ("1E-400", 0),
    ],
)
def test_per_million_to_pico(price: str, pico: int) -> None:
    assert pico_per_token(Decimal(price)) == pico


@given(st.integers(0, 10**12))
def test_back_and_forth(pico: int) -> None:
    text = per_million_tokens(pico)
    assert "E" not in text
    assert pico_per_token(Decimal(text)) == pico
