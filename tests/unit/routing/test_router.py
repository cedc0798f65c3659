"""Which backends, in what order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.routing import Router
from proxy.snapshot import Model


def model(count: int) -> Model:
    return Model("m", tuple(f"b{i}" for i in range(count)))


def test_a_model_without_a_backend_has_no_candidates() -> None:
    assert list(Router().candidates(model(0))) == []


def test_one_backend_is_the_only_candidate() -> None:
    router = Router()
    router.in_flight["b0"] = 100
    assert list(router.candidates(model(1))) == ["b0"]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_idle_ones_take_turns(count: int) -> None:
    router = Router()
    firsts = Counter(router.candidates(model(count))[0] for _ in range(count * 10))
    assert set(firsts.values()) == {10}


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.integers(0, 20))
def test_the_one_with_the_fewest_in_flight_comes_first(load: list[int], turns: int) -> None:
    router = Router()
    for i, requests in enumerate(load):
        router.in_flight[f"b{i}"] = requests
    for _ in range(turns):
        router.candidates(model(len(load)))
    order = list(router.candidates(model(len(load))))
    assert [router.in_flight[name] for name in order] == sorted(load)
    assert set(order) == set(model(len(load)).backends)


def test_looking_changes_no_load() -> None:
    router = Router()
    router.candidates(model(3))
    assert not any(router.in_flight.values())
