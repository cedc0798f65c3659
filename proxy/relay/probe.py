"""Asking a backend how it is: first whether it is well, where it has a place for that, and then for one token.

What the token took is booked as any request's, to the key `system`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from time import monotonic_ns
from typing import Any, Final

import msgspec

from proxy.errors import ProxyError
from proxy.exchange import Exchange, Record, Remembered
from proxy.flow import Flow
from proxy.nouns import SYSTEM_KEY
from proxy.relay.backends import Kind
from proxy.reply import Reply
from proxy.routing import Standing
from proxy.snapshot import Model, Principal
from proxy.wire import chat, completions, embeddings
from proxy.wire.body import Request
from proxy.wire.operation import JSON, EngineOperation, RelayedOperation, as_it_came, nothing_to_estimate

SYSTEM: Final = Principal(SYSTEM_KEY, SYSTEM_KEY)
"""Whose requests these are."""


def _nothing_to_read(body: bytes, record: Record) -> None:
    """It is well, or isn't: the status says so."""


HEALTH: Final = RelayedOperation(
    name="health", method=b"GET", path=b"/health", prepare=as_it_came, observe=_nothing_to_read, estimate=nothing_to_estimate
)

_TOKENS: Final[dict[str, tuple[EngineOperation[Any], dict[str, object]]]] = {
    "chat": (chat.OPERATION, {"messages": [{"role": "user", "content": "."}], "max_tokens": 1}),
    "completions": (completions.OPERATION, {"prompt": ".", "max_tokens": 1}),
    "embeddings": (embeddings.OPERATION, {"input": "."}),
}
_AS_CHAT: Final = ("responses", "messages")
"""Whoever answers these has the other, too."""


class Probe:
    """One of a backend, `model` its first. It runs in a flow of its own."""

    def __init__(self, standing: Standing, model: Model | None, deadline_ns: int) -> None:
        self.standing = standing
        self.deadline_ns = deadline_ns
        self.request = Request()
        self._model = model
        self._flow = Flow(_nothing)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._flow.start(coroutine)

    def give_up(self, error: ProxyError) -> None:
        self._flow.interrupt(error)

    def reply(self) -> Reply:
        """Nobody is waiting for the answer."""
        return Reply(Nowhere(), b"", False, False, 0)

    def questions(self, kind: Kind) -> Iterator[tuple[Exchange, RelayedOperation]]:
        """Each is asked when the one before it was answered well."""
        if kind.health_path:
            yield self._exchange(HEALTH, b""), HEALTH
        name, model = self.standing.served or ("chat", self._model.name if self._model is not None else "")
        known = _TOKENS.get("chat" if name in _AS_CHAT else name)
        if known is None or not model:
            return  # what else it does can't be asked for in general
        operation, fields = known
        body = msgspec.json.encode({"model": model, **fields})
        exchange = self._exchange(operation, body)
        record = exchange.record
        self.request = operation.read(body, record, JSON)
        exchange.principal, exchange.model = SYSTEM, self._model
        record.key_id, record.key_name = SYSTEM.key_id, SYSTEM.key_name
        record.read_ns = record.authenticated_ns = record.admitted_ns = exchange.elapsed_ns()
        yield exchange, operation

    def _exchange(self, operation: RelayedOperation, body: bytes) -> Exchange:
        exchange = Exchange(monotonic_ns(), operation.method, operation.path, {}, body, Remembered(), self._flow)
        exchange.operation = operation
        exchange.record.operation = operation.name
        return exchange


def _nothing() -> None:
    """Whoever asks has said what follows from the end."""


class Nowhere(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Nobody reads it."""

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        """Nobody is there."""
