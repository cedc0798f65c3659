"""Prices as people write them → prices as rows are charged.

A price of p per million tokens is p·10⁶ pico-units (10⁻¹²) per token. All of it is exact; what isn't a whole number of pico-units
is rounded half to even, once, here.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

_PICO = 1_000_000


def pico_per_token(per_million: Decimal) -> int:
    """Units per million tokens → integer pico-units per token."""
    return round(Fraction(per_million) * _PICO)


def per_million_tokens(pico: int) -> str:
    """The other way, for people: exact, without an exponent."""
    return f"{Decimal(pico).scaleb(-6).normalize():f}"
