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
from typing import Any, TypeVar

T = TypeVar("T")

_WAKE = object()
"""What a flow waits for in `wait`: nothing but `wake` or `interrupt`."""


class Flow:
    """One request's coroutine. All calls come from the event loop's thread. `ended` is called when it has ended."""

    _coroutine: Coroutine[Any, Any, None] | None = None
    _running = False
    _waiting: object = None
    _woken = False
    _error: Exception | None = None

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run until the first wait, or to the end."""
        self._coroutine = coroutine
        self._resume(None)

    def wake(self) -> None:
        """Let it go on from `wait`. Before it waits: it won't. After its end: nothing."""
        if self._running:
            self._woken = True
        elif self._waiting is _WAKE:
            self._resume(None)

    def interrupt(self, error: Exception) -> None:
        """Raise `error` where it waits. Before it waits: as soon as it does. After its end: nothing."""
        if self._running:
            self._error = error
        elif self._coroutine is not None:
            self._resume(error)

    @types.coroutine
    def wait(self) -> Generator[None, None, None]:
        """Until `wake` or `interrupt`."""
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
        if self._waiting is future:
            self._resume(None)

    def _resume(self, error: Exception | None) -> None:
        coroutine = self._coroutine
        if coroutine is None:
            return
        self._running = True
        self._waiting = None
        try:
            if error is None:
                coroutine.send(None)
            else:
                coroutine.throw(error)
            self._running = False
        except StopIteration:
            self._coroutine = None
            self._running = False
            self._ended()
        except BaseException:
            self._coroutine = None
            self._running = False
            self._ended()
            raise
