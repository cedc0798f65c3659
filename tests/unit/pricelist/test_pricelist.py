"""The price list that is in the tree."""

from __future__ import annotations

from decimal import Decimal

import pytest

from proxy.control.rates import pico_per_token
from proxy.nouns import PriceSettings
from proxy.pricelist import FILE, PriceList, Row, parse, pricelist, render

LISTED = pricelist()


def test_it_is_what_the_command_writes() -> None:
    assert FILE.read_text(encoding="utf-8") == render(LISTED)
    assert LISTED.source.startswith("litellm ")
    assert len(LISTED.rows) > 1000


def test_every_price_is_a_whole_number_of_pico_units() -> None:
    for model, row in LISTED.rows.items():
        price = PriceSettings(input=row.input, cached_input=row.cached_input, output=row.output)  # what is no price raises
        for each in (price.input, price.cached, price.output):
            assert Decimal(pico_per_token(each)).scaleb(-6) == each, model
        assert price.input or price.output, model


def test_every_row_is_a_line_of_its_own() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(LISTED.rows)
    assert [*LISTED.rows] == sorted(LISTED.rows)


def test_prices_as_the_providers_publish_them() -> None:
    """After a refresh: does their page say something else now?"""
    assert LISTED.rows["gpt-4o-mini"] == Row("openai", Decimal("0.15"), Decimal("0.075"), Decimal("0.6"))
    assert LISTED.rows["claude-haiku-4-5"] == Row("anthropic", Decimal(1), Decimal("0.1"), Decimal(5), ("cache-write",))
    assert LISTED.rows["text-embedding-3-small"].input == Decimal("0.02")


def test_there_and_back() -> None:
    rows = {
        'b, "quoted"': Row("p", Decimal("0.000001"), None, Decimal(1_000_000), ("above-200k", "audio")),
        "a": Row("q", Decimal(0), Decimal(0), Decimal("1E+1")),
    }
    text = render(PriceList("litellm 9", rows))
    assert parse(text) == PriceList("litellm 9", rows)
    assert text.splitlines()[2:] == ["a,q,0,0,10,", '"b, ""quoted""",p,0.000001,,1000000,above-200k audio']


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model,provider,input,cached_input,output,besides\n",
        "# litellm 9: x\nmodel,provider,input,output\n",
        "# litellm 9: x\nmodel,provider,input,cached_input,output,besides\na,p,1,,\n",
        "# litellm 9: x\nmodel,provider,input,cached_input,output,besides\na,p,1,,x,\n",
        "# litellm 9: x\nmodel,provider,input,cached_input,output,besides\na,p,1,,2,,\n",
    ],
)
def test_what_is_no_price_list(text: str) -> None:
    with pytest.raises(ValueError, match="price list"):
        parse(text)


def test_what_may_have_been_meant() -> None:
    row = Row("p", Decimal(1), None, Decimal(1))
    prices = PriceList("x", dict.fromkeys(["cloud/llama-3", "llama-2-chat", "gpt-4o"], row))
    assert prices.alike("llama-3") == ["cloud/llama-3"], "the model itself, before one that is spelt alike"
    assert prices.alike("gpt4o") == ["gpt-4o"]
    assert prices.alike("zzz") == []
