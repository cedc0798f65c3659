"""Fetching an issuer's public keys: what is taken over, from where, and what holds while it is down. The server is real."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.auth.tokens import Tokens
from proxy.control.discovery import DiscoveryError
from proxy.control.issuers import AGAIN_S, DOCUMENT_BYTES, MOST_KEYS, Fetched, Issuers, KnownIssuer, fetch, public_keys
from proxy.settings import IssuerSettings, Settings
from proxy.snapshot import SnapshotFile
from tests.support.issuer import Issuer, as_jwk
from tests.support.issuer_host import IssuerHost, Page
from tests.support.tls import CA, OTHER_CA, server_context

NOW = 1_795_000_000_000_000_000
KEYS = json.dumps({"keys": [{"kty": "EC", "crv": "P-256", "x": "x", "y": "y", "kid": "k"}]}).encode()


def said(issuer: str = "https://id.example", **more: Any) -> IssuerSettings:
    settings = Settings.of({"issuers": [{"issuer": issuer, "audience": ["glasshouse"], **more}]})
    return settings.issuers[0]


def fetched(settings: IssuerSettings, timeout_s: float = 20.0) -> Fetched:
    return asyncio.run(fetch(settings, timeout_s))


def names(keys: bytes) -> list[str]:
    return [key["kid"] for key in json.loads(keys)["keys"]]


# -- what is taken over --


def test_of_a_key_the_public_half_is_taken_over() -> None:  # failure 81
    """Also where somebody has published both, and nothing of a secret of both sides."""
    published = [
        {"kty": "RSA", "kid": "r", "n": "n", "e": "AQAB", "d": "private", "p": "private", "use": "sig", "alg": "RS256"},
        {"kty": "EC", "kid": "e", "crv": "P-256", "x": "x", "y": "y", "d": "private", "key_ops": ["verify"], "x5u": "http://x"},
        {"kty": "OKP", "kid": "o", "crv": "Ed25519", "x": "x", "d": "private"},
        {"kty": "oct", "kid": "s", "k": "secret", "alg": "HS256"},
        {"kty": ["RSA"], "kid": "odd"},
        {"kid": "nothing"},
        {"kty": "RSA", "kid": "half", "n": "n"},
        {"kty": "EC", "kid": "numbers", "crv": 256, "x": "x", "y": "y"},
        "no key",
        None,
    ]
    taken = json.loads(public_keys(json.dumps({"keys": published, "more": 1}).encode()))
    assert taken == {
        "keys": [
            {"kty": "RSA", "kid": "r", "n": "n", "e": "AQAB", "use": "sig", "alg": "RS256"},
            {"kty": "EC", "kid": "e", "crv": "P-256", "x": "x", "y": "y", "key_ops": ["verify"]},
            {"kty": "OKP", "kid": "o", "crv": "Ed25519", "x": "x"},
        ]
    }


@pytest.mark.parametrize(
    "document", [b"", b"<html>", b"[]", b"{}", b'{"keys": {}}', b'{"keys": "x"}', b"\xff", b"[" * 100_000, b'"keys"']
)
def test_what_is_no_set_of_keys(document: bytes) -> None:
    with pytest.raises(DiscoveryError):
        public_keys(document)


def test_more_keys_than_anybody_needs() -> None:
    key = {"kty": "OKP", "crv": "Ed25519", "x": "x"}
    assert len(json.loads(public_keys(json.dumps({"keys": [key] * MOST_KEYS}).encode()))["keys"]) == MOST_KEYS
    with pytest.raises(DiscoveryError, match="101 keys"):
        public_keys(json.dumps({"keys": [key] * (MOST_KEYS + 1)}).encode())


def test_tokens_are_verified_with_what_is_published() -> None:
    issuer = Issuer(kid="k1")
    known = KnownIssuer(said(issuer.name, claims={"user": "realm.name", "team": "groups"}, algorithms=["ES256"]))
    known.answered(Fetched(public_keys(json.dumps({"keys": [as_jwk(issuer.key, kid="k1")]}).encode()), 60.0), NOW)
    published = known.published()
    assert (published.user_claim, published.team_claim, published.project_claim) == (("realm", "name"), ("groups",), None)
    token = issuer.token(realm={"name": "ann"}, groups=["t"])
    identity = Tokens((published,)).verify(token, time.time_ns())
    assert (identity.user, identity.teams) == ("ann", ("t",))


# -- from where --


def test_an_issuer_says_where_its_keys_are() -> None:
    with IssuerHost() as host:
        host.discoverable(KEYS)
        assert names(fetched(said(host.url)).keys) == ["k"]
        assert host.asked == ["/.well-known/openid-configuration", "/keys"]


def test_the_place_that_is_said_is_asked_alone() -> None:
    with IssuerHost() as host:
        host.pages["/jwks"] = Page(KEYS)
        assert names(fetched(said(jwks_url=f"{host.url}/jwks")).keys) == ["k"]
        assert host.asked == ["/jwks"]


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    settings = said("anything", jwks_file=str(file))
    with pytest.raises(DiscoveryError, match="No such file"):
        fetched(settings)
    file.write_bytes(KEYS)
    assert names(fetched(settings).keys) == ["k"]
    file.write_bytes(KEYS + b" " * DOCUMENT_BYTES)
    with pytest.raises(DiscoveryError, match="more than"):
        fetched(settings)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (b'{"issuer":"https://other.example","jwks_uri":"%b/keys"}', "calls itself otherwise"),
        (b'{"jwks_uri":"%b/keys"}', "calls itself otherwise"),
        (b'{"issuer":"%b"}', "doesn't say where"),
        (b'{"issuer":"%b","jwks_uri":7}', "doesn't say where"),
        (b'{"issuer":"%b","jwks_uri":"file:///etc/passwd"}', "doesn't say where"),
        (b"[]", "not an object"),
        (b"no", "not JSON"),
    ],
)
def test_an_issuer_that_says_something_else(document: bytes, why: str) -> None:
    with IssuerHost() as host:
        text = document.replace(b"%b", host.url.encode())
        host.pages = {"/.well-known/openid-configuration": Page(text), "/keys": Page(KEYS)}
        with pytest.raises(DiscoveryError, match=why):
            fetched(said(host.url))
        assert host.asked == ["/.well-known/openid-configuration"]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/keys"])
def test_nobody_is_sent_elsewhere(status: int, path: str) -> None:
    with IssuerHost() as elsewhere, IssuerHost() as host:
        elsewhere.discoverable(KEYS)
        host.discoverable(KEYS)
        host.pages[path] = Page(b"", status, {"location": f"{elsewhere.url}{path}"})
        with pytest.raises(DiscoveryError, match=f"HTTP {status}"):
            fetched(said(host.url))
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (Page(KEYS, 500), "HTTP 500"),
        (Page(KEYS, 404), "HTTP 404"),
        (Page(KEYS + b" " * DOCUMENT_BYTES), "more than"),
        (Page(b"x" * 100, headers={"content-length": "200"}), "."),
    ],
)
def test_an_answer_that_is_of_no_use(page: Page, why: str) -> None:
    with IssuerHost() as host:
        host.pages["/jwks"] = page
        with pytest.raises(DiscoveryError, match=why):
            fetched(said(jwks_url=f"{host.url}/jwks"), 2.0)


def test_an_issuer_that_hangs() -> None:
    with IssuerHost() as host:
        host.pages["/jwks"] = Page(KEYS, hangs=True)
        with pytest.raises(DiscoveryError, match=r"no complete answer within 0\.3 s"):
            fetched(said(jwks_url=f"{host.url}/jwks"), 0.3)


def test_nobody_there() -> None:
    with IssuerHost() as host:
        pass
    with pytest.raises(DiscoveryError):
        fetched(said(jwks_url=f"{host.url}/jwks"))


def test_https_is_verified() -> None:
    with IssuerHost(server_context()) as host:
        host.discoverable(KEYS)
        assert names(fetched(said(host.url, ca_file=str(CA))).keys) == ["k"]
        for ca in ({}, {"ca_file": str(OTHER_CA)}):
            with pytest.raises(DiscoveryError, match=r"(?i)certificate"):
                fetched(said(host.url, **ca))
        with pytest.raises(DiscoveryError, match="ca_file"):
            fetched(said(host.url, ca_file="/nowhere.pem"))


def test_a_safe_issuer_names_no_unsafe_place() -> None:
    with IssuerHost(server_context()) as host:
        document = b'{"issuer":"%b","jwks_uri":"http://127.0.0.1:%d/keys"}' % (host.url.encode(), host.port)
        host.pages["/.well-known/openid-configuration"] = Page(document)
        with pytest.raises(DiscoveryError, match="not as safely"):
            fetched(said(host.url, ca_file=str(CA)))


# -- how long, and what holds meanwhile --


@pytest.mark.parametrize(
    ("said_of_it", "seconds"),
    [
        ("", 60),
        ("no-store", 60),
        ("max-age=120", 120),
        ("public, max-age=86400, must-revalidate", 300),
        ("Max-Age = 1", 10),
        ('max-age="30"', 30),
        ("s-maxage=30", 60),
        ("max-age=-5", 60),
        ("max-age=" + "9" * 40, 300),
    ],
)
def test_when_keys_are_fetched_again(said_of_it: str, seconds: float) -> None:
    with IssuerHost() as host:
        host.pages["/jwks"] = Page(KEYS, headers={"cache-control": said_of_it})
        assert fetched(said(jwks_url=f"{host.url}/jwks")).again_s == seconds


def test_an_issuer_that_is_down_keeps_its_keys() -> None:  # failure 46
    known = KnownIssuer(said())
    assert json.loads(known.published().keys) == {"keys": []}, "nothing of it is taken before"
    assert known.answered(Fetched(KEYS, 60.0), NOW)
    assert not known.answered(Fetched(KEYS, 60.0), NOW + 1)
    first, longest = AGAIN_S
    assert [known.failed("down", NOW + 2) for _ in range(6)] == [first, 2 * first, 4 * first, 8 * first, longest, longest]
    assert known.published().keys == KEYS
    assert (known.error, known.answered_unix_ns) == ("down", NOW + 1)
    assert known.answered(Fetched(b'{"keys":[]}', 60.0), NOW + 3), "one that says that it has none has none"
    assert known.failed("down", NOW + 4) == first


def test_the_next_process_begins_with_those_of_the_snapshot() -> None:
    before = Issuers([said("https://a.example"), said("https://b.example")], None)
    assert not before.complete
    for each in before.known:
        each.answered(Fetched(KEYS, 60.0), NOW)
    assert before.complete
    previous = SnapshotFile(issuers=before.published())
    after = Issuers([said("https://b.example", audience=["other"]), said("https://c.example")], previous)
    b, c = after.published()
    assert (b.keys, b.audience) == (KEYS, ("other",))
    assert json.loads(c.keys) == {"keys": []}
