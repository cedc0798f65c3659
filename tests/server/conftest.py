"""Workers and collectors for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from proxy.snapshot import Backend
from tests.server.test_collectors import Collecting
from tests.support.worker import Worker


class StartWorker(Protocol):
    def __call__(self, *backends: str | Backend, config: dict[str, Any] | None = None, **more: Any) -> Worker: ...


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StartWorker]:
    """`worker(url, ..., config={...})` runs one; all of them must end well when the test does."""
    with ExitStack() as stack:
        yield _starter(stack, tmp_path)


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWorker]:
    """The same for the fixtures of a module."""
    with ExitStack() as stack:
        yield _starter(stack, tmp_path_factory.mktemp("worker"))


def _starter(stack: ExitStack, directory: Path) -> StartWorker:
    started: list[Worker] = []

    def start(*backends: str | Backend, config: dict[str, Any] | None = None, **more: Any) -> Worker:
        made = Worker(backends, config, directory=directory / f"worker-{len(started)}", **more)
        started.append(made)
        return stack.enter_context(made)

    return start


@pytest.fixture
def collecting(tmp_path: Path) -> Iterator[Callable[..., Collecting]]:
    """`collecting(database=...)` is a collector of its own, whose workers the test plays."""
    made: list[Collecting] = []

    def make(name: str = "state", **config: Any) -> Collecting:
        made.append(Collecting(tmp_path / name, **config))
        return made[-1]

    yield make
    for each in made:
        each.clean_up()
