r"""Rows on the way to people and programs: a table, CSV or JSON.

What is shown came from elsewhere (names of models and of keys): a table and CSV show control characters as escapes, JSON has them
as `\uXXXX`, and a CSV cell that a spreadsheet would take for a formula gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, TypeVar

import click
import msgspec

Row = Mapping[str, Any]
Form = Literal["table", "csv", "json"]
Columns = Mapping[str, Callable[[Row], object]]
"""Head → what stands below it."""
Command = TypeVar("Command", bound=Callable[..., Any])

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NANO = 1_000_000_000


def form_option(command: Command) -> Command:
    """`--format table|csv|json` and, for short, `--json`, handed on as `form: Form`."""
    options = (
        click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True),
        click.option("--json", "form", flag_value="json", help="The same as --format json."),
    )
    for option in options:
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    """`--json`, handed on as `as_json: bool`, where there is one thing to show."""
    return click.option("--json", "as_json", is_flag=True, help="For programs: what the API said.")(command)


def listed(rows: Sequence[Row], columns: Columns, form: Form, nothing: str = "There is nothing.") -> None:
    """Print them. JSON has all of each, as it came; the others have these columns."""
    if form == "json":
        click.echo(json_text(rows))
        return
    cells = [[read(row) for read in columns.values()] for row in rows]
    if form == "csv":
        click.echo(csv_text([head.lower().replace(" ", "_") for head in columns], cells), nl=False)
    else:
        click.echo(table(list(columns), cells) if cells else nothing, err=not cells)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """One thing: a line for each of what is known of it. What isn't known is left out."""
    said = [(name, text) for name, value in pairs if (text := _cell(value))]
    width = max((len(name) for name, _ in said), default=0)
    return "\n".join(f"{click.style(printable(name).ljust(width), bold=True)}  {text}" for name, text in said)


def picture(spans: Sequence[tuple[str, float, float]], width: int = 48) -> str:
    """A bar for each (name, start, length) on a common scale; lengths in ms, behind the bars."""
    whole = max((start + length for _, start, length in spans), default=0.0)
    if whole <= 0:
        return ""
    names = max(len(name) for name, _, _ in spans)
    lines = []
    for name, start, length in spans:
        left = min(int(start / whole * width), width - 1)
        right = min(max(round((start + length) / whole * width), left + 1), width)
        bar = " " * left + ("█" * (right - left) if length > 0 else "▏")
        lines.append(f"{printable(name).ljust(names)}  {bar.ljust(width)}  {length:10.1f} ms")
    return "\n".join(lines)


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
    """What could do something to a terminal is escaped, which changes nothing of what it says."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    return "".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text)


def money(nano: int) -> str:
    """Integer nano-units → exact decimal text, at least two digits after the point: 132000 → "0.000132"."""
    whole, rest = divmod(abs(nano), _NANO)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{digits}"


def exact(amount: str) -> str:
    """Decimal text of money, as `money` has it."""
    return money(int(Decimal(amount).scaleb(9)))


def moment(unix_ns: int | None) -> str:
    """ns since 1970 → ISO 8601 to the second, UTC; "" for none."""
    if unix_ns is None:
        return ""
    return datetime.fromtimestamp(unix_ns // _NANO, UTC).isoformat().replace("+00:00", "Z")


def printable(text: str) -> str:
    """Text that can do nothing to a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "backslashreplace").decode() for each in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if code > 0xFFFF:
        return "".join(f"\\u{half:04x}" for half in (0xD800 + (code - 0x10000 >> 10), 0xDC00 + (code & 0x3FF)))
    return f"\\u{code:04x}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return printable(str(value))


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).replace("-", "", 1).isdecimal()


def _harmless(value: object) -> object:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    if not isinstance(value, str):
        return value
    value = "".join(each if each in "\n\r\t" else printable(each) for each in value)
    return f"'{value}" if value.startswith(_FORMULA) else value
