"""`glasshouse usage`: what was used and what it cost, from the ledger. Every number but the times is an exact sum."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import click

from proxy.cli.client import Api, Json, api_command
from proxy.cli.complete import names
from proxy.cli.report import Form, csv_text, exact, form_option, json_text, money, table
from proxy.cli.values import When

_AUDIO = "audio_seconds"
_COUNTS = {
    "requests": "REQUESTS",
    "ok": "OK",
    "errors": "ERRORS",
    "client_gone": "GONE",
    "crashed": "CRASHED",
    "input_tokens": "INPUT",
    "cached_tokens": "CACHED",
    "output_tokens": "OUTPUT",
    "reasoning_tokens": "REASONING",
    _AUDIO: "AUDIO SECONDS",
}
"""With their heads in a table."""
_WAITS = ("first_token_p50_ns", "first_token_p95_ns")
_GROUPS = ("key", "team", "user", "project", "model", "backend", "operation", "outcome", "day")

Used = dict[str, Json]


@click.command()
@click.option("--by", type=click.Choice(_GROUPS), default="key", show_default=True)
@click.option(
    "--since", type=When(), metavar="WHEN", help="24h, 7d, 2026-11-01 or 2026-11-01T12:30 (UTC); default: the beginning."
)
@click.option("--until", type=When(), metavar="WHEN", help="The same; not included. Default: now.")
@click.option("--team", metavar="TEAM", help="Only what this team used.", shell_complete=names("teams"))
@click.option("--user", metavar="USER", help="Only what was used with this user's keys.", shell_complete=names("users"))
@click.option("--project", metavar="PROJECT", help="Only what was used for this project.", shell_complete=names("projects"))
@click.option("--key", metavar="ID", help="Only what was used with the key of this id.")
@click.option("--model", metavar="MODEL", help="Only of this model.", shell_complete=names("models"))
@click.option("--backend", metavar="BACKEND", help="Only what ran on this backend.", shell_complete=names("backends"))
@form_option
@api_command
def usage(api: Api, by: str, since: datetime | None, until: datetime | None, form: Form, **filters: str | None) -> None:
    """Requests, tokens and cost by key, team, user, project, model, backend, operation, outcome or day (UTC).

    A request is of the team that its key was in when it came, and what is of none is in the line of none, "-".
    CACHED is part of INPUT, REASONING part of OUTPUT. FIRST TOKEN is how long half, and 95 %, of the requests that got one waited
    for it at most. AUDIO SECONDS, where there were any, is what was transcribed or translated.
    """
    span = {name: None if moment is None else moment.isoformat() for name, moment in (("since", since), ("until", until))}
    rows = [_exact(row) for row in api.pages("/usage", {"by": by, **span, **filters})]
    if form == "json":
        click.echo(json_text(rows))
    elif form == "csv":
        click.echo(_csv(by, rows), nl=False)
    else:
        click.echo(_table(by, rows) if rows else "Nothing was used in that time.", err=not rows)


def _exact(row: dict[str, Any]) -> Used:
    """In integers: what the API says of money and waiting, in the units of the ledger."""
    waits = {f"first_token_{rank}_ns": row.pop(f"first_token_{rank}_ms") for rank in ("p50", "p95")}
    cost = row.pop("cost")
    return {
        **row,
        "cost_nano": {currency: int(Decimal(amount).scaleb(9)) for currency, amount in cost.items()},
        **{name: None if ms is None else round(ms * 1_000_000) for name, ms in waits.items()},
        "cost": {currency: exact(amount) for currency, amount in cost.items()},
    }


def _csv(by: str, rows: Sequence[Used]) -> str:
    """One column of cost per currency."""
    currencies = sorted({currency for row in rows for currency in row["cost_nano"]})
    counts = _counts(rows)
    columns = [by, "label", *counts, *(f"cost_{currency.lower()}" for currency in currencies), *_WAITS]
    return csv_text(
        columns, ([row["group"], row["label"], *_numbers(row, counts), *_costs(row, currencies), *_waits(row)] for row in rows)
    )


def _counts(rows: Sequence[Used]) -> list[str]:
    """Few have audio."""
    return [name for name in _COUNTS if name != _AUDIO or any(row[_AUDIO] for row in rows)]


def _costs(row: Used, currencies: Sequence[str]) -> list[str]:
    return [money(row["cost_nano"].get(currency, 0)) for currency in currencies]


def _numbers(row: Used, counts: Sequence[str]) -> list[int]:
    return [row[name] for name in counts]


def _waits(row: Used) -> list[int | None]:
    return [row[name] for name in _WAITS]


def _table(by: str, rows: Sequence[Used]) -> str:
    counts = _counts(rows)
    numbers = [_numbers(row, counts) for row in rows]
    lines = [
        [row["label"] or "-", *counted, _cost(row["cost_nano"]), *map(_seconds, _waits(row))]
        for row, counted in zip(rows, numbers, strict=True)
    ]
    if len(rows) > 1:
        lines.append(["total", *map(sum, zip(*numbers, strict=True)), _cost(_total(rows)), "", ""])
    return table([by.upper(), *(_COUNTS[name] for name in counts), "COST", "FIRST TOKEN p50", "p95"], lines)


def _total(rows: Sequence[Used]) -> dict[str, int]:
    currencies = {currency for row in rows for currency in row["cost_nano"]}
    return {currency: sum(row["cost_nano"].get(currency, 0) for row in rows) for currency in sorted(currencies)}


def _cost(cost_nano: dict[str, int]) -> str:
    return " + ".join(f"{money(nano)} {currency}" for currency, nano in sorted(cost_nano.items())) or "0.00"


def _seconds(ns: int | None) -> str:
    return "" if ns is None else f"{ns / 1e9:.3f} s"
