"""Our prices in Phoenix's table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
import requests

from collectors.records.phoenix_http import Wire
from collectors.records.phoenix_prices import PhoenixPrices, PricesRefused
from proxy.nouns import DatedPriceSettings, ModelSettings, PriceSettings
from tests.unit.collectors.receiver import Receiver, receiving


@pytest.fixture
def phoenix() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire({}) as made:
        yield made


def models(**prices: PriceSettings) -> Callable[[], dict[str, ModelSettings]]:
    return lambda: {name: ModelSettings(price=price) for name, price in prices.items()}


QWEN = PriceSettings(input=Decimal("0.1"), cached_input=Decimal("0.02"), output=Decimal("0.4"))


def rates(price: dict[str, object]) -> dict[str, float]:
    costs = price["costs"]
    assert isinstance(costs, list)
    return {f"{cost['kind']} {cost['tokenType']}": cost["costPerMillionTokens"] for cost in costs}


def test_an_entry_a_model(phoenix: Receiver, wire: Wire) -> None:
    prices = PhoenixPrices(phoenix.url, wire, models(qwen=QWEN, flat=PriceSettings(input=Decimal(3), output=Decimal(5))))
    assert prices.sync()
    flat, qwen = phoenix.prices
    assert qwen["name"] == "qwen (glasshouse)"
    assert qwen["provider"] == ""
    assert rates(qwen) == {"PROMPT input": 0.1, "PROMPT cache_read": 0.02, "COMPLETION output": 0.4}
    assert rates(flat)["PROMPT cache_read"] == 3, "cached input costs what input costs, unless said otherwise"


def test_what_is_there_is_left_alone(phoenix: Receiver, wire: Wire) -> None:
    names = [f"model-{number}" for number in range(7)]
    assert PhoenixPrices(phoenix.url, wire, models(qwen=QWEN)).sync(names)
    assert phoenix.mutations == 8
    assert not PhoenixPrices(phoenix.url, wire, models(qwen=QWEN)).sync(names), "found on later pages too"
    assert phoenix.mutations == 8


def test_a_changed_price_is_changed_there(phoenix: Receiver, wire: Wire) -> None:
    PhoenixPrices(phoenix.url, wire, models(qwen=QWEN)).sync()
    dearer = PriceSettings(input=Decimal("0.2"), cached_input=Decimal("0.02"), output=Decimal("0.4"))
    assert PhoenixPrices(phoenix.url, wire, models(qwen=dearer)).sync()
    (price,) = phoenix.prices
    assert rates(price)["PROMPT input"] == 0.2


def test_a_model_without_a_price_costs_nothing_there_either(phoenix: Receiver, wire: Wire) -> None:
    PhoenixPrices(phoenix.url, wire, models()).sync(["gpt-4o"])
    (price,) = phoenix.prices
    assert set(rates(price).values()) == {0.0}


@pytest.mark.parametrize("model", ["qwen3-8b", "org/model:7b.v1+x", "a.b", "a(b", "a|b", "$^"])
def test_a_pattern_means_one_model(phoenix: Receiver, wire: Wire, model: str) -> None:
    PhoenixPrices(phoenix.url, wire, models()).sync([model])
    pattern = re.compile(phoenix.prices[0]["namePattern"])
    assert pattern.search(model)
    assert not any(pattern.search(other) for other in (f"{model}x", f"x{model}", model[:-1], model.replace(".", "x") + "!"))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"not found"),
        (405, b""),
        (200, b'{"data": null, "errors": [{"message": "not allowed"}]}'),
        (200, b'{"errors": "odd"}'),
        (200, b"[]"),
    ],
)
def test_what_has_no_table_for_us_says_so(phoenix: Receiver, wire: Wire, status: int, body: bytes) -> None:
    phoenix.graphql_status, phoenix.graphql_body = status, body
    with pytest.raises(PricesRefused):
        PhoenixPrices(phoenix.url, wire, models(qwen=QWEN)).sync()


@pytest.mark.parametrize("status", [429, 500, 503, 401, 403])
def test_what_may_pass_is_another_thing(phoenix: Receiver, wire: Wire, status: int) -> None:
    phoenix.graphql_status, phoenix.graphql_body = status, b"later"
    with pytest.raises(requests.RequestException):
        PhoenixPrices(phoenix.url, wire, models(qwen=QWEN)).sync()


def test_nobody_there(phoenix: Receiver, wire: Wire) -> None:
    phoenix.stop()
    with pytest.raises(requests.RequestException):
        PhoenixPrices(phoenix.url, wire, models(qwen=QWEN)).sync()
    assert wire.said == "ConnectionError"


def test_a_later_price_is_for_later_spans(phoenix: Receiver, wire: Wire) -> None:
    moments = [datetime(2027, 1, 1, tzinfo=UTC), datetime(2026, 12, 1, 1, tzinfo=timezone(timedelta(hours=1)))]
    later = tuple(DatedPriceSettings(valid_from=each, input=Decimal(at + 1)) for at, each in enumerate(moments))
    said = {"qwen": ModelSettings(price=QWEN, prices=later)}
    assert PhoenixPrices(phoenix.url, wire, lambda: said).sync()
    assert [(price["name"], price["startTime"]) for price in phoenix.prices] == [
        ("qwen (glasshouse)", None),
        ("qwen (glasshouse from 2026-12-01T00:00:00+00:00)", "2026-12-01T00:00:00+00:00"),
        ("qwen (glasshouse from 2027-01-01T00:00:00+00:00)", "2027-01-01T00:00:00+00:00"),
    ]
    patterns = [str(price["namePattern"]) for price in phoenix.prices]
    assert len(set(patterns)) == 3, "no two may be the same"
    assert sorted(patterns, key=len) == patterns, "of those that match, the longer counts"
    for pattern in patterns:
        assert re.search(pattern, "qwen")
        assert not re.search(pattern, "qwen2")
    assert not PhoenixPrices(phoenix.url, wire, lambda: said).sync()


def test_a_later_price_that_is_taken_back_goes(phoenix: Receiver, wire: Wire) -> None:
    later = DatedPriceSettings(valid_from=datetime(2027, 1, 1, tzinfo=UTC), input=Decimal(1))
    PhoenixPrices(phoenix.url, wire, lambda: {"qwen": ModelSettings(prices=(later,))}).sync()
    assert PhoenixPrices(phoenix.url, wire, lambda: {"qwen": ModelSettings()}).sync()
    assert [price["name"] for price in phoenix.prices] == ["qwen (glasshouse)"]
