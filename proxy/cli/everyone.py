"""`glasshouse everyone`: what all keys together may use."""

from __future__ import annotations

import click

from proxy.cli.catalogue import patched, show, told
from proxy.cli.client import Api, api_command
from proxy.cli.fields import ALLOWANCE, Changes, field_options
from proxy.cli.report import json_option


@click.group()
def everyone() -> None:
    """What all keys together may use."""


@everyone.command("show")
@json_option
@api_command
def show_command(api: Api, as_json: bool) -> None:
    """Every limit and budget that holds for all together."""
    show({"name": "everyone", **api.get("/everyone")}, as_json)


@everyone.command("set")
@field_options(*ALLOWANCE)
@json_option
@api_command
def set_command(api: Api, changes: Changes, as_json: bool) -> None:
    """Change what is said; what isn't said stays. Lists, budgets among them, are said as a whole."""
    told("What everyone may use was changed.", api.patch("/everyone", patched(api, changes)), as_json)
