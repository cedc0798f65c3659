"""What `glasshouse up` brings along where nothing is configured: a real model on two engines, and Phoenix.

None of it is part of the proxy. Each companion is a process of its own, in a virtual environment of its own (`environments`),
described by a `Companion` that the supervisor starts, watches and stops. To the proxy an engine is a backend like any other.

`leash.py`, `llama_server.py` and `phoenix_server.py` are scripts, run by a companion's interpreter; nothing here imports them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"

_INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")


class CompanionError(Exception):
    """A companion cannot be had; the text says why, to the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Companion:
    """One process to run beside the proxy.

    Start `argv` with exactly `env` in a session of its own (so that Ctrl-C reaches the supervisor alone). It is ready when a GET
    of `ready_url` answers 200, and ends on SIGTERM within `stop_timeout` seconds, with status 0 or -SIGTERM; after that, kill it.
    It also ends by itself, within seconds, when the process that started it is gone.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready_url: str
    stop_timeout: float
    notice: str
    """What whoever starts it should be told: where it listens and what it does with data."""


def script_argv(python: Path, script: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs one of this folder's scripts on a leash under `python`.

    `-I` keeps this folder off the script's path, where `phoenix.py` would hide Phoenix, and the caller's PYTHONPATH with it.
    """
    here = Path(__file__).parent
    return (str(python), "-I", "-u", str(here / "leash.py"), str(here / script), *arguments)


def sealed_environment(**settings: str) -> dict[str, str]:
    """The variables that a companion sees: a few that every process needs, and `settings`.

    The rest stays outside: a provider's API key is none of a companion's business, and a variable that was set for another
    Phoenix must not lead this one to that one's database.
    """
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | settings
