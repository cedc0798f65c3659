"""What people type → what the API takes. What is wrong with a value the API says; here is only what a command line needs:
times, spans, budgets in one word each, and `field=value` for whatever has no option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import click
import msgspec

Value = Any
"""As JSON has it."""

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")
_BUDGET = re.compile(
    r"(?P<amount>[0-9]+(?:\.[0-9]+)?)(?P<times>[kM]?) *(?P<unit>[A-Za-z_]+) */ *(?P<per>[a-z]+)(?: +(?P<rest>.*))?"
)
_TIMES = {"": 0, "k": 3, "M": 6}
_SOFT = "soft"
_exact = msgspec.json.Decoder(float_hook=Decimal)


class When(click.ParamType[datetime]):
    """`24h` (ago), `2026-11-01` or `2026-11-01T12:30`; without a time zone it is UTC."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            if (distance := _span(value)) is not None:
                return self.from_now(distance)
            when = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time; allowed: 24h, 7d, 2026-11-01, 2026-11-01T12:30 (UTC)", param, ctx)
        return when if when.tzinfo is not None else when.replace(tzinfo=UTC)

    def from_now(self, distance: timedelta) -> datetime:
        return datetime.now(UTC) - distance


class Until(When):
    """The same for what is to come: `24h` is in a day."""

    def from_now(self, distance: timedelta) -> datetime:
        return datetime.now(UTC) + distance


class Span(click.ParamType[int]):
    """`90s`, `30m`, `24h`, `7d` → seconds. `0` is none at all."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if (span := timedelta(0) if value == "0" else _span(value)) is None:
            self.fail(f"{value!r} is no span of time; allowed: 0, 90s, 30m, 24h, 7d", param, ctx)
        return int(span.total_seconds())


class Decimals(click.ParamType[Decimal]):
    """An exact number; whether it may be that one, the API says."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        try:
            number = Decimal(value)
        except InvalidOperation:
            self.fail(f"{value!r} is no number; allowed: such as 0.25", param, ctx)
        if not number.is_finite():
            self.fail(f"{value!r} is no number; allowed: such as 0.25", param, ctx)
        return number


class Number(click.ParamType[float]):
    """Such as 2 or 0.5; whether it may be that one, the API says."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number; allowed: such as 0.5", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number; allowed: such as 0.5", param, ctx)
        return number


class NumberOrDefault(Number):
    """The same, or `default`: None."""

    name = "number or default"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "default" else super().convert(value, param, ctx)


class Several(click.ParamType[list[str]]):
    """`a,b`; as an option that may be repeated."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else list(value)


class Budget(click.ParamType[dict[str, Value]]):
    """`500 EUR/month`, `5M tokens/day`, `3600 gpu_seconds/week`; behind it, as needed, a time zone and `soft`.

    A currency is written as `money`'s unit for people to read: it is checked against the settings' where they are known.
    """

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Value]:
        if isinstance(value, dict):
            return value
        if (match := _BUDGET.fullmatch(value.strip())) is None:
            self.fail(
                f"{value!r} is no budget; allowed: '500 EUR/month', '5M tokens/day', '3600 gpu_seconds/week', "
                "and behind it a time zone ('Europe/Vienna') and 'soft'",
                param,
                ctx,
            )
        unit, amount = match["unit"], _shifted(match["amount"], _TIMES[match["times"]])
        rest = (match["rest"] or "").split()
        budget: dict[str, Value] = {"per": match["per"]}
        if unit.isupper() and len(unit) == 3:
            budget |= {"money": Decimal(amount), CURRENCY: unit}
        elif unit in ("money", "tokens", "gpu_seconds"):
            budget[unit] = Decimal(amount) if unit == "money" or "." in amount else int(amount)
        else:
            self.fail(f"{unit!r} is nothing to count; allowed: a currency such as EUR, tokens, gpu_seconds", param, ctx)
        if _SOFT in rest:
            rest.remove(_SOFT)
            budget[_SOFT] = True
        if rest:
            budget["time_zone"] = " ".join(rest)
        return budget


CURRENCY = "currency"
"""Of a budget on its way from the command line: taken out, and compared, before the API gets it."""


class Assignment(click.ParamType[tuple[str, Value]]):
    """`field=value`; the value is JSON if it can be read as that, and text otherwise. Dots lead into sections: `bounds.n=8`."""

    name = "field=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Value]:
        if isinstance(value, tuple):
            return value[0], value[1]
        field, equals, text = value.partition("=")
        if not equals or not field:
            self.fail(f"{value!r} sets nothing; allowed: field=value, such as expires=null or bounds.n=8", param, ctx)
        return field, json_or_text(text)


def json_or_text(text: str) -> Value:
    try:
        return _exact.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return text


def nested(changes: Sequence[tuple[str, Value]]) -> dict[str, Value]:
    """Each `field=value` in its section, as in a JSON merge patch. Raises click.UsageError: a step into what is no section."""
    whole: dict[str, Value] = {}
    for field, value in changes:
        *steps, last = field.split(".")
        section = whole
        for step in steps:
            section = section.setdefault(step, {})
            if not isinstance(section, dict):
                raise click.UsageError(f"{field}: {step!r} is set beside it")
        section[last] = value
    return whole


def _span(text: str) -> timedelta | None:
    match = _SPAN.fullmatch(text)
    return timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None


def _shifted(digits: str, places: int) -> str:
    """A decimal number times 10^places, exactly."""
    whole, _, rest = digits.partition(".")
    rest = rest.ljust(places, "0")
    moved = f"{whole}{rest[:places]}".lstrip("0") or "0"
    return f"{moved}.{rest[places:]}" if rest[places:] else moved
