"""A sink's state in one file: the old one or the new one, never half of each, also after a power cut."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from proxy.files import replace_file

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


def write_state(path: Path, state: msgspec.Struct) -> None:
    """Replace the file. Raises OSError; the old one stays then."""
    replace_file(path, msgspec.msgpack.encode(state))
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_state(path: Path, kind: type[T]) -> T | None:
    """None if there is none yet. One that can't be read is put aside, with an error in the log. Raises OSError."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError) as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        log.error("state not readable; it was put aside", extra={"file": str(aside), "error": str(error)})
        return None
