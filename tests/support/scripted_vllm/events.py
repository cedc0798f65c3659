"""The events of a stream, before they are framed. Sans-io, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from tests.support.scripted_vllm import generation
from tests.support.scripted_vllm.generation import Call, Delta
from tests.support.scripted_vllm.requests import quote

DONE: Final = b"[DONE]"
ENGINE_DIED: Final = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Event(NamedTuple):
    """One SSE event: its data, what it adds to the tokens generated, and how long after the event before it comes."""

    data: bytes
    tokens: int = 0
    wait: float = 0.0
    name: bytes = b""
    """Of its `event:` field; chat, completions and audio have none."""


class Prepared(NamedTuple):
    """What an API answers: a body, or the events of a stream."""

    body: bytes = b""
    events: Iterator[Event] | None = None
    call: Call | None = None
    """What the engine's counters count."""
    prompt_tokens: int = 0
    """What they count where nothing is generated."""
    fail: Callable[[int], Iterable[Event | str]] | None = None
    """How a stream ends whose engine fails after so many events: by events, or by what is done to the connection."""


class Renderer(Protocol):
    """What an API with typed events makes of each delta."""

    def delta(self, delta: Delta) -> list[Event]: ...

    def close(self) -> list[Event]:
        """The events after the last delta."""


def typed(name: str, fields: dict[str, object]) -> Event:
    return Event(quote(fields), name=name.encode())


def typed_stream(call: Call, renderer: Renderer) -> Iterator[Event]:
    """A delta's tokens and time are those of its first event, or where it has none, of the next one."""
    tokens, wait, huge = 0, 0.0, call.script.huge_line
    for delta in generation.deltas(call):
        tokens, wait = tokens + delta.tokens, wait + delta.wait
        for event in renderer.delta(delta):
            yield event._replace(tokens=tokens, wait=wait)
            tokens, wait = 0, 0.0
        if huge and not tokens:
            yield typed("ping", {"type": "ping", "huge": "x" * huge})
            huge = 0
    for event in renderer.close():
        yield event._replace(tokens=tokens, wait=wait)
        tokens, wait = 0, 0.0
