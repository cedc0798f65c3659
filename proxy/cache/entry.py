"""An answer that was kept."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from proxy.exchange import UsageSource
from proxy.snapshot import Purge

ENTRY_VERSION: Final = 1
"""Of the fields below; another one is no entry."""


class Form(IntEnum):
    """How an answer was asked for. The numbers are part of keys: append, never renumber."""

    WHOLE = 0
    """In one piece."""
    STREAM = 1
    STREAM_WITH_USAGE = 2
    """The totals at the end (`stream_options.include_usage`)."""
    STREAM_WITH_USAGES = 3
    """With every chunk too (`continuous_usage_stats`)."""


RECORDED: Final = (
    *("key_id", "team", "user", "user_name", "id", "trace_id", "span_id"),
    *("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "usage_source", "chunks"),
)
"""The last fields of an Entry, which are a Record's too."""


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A complete answer, as its first client got it but for what was that client's own: ids of ours, limits."""

    operation: str
    model: str
    form: int
    head: bytes
    """Status line and header lines, without the last line's end."""
    sized: bool
    """`content-length` is among them."""
    body: bytes
    """Without chunks' framing."""
    served_by: bytes = b""
    """The header line that tells which backend it is from."""
    made_unix_ns: int = 0
    """When it was complete."""
    expires_unix_ns: int = 0
    took_ns: int = 0
    """From its admission to its engine's last byte."""
    finish_reasons: tuple[str, ...] = ()
    usage: bytes = b""
    """The engine's own `usage` (JSON), for a stream whose client didn't ask for it; nothing where it isn't known."""
    # what the record of the request says that it was made for: `RECORDED`
    key_id: str = ""
    team: str = ""
    user: str = ""
    user_name: str = ""
    id: bytes = b""
    trace_id: bytes = b""
    span_id: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    usage_source: int = UsageSource.NONE
    chunks: int = 0

    @property
    def streaming(self) -> bool:
        return self.form != Form.WHOLE

    @property
    def size(self) -> int:
        """Bytes of memory that it takes, about."""
        return len(self.head) + len(self.body) + len(self.usage) + 1500

    def over(self, unix_ns: int, purges: tuple[Purge, ...]) -> bool:
        """It may not be given again any more."""
        return unix_ns >= self.expires_unix_ns or (bool(purges) and self.withdrawn(purges))

    def withdrawn(self, purges: tuple[Purge, ...]) -> bool:
        """One of them says that it isn't to be given again."""
        return any(self._meant(each) for each in purges)

    def _meant(self, purge: Purge) -> bool:
        return (
            self.made_unix_ns < purge.before_unix_ns
            and purge.model in ("", self.model)
            and purge.key_id in ("", self.key_id)
            and purge.team in ("", self.team)
            and purge.user in ("", self.user, self.user_name)
        )
