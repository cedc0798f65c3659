"""Two ways to the same scripted vLLM: straight, and through a Glasshouse in front of it."""

from __future__ import annotations

import pytest

from tests.support.endpoints import Endpoint, through
from tests.support.scripted_vllm import ScriptedVLLM


@pytest.fixture(scope="module")
def straight(shared_vllm: ScriptedVLLM) -> Endpoint:
    return Endpoint(shared_vllm.url, "unused")


@pytest.fixture(scope="module", params=["straight", "through"])
def endpoint(request: pytest.FixtureRequest, straight: Endpoint) -> Endpoint:
    """Each test runs with both; what it gets is compared with what `straight` gives."""
    return straight if request.param == "straight" else through(request, straight.url)
