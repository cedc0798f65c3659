"""What a worker counts of one backend."""

from __future__ import annotations

import gc
import weakref

import pytest

from proxy.routing.standing import USUAL_PREFILL
from tests.support.routing import START_NS, S, backend, catalogue, world_of

ONE = catalogue([backend("a", depth=16, prefill_tokens=10_000)])
LONG = "x" * 4000


def test_what_is_taken_is_given_back() -> None:
    with world_of(ONE) as world:
        asked = [world.ask(key, LONG, max_tokens=10) for key in ("k", "l", "k")]
        standing = world["a"]
        assert standing.in_flight == 3
        assert standing.prefilling == sum(each.route.prompt for each in asked)
        assert standing.tokens == standing.prefilling + 30
        assert {key: (share.requests, share.prefilling) for key, share in standing.keys.items()} == {
            "k": (2, 2 * asked[0].route.prompt),
            "l": (1, asked[1].route.prompt),
        }
        asked[0].first_token()
        asked[0].first_token()
        assert standing.prefilling == sum(each.route.prompt for each in asked[1:])
        assert standing.tokens == sum(each.route.cost for each in asked)
        for each in asked:
            each.done()
            each.done()
        world.assert_idle()


def test_what_its_cache_has_is_not_counted() -> None:
    with world_of(catalogue([backend("a"), backend("b")])) as world:
        first = world.ask(text=LONG, max_tokens=1)
        home = first.backend
        first.first_token()
        first.done()
        again = world.ask(text=LONG, max_tokens=1)
        assert again.backend == home
        assert again.route.uncached <= 256 // 4 + len(again.exchange.body) // 4 - len(LONG) // 4 + 1
        again.done()
        world.assert_idle()


def test_a_prompt_whose_first_token_cant_be_seen_is_computed_after_a_while() -> None:
    with world_of(ONE) as world:
        asked = [world.ask("k", LONG, stream=False, max_tokens=1) for _ in range(3)]
        standing, prompt = world["a"], asked[0].route.prompt
        for computed in range(1, 4):
            world.router.sweep(START_NS + computed * prompt * S // USUAL_PREFILL - S // 1000)
            assert standing.prefilling == prompt * (4 - computed)
            world.router.sweep(START_NS + computed * prompt * S // USUAL_PREFILL + S // 1000)
            assert standing.prefilling == prompt * (3 - computed)
        for each in asked:
            each.done()
        world.assert_idle()


def test_how_fast_it_computes_prompts_is_learnt() -> None:
    with world_of(ONE) as world:
        for _ in range(60):
            asked = world.ask("k", LONG)
            world.now_ns += asked.route.prompt * S // 10_000
            asked.first_token()
            asked.done()
        assert world["a"].prefill_rate == pytest.approx(10_000, rel=0.02)
        for _ in range(60):
            asked = world.ask("k", "short")
            world.now_ns += S
            asked.first_token()
            asked.done()
        assert world["a"].prefill_rate == pytest.approx(10_000, rel=0.02)  # a short one says nothing


@pytest.mark.parametrize(("depth", "workers", "most"), [(16, 1, 16), (16, 2, 8), (1, 4, 1), (5, 2, 2)])
def test_workers_share_an_engines_depth(depth: int, workers: int, most: int) -> None:
    with world_of(
        catalogue([backend("a", depth=depth)]), workers=workers, waiting={"requests": 0}, redis={"url": "redis://localhost"}
    ) as world:
        asked = [world.ask() for _ in range(20)]
        assert sum(each.standing is not None for each in asked) == most


@pytest.mark.parametrize("depth", [0, 100])
def test_one_that_comes_back_has_a_part_of_its_depth(depth: int) -> None:  # failure 55
    with world_of(catalogue([backend("a", depth=depth)]), waiting={"requests": 0}) as world:
        world.eject("a")
        world.bring_back("a")
        at_first = sum(world.ask().standing is not None for _ in range(500))
        assert at_first == (26 if not depth else 10)
        world.router.sweep(world.now_ns + 15 * S)
        assert world["a"].depth == (128 if not depth else 50)
        world.router.sweep(world.now_ns + 30 * S)
        assert world["a"].depth >= (1 << 20 if not depth else 100)


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_kept_of_a_request_that_has_left(stream: bool) -> None:
    """Else each would stay in memory, body and all, and the next one would have to take other memory."""
    with world_of(ONE) as world:
        asked = world.ask("k", LONG, stream=stream)
        route = weakref.ref(asked.route)
        gc.collect()
        gc.disable()
        try:
            asked.done()
            del asked
            assert route() is None
        finally:
            gc.enable()
