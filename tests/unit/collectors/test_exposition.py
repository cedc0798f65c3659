"""`/metrics` over HTTP."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from collectors.exposition import Exposition


@pytest.fixture
def served() -> Iterator[Exposition]:
    registry = CollectorRegistry()
    Counter("test_things", "Things.", registry=registry).inc(3)
    exposition = Exposition("127.0.0.1:0", registry)
    exposition.start()
    yield exposition
    exposition.close()


def get(port: int, path: str, accept: str = "", host: str = "127.0.0.1") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("GET", path, headers={"Accept": accept} if accept else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers["content-type"], body


def test_text_and_openmetrics(served: Exposition) -> None:
    status, kind, body = get(served.port, "/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert "test_things_total 3.0" in body
    status, kind, body = get(served.port, "/metrics", accept="application/openmetrics-text;version=1.0.0")
    assert (status, kind.partition(";")[0]) == (200, "application/openmetrics-text")
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/favicon.ico", "/metricsx"])
def test_there_is_nothing_else(served: Exposition, path: str) -> None:
    status, kind, _ = get(served.port, path)
    assert (status, kind) == (404, "text/plain; charset=utf-8")


def test_a_query_is_allowed(served: Exposition) -> None:
    assert get(served.port, "/metrics?name[]=test_things_total")[0] == 200


def test_a_scraper_that_says_nothing_keeps_nobody_waiting(served: Exposition) -> None:
    with socket.create_connection(("127.0.0.1", served.port)):
        assert get(served.port, "/metrics")[0] == 200


def test_an_address_in_use_is_an_error_at_once(served: Exposition) -> None:
    with pytest.raises(OSError, match="in use"):
        Exposition(f"127.0.0.1:{served.port}", CollectorRegistry())


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        exposition = Exposition("[::1]:0", CollectorRegistry())
    except OSError:
        pytest.skip("no IPv6 here")
    exposition.start()
    assert get(exposition.port, "/metrics", host="::1")[0] == 200
    exposition.close()
