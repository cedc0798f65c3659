"""The `periods` file of the state directory: the periods for which somebody has a budget, and whether somebody's requests at the
same time are counted. Control writes it before the snapshot that has those limits. The collector sums what was spent in these
periods, and a worker that starts knows by it whether others may have anything that counts.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from proxy.files import replace_file
from proxy.spend.windows import Period


class Counted(msgspec.Struct, frozen=True):
    """`periods`: those of all budgets. `concurrency`: somebody may have so many requests at the same time."""

    periods: tuple[Period, ...] = ()
    concurrency: bool = False

    def __bool__(self) -> bool:
        return bool(self.periods) or self.concurrency


def read_counted(path: Path) -> Counted | None:
    """None: it isn't known, because nobody has written it yet or not in a way that this version can read. Raises OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Counted)
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_counted(path: Path, counted: Counted) -> None:
    """Replace the file: readers see the old one or the new one. Raises OSError; the old one stays then."""
    replace_file(path, msgspec.json.encode(counted))
