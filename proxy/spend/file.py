"""The `spend` file of the state directory: what the collector has stored in the ledger, summed by budget window, and how far it
had read the journal then. Whoever adds what the journal has since knows all that was spent (`reader.py`).

The collector deletes nothing from the journal that isn't in this file.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from proxy.files import replace_file
from proxy.journal import Checkpoint

SPEND_VERSION = 1
"""Readers take this version and the one before. Fields are only ever appended, with defaults."""


class SpendError(Exception):
    """The file isn't one that this version can read."""


class Row(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One worker incarnation's total for one key, and the team, user and project that it had."""

    worker: str
    key_id: str
    team: str
    cost_nano: int
    tokens: int
    gpu_ns: int
    user: str = ""
    project: str = ""


class WindowRows(msgspec.Struct, array_like=True):
    start_ns: int
    rows: list[Row]


class PeriodWindows(msgspec.Struct, array_like=True):
    """The windows of a period in which something was spent. Those before `since_ns` aren't here any more."""

    per: str
    time_zone: str
    since_ns: int
    windows: list[WindowRows]


class SpendFile(msgspec.Struct, array_like=True):
    """What is in the file. Money is in `currency`."""

    version: int = SPEND_VERSION
    currency: str = ""
    checkpoint: Checkpoint = msgspec.field(default_factory=Checkpoint)
    periods: list[PeriodWindows] = []


_decoder = msgspec.msgpack.Decoder(SpendFile)


def decode_spend(data: bytes) -> SpendFile:
    """Raises SpendError."""
    try:
        file = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SpendError(f"not a spend file: {error}") from None
    if not SPEND_VERSION - 1 <= file.version <= SPEND_VERSION:
        raise SpendError(f"spend version {file.version}; this version reads {SPEND_VERSION}")
    return file


def write_spend(path: Path, file: SpendFile) -> None:
    """Replace the file: readers see the old one or the new one. Raises OSError; the old one stays then."""
    replace_file(path, msgspec.msgpack.encode(file))
