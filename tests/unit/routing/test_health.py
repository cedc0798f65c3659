"""States of a backend, with the time as an argument."""

from __future__ import annotations

import pytest

from proxy.routing.health import FEWEST, FIRST_PART, Health, State
from proxy.settings import HealthSettings

S = 1_000_000_000
START = 1_000 * S


def health(**settings: float) -> Health:
    return Health(HealthSettings(**settings))  # type: ignore[arg-type]


def is_out(each: Health) -> bool:
    return each.state is State.OUT


def test_one_failure_makes_a_suspect_and_an_answer_clears_it() -> None:
    each = health()
    assert each.failed(START, "upstream_disconnected")
    assert (each.state, each.reason) == (State.SUSPECT, "upstream_disconnected")
    assert each.probe_due(START)
    assert each.succeeded(START + S)
    assert each.state is State.UP
    assert not each.succeeded(START + S)


def test_failures_in_a_row_are_enough_without_a_probe() -> None:
    each = health(failures=3)
    assert [each.failed(START + at, "x") for at in range(3)] == [True, False, True]
    assert each.state is State.OUT


def test_a_probe_that_succeeds_does_not_make_failures_unhappen() -> None:
    each = health(failures=3)
    for at in range(2):
        each.failed(START + at, "x")
        assert each.probed(START + at, None)
    each.failed(START + 2, "x")
    assert each.state is State.OUT


def test_certain_death_is_enough_once() -> None:
    each = health()
    assert each.failed(START, "engine_dead", certain=True)
    assert each.state is State.OUT


def test_one_that_mostly_fails_has_to_leave_although_it_answers_now_and_then() -> None:  # failure 52
    each = health(failures=3)
    for at in range(FEWEST):
        each.failed(START + at, "x")
        if is_out(each):
            break
        each.failed(START + at, "x")
        if is_out(each):
            break
        each.succeeded(START + at)
    assert each.state is State.OUT


def test_a_few_failures_among_many_answers_are_none() -> None:
    each = health()
    for at in range(1000):
        each.succeeded(START + at)
        if at % 10 == 0:
            each.failed(START + at, "x")
            each.succeeded(START + at)
    assert each.state is State.UP


@pytest.mark.parametrize("times", [1, 2, 3, 10])
def test_who_fails_again_soon_stays_out_twice_as_long(times: int) -> None:  # failure 52
    each = health(ejection=5, longest_ejection=60)
    now = START
    for _ in range(times):
        each.failed(now, "x", certain=True)
        away = each.until_ns - now
        assert not each.probe_due(each.until_ns - 1)
        now = each.until_ns
        assert each.probe_due(now)
        assert each.probed(now, None)
        now += S
    assert away == min(5 * 2 ** (times - 1), 60) * S


def test_a_probe_that_fails_doubles_it_too() -> None:
    each = health(ejection=5)
    each.failed(START, "x", certain=True)
    now = each.until_ns
    assert not each.probed(now, "first_byte_timeout")
    assert each.until_ns == now + 10 * S
    assert each.reason == "first_byte_timeout"


def test_doing_well_for_long_is_not_held_against_it() -> None:
    each = health(ejection=5)
    now = START
    for _ in range(3):
        each.failed(now, "x", certain=True)
        now = each.until_ns
        each.probed(now, None)
    each.failed(now + 3600 * S, "x", certain=True)
    assert each.until_ns == now + 3605 * S


def test_the_return_is_gradual() -> None:  # failure 55
    each = health(slow_start=30)
    assert each.part(START) == 1.0
    each.failed(START, "x", certain=True)
    back = each.until_ns
    each.probed(back, None)
    assert each.part(back) == FIRST_PART
    assert each.part(back + 15 * S) == 0.5
    assert each.part(back + 30 * S) == 1.0
    assert each.part(back + 31 * S) == 1.0


def test_a_suspect_that_passes_its_probe_was_never_away() -> None:
    each = health()
    each.suspect(START, "silence")
    each.probed(START + S, None)
    assert (each.state, each.part(START + S)) == (State.UP, 1.0)


def test_a_probe_at_a_time() -> None:
    each = health()
    each.suspect(START, "silence")
    each.probing = True
    assert not each.probe_due(START + S)


def test_what_hangs_is_tried_once_a_second_where_nobody_else_is() -> None:
    each = health()
    each.failed(START, "first_byte_timeout", certain=True)
    assert each.may_be_tried(START)
    each.tried(START)
    assert not each.may_be_tried(START + S - 1)
    assert each.may_be_tried(START + S)
    each.probed(START, "upstream_unreachable")
    assert each.may_be_tried(START + 1)  # that is told at once
