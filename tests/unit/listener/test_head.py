"""What a request's head must be."""

from __future__ import annotations

import pytest

from proxy.errors import InvalidRequest
from proxy.listener.head import TrustedProxies, check_host, check_transfer_encoding, origin_form


@pytest.mark.parametrize(
    "host",
    [
        *(b"localhost", b"a.example:8400", b"127.0.0.1:80", b"[::1]", b"[2001:db8::1]:443", b"[fe80::1%25eth0]:80"),
        *(b"my_host", b"xn--bcher-kva.example", b"a.example:", b"", b"a%41"),
    ],
)
def test_a_host(host: bytes) -> None:
    check_host(host)


@pytest.mark.parametrize(
    "host",
    [
        *(b"a.example/admin", b"a?x", b"a#x", b"user@a", b"a b", b"a\tb", b"a\\b", b"a:b", b"a:80:90", b"a:123456"),
        *(b"[::1", b"::1]", b"::1", b"[::1]x", b"a,b/", b"\xc3\xa4.example", b"a\x00", b'"a"', b"<a>", b"a|b", b"a^"),
    ],
)
def test_what_is_no_host(host: bytes) -> None:
    # failure 34
    with pytest.raises(InvalidRequest) as raised:
        check_host(host)
    assert raised.value.param == "Host"


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b"CHUNKED"])
def test_chunked(coding: bytes) -> None:
    check_transfer_encoding(coding, "1.1")


@pytest.mark.parametrize(
    ("coding", "version"),
    [
        *((coding, "1.1") for coding in (b"gzip, chunked", b"identity,chunked", b",chunked", b"chunked,", b"identity", b"")),
        (b"chunked", "1.0"),
    ],
)
def test_another_transfer_encoding(coding: bytes, version: str) -> None:
    # failure 30
    with pytest.raises(InvalidRequest):
        check_transfer_encoding(coding, version)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/v1/models", b"/v1/models"),
        (b"http://a.example/v1/models?x", b"/v1/models?x"),
        (b"HTTP://a.example:8400/v1/models", b"/v1/models"),
        (b"https://[::1]:1/", b"/"),
        (b"http://a.example", b"/"),
        (b"http://a.example?x", b"/?x"),
        (b"http://a.example//v1/models", b"//v1/models"),
        (b"/http://a.example/v1/models", b"/http://a.example/v1/models"),
        (b"*", b"*"),
        (b"a.example:443", b"a.example:443"),
    ],
)
def test_a_target_as_a_path(target: bytes, path: bytes) -> None:
    assert origin_form(target) == path


@pytest.mark.parametrize("target", [b"ftp://a/x", b"http:///x", b"http://u:p@a/x", b"http://a#x", b"http://a\\b/x", b"x://"])
def test_a_target_that_is_none(target: bytes) -> None:
    # failure 35
    with pytest.raises(InvalidRequest):
        origin_form(target)


# --- X-Forwarded-For ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (b"192.0.2.7", "192.0.2.7"),
        (b"6.6.6.6, 192.0.2.7", "192.0.2.7"),
        (b"6.6.6.6, 192.0.2.7, 10.1.2.3", "192.0.2.7"),
        (b"192.0.2.7,10.1.2.3,10.0.0.1", "192.0.2.7"),
        (b"10.1.2.3, 10.0.0.9", "10.1.2.3"),
        (b"192.0.2.7:5555", "192.0.2.7"),
        (b"[2001:db8::1]:5555", "2001:db8::1"),
        (b"2001:db8::1", "2001:db8::1"),
        (b"::ffff:192.0.2.7", "192.0.2.7"),
        (b"6.6.6.6, unknown, 10.1.2.3", "10.1.2.3"),
        (b"", "10.0.0.1"),
        (b"evil\xff", "10.0.0.1"),
        (b"999.1.1.1", "10.0.0.1"),
        (b", ,", "10.0.0.1"),
        (b"6.6.6.6," * 10_000 + b"192.0.2.7", "192.0.2.7"),
        (b"6.6.6.6," + b"10.0.0.2," * 100 + b"10.0.0.3", "10.0.0.2"),
    ],
)
def test_the_client_is_the_rightmost_that_nobody_trusted_has_written(forwarded: bytes, client: str) -> None:
    assert TrustedProxies(["10.0.0.0/8"]).client("10.0.0.1", forwarded) == client


def test_who_is_trusted() -> None:
    trusted = TrustedProxies(["10.0.0.0/8", "::1", "2001:db8::/32"])
    for address in ("10.255.0.1", "::1", "2001:db8:ffff::1"):
        assert address in trusted
    for address in ("11.0.0.1", "::2", "2001:db9::1", "", "nonsense"):
        assert address not in trusted
    assert "127.0.0.1" not in TrustedProxies([])
