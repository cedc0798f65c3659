"""How the last reading of the configuration went: a small file in the state directory.

The supervisor writes it, at its start and after each reload; the collector tells Prometheus, `glasshouse reload` tells people.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from proxy.files import replace_file


class LastReload(msgspec.Struct, frozen=True):
    began_ns: int
    """`time.monotonic_ns()` of this host: what was written before that has been read."""
    successful: bool
    success_unix_ns: int
    """When the last one that was successful ended."""
    lines: list[str] = []
    """For people: what was restarted, or why nothing was."""

    @classmethod
    def read(cls, path: Path) -> LastReload:
        """Raises OSError, msgspec.MsgspecError."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        """Replace the file: readers see the old one or the new one. Raises OSError."""
        replace_file(path, msgspec.json.encode(self))
