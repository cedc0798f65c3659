"""Where a client connects: to a backend, or to a Glasshouse in front of it. The same test does both and compares."""

from __future__ import annotations

from typing import Final, NamedTuple

import pytest

from tests.support.glasshouse import Glasshouse

FRESH: Final = {"Cache-Control": "no-cache"}
"""With these headers an answer is made, and kept as others are."""


class Endpoint(NamedTuple):
    url: str
    key: str
    keeps: Glasshouse | None = None
    """It gives answers again."""


def through(request: pytest.FixtureRequest, backend: str) -> Endpoint:
    """A Glasshouse in front of one backend, for all tests of the module."""
    proxy = request.getfixturevalue("shared_glasshouse")(backends=[backend])
    return Endpoint(proxy.url, proxy.key)


def again(request: pytest.FixtureRequest, backend: str) -> Endpoint:
    """One that gives every answer again that is worth it."""
    proxy = request.getfixturevalue("shared_glasshouse")(
        backends=[backend], config={"cache": {"policy": "all", "scope": "everyone"}}
    )
    return Endpoint(proxy.url, proxy.key, proxy)
