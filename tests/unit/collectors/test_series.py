"""Counters and histograms as plain lists."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.records.series import OTHER, Exemplar, LabelBounds, Series

A, B = ("a",), ("b",)


def test_a_counter_counts() -> None:
    series = Series(["x"])
    series.add(A)
    series.add(A, 5)
    series.add(B, 2)
    assert series.rows == {A: [6], B: [2]}


def test_an_observation_falls_into_the_first_bucket_that_holds_it() -> None:
    series = Series(["x"], [10, 20])
    for value in (0, 10, 11, 20, 21):
        series.observe(A, value)
    assert series.rows == {A: [2, 2, 1, 62]}


@given(st.lists(st.integers(0, 10**13), max_size=50), st.integers(0, 50))
def test_merging_is_observing(values: list[int], cut: int) -> None:
    bounds = [10**6, 10**9, 10**12]
    one_by_one, merged = Series(["x"], bounds), Series(["x"], bounds)
    for part in (values[:cut], values[cut:]):
        counts = [0] * 4
        for value in part:
            one_by_one.observe(A, value)
            counts[bisect_left(bounds, value)] += 1
        if part:
            merged.merge(A, counts, sum(part))
    assert one_by_one.rows == merged.rows


def test_an_exemplar_is_the_latest_of_its_bucket() -> None:
    series = Series(["x"], [10])
    series.observe(A, 3, b"first", 1)
    series.observe(A, 4, b"second", 2)
    series.observe(A, 40)
    assert series.exemplars == {A: {0: Exemplar(b"second", 4, 2)}}


def test_series_beyond_the_limit_are_counted_as_other() -> None:
    series = Series(["x", "y"], limit=2)
    for number in range(10):
        series.add((str(number), "y"))
    series.add(("0", "y"))
    assert series.rows == {("0", "y"): [2], ("1", "y"): [1], (OTHER, OTHER): [8]}


def test_values_beyond_the_limit_are_other_and_known_ones_stay() -> None:
    bounds = LabelBounds(limit=2)
    assert [bounds.bound("model", value) for value in "abca"] == ["a", "b", OTHER, "a"]
    assert bounds.bound("key", "c") == "c", "each label has its own"
    assert bounds.knows("model", "a")
    assert not bounds.knows("model", "c")


def test_what_was_saved_is_restored() -> None:
    series = Series(["x"], [10])
    series.observe(A, 3)
    again = Series(["x"], [10])
    again.restore(series.saved())
    assert again.rows == series.rows
    again.observe(A, 3)
    assert series.rows == {A: [1, 0, 3]}, "restored rows are the other's own"
    bounds = LabelBounds()
    bounds.bound("model", "a")
    other = LabelBounds()
    other.restore(bounds.saved())
    assert other.knows("model", "a")


@pytest.mark.parametrize("rows", [[(["a", "b"], [1, 2, 3])], [(["a"], [1])]])
def test_rows_of_another_shape_are_refused(rows: list[tuple[list[str], list[int]]]) -> None:
    with pytest.raises(ValueError, match="shape"):
        Series(["x"], [10]).restore(rows)


def test_a_copy_stands_alone() -> None:
    series = Series(["x"], [10])
    series.observe(A, 3, b"trace")
    copy = series.copy()
    series.observe(A, 3, b"later")
    assert copy.rows == {A: [1, 0, 3]}
    assert copy.exemplars[A][0].trace_id == b"trace"
