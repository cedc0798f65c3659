"""Where a client connects: to a backend, or to a Glasshouse in front of it. The same test does both and compares."""

from __future__ import annotations

from typing import NamedTuple

import pytest


class Endpoint(NamedTuple):
    url: str
    key: str


def through(request: pytest.FixtureRequest, backend: str) -> Endpoint:
    """A Glasshouse in front of one backend, for all tests of the module."""
    proxy = request.getfixturevalue("shared_glasshouse")(backends=[backend])
    return Endpoint(proxy.url, proxy.key)
