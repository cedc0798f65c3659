"""`glasshouse audit`: who changed what."""

from __future__ import annotations

from datetime import datetime

import click

from proxy.cli.catalogue import day, in_words
from proxy.cli.client import Api, Json, api_command
from proxy.cli.complete import names
from proxy.cli.report import Columns, Form, Row, form_option, listed
from proxy.cli.values import When

_ITSELF = ("id", "created_at", "changed_at")
"""What the row says anyway."""


def _changes(row: Row) -> str:
    """Field by field, what was and what is."""
    before, after = (_flat(row[side]) for side in ("before", "after"))
    said = []
    for field in dict.fromkeys([*before, *after]):
        if field in _ITSELF:
            continue
        was, now = (in_words(field, side.get(field)) for side in (before, after))
        if was != now:
            said.append(f"{field}: {now}" if was is None else f"{field}: {was} → {'nothing' if now is None else now}")
    return "; ".join(said)


def _flat(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {} if value is None else {"": value}


_COLUMNS: Columns = {
    "WHEN": lambda row: day(row["at"]),
    "WHO": lambda row: row["author"],
    "ROLE": lambda row: row["role"],
    "FROM": lambda row: row["address"],
    "DID": lambda row: row["action"],
    "TO": lambda row: f"{row['noun']}/{row['name']}",
    "WHAT": _changes,
}


@click.group()
def audit() -> None:
    """Who changed what, and when."""


@audit.command("list")
@click.option("--noun", metavar="NOUN", help="Only changes of teams, keys, models, ...")
@click.option("--name", metavar="NAME", help="Only changes of what is called so.")
@click.option("--author", metavar="NAME", help="Only what this one changed.", shell_complete=names("admins"))
@click.option("--team", metavar="TEAM", help="Only what was changed of this team.", shell_complete=names("teams"))
@click.option("--since", type=When(), metavar="WHEN", help="24h, 7d, 2026-11-01 or 2026-11-01T12:30 (UTC).")
@click.option("--until", type=When(), metavar="WHEN", help="The same; not included.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="So many at most.")
@form_option
@api_command
def list_command(api: Api, since: datetime | None, until: datetime | None, limit: int, form: Form, **filters: str | None) -> None:
    """Changes, the newest first."""
    span = {name: None if moment is None else moment.isoformat() for name, moment in (("since", since), ("until", until))}
    listed(api.pages("/audit", {**span, **filters}, limit), _COLUMNS, form, "Nothing was changed.")
