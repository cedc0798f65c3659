"""Driving one request's coroutine without a Task.

A request's pipeline is an ordinary coroutine, but it waits for one thing at a time, and what it waits for arrives in a callback
of the event loop (a protocol's `data_received`, a timer). So the callback resumes it directly: `wake` to go on, `interrupt` to
raise at the place where it waits. That saves the Task, its future and two turns of the event loop per request, and it makes
leaving deterministic: when a client hangs up, the pipeline has ended before the callback returns.

A coroutine that is driven so may await only `Flow.wait` and `Flow.until`: anything else of asyncio expects a Task. `until` is
the bridge: it waits for an asyncio future, such as a Task that connects.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from types import CoroutineType
from typing import Any, TypeVar

T = TypeVar("T")

_WAKE = object()
"""What a flow waits for in `wait`: nothing but `wake` or `interrupt`."""


class Flow:
    """One request's coroutine. All calls come from the event loop's thread. `ended` is called when it has ended."""

    _coroutine: CoroutineType[Any, Any, None] | None = None
    _waiting: object = None
    _woken = False
    _error: Exception | None = None

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run an `async def` until its first wait, or to its end."""
        self._coroutine = coroutine  # type: ignore[assignment]  # what an `async def` makes is a CoroutineType
        self._resume(coroutine, None)

    def wake(self) -> None:
        """Let it go on from `wait`. Before it waits: it won't. After its end, or while it waits for a future: nothing."""
        coroutine = self._coroutine
        if coroutine is None:
            return
        if self._waiting is _WAKE:
            self._resume(coroutine, None)
        elif coroutine.cr_running:
            self._woken = True

    def interrupt(self, error: Exception) -> None:
        """Raise `error` where it waits. Before it waits: as soon as it does. After its end: nothing."""
        coroutine = self._coroutine
        if coroutine is None:
            return
        if coroutine.cr_running:
            self._error = error
        else:
            self._resume(coroutine, error)

    @types.coroutine
    def wait(self) -> Generator[None, None, None]:
        """Until `wake` or `interrupt`."""
        if self._error is not None:
            self._raise_pending()
        if self._woken:
            self._woken = False
            return
        self._waiting = _WAKE
        yield

    @types.coroutine
    def until(self, future: asyncio.Future[T]) -> Generator[None, None, T]:
        """Until `future` is done; its result. If interrupted, the future is cancelled."""
        try:
            self._raise_pending()
            if not future.done():
                future.add_done_callback(self._future_done)
                self._waiting = future
                yield
        except BaseException:
            future.remove_done_callback(self._future_done)
            future.cancel()
            raise
        return future.result()

    def _raise_pending(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _future_done(self, future: asyncio.Future[Any]) -> None:
        if self._waiting is future and self._coroutine is not None:
            self._resume(self._coroutine, None)

    def _resume(self, coroutine: Coroutine[Any, Any, None], error: Exception | None) -> None:
        self._waiting = None
        try:
            if error is None:
                coroutine.send(None)
            else:
                coroutine.throw(error)
        except StopIteration:
            self._coroutine = None
            self._ended()
        except BaseException:
            self._coroutine = None
            self._ended()
            raise
