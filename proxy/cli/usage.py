"""`glasshouse usage`: what was used and what it cost, from the ledger. Every number but the times is an exact sum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import click
import msgspec

from proxy.cli.config import config_option, database, running_settings
from proxy.cli.report import csv_text, json_text, money, table
from proxy.store import UsageRow, reader
from proxy.store import usage as used
from proxy.store.ledger import By

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
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGO = re.compile(r"([0-9]{1,6})([mhdw])")


class When(click.ParamType[datetime]):
    """`24h` (ago), `2026-11-01` or `2026-11-01T12:30`; without a time zone it is UTC."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            if ago := _AGO.fullmatch(value):
                return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
            when = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time; allowed: 24h, 7d, 2026-11-01, 2026-11-01T12:30 (UTC)", param, ctx)
        return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


@click.command()
@click.option("--by", type=click.Choice(get_args(By)), default="key", show_default=True)
@click.option(
    "--since", type=When(), metavar="WHEN", help="24h, 7d, 2026-11-01 or 2026-11-01T12:30 (UTC); default: the beginning."
)
@click.option("--until", type=When(), metavar="WHEN", help="The same; not included. Default: now.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@config_option
def usage(
    by: By,
    since: datetime | None,
    until: datetime | None,
    form: Literal["table", "csv", "json"],
    config: Path | None,
) -> None:
    """Requests, tokens and cost by key, team, model, backend or day (UTC).

    A request is of the team that its key was in when it came, and what is of none is in the line of none, "-".
    CACHED is part of INPUT, REASONING part of OUTPUT. FIRST TOKEN is how long half, and 95 %, of the requests that got one waited
    for it at most. AUDIO SECONDS, where there were any, is what was transcribed or translated.
    """
    with database(running_settings(config)) as engine, reader(engine).connect() as connection:
        rows = used(connection, by, since, until)
    if form == "json":
        click.echo(json_text([_fields(row) for row in rows]))
    elif form == "csv":
        click.echo(_csv(by, rows), nl=False)
    else:
        click.echo(_table(by, rows) if rows else "Nothing was used in that time.", err=not rows)


def _fields(row: UsageRow) -> dict[str, Any]:
    """`cost` is decimal text, so that nothing on the way makes a float of it."""
    return {**msgspec.structs.asdict(row), "cost": {currency: money(nano) for currency, nano in row.cost_nano.items()}}


def _csv(by: str, rows: Sequence[UsageRow]) -> str:
    """One column of cost per currency."""
    currencies = sorted({currency for row in rows for currency in row.cost_nano})
    counts = _counts(rows)
    columns = [by, "label", *counts, *(f"cost_{currency.lower()}" for currency in currencies), *_WAITS]
    return csv_text(
        columns, ([row.group, row.label, *_numbers(row, counts), *_costs(row, currencies), *_waits(row)] for row in rows)
    )


def _counts(rows: Sequence[UsageRow]) -> list[str]:
    """Few have audio."""
    return [name for name in _COUNTS if name != _AUDIO or any(row.audio_seconds for row in rows)]


def _costs(row: UsageRow, currencies: Sequence[str]) -> list[str]:
    return [money(row.cost_nano.get(currency, 0)) for currency in currencies]


def _numbers(row: UsageRow, counts: Sequence[str]) -> list[int]:
    return [getattr(row, name) for name in counts]


def _waits(row: UsageRow) -> list[int | None]:
    return [getattr(row, name) for name in _WAITS]


def _table(by: str, rows: Sequence[UsageRow]) -> str:
    counts = _counts(rows)
    numbers = [_numbers(row, counts) for row in rows]
    lines = [
        [row.label or "-", *counted, _cost(row.cost_nano), *map(_seconds, _waits(row))]
        for row, counted in zip(rows, numbers, strict=True)
    ]
    if len(rows) > 1:
        lines.append(["total", *map(sum, zip(*numbers, strict=True)), _cost(_total(rows)), "", ""])
    return table([by.upper(), *(_COUNTS[name] for name in counts), "COST", "FIRST TOKEN p50", "p95"], lines)


def _total(rows: Sequence[UsageRow]) -> dict[str, int]:
    currencies = {currency for row in rows for currency in row.cost_nano}
    return {currency: sum(row.cost_nano.get(currency, 0) for row in rows) for currency in sorted(currencies)}


def _cost(cost_nano: dict[str, int]) -> str:
    return " + ".join(f"{money(nano)} {currency}" for currency, nano in sorted(cost_nano.items())) or "0.00"


def _seconds(ns: int | None) -> str:
    return "" if ns is None else f"{ns / 1e9:.3f} s"
