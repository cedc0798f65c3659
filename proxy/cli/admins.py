"""`glasshouse admins`: keys for the control API itself."""

from __future__ import annotations

from datetime import datetime

import click

from proxy.cli.catalogue import day, told
from proxy.cli.client import KEY_VARIABLE, Api, api_command, path_of
from proxy.cli.complete import names
from proxy.cli.report import Columns, Form, form_option, json_option, json_text, listed, printable
from proxy.cli.values import Until

_COLUMNS: Columns = {
    "ID": lambda row: row["id"],
    "NAME": lambda row: row["name"],
    "KEY": lambda row: f"{row['prefix']}…",
    "ROLE": lambda row: row["role"],
    "TEAM": lambda row: row["team"],
    "CREATED": lambda row: day(row["created_at"]),
    "EXPIRES": lambda row: day(row["expires_at"]),
    "REVOKED": lambda row: day(row["revoked_at"]),
}


@click.group()
def admins() -> None:
    """Keys for the control API: who may manage what."""


@admins.command()
@click.argument("name")
@click.option("--role", type=click.Choice(["admin", "manager", "viewer"]), default="admin", show_default=True)
@click.option("--team", metavar="TEAM", help="A manager's, and a viewer's who sees no other.", shell_complete=names("teams"))
@click.option("--expires", type=Until(), metavar="WHEN", help="30d (from now), 2026-12-31 or 2026-12-31T18:00+01:00.")
@json_option
@api_command
def create(api: Api, name: str, role: str, team: str | None, expires: datetime | None, as_json: bool) -> None:
    """Make an admin key called NAME and print it: on standard output the key alone, once and never again.

    An admin may do everything; a manager writes users, projects and keys of the team; a viewer reads.
    """
    new = {"name": name, "role": role, "team": team, "expires_at": None if expires is None else expires.isoformat()}
    made = api.post("/admins", {field: value for field, value in new.items() if value is not None})
    click.echo(f"The admin key {printable(repr(made['name']))} ({made['id']}), shown only now, for {KEY_VARIABLE}:", err=True)
    click.echo(json_text(made) if as_json else made["secret"])


@admins.command("list")
@form_option
@api_command
def list_command(api: Api, form: Form) -> None:
    """Every admin key, by name; the revoked ones too."""
    listed(api.pages("/admins", {"revoked": True}), _COLUMNS, form, "There are no admin keys.")


@admins.command()
@click.argument("id_or_name", shell_complete=names("admins"))
@json_option
@api_command
def revoke(api: Api, id_or_name: str, as_json: bool) -> None:
    """End an admin key for ever."""
    made = api.delete(path_of("admins", id_or_name))
    told(f"The admin key {made['name']!r} ({made['id']}) was revoked {day(made['revoked_at'])}.", made, as_json)
