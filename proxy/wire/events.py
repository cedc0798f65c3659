"""Watching a stream of typed events go by, as responses and messages have them: each event has a name (`event: ...`), and one of
them is the end. Per event the work is a look at its name; JSON is read for the few that carry facts.

There is no usage before the end in these streams, and no way to ask for it: the tokens of one that is left early are estimated.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from proxy.exchange import Record
from proxy.wire.observer import Observer
from proxy.wire.sse import data_of
from proxy.wire.stream import Terms

_FIRST = re.compile(rb"event: ([^\r\n]*)")
_NAME = re.compile(rb"(?:^|[\r\n])event:[ ]?([^\r\n]*)")


class _Typed(Struct, gc=False):
    type: str = ""


_typed = msgspec.json.Decoder(_Typed)


class EventObserver(Observer):
    """One answer's typed events. There is one choice, and its end is the answer's."""

    def __init__(self, record: Record, terms: Terms, *, limit: int, fingerprint: bytes = b"") -> None:
        super().__init__(record, limit)

    @property
    def answered(self) -> bool:
        return bool(self._record.finish_reasons)

    @property
    def whole(self) -> bool:
        return self.done

    def _named(self, name: str, event: bytes, now: int) -> bytes:
        """One event in, what the client gets of it out."""
        raise NotImplementedError

    def _event(self, event: bytes, now: int) -> bytes:
        if self.done:
            return b""
        name = _name_of(event)
        if name is None:  # a comment, or something of another server's
            self._started = True
            return event
        self._record.chunks += 1
        out = self._named(name, event, now)
        self._started = True
        return out

    def _failed(self, event: bytes, error: bytes, whole: bytes) -> bytes:
        """An error's event: `error` is its object, `whole` the answer that it would be by itself."""
        if not self._started:
            self.first_error = whole
            self.done = True
            return b""
        self.error_event = error
        return event


def _name_of(event: bytes) -> str | None:
    """The event's type: its name, or what its data says of it."""
    if match := _FIRST.match(event) or _NAME.search(event):
        return match[1].decode("ascii", "replace")
    data = data_of(event)
    if data is None:
        return None
    try:
        return _typed.decode(data).type
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return ""
