"""Where packages come from: what pip is configured for, handed to uv, which reads no configuration but its own.

`python -m tests.engine.sources COMMAND ...` runs a command that way. What the caller has set for uv wins.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

_SECTIONS: Final = ("global", "install", ":env:")
"""Of pip's configuration; the later ones win."""


def uv_sources(configuration: str) -> dict[str, str]:
    """uv's variables for what `pip config list` printed."""
    found: dict[str, list[str]] = {}
    lines = [line.partition("=") for line in configuration.splitlines() if "=" in line]
    for section in _SECTIONS:
        for name, _, value in lines:
            if name.startswith(f"{section}."):
                found[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value)).split()
    variables = {"UV_DEFAULT_INDEX": found.get("index-url", []), "UV_INDEX": found.get("extra-index-url", [])}
    sources = {name: " ".join(values) for name, values in variables.items() if values}
    if links := found.get("find-links"):
        sources["UV_FIND_LINKS"] = ",".join(links)
    if "UV_INDEX" in sources:
        sources["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does; safe where every file's hash is known
    return sources


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables with which uv looks where pip would."""
    command = (sys.executable, "-m", "pip", "config", "list")
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(variables))
    return {**uv_sources(listed.stdout), **variables}


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], environment())  # noqa: S606  # the Makefile's own command
