"""Three ways to the same scripted vLLM: straight, through a Glasshouse, and through one that gives answers again."""

from __future__ import annotations

import pytest

from tests.support.endpoints import Endpoint, again, through
from tests.support.scripted_vllm import ScriptedVLLM


@pytest.fixture(scope="module")
def straight(shared_vllm: ScriptedVLLM) -> Endpoint:
    return Endpoint(shared_vllm.url, "unused")


@pytest.fixture(scope="module", params=["straight", "through", "again"])
def endpoint(request: pytest.FixtureRequest, straight: Endpoint) -> Endpoint:
    """Each test runs with all; what it gets is compared with what `straight` gives. Of the last, things are asked for twice, the
    first time FRESH, and what is compared is the second answer."""
    if request.param == "straight":
        return straight
    return through(request, straight.url) if request.param == "through" else again(request, straight.url)
