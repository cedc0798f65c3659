"""`GET /models`: what may be asked for, where it runs and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter

from proxy.control.discovery import max_model_len
from proxy.control.prices import per_million_tokens
from proxy.control.state import Given, State
from proxy.nouns import ModelSettings
from proxy.snapshot import Model

router = APIRouter()


@dataclass(frozen=True)
class Price:
    """Per million tokens, exact decimal text. `source`: who said so; `row`: the row of the price list that was named."""

    currency: str
    input: str
    cached_input: str
    output: str
    source: Literal["configured", "table", "none"]
    row: str | None


@dataclass(frozen=True)
class ModelCard:
    id: str
    backends: list[str]
    max_model_len: int | None
    price: Price


@dataclass(frozen=True)
class ModelList:
    data: list[ModelCard]
    object: Literal["list"] = "list"


@router.get("/models")
async def models(given: Given) -> ModelList:
    return ModelList([_card(model, given) for model in given.inventory.models().values()])


def _card(model: Model, given: State) -> ModelCard:
    said = given.settings.models.get(model.name, ModelSettings()).price
    price = Price(
        currency=given.settings.currency,
        input=per_million_tokens(model.input_pico),
        cached_input=per_million_tokens(model.cached_input_pico),
        output=per_million_tokens(model.output_pico),
        source="none" if said is None else "configured" if said.from_ is None else "table",
        row=None if said is None else said.from_,
    )
    return ModelCard(model.name, list(model.backends), max_model_len(bytes(model.card)), price)
