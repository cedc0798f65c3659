"""`glasshouse export`: the running catalogue as a configuration file."""

from __future__ import annotations

from decimal import Decimal

import click

from proxy.cli.client import Api, Json, api_command
from proxy.cli.report import json_option, json_text, printable

_HEAD = """\
# What Glasshouse runs on, exported with `glasshouse export`. As a configuration file it declares all of it: what stands here is
# read-only in the API. Keys are here by the hashes of their secrets; passwords aren't here.
"""


@click.command()
@json_option
@api_command
def export(api: Api, as_json: bool) -> None:
    """Print the settings and all of the catalogue as a glasshouse.yaml: teams, users, projects, keys (by their hashes), models,
    prices, backends, limits and budgets.

    On an empty database it makes the same of them, so it moves a catalogue elsewhere, or into a repository.
    """
    from proxy.cli.documents import write

    answer = api.get("/export")
    for text in answer["left_out"]:
        click.echo(f"left out: {printable(text)}", err=True)
    click.echo(json_text(answer["file"]) if as_json else f"{_HEAD}{write(_readable(answer['file']))}", nl=as_json)


def _readable(value: Json) -> Json:
    """With prices and money as numbers."""
    if isinstance(value, dict):
        return {name: Decimal(each) if _is_amount(name, each) else _readable(each) for name, each in value.items()}
    return [_readable(each) for each in value] if isinstance(value, list) else value


def _is_amount(field: str, value: Json) -> bool:
    return field in ("input", "cached_input", "output", "money") and isinstance(value, str)
