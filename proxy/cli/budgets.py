"""`glasshouse budgets`: what may be spent, what of it is used, and what is left."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from proxy.cli.catalogue import budget as in_words
from proxy.cli.catalogue import day, expect_currency, source, told
from proxy.cli.client import Api, Json, api_command, path_of
from proxy.cli.complete import names
from proxy.cli.report import Columns, Form, form_option, json_option, listed, printable
from proxy.cli.values import CURRENCY, Budget

_LEVELS = {"team": "teams", "user": "users", "project": "projects", "key": "keys"}
_EVERYONE = "everyone"


_COLUMNS: Columns = {
    "OF": lambda row: row["level"],
    "NAME": lambda row: "" if row["level"] == _EVERYONE else row["subject"],
    "BUDGET": lambda row: row["amount"],
    "USED": lambda row: row["used"],
    "LEFT": lambda row: row["left"],
    "UNIT": lambda row: row["currency"] or row["unit"],
    "PER": lambda row: row["per"],
    "SINCE": lambda row: day(row["since"]) if row["per"] != "total" else "",
    "UNTIL": lambda row: day(row["until"]),
    "SOFT": lambda row: "soft" if row["soft"] else "",
    "DECLARED IN": source,
}


def _holder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--team NAME`, ... or `--everyone`, handed on as `level` and `subject`; both None if nothing is said."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        said = [(level, name) for level in _LEVELS if (name := options.pop(level)) is not None]
        said += [(_EVERYONE, _EVERYONE)] if options.pop(_EVERYONE) else []
        if len(said) > 1:
            raise click.UsageError(f"--{said[0][0]} and --{said[1][0]}; allowed: one of them")
        level, subject = said[0] if said else (None, None)
        return command(*arguments, level=level, subject=subject, **options)

    options = [click.option(f"--{level}", metavar="NAME", shell_complete=names(noun)) for level, noun in _LEVELS.items()]
    options.append(click.option("--everyone", is_flag=True, help="All keys together."))
    return functools.reduce(lambda made, option: option(made), reversed(options), run)


@click.group()
def budgets() -> None:
    """What may be spent, what is used and left of it."""


@budgets.command("list")
@_holder_options
@form_option
@api_command
def list_command(api: Api, level: str | None, subject: str | None, form: Form) -> None:
    """Every budget, or those of one, with what is used and left of it."""
    listed(api.pages("/budgets", {"level": level, "subject": subject}), _COLUMNS, form, "There are no budgets.")


@budgets.command("set")
@click.argument("budget", type=Budget())
@_holder_options
@json_option
@api_command
def set_command(api: Api, budget: dict[str, Json], level: str | None, subject: str | None, as_json: bool) -> None:
    """Add a budget, or change how much the one of the same unit and period is.

    BUDGET is such as '500 EUR/month', '5M tokens/day' or '3600 gpu_seconds/week', with a time zone and 'soft' behind it.
    """
    if (currency := budget.pop(CURRENCY, None)) is not None:
        expect_currency(api, currency)
    unit = _unit_of(budget)
    amount = {"amount": budget[unit], **({"time_zone": budget["time_zone"]} if "time_zone" in budget else {})}
    made = api.put(_path(level, subject, unit, budget["per"]), amount, soft=bool(budget.get("soft")))
    whose = _EVERYONE if made["level"] == _EVERYONE else f"the {made['level']} {made['subject']!r}"
    told(f"The budget of {whose} is {in_words(budget)}.", made, as_json)


@budgets.command("remove")
@click.argument("which", metavar="UNIT/PERIOD")
@click.option("--soft", is_flag=True, help="The soft one of these.")
@_holder_options
@json_option
@api_command
def remove_command(api: Api, which: str, soft: bool, level: str | None, subject: str | None, as_json: bool) -> None:
    """Remove the budget of this unit and period, such as money/month."""
    unit, _, per = which.partition("/")
    told(f"The budget of {which} was removed.", api.delete(_path(level, subject, unit, per), soft=soft), as_json)


def _unit_of(budget: dict[str, Json]) -> str:
    return next(unit for unit in ("money", "tokens", "gpu_seconds") if unit in budget)


def _path(level: str | None, subject: str | None, unit: str, per: str) -> str:
    if level is None or subject is None:
        raise click.UsageError(f"whose budget is it? allowed: {', '.join(f'--{each} NAME' for each in _LEVELS)}, --everyone")
    if "/" in subject or not unit.isidentifier() or not per.isidentifier():
        raise click.UsageError(f"{printable(f'{unit}/{per}')} of {printable(subject)} is no budget; allowed: such as money/month")
    return f"{path_of(f'budgets/{level}', subject)}/{unit}/{per}"
