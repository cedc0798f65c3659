"""`glasshouse cache`: what isn't to be given again."""

from __future__ import annotations

import click

from proxy.cli.catalogue import day, field, told
from proxy.cli.client import Api, api_command
from proxy.cli.complete import names
from proxy.cli.report import Columns, Form, form_option, json_option, listed
from proxy.cli.values import Span

_COLUMNS: Columns = {
    "BEFORE": lambda row: day(row["before"]),
    "MODEL": field("model"),
    "KEY": field("key"),
    "TEAM": field("team"),
    "USER": field("user"),
    "MADE": lambda row: day(row["made_at"]),
    "BY": field("author"),
    "DELETED": field("deleted"),
}
_OF = ("model", "key", "team", "user")


@click.group()
def cache() -> None:
    """Answers that are given again: which aren't to be."""


@cache.command("list")
@form_option
@api_command
def list_command(api: Api, form: Form) -> None:
    """What was purged and would not have expired yet. DELETED: how many answers Redis had of it, once it was looked through."""
    listed(api.pages("/cache", {}), _COLUMNS, form, "Nothing was purged.")


@cache.command()
@click.option("--model", metavar="MODEL", help="Only its answers; an alias will do.", shell_complete=names("models"))
@click.option("--key", metavar="KEY", help="Only what this key had, by its name or id.", shell_complete=names("keys"))
@click.option("--team", metavar="TEAM", help="Only what this team's keys had.", shell_complete=names("teams"))
@click.option("--user", metavar="USER", help="Only what this user had, or who was named so by callers.")
@click.option("--older-than", type=Span(), metavar="SPAN", help="Only what is older: 90s, 30m, 24h, 7d.")
@click.option("--all", "everything", is_flag=True, help="Everything that there is.")
@json_option
@api_command
def purge(api: Api, older_than: int | None, everything: bool, as_json: bool, **of: str | None) -> None:
    """Give these answers no more. What is asked for again is made anew."""
    said = {name: of[name] for name in _OF if of[name] is not None}
    if everything and (said or older_than is not None):
        raise click.UsageError("--all is everything; allowed: alone")
    if not (everything or said or older_than is not None):
        raise click.UsageError("nothing is said of what is to go; allowed: one of the options in --help, --all for everything")
    made = api.post("/cache/purge", said if older_than is None else said | {"older_than": older_than})
    what = ", ".join(f"{name} {made[name]!r}" for name in _OF if made[name] is not None)
    told(f"What was kept{f' of {what}' if what else ''} before {day(made['before'])} is given no more.", made, as_json)
