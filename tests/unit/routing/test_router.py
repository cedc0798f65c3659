"""Requests on their way to backends: who has which, who waits, and that nobody and nothing is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.engines import EngineLoad
from proxy.errors import ClientGone, NotReady, Overloaded, RateLimited
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.routing.waiting import QUANTUM
from proxy.snapshot import Model, Snapshot, SnapshotFile
from proxy.wire import audio
from tests.support.routing import START_NS, Asked, S, World, backend, catalogue, world_of

Scenario = Callable[[], Coroutine[Any, Any, None]]

ONE = catalogue([backend("a", depth=8)])
TWO = catalogue([backend("a"), backend("b")])
LONG = "x" * 4000


def in_loop(scenario: Scenario) -> Callable[[], None]:
    def test() -> None:
        asyncio.run(scenario())

    test.__name__ = scenario.__name__
    test.__doc__ = scenario.__doc__
    return test


def fill(world: World, key: str = "other", number: int = 8) -> list[Asked]:
    asked = [world.ask(key) for _ in range(number)]
    assert all(each.standing for each in asked)
    return asked


# -- one request --


def test_where_there_is_one_backend_there_is_no_choice() -> None:
    with world_of(ONE) as world:
        asked = world.ask()
        assert (asked.backend, asked.routed_by, asked.exchange.record.scores) == ("a", "only", [])


def test_a_model_without_backends_has_nobody() -> None:
    with world_of(catalogue([], {"m": ()})) as world:
        assert isinstance(world.ask().error, NotReady)


def test_who_failed_isnt_asked_again() -> None:
    with world_of(catalogue([backend(name) for name in "abc"])) as world:
        asked = world.ask()
        seen = [asked.backend]
        for _ in range(2):
            seen.append(asked.again().backend)
        assert sorted(seen) == ["a", "b", "c"]
        assert isinstance(asked.again().error, NotReady)
        world.assert_idle()


def test_one_that_was_the_last_choice_says_nothing_of_an_earlier_one() -> None:
    with world_of(TWO) as world:
        asked = world.ask()
        assert asked.exchange.record.scores
        asked.again()
        assert (asked.routed_by, asked.exchange.record.scores) == ("only", [])


def test_a_models_other_name_is_the_same_model() -> None:
    names = ("a", "b")
    file = SnapshotFile(models={each: Model("m", names, policy="round_robin") for each in ("m", "alias")}, backends=TWO.backends)
    with world_of(Snapshot(msgspec.msgpack.decode(msgspec.msgpack.encode(file), type=SnapshotFile))) as world:
        served = [world.ask(model=model).backend for model in ("m", "alias") * 3]
        assert served in (["a", "b"] * 3, ["b", "a"] * 3)


def test_an_answers_length_is_learnt_and_outlives_the_catalogue() -> None:
    with world_of(ONE) as world:
        for _ in range(300):
            world.ask(max_tokens=5000, n=2).done(output_tokens=2000)
        assert world.request().route.answer == pytest.approx(1000, rel=0.01)
        assert world.request(max_tokens=10, n=3).route.answer == 30
        world.follow(catalogue([backend("a", depth=8)]))
        assert world.request().route.answer == pytest.approx(1000, rel=0.01)


def test_who_gave_an_answer_has_what_goes_on_from_it() -> None:
    with world_of(TWO) as world:
        for number in range(20):
            first = world.ask()
            gave = first.backend
            world.router.gave(first.route, f"resp_{number}")
            world[gave].others = 10**6
            next_one = world.request()
            next_one.route.home = world.router._gave[f"resp_{number}"]
            assert next_one.enter().backend == gave
            assert next_one.routed_by == "auto.previous_response"
            world[gave].others = 0


def test_a_backend_that_hasnt_the_model_is_passed_over_for_a_while() -> None:
    with world_of(TWO) as world:
        asked = world.ask()
        wrong = asked.backend
        world.router.misrouted(asked.route)
        asked.done()
        for _ in range(5):
            other = world.ask()
            assert other.backend == "ab".replace(wrong, "")
            other.done()
        last = world.ask()
        world.router.misrouted(last.route)
        assert isinstance(world.ask().error, NotReady)
        last.done()
        world.router.sweep(START_NS + 31 * S)  # nobody would ever find out that it has it again
        assert {world.ask().backend for _ in range(10)} == {"a", "b"}


# -- room --


def test_a_key_alone_may_use_the_whole_depth() -> None:
    with world_of(ONE, waiting={"requests": 0}) as world:
        assert sum(bool(world.ask(text=LONG * 10).standing) for _ in range(20)) == 8


def test_of_several_keys_each_leaves_something() -> None:  # an eighth of 16
    with world_of(catalogue([backend("a", depth=16)]), waiting={"requests": 0}) as world:
        world.ask("quiet").done()
        assert sum(bool(world.ask("noisy").standing) for _ in range(20)) == 14
        assert world.ask("quiet").standing
        assert world.ask("quiet").standing
        assert not world.ask("quiet").standing


def test_of_several_keys_none_may_have_an_engine_compute_its_prompts_only() -> None:
    with world_of(catalogue([backend("a", prefill_tokens=2500)]), waiting={"requests": 0}) as world:
        world.ask("quiet").done()
        asked = [world.ask("noisy", LONG) for _ in range(5)]
        assert sum(bool(each.standing) for each in asked) == 2
        asked[0].first_token()
        assert world.ask("noisy", LONG).standing
        assert world.ask("quiet", LONG * 10).standing  # one may be as long as it is


def picture(text: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


def test_a_file_is_as_long_for_an_engine_as_what_it_shows_or_says() -> None:
    with world_of(TWO) as world:
        asked = world.ask(messages=picture(LONG))
        assert 2000 < asked.route.prompt < 2200
        reach = world.ask(messages=picture(LONG)).route.reach or {}
        assert 900 < reach[world[asked.backend].bit] // 4 < asked.route.prompt, "its text"
        assert world.ask(text=LONG * 100).route.prompt > 100_000
        body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n--b--\r\n' % bytes(400_000)
        recording = Exchange(START_NS, b"POST", audio.OPERATIONS[0].path, {}, body, Remembered(), Flow(lambda: None))
        request = audio.OPERATIONS[0].read(body, recording.record, b"multipart/form-data; boundary=b")
        route = world.router.route(recording, audio.OPERATIONS[0], request, world.snapshot.models["m"], world.snapshot)
        assert route.prompt == 1000


def test_when_the_others_have_been_quiet_for_a_while_one_has_it_all_again() -> None:
    with world_of(ONE, waiting={"requests": 0}) as world:
        world.ask("quiet").done()
        assert sum(bool(world.ask("noisy").standing) for _ in range(20)) == 7
        world.now_ns += 11 * S
        assert world.ask("noisy").standing


# -- the line --


@in_loop
async def test_who_waits_goes_on_when_there_is_room() -> None:
    with world_of(ONE) as world:
        there = fill(world, "k")
        waits = [world.ask() for _ in range(3)]
        assert world.router.waiting == 3
        world.now_ns += S
        there[0].done()
        assert (waits[0].backend, waits[0].ended) == ("a", False)  # it goes on in the loop's next turn
        await asyncio.sleep(0)
        assert [each.ended for each in waits] == [True, False, False]
        assert waits[0].exchange.record.queued_ns >= 0
        for each in [*there, *waits]:
            each.done()
            await asyncio.sleep(0)
        for each in waits:
            each.done()
        world.assert_idle()


@in_loop
async def test_a_client_that_leaves_while_it_waits_is_never_sent() -> None:  # failure 67
    with world_of(ONE) as world:
        there = fill(world, "k")
        gone, stays = world.ask(), world.ask()
        gone.leave()
        assert isinstance(gone.error, ClientGone)
        there[0].done()
        assert (gone.backend, stays.backend) == ("", "a")


@in_loop
async def test_a_client_that_leaves_in_the_moment_that_it_is_let_in_holds_nothing() -> None:
    with world_of(ONE) as world:
        there = fill(world, "k")
        gone, stays = world.ask(), world.ask()
        there[0].done()
        assert gone.backend == "a"
        gone.leave()
        assert (gone.backend, stays.backend) == ("", "a")
        await asyncio.sleep(0)
        for each in [*there, stays]:
            each.done()
        world.assert_idle()


@in_loop
async def test_nobody_waits_longer_than_allowed() -> None:
    with world_of(ONE, waiting={"timeout": 10}) as world:
        fill(world, "k")
        asked = world.ask()
        await world.pass_s(9.9)
        assert asked.error is None
        await world.pass_s(0.2)
        assert isinstance(asked.error, Overloaded)
        assert asked.error.error_code == "queue_timeout"
        assert world.router.waiting == 0


@in_loop
async def test_priority_is_strict() -> None:
    with world_of(ONE) as world:
        there = fill(world)
        asked = [world.ask(f"k{priority}", priority=priority) for priority in (2, 1, 0) * 3]
        order = []
        for _ in asked:
            there.pop(0).done()
            await asyncio.sleep(0)
            there += [each for each in asked if each.standing and each not in there]
            order.append(there[-1].route.priority)
        assert order == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@in_loop
async def test_a_full_line_turns_people_away() -> None:
    with world_of(ONE, waiting={"requests": 5}) as world:
        fill(world, "k0")
        asked = [world.ask(f"k{at}") for at in range(8)]
        errors = [each.error for each in asked if each.error]
        assert len(errors) == 3
        assert all(isinstance(each, Overloaded) and each.error_code == "queue_full" for each in errors)
        assert world.router.waiting == 5


@in_loop
async def test_one_key_cant_fill_the_line() -> None:
    with world_of(ONE, waiting={"requests": 80}) as world:
        fill(world, "noisy")
        noisy = [world.ask("noisy") for _ in range(200)]
        refused = [each.error for each in noisy if each.error]
        assert all(isinstance(each, RateLimited) for each in refused)
        assert world.router.waiting == 70
        for key in ("b", "c"):
            assert world.ask(key).error is None  # there still is a place for whoever comes


@in_loop
async def test_lines_with_a_backend_in_common_take_turns() -> None:
    shared = catalogue([backend("a", depth=4), backend("b", depth=1)], {"m": "ab", "n": "a"})
    with world_of(shared) as world:
        there = [world.ask(model="m", max_tokens=1) for _ in range(5)]
        waits = {model: [world.ask(model=model) for _ in range(20)] for model in "mn"}
        at_a = [each for each in there if each.backend == "a"]
        served: Counter[str] = Counter()
        for _ in range(20):
            at_a.pop(0).done()
            for model, asked in waits.items():
                for each in [each for each in asked if each.standing]:
                    asked.remove(each)
                    at_a.append(each)
                    served[model] += 1
        assert served == {"m": 10, "n": 10}


@in_loop
async def test_keys_share_in_tokens_that_were_computed() -> None:
    """A batch of long prompts beside short ones, whose caches save much of some: over time the same for each."""
    with world_of(catalogue([backend("a", depth=4, prefill_tokens=10**6)])) as world:
        texts = {"batch": "x" * 16_000, "chat": "y" * 2_000, "cached": "z" * 16_000}
        computed = {"batch": 4000, "chat": 500, "cached": 1000}
        there = [world.ask("other") for _ in range(4)]
        asked = {key: [world.ask(key, text, max_tokens=1) for _ in range(30)] for key, text in texts.items()}
        had: Counter[str] = Counter()
        for turn in range(600):
            former = there.pop(0)
            took = computed.get(former.route.key, 0)
            former.done(output_tokens=1, computed_tokens=took)
            for key, routes in asked.items():
                for each in [each for each in routes if each.standing]:
                    routes.remove(each)
                    there.append(each)
                    if turn > 30:
                        had[key] += computed[key]
                    routes.append(world.ask(key, texts[key], max_tokens=1))
        assert max(had.values()) - min(had.values()) <= QUANTUM + 5 * 4001  # a round, and what was under way


@pytest.mark.parametrize(("took_s", "depth", "line"), [(1.0, 4, 40), (0.3, 8, 200), (5.0, 2, 10)])
def test_when_to_come_back_is_told_honestly(took_s: float, depth: int, line: int) -> None:
    """What is said to one that is refused is, within a factor of two, how long it takes until those have gone who are in line."""

    async def scenario() -> None:
        with world_of(catalogue([backend("a", depth=depth)]), waiting={"requests": line, "timeout": 1000}) as world:
            under_way: list[tuple[int, Asked]] = []
            waits: list[Asked] = []
            last: list[Asked] = []
            said = told_ns = 0

            def step() -> None:
                for end_ns, each in [each for each in under_way if each[0] <= world.now_ns]:
                    under_way.remove((end_ns, each))
                    each.done(10, 10)
                for each in [each for each in waits if each.standing]:
                    waits.remove(each)
                    under_way.append((world.now_ns + int(took_s * S), each))

            for turn in range(100_000):
                world.now_ns += S // 50
                step()
                while not last:
                    asked = world.ask(f"k{turn % 50}")
                    if asked.error is not None:
                        if turn * 0.02 > 10 * took_s:
                            assert isinstance(asked.error, Overloaded | RateLimited)
                            said, told_ns, last = asked.error.retry_after_s or 0, world.now_ns, list(waits)
                        break
                    waits.append(asked)
                    step()
                if last and not waits:
                    break
            waited_s = (world.now_ns - told_ns) / S
            assert waited_s / 2 <= said <= 2 * waited_s + 1

    asyncio.run(scenario())


# -- backends that come, go and fail --


@in_loop
async def test_where_all_are_out_requests_still_find_out() -> None:  # failure 53
    with world_of(TWO) as world:
        world.eject("a", "b")
        assert {world.ask().backend for _ in range(4)} == {"a", "b"}


@in_loop
async def test_of_those_that_hang_each_is_tried_once_a_second_and_the_others_are_told_when_to_come_back() -> None:
    with world_of(TWO) as world:
        for name in "ab":
            world[name].health.failed(world.now_ns, "first_byte_timeout", certain=True)
        world.router.changed()
        for _ in range(3):
            asked = [world.ask() for _ in range(5)]
            assert Counter(each.backend for each in asked) == {"a": 1, "b": 1, "": 3}
            errors = [each.error for each in asked if each.error]
            assert all(isinstance(each, NotReady) and each.retry_after_s == 5 for each in errors) or world.now_ns > START_NS
            world.now_ns += S


@in_loop
async def test_when_nobody_is_left_those_who_wait_are_told() -> None:
    with world_of(ONE) as world:
        fill(world, "k")
        asked = world.ask()
        world.router.standings["a"].drained = True
        world.router.changed()
        await world.pass_s(0.1)
        assert isinstance(asked.error, NotReady)


@in_loop
async def test_who_waits_goes_to_a_backend_that_comes() -> None:
    with world_of(ONE) as world:
        fill(world, "k")
        asked = [world.ask() for _ in range(3)]
        world.follow(catalogue([backend("a", depth=8), backend("b", depth=2)]))
        await world.pass_s(0.1)
        assert [each.backend for each in asked] == ["b", "b", ""]
        assert world.router.waiting == 1


@in_loop
async def test_whose_model_is_gone_is_told_and_the_others_go_on_waiting() -> None:
    with world_of(catalogue([backend("a", depth=1)], {"m": "a", "n": "a"})) as world:
        there = world.ask()
        gone, stays = world.ask(model="n"), world.ask(model="m")
        world.follow(catalogue([backend("a", depth=1)], {"m": "a"}))
        await world.pass_s(0.1)
        assert isinstance(gone.error, NotReady)
        assert stays.error is None
        there.done()
        assert stays.backend == "a"


@in_loop
async def test_who_comes_back_after_a_change_waits_where_somebody_looks() -> None:
    """It was at a backend while the catalogue changed, and has to go to another one, which has no room."""
    with world_of(catalogue([backend("a", depth=1), backend("b", depth=1)]), waiting={"timeout": 5}) as world:
        first, second = world.ask(), world.ask()
        world.follow(catalogue([backend(first.backend, depth=1), backend(second.backend, depth=1)]))
        first.again()
        assert world.router.waiting == 1
        second.done()
        assert first.backend
        third = world.ask()
        world.follow(catalogue([backend("a", depth=1), backend("b", depth=1)]))
        third.again()
        await world.pass_s(5.1)
        assert isinstance(third.error, Overloaded)


@in_loop
async def test_who_comes_back_after_a_change_isnt_sent_to_whom_the_catalogue_has_no_more() -> None:
    with world_of(catalogue([backend(name) for name in "abc"])) as world:
        asked = world.ask()
        left = [name for name in "abc" if name != asked.backend]
        world.follow(catalogue([backend(asked.backend), backend(left[0])]))
        assert asked.again().backend == left[0]
        assert isinstance(asked.again().error, NotReady)


def test_what_engines_say_of_others_counts() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="least_loaded")) as world:
        mine = [world.ask() for _ in range(2)]
        world.learn({"a": EngineLoad(running=6, waiting=4), "b": EngineLoad(running=1)})
        assert (world["a"].others, world["b"].others) == (0, 0)  # it may have ended meanwhile
        world.learn({"a": EngineLoad(running=7, waiting=4), "b": EngineLoad(running=1)})
        assert (world["a"].others, world["b"].others) == (9 * 500, 0)
        world.learn({"b": EngineLoad()})
        assert world["a"].others == 0
        assert all(each.standing for each in mine)


def test_a_cache_that_overflows_counts_as_work() -> None:
    with world_of(ONE) as world:
        asked = world.ask(text=LONG)
        for usage, least, most in ((0.5, 0, 0), (0.9, 0, 0), (0.95, 0.4, 0.6), (1.0, 0.9, 1.1)):
            world.learn({"a": EngineLoad(running=1, kv_usage=usage)})
            assert least * asked.route.cost <= world["a"].others <= most * asked.route.cost


@pytest.mark.parametrize(
    ("said", "forgets"),
    [((5.0, 5.0), False), ((5.0, 7.0), True), ((0.0, 0.0), False), ((0.0, 9.0), True)],
    ids=["same", "anew", "doesn't say", "was noticed"],
)
def test_one_that_was_started_anew_has_nothing_in_its_cache(said: tuple[float, float], forgets: bool) -> None:  # failure 12
    with world_of(TWO) as world:
        world.learn({name: EngineLoad(started_unix_s=said[0]) for name in "ab"})
        first = world.ask(text=LONG)
        home = first.backend
        first.done()
        world.learn({name: EngineLoad(started_unix_s=said[1] if name == home else said[0]) for name in "ab"})
        asked = world.ask(text=LONG)
        assert asked.routed_by == ("auto.load" if forgets else "auto.prefix")


@pytest.mark.parametrize(("said", "asked"), [(7.0, True), (5.0, False)], ids=["anew", "same"])
def test_one_that_was_started_anew_is_asked_at_once(said: float, asked: bool) -> None:
    with world_of(TWO) as world:
        world.learn({"a": EngineLoad(started_unix_s=5.0)})
        world.eject("a")
        world.learn({"a": EngineLoad(started_unix_s=said)})
        assert world["a"].health.probe_due(world.now_ns) is asked


def test_one_at_another_address_is_another_one() -> None:
    with world_of(TWO) as world:
        first = world.ask(text=LONG)
        home = first.backend
        first.done()
        world.eject(home)
        moved = msgspec.structs.replace(world.snapshot.backends[home], port=9000)
        world.follow(catalogue([moved, world.snapshot.backends["ab".replace(home, "")]]))
        assert {world.ask(text=f"{at}").backend for at in range(4)} == {"a", "b"}
        assert world.ask(text=LONG).routed_by == "auto.load"


# -- whatever happens --


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("kkkkl"), st.integers(0, 40), st.sampled_from("mmn")),
        st.tuples(st.sampled_from(["done", "token", "leave", "fail"]), st.integers(0, 1000)),
        st.tuples(st.just("pass"), st.floats(0.05, 3.0)),
        st.tuples(st.sampled_from(["drain", "eject", "back", "remove"]), st.sampled_from("abc")),
        st.tuples(st.just("turn")),
    ),
    max_size=80,
)


def check(world: World, asked: list[Asked]) -> None:
    """What holds at every moment."""
    router = world.router
    waiting = [each for each in asked if not each.ended and not each.standing]
    assert router.waiting == len(waiting) == len(router.in_line()) == sum(line.waiting for line in router._lines.values())
    assert {id(each.route) for each in waiting} == {id(route) for route in router.in_line()}
    for standing in router.standings.values():
        mine = [each for each in asked if each.standing is standing]
        assert standing.in_flight == len(mine)
        assert standing.tokens == sum(each.route.uncached + each.route.answer for each in mine)
        assert standing.prefilling == sum(each.route.prefilling for each in mine) >= 0
        keys = Counter(each.route.key for each in mine)
        assert {key: share.requests for key, share in standing.keys.items()} == keys
        for key, share in standing.keys.items():
            assert share.prefilling == sum(each.route.prefilling for each in mine if each.route.key == key) >= 0


@pytest.mark.parametrize("policy", ["auto", "prefix_affinity", "session", "weighted"])
@settings(deadline=None, max_examples=60)
@given(steps=steps, depth=st.integers(1, 4))
def test_nothing_is_lost_and_nothing_counted_twice(policy: str, steps: list[tuple[Any, ...]], depth: int) -> None:
    async def scenario() -> None:
        backends = {name: backend(name, depth=depth, prefill_tokens=2000) for name in "abc"}

        def now() -> Snapshot:
            models = {"m": [name for name in "abc" if name in backends], "n": [name for name in "ab" if name in backends]}
            return catalogue(backends.values(), models, policy=policy)

        with world_of(now(), waiting={"requests": 20, "timeout": 5}) as world:
            asked: list[Asked] = []

            def one_of(number: int, those: list[Asked]) -> list[Asked]:
                return those[number % len(those) :][:1] if those else []

            for step, *given in steps:
                there = [each for each in asked if each.standing and each.ended]
                if step == "ask":
                    key, size, model = given
                    before = {name: each.in_flight for name, each in world.router.standings.items()}
                    each = world.ask(key, "x" * 100 * size, model=model, session=key, max_tokens=5, stream=size % 2 == 0)
                    asked.append(each)
                    if each.standing is not None:
                        assert before[each.backend] < each.standing.depth
                        assert not each.standing.drained
                elif step == "done":
                    for each in one_of(given[0], there):
                        each.done(5, 50)
                elif step == "token":
                    for each in one_of(given[0], there):
                        each.first_token()
                elif step == "fail":
                    for each in one_of(given[0], there):
                        each.standing.health.failed(world.now_ns, "upstream_disconnected")  # type: ignore[union-attr]
                        world.router.changed()
                        each.again()
                elif step == "leave":
                    for each in one_of(given[0], [each for each in asked if not each.ended]):
                        each.leave()
                elif step == "pass":
                    await world.pass_s(given[0], given[0] / 2)
                elif step == "turn":
                    await asyncio.sleep(0)
                elif step == "eject" and given[0] in world.router.standings:
                    world.eject(given[0])
                elif step == "back" and given[0] in world.router.standings:
                    health = world[given[0]].health
                    if health.probe_due(world.now_ns):
                        health.probed(world.now_ns, None)
                        world.router.changed()
                elif step in ("drain", "remove"):
                    name = given[0]
                    if name not in backends:
                        backends[name] = backend(name, depth=depth)
                    elif step == "remove":
                        del backends[name]
                    else:
                        former = backends[name]
                        backends[name] = msgspec.structs.replace(former, drained=not former.drained)
                    world.follow(now())
                check(world, asked)
            for _ in range(10):
                await world.pass_s(1, 0.5)
                for each in [each for each in asked if each.ended]:
                    each.done()
                check(world, asked)
            assert all(each.ended for each in asked)
            world.assert_idle()

    asyncio.run(scenario())
