"""Times, spans, budgets and assignments, as they are typed."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli.values import Assignment, Budget, Decimals, Several, Span, Until, When, nested


def converted(kind: click.ParamType[Any], text: str) -> Any:
    return kind.convert(text, None, None)


def refused(kind: click.ParamType[Any], text: str) -> str:
    with pytest.raises(click.BadParameter) as caught:
        converted(kind, text)
    return caught.value.message


@pytest.mark.parametrize("text", ["24h", "7d"])
def test_before_and_ahead(text: str) -> None:
    now = datetime.now(UTC)
    assert converted(When(), text) < now < converted(Until(), text)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("90s", 90), ("30m", 1800), ("24h", 86_400), ("2w", 1_209_600)])
def test_spans(text: str, seconds: int) -> None:
    assert converted(Span(), text) == seconds


@pytest.mark.parametrize("text", ["", "1", "-1h", "1y", "1.5h", "٣h"])
def test_no_span(text: str) -> None:
    assert "allowed: 0, 90s, 30m, 24h, 7d" in refused(Span(), text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("500 EUR/month", {"money": Decimal(500), "currency": "EUR", "per": "month"}),
        ("0.5 money / day", {"money": Decimal("0.5"), "per": "day"}),
        ("5M tokens/day", {"tokens": 5_000_000, "per": "day"}),
        ("1.25k tokens/total", {"tokens": 1250, "per": "total"}),
        ("3600 gpu_seconds/week", {"gpu_seconds": 3600, "per": "week"}),
        ("1 tokens/day America/New_York soft", {"tokens": 1, "per": "day", "time_zone": "America/New_York", "soft": True}),
        ("1 tokens/day soft", {"tokens": 1, "per": "day", "soft": True}),
        ("1 tokens/fortnight", {"tokens": 1, "per": "fortnight"}),  # the API says what is allowed
    ],
)
def test_budgets(text: str, budget: dict[str, Any]) -> None:
    assert converted(Budget(), text) == budget


@pytest.mark.parametrize("text", ["", "500", "EUR/month", "-5 EUR/month", "5 EUR", "5e3 tokens/day", "5 €/month"])
def test_no_budget(text: str) -> None:
    assert "no budget" in refused(Budget(), text)


@given(st.decimals(min_value=0, max_value=10**9, places=6))
def test_amounts_are_exact(amount: Decimal) -> None:
    assert converted(Budget(), f"{amount:f}M money/day")["money"] == amount * 10**6
    assert converted(Decimals(), f"{amount:f}") == amount


@pytest.mark.parametrize(
    ("text", "assigned"),
    [
        ("expires=null", ("expires", None)),
        ("bounds.n=8", ("bounds.n", 8)),
        ('models=["a"]', ("models", ["a"])),
        ("team=research", ("team", "research")),
        ("name=a=b", ("name", "a=b")),
        ("price.input=0.1", ("price.input", Decimal("0.1"))),
        ("x=", ("x", "")),
        ("x={", ("x", "{")),
        ("x=" + "[" * 5000, ("x", "[" * 5000)),
    ],
)
def test_assignments(text: str, assigned: tuple[str, Any]) -> None:
    assert converted(Assignment(), text) == assigned


@pytest.mark.parametrize("text", ["", "x", "=1"])
def test_no_assignment(text: str) -> None:
    assert "sets nothing; allowed: field=value" in refused(Assignment(), text)


def test_lists() -> None:
    assert converted(Several(), "a, b,,c") == ["a", "b", "c"]
    assert converted(Several(), "") == []


def test_sections() -> None:
    assert nested([("bounds.n", 1), ("bounds.tools", 2), ("team", None)]) == {"bounds": {"n": 1, "tools": 2}, "team": None}
    with pytest.raises(click.UsageError, match=r"bounds\.n: 'bounds' is set beside it"):
        nested([("bounds", 1), ("bounds.n", 2)])
