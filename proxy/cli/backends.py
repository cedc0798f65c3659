"""`glasshouse backends`: the inference servers; and drained or weighed while everything runs."""

from __future__ import annotations

import click

from proxy.cli.catalogue import NounCommands, checked, refuse_existing, source, told, without_nothing
from proxy.cli.client import Api, Json, api_command
from proxy.cli.fields import Changes, field_options
from proxy.cli.report import Columns, Row, json_option, printable
from proxy.cli.values import NumberOrDefault

_FIELDS = ("kind", "models", "weight", "depth", "prefill_tokens", "api_key_env", "ca_file")


def _reachable(row: Row) -> str:
    return {True: "yes", False: f"no: {row['error']}", None: "not asked yet"}[row["reachable"]]


def _weight(row: Row) -> str:
    declared = row["settings"]["weight"]
    return f"{row['weight']:g}" if row["weight"] == declared else f"{row['weight']:g} (declared: {declared:g})"


_COLUMNS: Columns = {
    "NAME": lambda row: row["name"],
    "URL": lambda row: row["url"],
    "KIND": lambda row: row["kind"],
    "MODELS": lambda row: row["models"],
    "REACHABLE": _reachable,
    "STATE": lambda row: "drained" if row["drained"] else "",
    "WEIGHT": _weight,
    "DECLARED IN": source,
}
_NOUN = NounCommands("backends", "backend", _FIELDS, _COLUMNS)

backends = _NOUN.group("The inference servers that models run on.", creates=False)


@backends.command()
@click.argument("name")
@click.argument("address", metavar="URL")
@field_options(*_FIELDS)
@json_option
@api_command
def add(api: Api, name: str, address: str, changes: Changes, as_json: bool) -> None:
    """Let models run on the inference server at URL, too; it is called NAME."""
    refuse_existing(api, _NOUN.noun, _NOUN.one, name)
    made = api.put(_NOUN.path(name), {**without_nothing(checked(api, changes)), "url": address})
    told(f"The backend {name!r} was added.", made, as_json)


@backends.command()
@_NOUN.argument
@json_option
@api_command
def drain(api: Api, name: str, as_json: bool) -> None:
    """Give a backend no more requests; those that it has go on. Until `undrain`, also when it is started anew."""
    made = api.post(f"{_NOUN.path(name)}/drain")
    told(f"The backend {name!r} is drained.", made, as_json)
    if alone := _nowhere_else(api, made):
        click.echo(f"Nobody else serves {printable(', '.join(alone))}.", err=True)


@backends.command()
@_NOUN.argument
@json_option
@api_command
def undrain(api: Api, name: str, as_json: bool) -> None:
    """Give a backend requests again."""
    told(f"The backend {name!r} gets requests.", api.post(f"{_NOUN.path(name)}/undrain"), as_json)


@backends.command()
@_NOUN.argument
@click.argument("number", metavar="N|default", type=NumberOrDefault())
@json_option
@api_command
def weight(api: Api, name: str, number: float | None, as_json: bool) -> None:
    """How much a backend may do, against others: twice as much with 2 as with 1. `default`: as it is declared."""
    made = api.put(f"{_NOUN.path(name)}/weight", {"weight": number})
    told(f"The backend {name!r} has the weight {made['weight']:g}.", made, as_json)


def _nowhere_else(api: Api, drained: Json) -> list[str]:
    """Models (and patterns) of a drained backend that no other one serves."""
    others = [row for row in api.pages("/backends", {}) if not row["drained"]]
    served = {model for row in others for model in row["models"]}
    return [model for model in drained["models"] if model not in served]
