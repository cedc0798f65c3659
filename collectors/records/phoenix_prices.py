"""Our prices in Phoenix's table, so that the costs it shows are the ledger's.

Phoenix computes costs itself, from tokens and a table of its own, and ignores what a span says; and it has prices for names that
merely look like ours. So every model that we send spans of gets an entry `<model> (glasshouse)`, with a price of zero where the
settings give none; a custom entry precedes the built-in ones. Phoenix reads its table again every few seconds and prices nothing
in arrears: entries must be there before the spans. It adds up without rounding, the ledger rounds each request to the nano-unit.

A price that is valid from a moment on has an entry of its own, `<model> (glasshouse from <moment>)`, which Phoenix takes for
spans that begin at that moment or later. No two entries may have the same pattern, and of those that match the more specific one
counts before the later one: so each later price has a pattern that means the same and is a little longer.

Amounts are in the currency of the settings; Phoenix writes `$` before any amount.

Source: Phoenix's GraphQL schema (generativeModels, createModel, updateModel, deleteModel) and its cost_model_lookup.py and
regex_specificity.py; there is no REST endpoint for prices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import requests

from collectors.records.phoenix_http import NotATarget
from proxy.nouns import ModelSettings, PriceSettings

POLL_SECONDS = 6.0
"""After this time a changed table is in use: Phoenix looks every 5 s."""

TIMEOUT_SECONDS = 10.0

_LATER = " (glasshouse from "

_LIST = """
query ($after: String) {
  generativeModels(first: 200, after: $after) {
    pageInfo { hasNextPage endCursor }
    edges { node { id name kind namePattern provider startTime tokenPrices { tokenType kind costPerMillionTokens } } }
  }
}"""
_CREATE = "mutation ($input: CreateModelMutationInput!) { createModel(input: $input) { model { id } } }"
_UPDATE = "mutation ($input: UpdateModelMutationInput!) { updateModel(input: $input) { model { id } } }"
_DELETE = "mutation ($input: DeleteModelMutationInput!) { deleteModel(input: $input) { model { id } } }"


class PricesRefused(Exception):
    """What answers there has no price table, or keeps it closed to us. Asking again would not help."""


class _Entry(NamedTuple):
    """A row of Phoenix's table. `rates`: (token type, kind) → per million tokens. `start`: for spans that begin then or later;
    None: for all."""

    name: str
    pattern: str
    rates: Mapping[tuple[str, str], float]
    start: datetime | None = None

    def equals(self, other: _Entry) -> bool:
        same = self[:2] == other[:2] and self.start == other.start and self.rates.keys() == other.rates.keys()
        return same and all(math.isclose(rate, other.rates[which], rel_tol=1e-9) for which, rate in self.rates.items())


class PhoenixPrices:
    """One Phoenix's table, as far as it is ours. `models` says what models cost now and later."""

    def __init__(self, base_url: str, session: requests.Session, models: Callable[[], Mapping[str, ModelSettings]]) -> None:
        self._url = f"{base_url}/graphql"
        self._session = session
        self._models = models

    def sync(self, models: Iterable[str] = ()) -> bool:
        """See to the entries of each model that has a price and of `models`; True if the table had to be changed.
        Raises requests.RequestException (not reachable now), PricesRefused."""
        there, priced = dict(self._custom_entries()), self._models()
        wanted = [entry for model in sorted({*priced, *models}) for entry in _entries(model, priced.get(model, ModelSettings()))]
        stale = [name for name in there.keys() - {entry.name for entry in wanted} if _LATER in name and name.endswith(")")]
        for name in stale:
            self._ask(_DELETE, input={"id": there[name][0]})
        changed = bool(stale)
        for entry in wanted:
            known = there.get(entry.name)
            if known is None:
                self._ask(_CREATE, input=_input(entry))
            elif not known[1].equals(entry):
                self._ask(_UPDATE, input={"id": known[0], **_input(entry)})
            else:
                continue
            changed = True
        return changed

    def _custom_entries(self) -> Iterator[tuple[str, tuple[str, _Entry]]]:
        """(name, (id, entry)); those that Phoenix brings along come last and are left out."""
        after = None
        while True:
            page = self._ask(_LIST, after=after)["generativeModels"]
            for edge in page["edges"]:
                node = edge["node"]
                if node["kind"] != "CUSTOM":
                    return
                rates = {(price["tokenType"], price["kind"]): price["costPerMillionTokens"] for price in node["tokenPrices"]}
                start = datetime.fromisoformat(node["startTime"]) if node["startTime"] else None
                yield node["name"], (node["id"], _Entry(node["name"], node["namePattern"], rates, start))
            if not page["pageInfo"]["hasNextPage"]:
                return
            after = page["pageInfo"]["endCursor"]

    def _ask(self, query: str, **variables: object) -> Any:
        body: dict[str, Any] = {"query": query, "variables": variables}
        try:
            response = self._session.post(self._url, json=body, timeout=TIMEOUT_SECONDS)
        except NotATarget as error:
            raise PricesRefused(f"{self._url}: {error}") from None
        if response.status_code in (401, 403):
            response.raise_for_status()
        try:
            answer = response.json()
            data = answer["data"]
        except (ValueError, KeyError, TypeError):
            raise PricesRefused(f"{self._url} answered {response.status_code}, not GraphQL") from None
        if data is None or answer.get("errors"):
            raise PricesRefused(f"{self._url}: {_first_message(answer)}")
        return data


def _entries(model: str, settings: ModelSettings) -> Iterator[_Entry]:
    """The price of before all dates, and each later one."""
    pattern = re.escape(model)
    yield _Entry(f"{model} (glasshouse)", f"^{pattern}$", _rates(settings.price or PriceSettings()))
    for price in sorted(settings.prices, key=lambda price: price.valid_from):
        start = price.valid_from.astimezone(UTC)
        pattern = f"(?:{pattern})"
        yield _Entry(f"{model}{_LATER}{start.isoformat()})", f"^{pattern}$", _rates(price), start)


def _rates(price: PriceSettings) -> dict[tuple[str, str], float]:
    rates = {("input", "PROMPT"): price.input, ("cache_read", "PROMPT"): price.cached, ("output", "COMPLETION"): price.output}
    return {which: float(rate) for which, rate in rates.items()}


def _input(entry: _Entry) -> dict[str, Any]:
    costs = [
        {"tokenType": token_type, "kind": kind, "costPerMillionTokens": rate} for (token_type, kind), rate in entry.rates.items()
    ]
    start = None if entry.start is None else entry.start.isoformat()
    return {"name": entry.name, "provider": "", "namePattern": entry.pattern, "costs": costs, "startTime": start}


def _first_message(answer: Mapping[str, Any]) -> str:
    errors = answer.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else {}
    return str(first.get("message", "no data")) if isinstance(first, dict) else "no data"
