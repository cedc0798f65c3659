"""`glasshouse keys`: who may use the models. Changes reach the workers within two seconds, without a restart.

A key's secret is on standard output, alone, and everything else beside it: `KEY=$(glasshouse keys create alice)`.
"""

from __future__ import annotations

from typing import Any

import click

from proxy.cli.catalogue import (
    budgets,
    checked,
    day,
    field,
    limits,
    patched,
    setting,
    show,
    source,
    state,
    told,
    without_nothing,
)
from proxy.cli.client import Api, Json, api_command, path_of
from proxy.cli.complete import names
from proxy.cli.fields import ALLOWANCE, Changes, field_options
from proxy.cli.report import Columns, Form, form_option, json_option, json_text, listed, printable
from proxy.cli.values import Span

_FIELDS = ("team", "user", "project", "tags", *ALLOWANCE)
_COLUMNS: Columns = {
    "ID": field("id"),
    "NAME": field("name"),
    "KEY": lambda row: f"{row['prefix']}…" if row["prefix"] else "",
    "TEAM": setting("team"),
    "USER": setting("user"),
    "PROJECT": setting("project"),
    "TAGS": setting("tags"),
    "LIMITS": limits,
    "BUDGETS": budgets,
    "CREATED": lambda row: day(row["created_at"]),
    "STATE": state,
    "DECLARED IN": source,
}
_SELDOM = ("TEAM", "USER", "PROJECT", "TAGS", "LIMITS", "BUDGETS", "DECLARED IN")
"""Columns that a table has if there is anything in them."""
_NONE = "There are no keys; make one with: glasshouse keys create NAME"
_name = click.argument("id_or_name", shell_complete=names("keys"))


@click.group()
def keys() -> None:
    """API keys of callers."""


@keys.command()
@click.argument("name")
@field_options(*_FIELDS)
@json_option
@api_command
def create(api: Api, name: str, changes: Changes, as_json: bool) -> None:
    """Make a key called NAME and print it: on standard output the key alone, once and never again."""
    made = api.post("/keys", {**without_nothing(checked(api, changes)), "name": name})
    _tell_secret(made, as_json, "shown only now; it works within two seconds")


@keys.command("list")
@click.option("--team", metavar="TEAM", help="Only those of this team.", shell_complete=names("teams"))
@click.option("--user", metavar="USER", help="Only those of this user.", shell_complete=names("users"))
@click.option("--project", metavar="PROJECT", help="Only those for this project.", shell_complete=names("projects"))
@click.option("--tag", metavar="TAG", help="Only those with this tag.")
@click.option("--containing", metavar="TEXT", help="Only those whose name has this in it.")
@click.option("--in-use", is_flag=True, help="Without those that were revoked.")
@form_option
@api_command
def list_command(api: Api, form: Form, in_use: bool, **filters: str | None) -> None:
    """Every key, by name; the revoked ones too."""
    rows = api.pages("/keys", {"revoked": not in_use, **filters})
    nothing = "There are no such keys." if any(filters.values()) else _NONE
    shown = {head: read for head, read in _COLUMNS.items() if form != "table" or head not in _SELDOM or any(map(read, rows))}
    listed(rows, shown, form, nothing)


@keys.command("show")
@_name
@json_option
@api_command
def show_command(api: Api, id_or_name: str, as_json: bool) -> None:
    """All that is known of a key; its secret is nowhere."""
    key = api.get(_path(api, id_or_name))
    show({**key, "secrets": [_secret(each) for each in key["secrets"]]} if not as_json else key, as_json)


@keys.command("set")
@_name
@field_options(*_FIELDS)
@json_option
@api_command
def set_command(api: Api, id_or_name: str, changes: Changes, as_json: bool) -> None:
    """Change what is said of a key; what isn't said stays. Lists, budgets among them, are said as a whole."""
    _tell("changed", api.patch(_path(api, id_or_name), patched(api, changes)), as_json)


@keys.command()
@_name
@click.option(
    "--overlap", type=Span(), default="24h", show_default=True, metavar="SPAN", help="How long the former secret still works."
)
@json_option
@api_command
def rotate(api: Api, id_or_name: str, overlap: int, as_json: bool) -> None:
    """Give a key a new secret and print it, as `create` does. It stays the same key: limits, budgets and usage go on."""
    made = api.post(f"{_path(api, id_or_name)}/rotate", {"overlap_seconds": overlap})
    _tell_secret(made, as_json, f"shown only now; the former one works {_until(made)}")


@keys.command()
@_name
@json_option
@api_command
def block(api: Api, id_or_name: str, as_json: bool) -> None:
    """Refuse what is asked for with a key, until it is unblocked."""
    _tell("blocked", api.post(f"{_path(api, id_or_name)}/block"), as_json)


@keys.command()
@_name
@json_option
@api_command
def unblock(api: Api, id_or_name: str, as_json: bool) -> None:
    """Let a key work again."""
    _tell("unblocked", api.post(f"{_path(api, id_or_name)}/unblock"), as_json)


@keys.command()
@_name
@json_option
@api_command
def revoke(api: Api, id_or_name: str, as_json: bool) -> None:
    """End a key for ever. What it was used for stays."""
    made = api.delete(_path(api, id_or_name))
    told(f"The key {made['name']!r} ({made['id']}) was revoked {day(made['revoked_at'])}.", made, as_json)


def _path(api: Api, id_or_name: str) -> str:
    """A name with a slash can't stand in a path, but its id can."""
    if "/" in id_or_name:
        found = [key["id"] for key in api.pages("/keys", {"containing": id_or_name}) if key["name"] == id_or_name]
        if not found:
            raise click.ClickException(f"there is no key {printable(repr(id_or_name))}")
        id_or_name = found[0]
    return path_of("keys", id_or_name)


def _tell_secret(made: dict[str, Json], as_json: bool, text: str) -> None:
    click.echo(f"The key {printable(repr(made['name']))} ({made['id']}), {text}:", err=True)
    click.echo(json_text(made) if as_json else made["secret"])


def _tell(what: str, made: dict[str, Json], as_json: bool) -> None:
    told(f"The key {made['name']!r} ({made['id']}) was {what}.", made, as_json)


def _until(made: dict[str, Json]) -> str:
    ends = [each["ends_at"] for each in made["secrets"] if each["ends_at"]]
    return f"until {day(max(ends))}" if ends else "no longer"


def _secret(secret: dict[str, Any]) -> str:
    ends = f", until {day(secret['ends_at'])}" if secret["ends_at"] else ""
    return f"{secret['prefix']}… of {day(secret['created_at'])}{ends}"
