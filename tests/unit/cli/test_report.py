"""Money is exact, cells are harmless, columns line up."""

from __future__ import annotations

import csv
import io
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli.report import csv_text, moment, money, printable, table


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "0.00"),
        (132_000, "0.000132"),
        (1, "0.000000001"),
        (1_500_000_000, "1.50"),
        (12_000_000_000, "12.00"),
        (-132_000, "-0.000132"),
        (2**63 - 1, "9223372036.854775807"),
    ],
)
def test_money(nano: int, text: str) -> None:
    assert money(nano) == text


@given(st.integers())
def test_money_is_exact(nano: int) -> None:
    digits = money(nano).replace(".", "")
    point = len(money(nano)) - money(nano).index(".") - 1
    assert int(digits) * 10 ** (9 - point) == nano
    assert Decimal(money(nano)).as_tuple().exponent in range(-9, -1)


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])  # failure 78
def test_no_formula_in_csv(cell: str) -> None:
    [[head], [value]] = csv.reader(io.StringIO(csv_text([cell], [[cell]]), newline=""))
    assert head == value == f"'{cell}"


def test_other_cells_stay_as_they_are() -> None:
    row = ["a,b", 'quote "', "line\nbreak", "0=1", -5, None]
    assert csv_text(["h"], [row]) == 'h\r\n"a,b","quote ""","line\nbreak",0=1,-5,\r\n'


@pytest.mark.parametrize(
    ("text", "shown"),
    [("Zoë", "Zoë"), ("\x1b[31m", r"\x1b[31m"), ("a\r\nb", r"a\r\nb"), ("\u202e", r"\u202e"), ("\ud800", r"\ud800")],
)
def test_nothing_for_the_terminal(text: str, shown: str) -> None:  # failure 78
    assert printable(text) == shown


def test_a_table() -> None:
    lines = table(["NAME", "N"], [["a", 5], ["long name", 12345], ["\x1b", None]]).splitlines()
    assert lines[1:] == ["a              5", "long name  12345", r"\x1b"]
    assert "NAME" in lines[0]


def test_a_table_without_rows() -> None:
    assert len(table(["NAME", "N"], []).splitlines()) == 1


def test_moments() -> None:
    assert moment(1_795_176_000_999_999_999) == "2026-11-20T12:00:00Z"
    assert moment(None) == ""
