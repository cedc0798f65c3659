"""`glasshouse prices`: what models cost, and from when on."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from proxy.cli.catalogue import day, source, told
from proxy.cli.client import Api, Json, api_command, path_of
from proxy.cli.complete import names
from proxy.cli.report import Columns, Form, form_option, json_option, listed
from proxy.cli.values import Decimals, Until

_ALWAYS = "always"
_COLUMNS: Columns = {
    "MODEL": lambda row: row["model"],
    "FROM": lambda row: day(row["valid_from"]),
    "INPUT": lambda row: row["input"],
    "CACHED INPUT": lambda row: row["cached_input"],
    "OUTPUT": lambda row: row["output"],
    "PER MILLION TOKENS IN": lambda row: row["currency"],
    "PRICE LIST": lambda row: row["row"],
    "HOLDS": lambda row: "now" if row["valid"] else "",
    "DECLARED IN": source,
}
_model = click.argument("model", shell_complete=names("models"))
_since = click.option(
    "--from", "since", type=Until(), metavar="WHEN", help="2026-12-01, 7d (from now); default: before all others."
)


@click.group()
def prices() -> None:
    """What models cost. Each price holds from its time on until the next one's."""


@prices.command("list")
@click.argument("model", required=False, shell_complete=names("models"))
@form_option
@api_command
def list_command(api: Api, model: str | None, form: Form) -> None:
    """Every price, or those of MODEL, the first one first."""
    listed(api.pages("/prices", {"model": model}), _COLUMNS, form, "No model has a price: all cost nothing.")


@prices.command("set")
@_model
@_since
@click.option("--input", "fresh", type=Decimals(), metavar="PRICE", help="Per million tokens.")
@click.option("--cached-input", "cached", type=Decimals(), metavar="PRICE", help="Default: as input.")
@click.option("--output", type=Decimals(), metavar="PRICE", help="Per million tokens.")
@click.option("--row", metavar="NAME", help="What isn't said is as in this row of litellm's price list (US dollars).")
@json_option
@api_command
def set_command(
    api: Api,
    model: str,
    since: datetime | None,
    fresh: Json,
    cached: Json,
    output: Json,
    row: str | None,
    as_json: bool,
) -> None:
    """Say what MODEL costs, always or from a time on, in the currency of the settings."""
    said = {"input": fresh, "cached_input": cached, "output": output, "from": row}
    price = {field: value for field, value in said.items() if value is not None}
    if not price:
        raise click.UsageError("nothing is said of what it costs; allowed: --input, --cached-input, --output, --row")
    made = api.put(_path(model, since), price)
    text = f"{made['model']!r} costs {made['input']} / {made['output']} {made['currency']} per million tokens in / out"
    begin = f" from {day(made['valid_from'])} on" if made["valid_from"] else ""
    told(f"{text}{begin}.", made, as_json)


@prices.command("remove")
@_model
@_since
@json_option
@api_command
def remove_command(api: Api, model: str, since: datetime | None, as_json: bool) -> None:
    """Take back what was said of MODEL for this time."""
    told(f"The price of {model!r} was removed.", api.delete(_path(model, since)), as_json)


def _path(model: str, since: datetime | None) -> str:
    moment = _ALWAYS if since is None else since.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return f"{path_of('prices', model)}/{moment.replace(':', '%3A')}"
