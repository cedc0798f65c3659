"""`python -m proxy.pricelist.refresh [VERSION | WHEEL]`: write the price list anew; with neither, from the newest litellm.

pip fetches the wheel, and one file is read out of it: nothing of litellm is installed or run. Figures are decimal all the way.

Taken are models with a price per token of text. Left out is what a record could not bill: prices per second, character, image,
page or query, and rows that only say zero (local engines, subscriptions, unknown). A row that is in the list and has such prices
*too* names them in its last column:

    above-200k    longer prompts cost more
    cache-write   writing to the provider's cache costs more than input
    reasoning, audio, images    tokens of this kind have a price of their own

Prices for batches and for other service tiers than the standard one are left out without a word.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import click

from proxy.pricelist import FILE, PriceList, Row, parse, render

MEMBER = "litellm/model_prices_and_context_window_backup.json"
MODES = frozenset({"chat", "completion", "responses", "embedding", "rerank"})
"""Kinds of models whose requests are billed by tokens of text."""

DEAREST = 1
"""Dollars per token: what the settings allow."""

_PICO = Decimal("0.000001")
_NOISE = Decimal("1e-12")
_LONGER = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")


class Refused(Exception):
    """The list stays as it is; the text says why."""


def main(arguments: Sequence[str] | None = None, file: Path = FILE) -> int:
    parser = argparse.ArgumentParser(prog="python -m proxy.pricelist.refresh", description="Write the price list anew.")
    parser.add_argument("source", nargs="?", default="", metavar="VERSION | WHEEL", help="of litellm; default: the newest")
    source = parser.parse_args(arguments).source
    try:
        with tempfile.TemporaryDirectory() as directory:
            wheel = Path(source) if source.endswith(".whl") else fetch(source, Path(directory))
            version, content = unpack(wheel)
        rows, rounded = extract(content)
        old = parse(file.read_text(encoding="utf-8")) if file.exists() else PriceList("nothing", {})
        new = PriceList(f"litellm {version}", rows)
        refuse_shrinking(old, new, file)
    except (Refused, OSError, ValueError) as error:
        click.echo(f"{file.name} stays as it is: {error}", err=True)
        return 1
    scratch = file.with_suffix(".new")
    scratch.write_text(render(new), encoding="utf-8")
    scratch.replace(file)
    for line in rounded:
        click.echo(f"rounded: {line}")
    click.echo(changes(old, new))
    return 0


def fetch(version: str, directory: Path) -> Path:
    """litellm's wheel for this machine, by pip and its settings. Raises Refused."""
    wanted = f"litellm=={version}" if version else "litellm"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(directory)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=False).returncode:
        raise Refused(f"pip could not fetch {wanted}")
    return next(directory.glob("*.whl"))


def unpack(wheel: Path) -> tuple[str, bytes]:
    """(version, the table as JSON). Raises Refused, OSError."""
    name = re.match(r"litellm-([^-]+)-", wheel.name)  # the binary distribution format: name, version and tags
    if name is None:
        raise Refused(f"{wheel.name} is not a wheel of litellm")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return name[1], archive.read(MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Refused(f"{wheel.name}: {error}") from None


def extract(content: bytes) -> tuple[dict[str, Row], list[str]]:
    """(the rows to keep, what rounding changed in them, in words). Raises Refused."""
    try:
        table = json.loads(content, parse_float=Decimal, parse_int=Decimal)
        entries = [(model, entry) for model, entry in table.items() if entry.get("mode") in MODES]
    except (ValueError, ArithmeticError, AttributeError, TypeError) as error:
        raise Refused(f"{MEMBER} is not the table that this was written for: {error}") from None
    rows: dict[str, Row] = {}
    rounded: list[str] = []
    for model, entry in entries:
        if not model.isprintable():
            raise Refused(f"the name {model!r} does not fit on a line")
        read = _Entry(model, entry, rounded)
        price, output = read.price("input_cost_per_token"), read.price("output_cost_per_token")
        if price or output:
            cached = read.price("cache_read_input_token_cost")
            provider = str(entry.get("litellm_provider", ""))
            rows[model] = Row(provider, price or Decimal(0), cached, output or Decimal(0), tuple(read.besides()))
    return rows, rounded


class _Entry:
    """One model of litellm's table. `rounded` takes note of prices that lose something."""

    def __init__(self, model: str, entry: Mapping[str, Any], rounded: list[str]) -> None:
        self._model = model
        self._entry = entry
        self._rounded = rounded

    def price(self, key: str) -> Decimal | None:
        """Per token → per million, in whole pico-units per token. Raises Refused."""
        exact = self._number(key)
        if exact is None:
            return None
        kept = exact.quantize(_PICO, ROUND_HALF_EVEN)
        if abs(exact - kept) > exact * _NOISE:  # less is what a float left behind: 4.0000000000000003e-07
            self._rounded.append(f"{self._model} {key}: {exact} to {kept} per million tokens")
        return kept

    def besides(self) -> Iterator[str]:
        if longer := [int(found[1]) for found in map(_LONGER.fullmatch, self._entry) if found]:
            yield f"above-{min(longer)}k"
        elif "tiered_pricing" in self._entry:
            yield "above-some-length"
        if (self._number("cache_creation_input_token_cost") or 0) > (self._number("input_cost_per_token") or 0):
            yield "cache-write"
        if self._differs("reasoning"):
            yield "reasoning"
        if self._differs("audio"):
            yield "audio"
        if self._differs("image") or "input_cost_per_image" in self._entry:
            yield "images"

    def _differs(self, kind: str) -> bool:
        """Whether tokens of this kind cost something else than tokens of text."""
        ways = ("input", "output")
        pairs = [(self._number(f"{way}_cost_per_{kind}_token"), self._number(f"{way}_cost_per_token")) for way in ways]
        return any(its is not None and its != texts for its, texts in pairs)

    def _number(self, key: str) -> Decimal | None:
        """Per million tokens, as it is written. Raises Refused."""
        value = self._entry.get(key)
        if value is None:
            return None
        if not isinstance(value, Decimal) or not 0 <= value <= DEAREST:
            raise Refused(f"{self._model}: {key}: {value} is no price")
        return value.scaleb(6)


def refuse_shrinking(old: PriceList, new: PriceList, file: Path) -> None:
    """A table of which half is gone was more likely misread than thinned out. Raises Refused."""
    if 2 * len(new.rows) < len(old.rows):
        raise Refused(f"of {len(old.rows)} models {len(new.rows)} would be left; if that is right, delete {file} first")


def changes(old: PriceList, new: PriceList) -> str:
    added, removed = new.rows.keys() - old.rows.keys(), old.rows.keys() - new.rows.keys()
    changed = [model for model in new.rows.keys() & old.rows.keys() if new.rows[model] != old.rows[model]]
    counts = f"{len(added)} added, {len(removed)} removed, {len(changed)} changed, {len(new.rows)} in all"
    return f"{old.source} -> {new.source}: {counts}"


if __name__ == "__main__":
    sys.exit(main())
