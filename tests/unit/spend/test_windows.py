"""Windows of budgets: whole, without gap or overlap, by the clocks on the wall."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.spend.tally import QUARTER_NS
from proxy.spend.windows import FOREVER_NS, SECOND_NS, Period, window

HOUR = 3600 * SECOND_NS


def at(text: str, zone: str = "UTC", fold: int = 0) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()) * SECOND_NS


def shown(period: Period, unix_ns: int) -> tuple[str, str]:
    """A window by the clocks of its zone."""
    zone = ZoneInfo(period.time_zone)
    start, end = (datetime.fromtimestamp(each // SECOND_NS, zone) for each in window(period, unix_ns))
    return start.isoformat(), end.isoformat()


@pytest.mark.parametrize(
    ("per", "start", "end"),
    [
        ("day", "2026-11-20T00:00:00+00:00", "2026-11-21T00:00:00+00:00"),
        ("week", "2026-11-16T00:00:00+00:00", "2026-11-23T00:00:00+00:00"),
        ("month", "2026-11-01T00:00:00+00:00", "2026-12-01T00:00:00+00:00"),
    ],
)
def test_day_week_and_month(per: str, start: str, end: str) -> None:
    """A Friday."""
    assert shown(Period(per), at("2026-11-20T15:04:05")) == (start, end)


@pytest.mark.parametrize("day", ["2026-12-31", "2027-01-31", "2028-02-29", "2027-02-28"])
def test_months_of_every_length_and_the_end_of_a_year(day: str) -> None:
    start, end = window(Period("month"), at(f"{day}T23:59:59"))
    assert end == at(f"{day}T00:00:00") + 24 * HOUR
    assert start == at(f"{day[:8]}01T00:00:00")


def test_a_total_has_neither_beginning_nor_end() -> None:
    assert window(Period("total", "Europe/Vienna"), at("2026-11-20T15:04:05")) == (0, 2**63 - 1) == (0, FOREVER_NS)


# failure 60
@pytest.mark.parametrize("per", ["day", "week", "month"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Vienna", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
def test_the_instant_of_rollover_belongs_to_the_new_window_and_to_no_other(per: str, zone: str) -> None:
    period = Period(per, zone)
    start, end = window(period, at("2026-11-20T12:00:00"))
    assert window(period, end - 1) == window(period, start) == (start, end)
    assert window(period, end)[0] == end
    assert window(period, start - 1)[1] == start


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Vienna", "2026-03-29", 23),
        ("Europe/Vienna", "2026-10-25", 25),
        ("Europe/Vienna", "2026-11-20", 24),
        ("America/New_York", "2026-03-08", 23),
        ("America/New_York", "2026-11-01", 25),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("Australia/Lord_Howe", "2026-10-04", 23.5),
        ("Asia/Kathmandu", "2026-11-20", 24),
        ("America/Santiago", "2026-09-06", 23),
        ("America/Santiago", "2026-04-04", 25),
        ("America/Sao_Paulo", "2018-11-04", 23),
        ("America/Sao_Paulo", "2019-02-16", 25),
        ("America/Havana", "2026-11-01", 25),
    ],
)
def test_a_day_is_as_long_as_its_zone_makes_it(zone: str, day: str, hours: float) -> None:
    start, end = window(Period("day", zone), at(f"{day}T12:00:00", zone))
    assert (end - start) / HOUR == hours
    inside = (
        datetime.fromtimestamp(start // SECOND_NS, ZoneInfo(zone)),
        datetime.fromtimestamp(end // SECOND_NS - 1, ZoneInfo(zone)),
    )
    assert [each.date().isoformat() for each in inside] == [day, day]
    assert datetime.fromtimestamp(start // SECOND_NS - 1, ZoneInfo(zone)).date().isoformat() < day


def test_an_offset_of_three_quarters_of_an_hour() -> None:
    assert window(Period("day", "Asia/Kathmandu"), at("2026-11-20T18:14:59"))[1] == at("2026-11-20T18:15:00")


@pytest.mark.parametrize(("zone", "day"), [("America/Santiago", "2026-09-06"), ("America/Sao_Paulo", "2018-11-04")])
def test_where_there_is_no_midnight_the_day_begins_when_clocks_are_put_forward(zone: str, day: str) -> None:
    start, _ = shown(Period("day", zone), at(f"{day}T12:00:00", zone))
    assert start.startswith(f"{day}T01:00:00")


def test_clocks_put_forward_over_midnight_and_not_at_it() -> None:
    """Toronto in 1919 went from 23:30 on 30 March to 00:30 on the 31st."""
    start, _ = shown(Period("day", "America/Toronto"), at("1919-03-31T12:00:00", "America/Toronto"))
    assert start.startswith("1919-03-31T00:30:00")


def test_an_evening_that_is_repeated_after_midnight_belongs_to_the_new_day() -> None:
    """Newfoundland put its clocks back at one minute past midnight, until 2011: a date came twice."""
    period = Period("day", "America/St_Johns")
    start, end = window(period, at("2010-11-07T12:00:00", "America/St_Johns"))
    again = at("2010-11-06T23:30:00", "America/St_Johns", fold=1)
    assert start < again < end
    assert window(period, again) == (start, end)
    assert window(period, start - 1)[1] == start


def test_a_day_that_a_zone_left_out() -> None:
    """Samoa went from 29 to 31 December 2011."""
    period = Period("day", "Pacific/Apia")
    assert (
        window(period, at("2011-12-29T12:00:00", "Pacific/Apia"))[1]
        == window(period, at("2011-12-31T12:00:00", "Pacific/Apia"))[0]
    )


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(available_timezones())),
    st.sampled_from(["day", "week", "month"]),
    st.integers(at("1980-01-01T00:00:00"), at("2037-12-31T00:00:00")),
)
def test_every_instant_is_in_one_window_and_windows_are_next_to_each_other(zone: str, per: str, unix_ns: int) -> None:
    period = Period(per, zone)
    start, end = window(period, unix_ns)
    assert start <= unix_ns < end
    assert window(period, start) == window(period, end - 1) == (start, end)
    assert window(period, end)[0] == end
    assert window(period, start - 1)[1] == start


def test_every_zone_changes_its_date_at_a_quarter_of_an_hour() -> None:
    """The tally of what was spent relies on it (`proxy/spend/tally.py`)."""
    for zone in available_timezones():
        months = [datetime(2026 + month // 12, month % 12 + 1, 15, tzinfo=UTC) for month in range(30)]
        starts = [window(Period("month", zone), int(month.timestamp()) * SECOND_NS)[0] for month in months]
        assert all(start % QUARTER_NS == 0 for start in starts), zone
        assert all(before < after for before, after in pairwise(starts)), zone


def test_what_is_no_period_or_no_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: day, week, month, total"):
        window(Period("year"), 0)
    with pytest.raises(ZoneInfoNotFoundError):
        window(Period("day", "Europe/Atlantis"), 0)
