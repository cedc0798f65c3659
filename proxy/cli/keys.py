"""`glasshouse keys`: make, list and revoke API keys. Changes reach the workers within two seconds, without a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from proxy.cli.config import config_option, database, running_settings
from proxy.cli.report import json_text, moment, printable, table
from proxy.store import KeyRow, create_key, list_keys, reader, revoke_key


@click.group()
def keys() -> None:
    """API keys of callers."""


@keys.command()
@click.argument("name")
@config_option
def create(name: str, config: Path | None) -> None:
    """Make a key called NAME and print it: on standard output the key alone, once and never again."""
    with database(running_settings(config)) as engine, engine.begin() as connection:
        secret, row = create_key(connection, name)
    click.echo(f"The key {printable(row.name)!r} ({row.id}), shown only now; it works within two seconds:", err=True)
    click.echo(secret)


@keys.command("list")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_option
def list_command(form: Literal["table", "json"], config: Path | None) -> None:
    """Every key, the revoked ones too."""
    with database(running_settings(config)) as engine, reader(engine).connect() as connection:
        rows = list_keys(connection)
    if form == "json":
        click.echo(json_text([_fields(row) for row in rows]))
    elif rows:
        lines = [(row.id, row.name, f"{row.prefix}…", moment(row.created_at), moment(row.revoked_at)) for row in rows]
        click.echo(table(["ID", "NAME", "KEY", "CREATED", "REVOKED"], lines))
    else:
        click.echo("There are no keys; make one with: glasshouse keys create NAME", err=True)


@keys.command()
@click.argument("id_or_name")
@config_option
def revoke(id_or_name: str, config: Path | None) -> None:
    """End the key with this id, or the one in use with this name."""
    with database(running_settings(config)) as engine, engine.begin() as connection:
        row = revoke_key(connection, id_or_name)
    click.echo(f"The key {printable(row.name)!r} ({row.id}) was revoked {moment(row.revoked_at)}.", err=True)


def _fields(row: KeyRow) -> dict[str, str | None]:
    return {
        "id": row.id,
        "name": row.name,
        "prefix": row.prefix,
        "created_at": moment(row.created_at),
        "revoked_at": moment(row.revoked_at) or None,
    }
