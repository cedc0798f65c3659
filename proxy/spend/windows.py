"""When a day, a week, a month begins and ends in a time zone. Pure; times are integer ns since 1970, UTC.

A window is half-open: the instant of its end belongs to the next one. A day is as long as the zone makes it (23, 24 or 25 hours,
or half an hour more or less) and begins at the first instant that has its date: where clocks are put forward over midnight that
is later than 00:00, and where they are put back over it, what is repeated of the evening belongs to the new day.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from proxy.settings import Settings

SECOND_NS = 1_000_000_000
FOREVER_NS = 2**63 - 1


class Period(NamedTuple):
    """What a budget is for: `per` day, week (from Monday), month or total, by the clocks of `time_zone`."""

    per: str
    time_zone: str = "UTC"


def periods_of(settings: Settings) -> list[Period]:
    """Those that somebody has a budget for."""
    return sorted({Period(budget.per, budget.time_zone) for each in settings.allowances for budget in each.budgets})


def window(period: Period, unix_ns: int) -> tuple[int, int]:
    """The window that an instant lies in → (start, end). Raises ZoneInfoNotFoundError."""
    if period.per == "total":
        return 0, FOREVER_NS
    zone = ZoneInfo(period.time_zone)
    first = _first_day(period.per, datetime.fromtimestamp(unix_ns // SECOND_NS, zone).date())
    start, end = _start(first, zone), _start(following := _next(period.per, first), zone)
    if unix_ns < end:
        return start, end
    return end, _start(_next(period.per, following), zone)  # the evening again, after its midnight


def _first_day(per: str, day: date) -> date:
    """Of the day, week or month that `day` is in."""
    match per:
        case "day":
            return day
        case "week":
            return day - timedelta(day.weekday())
        case "month":
            return day.replace(day=1)
    raise ValueError(f"{per!r} is no period; allowed: day, week, month, total")


def _next(per: str, first: date) -> date:
    """The first day of what follows."""
    if per == "month":
        return (first + timedelta(31)).replace(day=1)
    return first + timedelta(7 if per == "week" else 1)


def _start(day: date, zone: ZoneInfo) -> int:
    """The first instant whose date is `day`, or a later one where the zone skipped that day."""
    midnight = datetime.combine(day, time(), zone)
    late = _unix(midnight)
    if datetime.fromtimestamp(late, zone).replace(tzinfo=None) == midnight.replace(tzinfo=None):
        return late * SECOND_NS  # of two midnights the first
    early = _unix(midnight.replace(fold=1))  # there is none: clocks were put forward between these two (PEP 495)
    while late - early > 1:
        middle = (early + late) // 2
        if datetime.fromtimestamp(middle, zone).date() < day:
            early = middle
        else:
            late = middle
    return late * SECOND_NS


def _unix(when: datetime) -> int:
    return int(when.astimezone(UTC).timestamp())
