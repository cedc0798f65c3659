"""A name for a state directory, which is what the workers of one host have in common."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def host_id(directory: Path) -> str:
    """Made at the first start, by whichever worker comes first. Raises OSError."""
    path = directory / "host-id"
    if not path.exists():
        scratch = directory / f"host-id.{os.getpid()}"
        scratch.write_text(uuid.uuid4().hex + "\n")
        try:
            os.link(scratch, path)  # unlike a rename it doesn't replace what another has made
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
    return path.read_text().strip()
