"""How many keys an address may guess. Time is passed in."""

from __future__ import annotations

import pytest

from proxy.auth.guesses import ADDRESSES, EVERY_NS, GUESSES, Guesses

NOW = 10**15
MINUTE_NS = 60_000_000_000


def test_a_minutes_worth_at_once_then_one_a_second() -> None:
    # failure 82
    guesses = Guesses()
    assert [guesses.wait_ns("a", NOW) for _ in range(GUESSES)] == [0] * GUESSES
    assert [guesses.wait_ns("a", NOW) for _ in range(3)] == [EVERY_NS] * 3
    assert guesses.wait_ns("a", NOW + EVERY_NS - 1) == 1
    assert guesses.wait_ns("a", NOW + EVERY_NS) == 0
    assert guesses.wait_ns("a", NOW + EVERY_NS) == EVERY_NS


@pytest.mark.parametrize("gap_ns", [1, 1_000_000, 250_000_000, 999_999_999])
def test_no_minute_has_more_than_two_minutes_worth_and_no_hour_more_than_one_more(gap_ns: int) -> None:
    # failure 82
    guesses = Guesses()
    let = [at for at in range(0, 3 * MINUTE_NS, max(gap_ns, 1_000_000)) if guesses.wait_ns("a", NOW + at) == 0]
    assert len(let) <= GUESSES + 3 * MINUTE_NS // EVERY_NS
    assert len([at for at in let if MINUTE_NS <= at < 2 * MINUTE_NS]) <= GUESSES


def test_other_addresses_are_counted_by_themselves() -> None:
    guesses = Guesses()
    for _ in range(GUESSES + 1):
        guesses.wait_ns("a", NOW)
    assert guesses.wait_ns("a", NOW) > 0
    assert guesses.wait_ns("b", NOW) == 0


def test_what_is_known_is_bounded_and_who_guesses_on_is_kept() -> None:
    # failure 82
    guesses = Guesses()
    for _ in range(GUESSES):
        guesses.wait_ns("busy", NOW)
    for number in range(3 * ADDRESSES):
        guesses.wait_ns(f"address {number}", NOW)
        if number % (ADDRESSES // 2) == 0:
            guesses.wait_ns("busy", NOW + number + EVERY_NS)
    assert len(guesses) == ADDRESSES
    assert guesses.wait_ns("busy", NOW + EVERY_NS) > 0
