"""Answers that this worker keeps in its own memory: the ones that were asked for last, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from proxy.cache.entry import Entry
from proxy.snapshot import Purge

_LOOKED_AT: Final = 2000
"""Entries in one look for those that are over: a look at all of them would keep streams waiting."""


class Memory:
    """`bytes`: what it holds, about. `evictions`: entries that had to make room for others."""

    def __init__(self, most_bytes: int) -> None:
        self.bytes = 0
        self.evictions = 0
        self._most = most_bytes
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        """Those that were asked for longest ago come first. (A dict looks for its first among all that were ever dropped.)"""
        self._to_look_at: list[bytes] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        """Be it one that is over."""
        return key in self._entries

    def get(self, key: bytes, unix_ns: int, purges: tuple[Purge, ...]) -> Entry | None:
        """One that may be given again."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.over(unix_ns, purges):
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        size = entry.size
        if size > self._most:
            return
        self.drop(key)
        self._entries[key] = entry
        self.bytes += size
        while self.bytes > self._most:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.size
            self.evictions += 1

    def drop(self, key: bytes) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self.bytes -= entry.size

    def tidy(self, unix_ns: int, purges: tuple[Purge, ...]) -> None:
        """Let go of what may not be given again any more, some of it at a time."""
        if not self._to_look_at:
            self._to_look_at = list(self._entries)
        looked_at, self._to_look_at = self._to_look_at[-_LOOKED_AT:], self._to_look_at[:-_LOOKED_AT]
        for key in looked_at:
            entry = self._entries.get(key)
            if entry is not None and entry.over(unix_ns, purges):
                self.drop(key)
