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

_AUDIO = ("audio_seconds",)
_SAVED = ("cache_hits", "coalesced", "cache_misses", "saved_input_tokens", "saved_output_tokens")
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
    "audio_seconds": "AUDIO SECONDS",
    "cache_hits": "HITS",
    "coalesced": "COALESCED",
    "cache_misses": "MISSES",
    "saved_input_tokens": "SAVED INPUT",
    "saved_output_tokens": "SAVED OUTPUT",
}
"""With their heads in a table."""
_WAITS = ("first_token_p50_ns", "first_token_p95_ns")
_GROUPS = ("key", "team", "user", "project", "model", "backend", "operation", "outcome", "cache", "day")

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
    """Requests, tokens and cost by key, team, user, project, model, backend, operation, outcome, cache or day (UTC).

    A request is of the team that its key was in when it came, and what is of none is in the line of none, "-".
    CACHED is part of INPUT, REASONING part of OUTPUT. FIRST TOKEN is how long half, and 95 %, of the requests that got one waited
    for it at most. AUDIO SECONDS, where there were any, is what was transcribed or translated.

    Where a cache was asked: HITS had an answer that was kept, COALESCED shared one that was under way, MISSES went to an engine.
    The first two cost nothing; SAVED is what an engine would have taken for them.
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
    costs = {name: row.pop(name) for name in ("cost", "saved_cost")}
    saved_ms = row.pop("saved_ms")
    return {
        **row,
        "saved_ns": round(saved_ms * 1_000_000),
        **{f"{name}_nano": {currency: _nano(amount) for currency, amount in cost.items()} for name, cost in costs.items()},
        **{name: None if ms is None else round(ms * 1_000_000) for name, ms in waits.items()},
        **{name: {currency: exact(amount) for currency, amount in cost.items()} for name, cost in costs.items()},
    }


def _nano(amount: str) -> int:
    return int(Decimal(amount).scaleb(9))


def _csv(by: str, rows: Sequence[Used]) -> str:
    """One column of cost per currency."""
    counts, money_of = _counts(rows), _money_of(rows)
    columns = [(name, currency) for name in money_of for currency in _currencies(rows, name)]
    heads = [f"{name.removesuffix('_nano')}_{currency.lower()}" for name, currency in columns]
    saved = ["saved_ns"] if len(money_of) > 1 else []
    return csv_text(
        [by, "label", *counts, *heads, *saved, *_WAITS],
        (
            [
                *(row["group"], row["label"], *_numbers(row, counts)),
                *(money(row[name].get(currency, 0)) for name, currency in columns),
                *_numbers(row, saved),
                *_waits(row),
            ]
            for row in rows
        ),
    )


def _counts(rows: Sequence[Used]) -> list[str]:
    """Few have audio, or a cache."""
    without = {name for names in (_AUDIO, _SAVED) if not any(row[name] for row in rows for name in names) for name in names}
    return [name for name in _COUNTS if name not in without]


def _money_of(rows: Sequence[Used]) -> list[str]:
    """What is told of in money; two where there was a cache."""
    return ["cost_nano", "saved_cost_nano"] if any(row[name] for row in rows for name in _SAVED) else ["cost_nano"]


def _currencies(rows: Sequence[Used], name: str) -> list[str]:
    return sorted({currency for row in rows for currency in row[name]})


def _numbers(row: Used, counts: Sequence[str]) -> list[int]:
    return [row[name] for name in counts]


def _waits(row: Used) -> list[int | None]:
    return [row[name] for name in _WAITS]


def _table(by: str, rows: Sequence[Used]) -> str:
    counts = _counts(rows)
    numbers = [_numbers(row, counts) for row in rows]
    money_of = _money_of(rows)
    cached = len(money_of) > 1
    lines = [
        [
            *(row["label"] or "-", *counted, *(_cost(row[name]) for name in money_of)),
            *([_seconds(row["saved_ns"])] if cached else []),
            *map(_seconds, _waits(row)),
        ]
        for row, counted in zip(rows, numbers, strict=True)
    ]
    if len(rows) > 1:
        totals = [*map(sum, zip(*numbers, strict=True)), *(_cost(_total(rows, name)) for name in money_of)]
        time = [_seconds(sum(row["saved_ns"] for row in rows))] if cached else []
        lines.append(["total", *totals, *time, "", ""])
    heads = ["COST", *(["SAVED COST", "SAVED TIME"] if cached else []), "FIRST TOKEN p50", "p95"]
    return table([by.upper(), *(_COUNTS[name] for name in counts), *heads], lines)


def _total(rows: Sequence[Used], name: str) -> dict[str, int]:
    return {currency: sum(row[name].get(currency, 0) for row in rows) for currency in _currencies(rows, name)}


def _cost(cost_nano: dict[str, int]) -> str:
    return " + ".join(f"{money(nano)} {currency}" for currency, nano in sorted(cost_nano.items())) or "0.00"


def _seconds(ns: int | None) -> str:
    return "" if ns is None else f"{ns / 1e9:.3f} s"
