"""`/prices`: what models cost, and from when on. A price is its model's: known by the model's name and the moment from which it
holds, or `always` for what holds before any of these."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue, models
from proxy.control.access import ADMIN, READERS, Caller, allow
from proxy.control.answers import MaybeText, Page, PartOf, answer, documented
from proxy.control.bodies import body_of
from proxy.control.catalogue import Held
from proxy.control.resource import missing
from proxy.control.state import Asking, Given, State
from proxy.control.writes import REPLAYED, Signed
from proxy.errors import InvalidRequest
from proxy.nouns import DatedPriceSettings, ModelSettings, PriceSettings
from proxy.settings import filled_price
from proxy.store import MODELS, Author, lock

ALWAYS = "always"
_EARLIEST = datetime.min.replace(tzinfo=UTC)

router = APIRouter(tags=["prices"])
PATH = f"/prices/{models.NAMES.replace('name', 'model')}/{{valid_from}}"


def _prepare(body: Any) -> Any:
    return filled_price("", body)


class ModelPrice(msgspec.Struct, kw_only=True):
    """Per million tokens, in `currency`. `valid_from` null: before any other. `valid`: it is the one that holds now. `row`: the
    row of the price list that was named."""

    object: Literal["price"] = "price"
    model: str
    valid_from: datetime | None
    valid: bool
    source: Literal["file", "database"]
    currency: str
    input: str
    cached_input: str
    output: str
    row: str | None


class RemovedPrice(msgspec.Struct, kw_only=True):
    object: Literal["price"] = "price"
    model: str
    valid_from: datetime | None
    deleted: Literal[True] = True


def _moment(
    valid_from: Annotated[str, Path(description=f"A time with its zone, such as 2026-12-01T00:00:00+01:00, or `{ALWAYS}`.")],
) -> datetime | None:
    if valid_from == ALWAYS:
        return None
    try:
        moment = datetime.fromisoformat(valid_from)
        if moment.tzinfo is not None:
            return DatedPriceSettings(valid_from=moment).valid_from.astimezone(UTC)
    except ValueError:
        pass
    raise InvalidRequest(
        f"valid_from: {valid_from!r} is no time; allowed: one with its zone, such as 2026-12-01T00:00:00+01:00, or {ALWAYS}",
        param="valid_from",
    )


Since = Annotated[datetime | None, Depends(_moment)]
Model = Annotated[str, Path(description="Its name. Slashes stay as they are.")]


@router.get("/prices", summary="List prices", **documented(Page[ModelPrice]))
@allow(*READERS)
async def several(given: Given, caller: Asking, part: PartOf, model: MaybeText = None) -> Response:
    def look(connection: Connection) -> list[ModelPrice]:
        is_visible = models.visible(connection, given, caller)
        held = catalogue.page(connection, given.settings, MODELS)
        wanted = [each for each in held if model in (None, each.name) and is_visible(each.name)]
        return [price for each in wanted for price in _show(given, each) if _place(price) > part.after][: part.most]

    return answer(part.page(await given.database.read(look), lambda price: price, _place))


@router.put(PATH, summary="Set a price", **documented(ModelPrice, body=PriceSettings))
@allow(*ADMIN)
async def put(
    given: Given,
    caller: Asking,
    author: Signed,
    model: Model,
    since: Since,
    price: Annotated[Any, Depends(body_of(PriceSettings, _prepare))],
) -> Response:
    models.check_currency(given, price)
    held, replayed = await given.database.write(_put, given, caller, model, since, price, author)
    [shown] = [each for each in _show(given, held) if each.valid_from == since]
    return answer(shown, headers=REPLAYED if replayed else None)


@router.delete(PATH, summary="Remove a price", **documented(RemovedPrice))
@allow(*ADMIN)
async def delete(given: Given, caller: Asking, author: Signed, model: Model, since: Since) -> Response:
    replayed = await given.database.write(_delete, given, caller, model, since, author)
    return answer(RemovedPrice(model=model, valid_from=since), headers=REPLAYED if replayed else None)


# -- in a transaction --


def _put(
    connection: Connection, state: State, caller: Caller, model: str, since: datetime | None, price: PriceSettings, author: Author
) -> tuple[Held[ModelSettings], bool]:
    def changed(value: ModelSettings) -> ModelSettings:
        if since is None:
            return msgspec.structs.replace(value, price=price)
        dated = DatedPriceSettings(valid_from=since, **msgspec.structs.asdict(price))
        return msgspec.structs.replace(value, prices=_sorted((*_others(value, since), dated)))

    lock(connection)
    if catalogue.one(connection, state.settings, MODELS, model) is None:
        held, _, replayed = models.resource.put(connection, state, caller, model, changed(ModelSettings()), author)
    else:
        held, _, replayed = models.resource.change(connection, state, caller, model, changed, author)
    return held, replayed


def _delete(connection: Connection, state: State, caller: Caller, model: str, since: datetime | None, author: Author) -> bool:
    def changed(value: ModelSettings) -> ModelSettings:
        less = {"price": None} if since is None else {"prices": _others(value, since)}
        without = msgspec.structs.replace(value, **less)
        if without == value:
            raise missing("price", f"{model}/{ALWAYS if since is None else since.isoformat()}")
        return without

    _, _, replayed = models.resource.change(connection, state, caller, model, changed, author)
    return replayed


def _others(value: ModelSettings, since: datetime) -> tuple[DatedPriceSettings, ...]:
    return tuple(each for each in value.prices if each.valid_from != since)


def _sorted(prices: tuple[DatedPriceSettings, ...]) -> tuple[DatedPriceSettings, ...]:
    return tuple(sorted(prices, key=attrgetter("valid_from")))


# -- answers --


def _show(state: State, held: Held[ModelSettings]) -> Iterator[ModelPrice]:
    """Those of a model, the first one first."""
    valid = models.valid_price(held.value, datetime.now(UTC))
    for price in filter(None, (held.value.price, *_sorted(held.value.prices))):
        yield ModelPrice(
            model=held.name,
            valid_from=price.valid_from.astimezone(UTC) if isinstance(price, DatedPriceSettings) else None,
            valid=price is valid,
            source=held.source,
            currency=state.settings.currency,
            input=f"{price.input:f}",
            cached_input=f"{price.cached:f}",
            output=f"{price.output:f}",
            row=price.from_,
        )


def _place(price: ModelPrice) -> str:
    return f"{price.model}\0{(price.valid_from or _EARLIEST).isoformat()}"
