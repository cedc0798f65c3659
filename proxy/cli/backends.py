"""`glasshouse backends`: the inference servers."""

from __future__ import annotations

import click

from proxy.cli.catalogue import NounCommands, checked, refuse_existing, source, told, without_nothing
from proxy.cli.client import Api, api_command
from proxy.cli.fields import Changes, field_options
from proxy.cli.report import Columns, Row, json_option

_FIELDS = ("kind", "api_key_env", "ca_file")


def _reachable(row: Row) -> str:
    return {True: "yes", False: f"no: {row['error']}", None: "not asked yet"}[row["reachable"]]


_COLUMNS: Columns = {
    "NAME": lambda row: row["name"],
    "URL": lambda row: row["url"],
    "KIND": lambda row: row["kind"],
    "MODELS": lambda row: row["models"],
    "REACHABLE": _reachable,
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
