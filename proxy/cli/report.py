"""Rows on the way to people and programs: a table, CSV or JSON.

What is shown came from elsewhere (names of models and of keys): a table shows control characters as escapes, and a CSV cell
that a spreadsheet would take for a formula gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

Row = Mapping[str, Any]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NANO = 1_000_000_000


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned, numbers to the right. A last line without a newline."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[at]) for row in cells) for at in range(len(columns))]
    widths = [max(len(column), *(len(row[at]) for row in cells)) if cells else len(column) for at, column in enumerate(columns)]

    def line(row: Sequence[str]) -> str:
        parts = (
            text.rjust(width) if right else text.ljust(width) for text, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join([click.style(line(columns), bold=True), *map(line, cells)])


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """RFC 4180, without what would be a formula (OWASP: CSV injection)."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_harmless(column) for column in columns])
    writer.writerows([_harmless(value) for value in row] for row in rows)
    return text.getvalue()


def json_text(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def money(nano: int) -> str:
    """Integer nano-units → exact decimal text, at least two digits after the point: 132000 → "0.000132"."""
    whole, rest = divmod(abs(nano), _NANO)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{digits}"


def moment(unix_ns: int | None) -> str:
    """ns since 1970 → ISO 8601 to the second, UTC; "" for none."""
    if unix_ns is None:
        return ""
    return datetime.fromtimestamp(unix_ns // _NANO, UTC).isoformat().replace("+00:00", "Z")


def printable(text: str) -> str:
    """Text that can do nothing to a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "backslashreplace").decode() for each in text)


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).replace("-", "", 1).isdecimal()


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
