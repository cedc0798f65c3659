"""The real engines of a test run, and a Glasshouse in front of one of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.embedded.environments import InstallFailed
from tests.conftest import Start
from tests.engine.environment import Prepared, Say, prepare
from tests.engine.vllm import SMOLLM2, TINY, Engine, Engines
from tests.support.endpoints import Endpoint
from tests.support.glasshouse import Glasshouse
from tests.unit.collectors.receiver import Receiver, receiving


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=10, help="how often what is compared between two engines is measured")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """Of what is measured side by side."""
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """To the person who waits, past pytest's capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n  {text}", end="", flush=True)

    return tell


@pytest.fixture(scope="session")
def prepared(say: Say) -> Prepared:
    try:
        return prepare(say)
    except InstallFailed as failed:
        pytest.skip(str(failed))


@pytest.fixture(scope="session")
def spans() -> Iterator[Receiver]:
    """Where the engines' own spans arrive."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def engines(prepared: Prepared, spans: Receiver, tmp_path_factory: pytest.TempPathFactory, say: Say) -> Iterator[Engines]:
    made = Engines(prepared, tmp_path_factory.mktemp("engines"), f"{spans.url}/v1/traces", say)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def tiny(engines: Engines) -> Engine:
    """The engine that most tests share: fast, and it says nothing that makes sense."""
    return engines.get("tiny", TINY)


@pytest.fixture(scope="module")
def smollm2(engines: Engines) -> Engine:
    """The engine that makes sense, and takes a second for what the other does in a blink."""
    return engines.get("smollm2", SMOLLM2)


@pytest.fixture(scope="module")
def proxy(shared_glasshouse: Start, tiny: Engine) -> Glasshouse:
    """In front of the tiny engine, for all tests of a module."""
    return shared_glasshouse([tiny.url])


@pytest.fixture(scope="module")
def through(proxy: Glasshouse) -> Endpoint:
    return Endpoint(proxy.url, proxy.key)
