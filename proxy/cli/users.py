"""`glasshouse users`: whose keys there are."""

from __future__ import annotations

import click

from proxy.cli.catalogue import NounCommands, budgets, limits, setting, source, state, told
from proxy.cli.client import Api, api_command
from proxy.cli.fields import ALLOWANCE
from proxy.cli.report import Columns, json_option, printable

_COLUMNS: Columns = {
    "NAME": lambda row: row["name"],
    "TEAM": setting("team"),
    "LIMITS": limits,
    "BUDGETS": budgets,
    "STATE": state,
    "DECLARED IN": source,
}
_NOUN = NounCommands("users", "user", ("team", *ALLOWANCE), _COLUMNS)

users = _NOUN.with_blocking(_NOUN.group("Whose keys they are; all of one share limits and budgets."))


@users.command()
@_NOUN.argument
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
@api_command
def forget(api: Api, name: str, yes: bool, as_json: bool) -> None:
    """Delete what this user's requests said, in the ledger and in traces. What they used and cost stays."""
    if not yes:
        click.confirm(f"Delete the content of all requests of {printable(name)}? It can't be had back.", abort=True, err=True)
    done = api.delete(f"{_NOUN.path(name)}/content")
    told(f"{done['requests']} requests and {done['traces']} traces of {name!r} say nothing any more.", done, as_json)
    if done["pending"]:
        click.echo(f"Of {done['pending']} requests the traces may be on their way: run this again in an hour.", err=True)
