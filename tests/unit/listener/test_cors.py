"""Which web pages may read answers: as Starlette's middleware has it, which is what stands before vLLM."""

from __future__ import annotations

import pytest

from proxy.listener.cors import Cors

PAGE = b"https://chat.example"
ASKED = {b"origin": PAGE, b"access-control-request-method": b"POST"}


def fields(lines: bytes) -> dict[str, str]:
    assert not lines or lines.startswith(b"\r\n")
    return dict(line.split(": ", 1) for line in lines.decode().split("\r\n")[1:])


def test_any_page() -> None:
    assert fields(Cors(["*"]).lines(PAGE)) == {
        "access-control-allow-origin": "*",
        "access-control-expose-headers": "x-request-id, x-glasshouse-cache, age",
    }


def test_a_page_of_the_list() -> None:
    cors = Cors(["http://localhost:3000", PAGE.decode()])
    assert fields(cors.lines(PAGE)) == {
        "access-control-allow-origin": PAGE.decode(),
        "vary": "Origin",
        "access-control-expose-headers": "x-request-id, x-glasshouse-cache, age",
    }


@pytest.mark.parametrize(
    "origin", [b"https://evil.example", b"http://chat.example", b"https://chat.example.evil", b"null", b"*", b""]
)
def test_another_page_gets_nothing(origin: bytes) -> None:
    cors = Cors([PAGE.decode()])
    assert cors.lines(origin) == b""
    answer = cors.preflight(ASKED | {b"origin": origin})
    assert answer is not None
    assert answer[0] == 400
    assert b"allow-origin" not in answer[2]


def test_a_browser_that_asks_first() -> None:
    answer = Cors(["*"]).preflight(ASKED | {b"access-control-request-headers": b"authorization,content-type"})
    assert answer is not None
    status, text, lines = answer
    assert (status, text) == (200, b"OK")
    assert fields(lines) == {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "GET, HEAD, OPTIONS, POST",
        "access-control-allow-headers": "authorization,content-type",
        "access-control-max-age": "600",
        "vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
    }


def test_a_browser_that_asks_for_what_there_is_not() -> None:
    answer = Cors(["*"]).preflight(ASKED | {b"access-control-request-method": b"DELETE"})
    assert answer is not None
    assert answer[:2] == (400, b"Disallowed CORS method")


@pytest.mark.parametrize("headers", [{}, {b"origin": PAGE}, {b"access-control-request-method": b"POST"}])
def test_what_is_no_such_question(headers: dict[bytes, bytes]) -> None:
    assert Cors(["*"]).preflight(headers) is None


def test_switched_off() -> None:
    cors = Cors([])
    assert cors.lines(PAGE) == b""
    assert cors.preflight(ASKED) is None
