"""Whose key it is."""

from __future__ import annotations

import hashlib
from time import monotonic_ns
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.auth import Authenticator
from proxy.errors import NotReady, Unauthenticated
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.snapshot import Principal, Snapshot, SnapshotFile
from proxy.snapshot.model import encode_principal


def snapshot(*keys: str) -> Snapshot:
    principals = {
        hashlib.sha256(key.encode()).digest(): encode_principal(Principal(f"id of {key}", f"name of {key}")) for key in keys
    }
    return Snapshot(SnapshotFile(keys=principals))


def exchange(authorization: bytes | None, remembered: Remembered | None = None) -> Exchange:
    headers = {} if authorization is None else {b"authorization": authorization}
    return Exchange(monotonic_ns(), b"POST", b"/", headers, b"", remembered or Remembered(), Flow(lambda: None))


def authenticator(current: Snapshot | None) -> tuple[Authenticator, Any]:
    """With a feed that the test may change."""
    feed = SimpleNamespace(current=current)
    return Authenticator(feed), feed  # type: ignore[arg-type]


@pytest.mark.parametrize("authorization", [b"Bearer gh-1", b"bearer gh-1", b"BEARER gh-1", b"Bearer   gh-1", b"Bearer gh-1 "])
def test_a_good_key(authorization: bytes) -> None:
    made = exchange(authorization)
    authenticator(snapshot("gh-1", "gh-2"))[0].authenticate(made)
    assert made.principal == Principal("id of gh-1", "name of gh-1")
    assert made.accepted
    assert (made.record.key_id, made.record.key_name) == ("id of gh-1", "name of gh-1")
    assert made.record.authenticated_ns > 0


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        (b"", "invalid_api_key"),
        (b"Bearer", "invalid_api_key"),
        (b"Bearer ", "invalid_api_key"),
        (b"Bearer gh-", "invalid_api_key"),
        (b"Bearer gh-11", "invalid_api_key"),
        (b"Bearer GH-1", "invalid_api_key"),
        (b"gh-1", "invalid_api_key"),
        (b"Basic gh-1", "invalid_api_key"),
        (b"Bearer\tgh-1", "invalid_api_key"),
        (b"Bearer gh-1,gh-2", "invalid_api_key"),
        (b"Bearer \xff\x00", "invalid_api_key"),
        (b"Bearer " + hashlib.sha256(b"gh-1").hexdigest().encode(), "invalid_api_key"),  # failure 69: the hash is no key
        (b"Bearer " + hashlib.sha256(b"gh-1").digest(), "invalid_api_key"),
    ],
)
def test_a_bad_key(authorization: bytes | None, code: str) -> None:
    made = exchange(authorization)
    with pytest.raises(Unauthenticated) as raised:
        authenticator(snapshot("gh-1"))[0].authenticate(made)
    assert (raised.value.error_code, raised.value.status) == (code, 401)
    assert "gh-1" not in raised.value.message, "a key is never repeated"
    assert not made.accepted
    assert made.record.key_id == ""


def test_without_a_catalogue_nobody_is_known_and_nobody_unknown() -> None:
    with pytest.raises(NotReady):
        authenticator(None)[0].authenticate(exchange(b"Bearer gh-1"))


def test_a_connection_remembers_until_the_header_or_the_catalogue_changes() -> None:
    remembered = Remembered()
    made, feed = authenticator(snapshot("gh-1", "gh-2"))
    made.authenticate(exchange(b"Bearer gh-1", remembered))
    feed.current.principal = None  # whoever asks now is found out
    again = exchange(b"Bearer gh-1", remembered)
    made.authenticate(again)
    assert again.record.key_id == "id of gh-1"
    feed.current = snapshot("gh-2")
    with pytest.raises(Unauthenticated):
        made.authenticate(exchange(b"Bearer gh-1", remembered))
    other = exchange(b"Bearer gh-2", remembered)
    made.authenticate(other)
    assert other.record.key_id == "id of gh-2"


@pytest.mark.parametrize("authorization", [None, b"", b"Bearer wrong"])
def test_what_failed_is_not_remembered(authorization: bytes | None) -> None:
    remembered = Remembered()
    made, _ = authenticator(snapshot("gh-1"))
    made.authenticate(exchange(b"Bearer gh-1", remembered))
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            made.authenticate(exchange(authorization, remembered))
