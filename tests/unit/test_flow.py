"""Driving a coroutine from callbacks: wake and interrupt before, while and after it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from proxy.flow import Flow


class Stop(Exception):
    pass


class Run:
    """A flow, and what happened in it, in order."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.flow = Flow(lambda: self.happened.append("ended"))

    def start(self, steps: Callable[[Run], Awaitable[None]]) -> list[str]:
        async def run() -> None:
            await steps(self)

        self.flow.start(run())
        return self.happened


async def wait_once(run: Run) -> None:
    run.happened.append("before")
    try:
        await run.flow.wait()
        run.happened.append("after")
    except Stop:
        run.happened.append("stopped")
    finally:
        run.happened.append("finally")


def test_one_that_never_waits_has_ended_when_start_returns() -> None:
    async def steps(run: Run) -> None:
        run.happened.append("step")

    assert Run().start(steps) == ["step", "ended"]


def test_one_that_waits_goes_on_when_it_is_woken() -> None:
    run = Run()
    assert run.start(wait_once) == ["before"]
    run.flow.wake()
    assert run.happened == ["before", "after", "finally", "ended"]


def test_one_that_waits_hears_an_interruption_at_once() -> None:
    run = Run()
    run.start(wait_once)
    run.flow.interrupt(Stop())
    assert run.happened == ["before", "stopped", "finally", "ended"]


def test_a_wake_before_the_wait_is_not_lost() -> None:
    async def steps(run: Run) -> None:
        run.flow.wake()
        await run.flow.wait()
        run.happened.append("first")
        await run.flow.wait()
        run.happened.append("second")

    run = Run()
    assert run.start(steps) == ["first"], "one wake is one wait"
    run.flow.wake()
    assert run.happened == ["first", "second", "ended"]


def test_an_interruption_before_the_wait_is_not_lost() -> None:
    async def steps(run: Run) -> None:
        run.flow.interrupt(Stop())
        run.happened.append("still running")
        await wait_once(run)

    assert Run().start(steps) == ["still running", "before", "stopped", "finally", "ended"]


def test_an_interruption_counts_more_than_a_wake() -> None:
    async def steps(run: Run) -> None:
        run.flow.wake()
        run.flow.interrupt(Stop())
        await wait_once(run)

    assert Run().start(steps) == ["before", "stopped", "finally", "ended"]


def test_after_the_end_nothing_happens() -> None:
    run = Run()
    run.start(wait_once)
    run.flow.wake()
    happened = list(run.happened)
    run.flow.wake()
    run.flow.interrupt(Stop())
    assert run.happened == happened


def test_one_that_was_interrupted_may_wait_again() -> None:
    """So an attempt on another connection begins."""

    async def steps(run: Run) -> None:
        await wait_once(run)
        await wait_once(run)

    run = Run()
    run.start(steps)
    run.flow.interrupt(Stop())
    assert run.happened == ["before", "stopped", "finally", "before"]
    run.flow.wake()
    assert run.happened[4:] == ["after", "finally", "ended"]


def test_an_interruption_that_nobody_catches_ends_it_and_is_raised() -> None:
    async def steps(run: Run) -> None:
        await run.flow.wait()

    run = Run()
    run.start(steps)
    with pytest.raises(Stop):
        run.flow.interrupt(Stop())
    assert run.happened == ["ended"]
    run.flow.wake()
    assert run.happened == ["ended"]


def test_an_error_of_its_own_ends_it_and_is_raised() -> None:
    async def steps(run: Run) -> None:
        raise Stop

    run = Run()
    with pytest.raises(Stop):
        run.start(steps)
    assert run.happened == ["ended"]


def test_flows_may_drive_one_another() -> None:
    first, second = Run(), Run()
    second.start(wait_once)

    async def steps(run: Run) -> None:
        second.flow.interrupt(Stop())
        run.happened.append("went on")

    assert first.start(steps) == ["went on", "ended"]
    assert second.happened[-1] == "ended"


# --- futures -----------------------------------------------------------------------------------------------------------


def on_a_future(
    settle: Callable[[Run, asyncio.Future[str]], None], *, done: bool = False
) -> tuple[list[str], asyncio.Future[str]]:
    """Run a flow that waits for a future, and do something to either → (what happened, the future)."""

    async def scene() -> tuple[list[str], asyncio.Future[str]]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if done:
            future.set_result("done before")

        async def steps(run: Run) -> None:
            try:
                run.happened.append(await run.flow.until(future))
            except (Stop, asyncio.CancelledError, ZeroDivisionError) as error:
                run.happened.append(type(error).__name__)

        run = Run()
        run.start(steps)
        settle(run, future)
        for _ in range(3):
            await asyncio.sleep(0)
        return run.happened, future

    return asyncio.run(scene())


def test_a_futures_result_is_waited_for() -> None:
    assert on_a_future(lambda run, future: future.set_result("it"))[0] == ["it", "ended"]


def test_a_future_that_is_done_needs_no_waiting() -> None:
    assert on_a_future(lambda run, future: run.happened.append("then"), done=True)[0] == ["done before", "ended", "then"]


def test_a_futures_error_is_raised() -> None:
    assert on_a_future(lambda run, future: future.set_exception(ZeroDivisionError()))[0] == ["ZeroDivisionError", "ended"]


def test_a_cancelled_future_says_so() -> None:
    def cancel(run: Run, future: asyncio.Future[str]) -> None:
        future.cancel()

    assert on_a_future(cancel)[0] == ["CancelledError", "ended"]


def test_an_interruption_cancels_the_future() -> None:
    happened, future = on_a_future(lambda run, future: run.flow.interrupt(Stop()))
    assert happened == ["Stop", "ended"]
    assert future.cancelled()


def test_an_interruption_after_the_future_was_done_comes_first() -> None:
    def both(run: Run, future: asyncio.Future[str]) -> None:
        future.set_result("too late")
        run.flow.interrupt(Stop())

    assert on_a_future(both)[0] == ["Stop", "ended"]


def test_a_wake_does_not_end_the_waiting_for_a_future() -> None:
    assert on_a_future(lambda run, future: run.flow.wake())[0] == []


def test_an_interruption_before_waiting_for_a_future_cancels_it() -> None:
    async def scene() -> None:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def steps(run: Run) -> None:
            run.flow.interrupt(Stop())
            with pytest.raises(Stop):
                await run.flow.until(future)
            run.happened.append("stopped")

        assert Run().start(steps) == ["stopped", "ended"]
        assert future.cancelled()

    asyncio.run(scene())
