"""What models cost at the providers that sell them: litellm's public table, pinned, as data (`litellm.csv`).

A row counts where a model's settings name it (`price: {from: ROW}`), and nowhere else. Neither a name nor a backend's kind tells
who runs a model: an engine of one's own serves `gpt-oss-120b` too, and llama.cpp is of kind `openai`. A cloud's bill by accident
is worse than none.

It lies beneath the settings, because a row is filled in where they are checked: from there on a price is numbers, in the
effective settings that control and the collectors share. So the list is opened where somebody's own file is checked, and by no
worker. `refresh.py` writes it anew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("litellm.csv")
CURRENCY = "USD"

_COLUMNS = ("model", "provider", "input", "cached_input", "output", "besides")


class Row(NamedTuple):
    """Dollars per million tokens, each a whole number of pico-dollars per token. `cached_input` is None where it has no price of
    its own. `besides`: what the provider charges otherwise, and the row therefore doesn't cover."""

    provider: str
    input: Decimal
    cached_input: Decimal | None
    output: Decimal
    besides: tuple[str, ...] = ()


class PriceList(NamedTuple):
    """`source`: name and version of what it was made from. `rows`: model → its row."""

    source: str
    rows: Mapping[str, Row]

    def alike(self, name: str) -> Sequence[str]:
        """What may have been meant by a name that isn't there: the model at a provider, or something spelt alike."""
        return [model for model in self.rows if model.endswith(f"/{name}")][:3] or get_close_matches(name, self.rows)


@cache
def pricelist() -> PriceList:
    """The one in the package. Raises OSError, ValueError: the installation is damaged."""
    return parse(FILE.read_text(encoding="utf-8"))


def parse(text: str) -> PriceList:
    """What `render` wrote. Raises ValueError."""
    first, _, table = text.partition("\n")
    lines = csv.reader(io.StringIO(table))
    if not first.startswith("# ") or tuple(next(lines, ())) != _COLUMNS:
        raise ValueError("this is no price list")
    return PriceList(first[2:].partition(":")[0], {model: _row(cells) for model, *cells in lines})


def render(prices: PriceList) -> str:
    """One line per model, sorted: a refresh can be read as a diff."""
    text = io.StringIO()
    text.write(f"# {prices.source}: {CURRENCY} per million tokens, from litellm's table (MIT); written by `make prices`\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for model, row in sorted(prices.rows.items()):
        numbers = ("" if each is None else f"{each.normalize():f}" for each in row[1:4])
        writer.writerow((model, row.provider, *numbers, " ".join(row.besides)))
    return text.getvalue()


def _row(cells: list[str]) -> Row:
    try:
        provider, price, cached, output, besides = cells
        return Row(provider, Decimal(price), Decimal(cached) if cached else None, Decimal(output), tuple(besides.split()))
    except (ValueError, InvalidOperation):
        raise ValueError(f"this is no row of a price list: {cells}") from None
