"""Marks of prompts, and what was sent where."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.routing.prefixes import MOST_MARKS, PLACES, Prefixes, marks_of

texts = st.binary(min_size=1, max_size=8).flatmap(
    lambda seed: st.integers(0, 9000).map(lambda n: (seed * (n // len(seed) + 1))[:n])
)


@settings(deadline=None)
@given(texts, st.binary(max_size=3000), st.binary(max_size=3000))
def test_prompts_have_the_marks_in_common_up_to_where_they_part(common: bytes, one: bytes, other: bytes) -> None:
    mine, theirs = marks_of([common + one], 7), marks_of([common + other], 7)
    same = sum(1 for place in PLACES if place <= len(common))
    assert mine[:same] == theirs[:same]
    assert len(mine) == sum(1 for place in PLACES if place <= len(common + one))


@settings(deadline=None)
@given(texts, st.integers(0, 9000))
def test_in_how_many_parts_it_came_is_no_difference(text: bytes, at: int) -> None:
    assert marks_of([text[:at], text[at:]], 7) == marks_of([text], 7)


def test_another_model_has_another_cache() -> None:
    assert marks_of([b"x" * 300], 1) != marks_of([b"x" * 300], 2)


def test_how_far_a_prompt_is_known_where() -> None:
    prefixes = Prefixes()
    a, b, c = prefixes.enter(), prefixes.enter(), prefixes.enter()
    system = b"s" * 1024
    prefixes.sent(marks_of([system + b"1" * 1024], 0), a)
    prefixes.sent(marks_of([system + b"2" * 1024], 0), b)
    assert prefixes.reach(marks_of([system + b"1" * 4096], 0)) == {a: 2048, b: 1024}
    assert prefixes.reach(marks_of([b"other" * 500], 0)) == {}
    assert c not in prefixes.reach(marks_of([system], 0))


def test_a_cache_that_was_lost_is_forgotten_and_hides_no_other() -> None:
    prefixes = Prefixes()
    a, b = prefixes.enter(), prefixes.enter()
    marks = marks_of([b"x" * 2048], 0)
    prefixes.sent(marks, a)
    prefixes.sent(marks[:4], b)
    prefixes.leave(a)
    assert prefixes.reach(marks) == {b: 1024}


def test_what_was_not_seen_for_longest_goes_first() -> None:
    prefixes = Prefixes(most=64)
    a = prefixes.enter()
    kept = marks_of([b"k" * 1024], 0)
    prefixes.sent(kept, a)
    for number in range(1000):
        prefixes.sent(marks_of([b"%8d" % number * 128], 0), a)
        prefixes.sent(kept, a)
    assert prefixes.reach(kept) == {a: 1024}
    assert len(prefixes) <= 64
    assert prefixes.reach(marks_of([b"%8d" % 1 * 128], 0)) == {}


def test_restarts_cost_nothing_in_the_long_run() -> None:
    prefixes = Prefixes()
    marks = marks_of([b"x" * 512], 0)
    for _ in range(1_000):
        bit = prefixes.enter()
        prefixes.sent(marks, bit)
        assert prefixes.reach(marks) == {bit: 512}
        prefixes.leave(bit)
    assert bit.bit_length() == 1


def test_what_is_remembered_takes_as_much_memory_as_is_said() -> None:
    prefixes = Prefixes()
    bits = [prefixes.enter() for _ in range(64)]
    tracemalloc.start()
    try:
        for number in range(4 * MOST_MARKS // len(PLACES)):
            marks = [number * len(PLACES) + at + 2**31 for at in range(len(PLACES))]
            prefixes.sent(marks, bits[number % 64])
            prefixes.sent(marks, bits[number * 7 % 64])
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert MOST_MARKS * 15 / 16 <= len(prefixes) <= MOST_MARKS
    assert taken < 20 * 2**20
