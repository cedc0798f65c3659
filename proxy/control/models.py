"""`/models`: what may be asked for: what is said of a model, and what the backends say that they serve.

A model that is served needs no settings, and one that has settings need not be served; both are here, and patterns that backends
are declared to serve; aliases aren't. Who is of a team sees the models that the team may use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec
from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import ADMIN, READERS, Caller, allow
from proxy.control.answers import Page, PartOf, Text, answer, documented
from proxy.control.catalogue import Held
from proxy.control.discovery import max_model_len
from proxy.control.rates import per_million_tokens, pico_per_token
from proxy.control.resource import Named, Object, Resource, common, missing
from proxy.control.state import Asking, Given, State
from proxy.errors import InvalidRequest
from proxy.nouns import ModelSettings, PriceSettings
from proxy.pricelist import CURRENCY
from proxy.settings import priced_model
from proxy.snapshot import Model
from proxy.store import MODELS, TEAMS

_WITHOUT_SETTINGS: dict[str, Any] = {"source": None, "created_at": None, "changed_at": None, "settings": ModelSettings()}


class Price(msgspec.Struct, kw_only=True):
    """Per million tokens, exact decimal text. `source`: the settings, a row of the price list that they name, or nobody;
    `row`: which row."""

    currency: str
    input: str
    cached_input: str
    output: str
    source: Literal["configured", "table", "none"]
    row: str | None


class ModelCard(Object, kw_only=True):
    """`served`: some backend has it. `revision`: another one where it may answer otherwise. `price`: what holds now. `source`:
    who has its settings; null: it has none."""

    object: Literal["model"] = "model"
    id: str
    source: Literal["file", "database"] | None  # type: ignore[assignment]  # or none
    served: bool
    backends: list[str]
    max_model_len: int | None
    revision: str | None
    price: Price
    settings: ModelSettings


# -- in a transaction --


def visible(connection: Connection, state: State, caller: Caller) -> Callable[[str], bool]:
    """Whether a model is there for him: for a team that may use some only, no others are."""
    if caller.team is None:
        return lambda name: True
    team = catalogue.one(connection, state.settings, TEAMS, caller.team)
    patterns = None if team is None else team.value.models
    return lambda name: patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(
    connection: Connection, state: State, _: Caller, name: str, value: ModelSettings, _before: ModelSettings | None
) -> ModelSettings:
    """Raises InvalidRequest: an alias stands for two models; a model is its own fallback, or makes embeddings for itself; a price
    list in another currency."""
    if len(set(value.aliases)) != len(value.aliases):
        raise InvalidRequest("aliases: one stands twice", param="aliases")
    if itself := {name, *value.aliases} & set(value.fallbacks):
        raise InvalidRequest(f"fallbacks: {sorted(itself)[0]!r} is the model itself; allowed: others", param="fallbacks")
    semantic = value.cache.semantic
    if semantic is not None and semantic.model in (name, *value.aliases):
        param = "cache.semantic.model"
        raise InvalidRequest(f"{param}: {semantic.model!r} is the model itself; allowed: one that makes embeddings", param=param)
    for other in catalogue.page(connection, state.settings, MODELS):
        if other.name != name and (twice := sorted(set(other.value.aliases) & set(value.aliases))):
            raise InvalidRequest(f"aliases: {twice[0]!r} stands for {other.name!r} already", param="aliases")
    for price in filter(None, (value.price, *value.prices)):
        check_currency(state, price)
    return value


def check_currency(state: State, price: PriceSettings) -> None:
    """Raises InvalidRequest: the price list's is another."""
    if price.from_ is not None and state.settings.currency != CURRENCY:
        raise InvalidRequest(
            f"from: {price.from_!r} has its price in {CURRENCY}, and currency is {state.settings.currency!r}; "
            f"allowed: input, cached_input and output in {state.settings.currency}",
            param="from",
        )


# -- answers --


def valid_price(settings: ModelSettings, now: datetime) -> PriceSettings | None:
    """The price of requests that are received now; None: nobody said one."""
    since = [each for each in settings.prices if each.valid_from <= now]
    return max(since, key=lambda each: each.valid_from) if since else settings.price


def _served(state: State) -> dict[str, Model]:
    """Patterns too."""
    models, patterns = state.inventory.serving(time.time_ns())
    return {name: model for name, model in models.items() if name == model.name} | patterns


def _show(state: State, held: Held[ModelSettings]) -> ModelCard:
    return _card(state, held.name, held, _served(state).get(held.name))


def _card(state: State, name: str, held: Held[ModelSettings] | None, served: Model | None) -> ModelCard:
    fields = _WITHOUT_SETTINGS if held is None else common(held)
    said = valid_price(state.inventory.said_of(name) if held is None else held.value, datetime.now(UTC))
    price = said or PriceSettings()
    return ModelCard(
        **fields | {"name": name},
        id=name,
        served=served is not None,
        backends=[] if served is None else list(served.backends),
        max_model_len=None if served is None else max_model_len(bytes(served.card)),
        revision=None if served is None else served.revision,
        price=Price(
            currency=state.settings.currency,
            input=per_million_tokens(pico_per_token(price.input)),
            cached_input=per_million_tokens(pico_per_token(price.cached)),
            output=per_million_tokens(pico_per_token(price.output)),
            source="none" if said is None else "configured" if said.from_ is None else "table",
            row=None if said is None else said.from_,
        ),
    )


# -- routes --

NAMES = "{name:path}"

router = APIRouter(tags=["models"])


@router.get("/models", summary="List models", **documented(Page[ModelCard]))
@allow(*READERS)
async def several(given: Given, caller: Asking, part: PartOf, containing: Text = "") -> Response:
    served = _served(given)

    def look(connection: Connection) -> list[ModelCard]:
        known = {held.name: held for held in catalogue.page(connection, given.settings, MODELS)}
        is_visible = visible(connection, given, caller)
        wanted = [name for name in sorted(served.keys() | known.keys()) if name > part.after and containing in name]
        shown = [name for name in wanted if is_visible(name)][: part.most]
        return [_card(given, name, known.get(name), served.get(name)) for name in shown]

    return answer(part.page(await given.database.read(look), lambda card: card, lambda card: card.id))


@router.get(f"/models/{NAMES}", summary="One model", **documented(ModelCard))
@allow(*READERS)
async def one(given: Given, caller: Asking, name: Named) -> Response:
    served = _served(given).get(name)

    def look(connection: Connection) -> ModelCard:
        held = catalogue.one(connection, given.settings, MODELS, name)
        if (held is None and served is None) or not visible(connection, given, caller)(name):
            raise missing(MODELS.one, name)
        return _card(given, name, held, served)

    return answer(await given.database.read(look))


def _prepare(body: object) -> object:
    return priced_model("", body)


resource = Resource(MODELS, ModelCard, _show, READERS, ADMIN, _check, _prepare)
router.routes.extend(resource.routes(listed=False, names=NAMES).routes)
