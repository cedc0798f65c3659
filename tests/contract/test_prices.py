"""What a model costs, said by everybody who says it: the settings decide, and nobody says anything else.

What is configured wins over the price list; the list counts only where it is named; a model that nobody said anything about is
free, whatever it is called and whatever kind of server answers for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from collectors.records.phoenix_http import Wire
from collectors.records.phoenix_prices import PhoenixPrices
from proxy.control.app import create_app
from proxy.control.discovery import Answer, Kind
from proxy.control.local import Local
from proxy.pricelist import pricelist
from proxy.settings import Settings
from tests.support.control import state_of
from tests.unit.collectors.receiver import Receiver, receiving

MODEL = "gpt-4o-mini"
LISTED = pricelist().rows[MODEL]
KINDS: tuple[Kind, ...] = ("vllm", "openai")

Said = tuple[str, str, str, str, str | None]
"""Per million tokens: input, cached input, output; then the source, and the row of the price list."""

ROW = tuple(f"{each:f}" for each in (LISTED.input, LISTED.cached_input or LISTED.input, LISTED.output))
OF_LIST: Said = (ROW[0], ROW[1], ROW[2], "table", MODEL)

CASES: dict[str, tuple[dict[str, Any], Said]] = {
    "nothing is said": ({}, ("0", "0", "0", "none", None)),
    "the model is named, its price isn't": ({MODEL: {}}, ("0", "0", "0", "none", None)),
    "another model has a price": ({"m": {"price": {"from": MODEL}}}, ("0", "0", "0", "none", None)),
    "a price of one's own": ({MODEL: {"price": {"input": "3", "output": "5"}}}, ("3", "3", "5", "configured", None)),
    "free, on purpose": ({MODEL: {"price": {}}}, ("0", "0", "0", "configured", None)),
    "the price list": ({MODEL: {"price": {"from": MODEL}}}, OF_LIST),
    "the price list, but for a number": (
        {MODEL: {"price": {"from": MODEL, "cached_input": "0"}}},
        (ROW[0], "0", ROW[2], "table", MODEL),
    ),
    "another row of the price list": (
        {MODEL: {"price": {"from": "text-embedding-3-small"}}},
        ("0.02", "0.02", "0", "table", "text-embedding-3-small"),
    ),
}


@pytest.fixture
def phoenix() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Settings, Said]:
    """The settings, as the processes read them."""
    models, said = CASES[request.param]
    written = {"state_dir": str(tmp_path), "backends": [{"url": "http://gpu", "name": "gpu"}], "models": models}
    Settings.of(written).write(tmp_path / "settings.json")
    return Settings.read(tmp_path / "settings.json"), said


@pytest.mark.parametrize("kind", KINDS)
def test_control_publishes_it_and_tells_who_said_so(case: tuple[Settings, Said], kind: Kind) -> None:
    settings, (price, cached, output, source, row) = case
    state = state_of(settings)
    state.inventory.known["gpu"].answered(Answer(kind, {MODEL: b'{"id":"gpt-4o-mini"}'}), 0)

    model = state.inventory.models(0)[MODEL]
    assert (model.input_pico, model.cached_input_pico, model.output_pico) == tuple(map(pico, (price, cached, output)))

    with TestClient(Local(create_app(state)), base_url="http://127.0.0.1:8401") as client:
        [told] = [each for each in client.get("/models").json()["data"] if each["id"] == MODEL]
        assert client.portal is not None
        client.portal.call(state.database.close)
    state.feed.close()
    assert told["price"] == {
        "currency": "USD",
        "input": price,
        "cached_input": cached,
        "output": output,
        "source": source,
        "row": row,
    }


def test_phoenix_is_told_the_same(case: tuple[Settings, Said], phoenix: Receiver) -> None:
    settings, said = case
    with Wire({}) as wire:
        PhoenixPrices(phoenix.url, wire, lambda: settings.models).sync([MODEL])
    [entry] = [each for each in phoenix.prices if each["name"] == f"{MODEL} (glasshouse)"]
    rates = {cost["tokenType"]: cost["costPerMillionTokens"] for cost in entry["costs"]}
    assert rates == {"input": float(said[0]), "cache_read": float(said[1]), "output": float(said[2])}


def pico(per_million: str) -> int:
    whole, _, rest = per_million.partition(".")
    return int(whole + rest.ljust(6, "0"))
