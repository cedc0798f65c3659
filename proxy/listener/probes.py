"""`GET /health` (the process lives) and `GET /ready` (send requests here): no key, no record."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

READY = "ready"


class Probes:
    """`state` says why the worker isn't ready, or READY."""

    def __init__(self, state: Callable[[], str]) -> None:
        self._state = state

    def answer(self, target: bytes) -> tuple[int, bytes] | None:
        """(status, JSON body) of a GET, if this is a probe."""
        if target == b"/health":
            return 200, b'{"status":"alive"}'
        if target == b"/ready":
            state = self._state()
            return (200 if state == READY else 503), msgspec.json.encode({"status": state})
        return None
