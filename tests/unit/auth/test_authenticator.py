"""Whose key it is."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from time import monotonic_ns
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.auth import Authenticator
from proxy.auth.guesses import GUESSES
from proxy.errors import Forbidden, InvalidRequest, NotReady, RateLimited, Unauthenticated
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.snapshot import (
    Allowance,
    KeyTable,
    Principal,
    Snapshot,
    SnapshotFile,
    decode_snapshot,
    encode_principal,
    encode_snapshot,
)
from tests.support.issuer import Issuer


def snapshot(*keys: str) -> Snapshot:
    principals = {
        hashlib.sha256(key.encode()).digest(): encode_principal(Principal(f"id of {key}", f"name of {key}")) for key in keys
    }
    return Snapshot(SnapshotFile(keys=principals))


def exchange(authorization: bytes | None, remembered: Remembered | None = None, api_key: bytes | None = None) -> Exchange:
    headers = {} if authorization is None else {b"authorization": authorization}
    if api_key is not None:
        headers[b"x-api-key"] = api_key
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


# --- either header, the same rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("api_key", [b"gh-1", b" gh-1 "])
def test_a_good_key_in_the_other_header(api_key: bytes) -> None:
    # failure 32
    made = exchange(None, api_key=api_key)
    authenticator(snapshot("gh-1"))[0].authenticate(made)
    assert made.record.key_id == "id of gh-1"


@pytest.mark.parametrize(
    "api_key",
    [
        *(b"", b"gh-", b"GH-1", b"gh-11", b"Bearer gh-1", b"gh-1,gh-2", b"\xff\x00"),
        hashlib.sha256(b"gh-1").hexdigest().encode(),
        hashlib.sha256(b"gh-1").digest(),
    ],
)
def test_a_bad_key_in_the_other_header(api_key: bytes) -> None:
    # failures 32, 69
    made = exchange(None, api_key=api_key)
    with pytest.raises(Unauthenticated) as raised:
        authenticator(snapshot("gh-1"))[0].authenticate(made)
    assert (raised.value.error_code, raised.value.status) == ("invalid_api_key", 401)
    assert not made.accepted


def test_both_headers_with_one_key_are_one_key() -> None:
    # failure 32
    made = exchange(b"Bearer gh-1", api_key=b"gh-1")
    authenticator(snapshot("gh-1"))[0].authenticate(made)
    assert made.record.key_id == "id of gh-1"


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        (b"Bearer gh-1", b"gh-2"),
        (b"Bearer gh-1", b""),
        (b"Bearer wrong", b"gh-1"),
        (b"Bearer gh-1", b"wrong"),
        (b"Basic gh-1", b"gh-1"),
        (b"", b"gh-1"),
    ],
)
def test_two_keys_are_refused_whichever_of_them_is_good(authorization: bytes, api_key: bytes) -> None:
    # failure 32
    made = exchange(authorization, api_key=api_key)
    with pytest.raises(InvalidRequest) as raised:
        authenticator(snapshot("gh-1", "gh-2"))[0].authenticate(made)
    assert (raised.value.status, raised.value.error_code) == (400, "conflicting_api_keys")
    assert "gh-" not in raised.value.message
    assert not made.accepted


def test_what_is_remembered_is_remembered_of_both_headers() -> None:
    """A connection that proved one key, and now names another in the header that wasn't there before."""
    remembered = Remembered()
    made, _ = authenticator(snapshot("gh-1", "gh-2"))
    made.authenticate(exchange(b"Bearer gh-1", remembered))
    with pytest.raises(InvalidRequest):
        made.authenticate(exchange(b"Bearer gh-1", remembered, api_key=b"gh-2"))
    other = exchange(None, remembered, api_key=b"gh-2")
    made.authenticate(other)
    assert other.record.key_id == "id of gh-2"
    with pytest.raises(Unauthenticated):
        made.authenticate(exchange(None, remembered, api_key=b"wrong"))
    with pytest.raises(Unauthenticated):
        made.authenticate(exchange(None, remembered))


# --- what is stored and compared ---------------------------------------------------------------------------------------


def test_what_is_looked_up_is_the_whole_hash_of_what_came() -> None:
    """Nothing is compared with a secret: how far a guess is right shows in no comparison's time."""
    # failure 69
    asked: list[bytes] = []

    def find(digest: bytes) -> None:
        asked.append(digest)

    made, feed = authenticator(snapshot("gh-1"))
    feed.current.find = find
    for sent in (exchange(b"Bearer gh-1"), exchange(None, api_key=b"gh-1")):
        with pytest.raises(Unauthenticated):
            made.authenticate(sent)
    assert asked == [hashlib.sha256(b"gh-1").digest()] * 2


@pytest.mark.parametrize("at", range(32))
def test_a_hash_that_is_nearly_the_same_is_another_key(at: int) -> None:
    # failure 69
    digest = bytearray(hashlib.sha256(b"gh-1").digest())
    digest[at] ^= 1
    alike = Snapshot(SnapshotFile(keys={bytes(digest): encode_principal(Principal("id", "name"))}))
    with pytest.raises(Unauthenticated):
        authenticator(alike)[0].authenticate(exchange(b"Bearer gh-1"))


def test_no_key_is_in_what_workers_know() -> None:
    # failure 69
    known = snapshot("gh-1-a-secret")
    authenticator(known)[0].authenticate(exchange(b"Bearer gh-1-a-secret"))
    assert known._found.keys() == {hashlib.sha256(b"gh-1-a-secret").digest()}
    assert list(known._keys) == [hashlib.sha256(b"gh-1-a-secret").digest()]


# --- what a connection remembers ---------------------------------------------------------------------------------------


def test_without_a_catalogue_nobody_is_known_and_nobody_unknown() -> None:
    with pytest.raises(NotReady):
        authenticator(None)[0].authenticate(exchange(b"Bearer gh-1"))


def test_a_connection_remembers_until_the_header_or_the_catalogue_changes() -> None:
    remembered = Remembered()
    made, feed = authenticator(snapshot("gh-1", "gh-2"))
    made.authenticate(exchange(b"Bearer gh-1", remembered))
    feed.current.find = None  # whoever asks now is found out
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


# --- ends and blocks ---------------------------------------------------------------------------------------------------

SOON_NS = 4_102_444_800_000_000_000
LATER_NS = SOON_NS + 1_000_000_000
LEVELS = ("key", "user", "project", "team", "everyone")


def with_levels(allowances: Mapping[str, Allowance], secret_ends_unix_ns: int = 0) -> Snapshot:
    """`gh-1`, whose levels have these allowances."""
    said = {level: allowances.get(level, Allowance()) for level in LEVELS}
    principal = Principal("id", "name", "team", said["key"], "user", "project")
    return Snapshot(
        SnapshotFile(
            keys=KeyTable.build([(hashlib.sha256(b"gh-1").digest(), secret_ends_unix_ns, encode_principal(principal))]),
            users={"user": said["user"]},
            projects={"project": said["project"]},
            teams={"team": said["team"]},
            everyone=said["everyone"],
        )
    )


def expiring(secret_ns: int = 0, **levels: int) -> Snapshot:
    """`gh-1`, whose secret and levels expire then; 0: never."""
    return with_levels({level: Allowance(expires_unix_ns=end) for level, end in levels.items()}, secret_ns)


@pytest.mark.parametrize(
    "current",
    [
        *(expiring(**{level: SOON_NS}) for level in LEVELS),
        expiring(SOON_NS),
        expiring(SOON_NS, key=LATER_NS),
        expiring(LATER_NS, key=SOON_NS),
        expiring(key=LATER_NS, team=SOON_NS, everyone=LATER_NS),
    ],
)
def test_a_key_is_none_from_the_moment_on_at_which_it_or_the_first_of_its_levels_ends(current: Snapshot) -> None:
    now = [SOON_NS - 1]
    made = Authenticator(SimpleNamespace(current=current), lambda: now[0])  # type: ignore[arg-type]
    made.authenticate(exchange(b"Bearer gh-1"))
    now[0] += 1
    refused = exchange(b"Bearer gh-1")
    with pytest.raises(Unauthenticated) as raised:
        made.authenticate(refused)
    assert (raised.value.error_code, raised.value.status) == ("expired_api_key", 401)
    assert not refused.accepted


def test_of_two_secrets_each_ends_by_itself() -> None:
    """A rotated key: for a while both work, and both are the same caller."""
    principal = encode_principal(Principal("id", "name"))
    secrets = {b"gh-former": SOON_NS, b"gh-newer": 0}
    keys = KeyTable.build((hashlib.sha256(secret).digest(), end, principal) for secret, end in secrets.items())
    now = [SOON_NS - 1]
    made = Authenticator(SimpleNamespace(current=Snapshot(SnapshotFile(keys=keys))), lambda: now[0])  # type: ignore[arg-type]
    assert made.authenticate(exchange(b"Bearer gh-former")) is made.authenticate(exchange(b"Bearer gh-newer"))
    now[0] = SOON_NS
    made.authenticate(exchange(b"Bearer gh-newer"))
    with pytest.raises(Unauthenticated, match="expired"):
        made.authenticate(exchange(b"Bearer gh-former"))


@pytest.mark.parametrize("level", LEVELS)
def test_a_key_of_which_a_level_is_blocked_is_refused_and_no_guess(level: str) -> None:
    made = Authenticator(SimpleNamespace(current=with_levels({level: Allowance(blocked=True)})))  # type: ignore[arg-type]
    for _ in range(2 * GUESSES):
        refused = exchange(b"Bearer gh-1")
        with pytest.raises(Unauthenticated) as raised:
            made.authenticate(refused)
        assert (raised.value.error_code, raised.value.status) == ("key_blocked", 401)
        assert not refused.accepted


def test_a_key_of_which_the_file_is_damaged_is_not_refused_for_being_wrong(caplog: pytest.LogCaptureFixture) -> None:
    written = bytearray(
        encode_snapshot(SnapshotFile(keys={hashlib.sha256(b"gh-1").digest(): encode_principal(Principal("i", "n"))}))
    )
    written[-1] ^= 1
    made, _ = authenticator(Snapshot(decode_snapshot(bytes(written))))
    with pytest.raises(NotReady):
        made.authenticate(exchange(b"Bearer gh-1"))
    assert "damaged" in str(vars(caplog.records[0]))
    with pytest.raises(Unauthenticated):
        made.authenticate(exchange(b"Bearer gh-2"))


def test_a_connection_that_remembers_a_key_notices_its_expiry() -> None:
    now = [SOON_NS - 1]
    made = Authenticator(SimpleNamespace(current=expiring(SOON_NS)), lambda: now[0])  # type: ignore[arg-type]
    remembered = Remembered()
    first, second = exchange(b"Bearer gh-1", remembered), exchange(b"Bearer gh-1", remembered)
    made.authenticate(first)
    now[0] = SOON_NS
    first.record.received_unix_ns = SOON_NS - 3_000_000_000  # its first byte is not what counts ...
    made.authenticate(first)
    second.record.received_unix_ns = SOON_NS - 3_000_000_000
    second.origin_ns -= 3_000_000_000  # ... but the moment at which it is whole, and its turn
    with pytest.raises(Unauthenticated, match="expired"):
        made.authenticate(second)
    assert not second.accepted


def test_a_key_that_has_expired_is_no_guess() -> None:
    made = Authenticator(SimpleNamespace(current=expiring(1)))  # type: ignore[arg-type]
    for _ in range(2 * GUESSES):
        with pytest.raises(Unauthenticated):
            made.authenticate(exchange(b"Bearer gh-1"))


def test_who_it_is_is_on_the_record() -> None:
    made = exchange(b"Bearer gh-1")
    Authenticator(SimpleNamespace(current=expiring())).authenticate(made)  # type: ignore[arg-type]
    record = made.record
    assert (record.key_id, record.key_name, record.team, record.user_name, record.project) == (
        "id",
        "name",
        "team",
        "user",
        "project",
    )


# --- guessing ----------------------------------------------------------------------------------------------------------


def from_address(address: str, authorization: bytes, remembered: Remembered | None = None) -> Exchange:
    made = exchange(authorization, remembered)
    made.record.client_address = address
    return made


def test_who_guesses_too_often_is_told_to_wait_and_a_right_key_never_is() -> None:
    # failure 82
    made, _ = authenticator(snapshot("gh-1"))
    for _ in range(GUESSES):
        with pytest.raises(Unauthenticated):
            made.authenticate(from_address("192.0.2.1", b"Bearer wrong"))
    with pytest.raises(RateLimited) as raised:
        made.authenticate(from_address("192.0.2.1", b"Bearer wrong"))
    error = raised.value
    assert (error.status, error.error_code, error.retry_after_s) == (429, "rate_limit_exceeded", 1)
    assert error.lines.startswith(b"\r\nretry-after-ms: ")
    made.authenticate(from_address("192.0.2.1", b"Bearer gh-1"))
    with pytest.raises(Unauthenticated):
        made.authenticate(from_address("192.0.2.2", b"Bearer wrong"))


def test_one_sites_ipv6_addresses_guess_together() -> None:
    # failure 82
    made, _ = authenticator(snapshot("gh-1"))
    for number in range(GUESSES):
        with pytest.raises(Unauthenticated):
            made.authenticate(from_address(f"2001:db8:1:2::{number:x}", b"Bearer wrong"))
    with pytest.raises(RateLimited):
        made.authenticate(from_address("2001:db8:1:2:ffff::", b"Bearer wrong"))


def test_right_keys_are_not_counted() -> None:
    # failure 82
    made, _ = authenticator(snapshot("gh-1"))
    for _ in range(2 * GUESSES):
        made.authenticate(from_address("192.0.2.1", b"Bearer gh-1"))
    assert len(made._guesses) == 0


# --- tokens ------------------------------------------------------------------------------------------------------------

ISSUER = Issuer()


def trusting(*keys: str, **more: Any) -> Snapshot:
    """A snapshot with these keys and an issuer."""
    principals = {hashlib.sha256(key.encode()).digest(): encode_principal(Principal(key, key)) for key in keys}
    return Snapshot(SnapshotFile(keys=principals, issuers=(ISSUER.published(team_claim=("team",)),), **more))


def bearer(token: bytes, remembered: Remembered | None = None) -> Exchange:
    return from_address("192.0.2.1", b"Bearer " + token, remembered)


def test_a_token_is_taken_in_either_header_beside_keys() -> None:
    made, _ = authenticator(trusting("gh-1", "a.key.with-dots"))
    by_token, by_api_key = bearer(ISSUER.token()), exchange(None, api_key=ISSUER.token())
    assert made.authenticate(by_token) is made.authenticate(by_api_key)
    assert by_token.record.key_id.startswith("jwt:")
    assert (by_token.record.key_name, by_token.record.user_name) == ("u1", "u1")
    assert made.authenticate(exchange(b"Bearer gh-1")).key_id == "gh-1"
    assert made.authenticate(exchange(b"Bearer a.key.with-dots")).key_id == "a.key.with-dots"


@pytest.mark.parametrize("level", ["user", "team", "everyone"])
def test_a_bearer_has_the_levels_that_are_declared_for_him(level: str) -> None:
    blocked = Allowance(blocked=True)
    places: dict[str, dict[str, Any]] = {
        "user": {"users": {"u1": blocked}},
        "team": {"teams": {"t": blocked}},
        "everyone": {"everyone": blocked},
    }
    free, _ = authenticator(trusting(teams={"t": Allowance()}))
    free.authenticate(bearer(ISSUER.token(team="t")))
    made, _ = authenticator(trusting(**{"teams": {"t": Allowance()}, **places[level]}))
    with pytest.raises(Unauthenticated) as raised:
        made.authenticate(bearer(ISSUER.token(team="t")))
    assert raised.value.error_code == "key_blocked"


def test_a_connection_remembers_a_token_until_it_expires() -> None:
    expires = int(time.time()) + 1000
    now = [time.time_ns()]
    made = Authenticator(SimpleNamespace(current=trusting()), lambda: now[0])  # type: ignore[arg-type]
    remembered, token = Remembered(), ISSUER.token(exp=expires)
    made.authenticate(bearer(token, remembered))
    made._tokens = None
    made.authenticate(bearer(token, remembered))
    assert made._tokens is None, "it wasn't looked at again"
    now[0] = (expires + 30) * 1_000_000_000
    later = bearer(token, remembered)
    later.record.received_unix_ns = now[0]
    with pytest.raises(Unauthenticated) as raised:
        made.authenticate(later)
    assert raised.value.error_code == "expired_token"


def test_a_new_snapshot_of_the_same_issuers_verifies_no_token_again() -> None:
    made, feed = authenticator(trusting())
    token, remembered = ISSUER.token(), Remembered()
    first = made.authenticate(bearer(token, remembered))
    known = made._tokens
    feed.current = trusting("gh-1")
    second = made.authenticate(bearer(token, remembered))
    assert made._tokens is known
    assert second == first
    assert second is not first, "it is another snapshot's"


def test_whose_issuer_is_not_trusted_any_more_is_nobody() -> None:
    made, feed = authenticator(trusting())
    token, remembered = ISSUER.token(), Remembered()
    made.authenticate(bearer(token, remembered))
    other = Issuer("https://other.example", number=1)
    feed.current = Snapshot(SnapshotFile(issuers=(other.published(),)))
    with pytest.raises(Unauthenticated, match="issuer"):
        made.authenticate(bearer(token, remembered))
    feed.current = Snapshot(SnapshotFile())
    with pytest.raises(Unauthenticated, match="Incorrect API key"):
        made.authenticate(bearer(token, remembered))


def test_wrong_tokens_are_guesses_and_right_or_expired_ones_are_not() -> None:
    # failures 81, 82
    made, _ = authenticator(trusting())
    for _ in range(2 * GUESSES):
        with pytest.raises(Unauthenticated) as raised:
            made.authenticate(bearer(ISSUER.token(exp=1)))
        assert raised.value.error_code == "expired_token"
    for _ in range(GUESSES):
        with pytest.raises(Unauthenticated) as raised:
            made.authenticate(bearer(ISSUER.token(aud="other")))
        assert raised.value.error_code == "invalid_token"
    with pytest.raises(RateLimited):
        made.authenticate(bearer(ISSUER.token(aud="other")))
    made.authenticate(bearer(ISSUER.token()))


def test_a_token_of_a_team_that_is_not_declared_is_forbidden_and_no_guess() -> None:
    made, _ = authenticator(trusting())
    for _ in range(2 * GUESSES):
        with pytest.raises(Forbidden) as raised:
            made.authenticate(bearer(ISSUER.token(team="t")))
        assert raised.value.error_code == "unknown_team"


def test_who_starts_with_issuers_is_ready_for_tokens() -> None:
    """What must be imported for them takes longer than a stream may wait."""
    assert authenticator(trusting())[0]._tokens is not None
    assert authenticator(snapshot("gh-1"))[0]._tokens is None


# --- very many keys ----------------------------------------------------------------------------------------------------


def test_many_keys_are_looked_up_one_by_one_and_wrong_ones_leave_nothing() -> None:
    """100,000 keys: none is decoded before it is used, and 100,000 wrong ones make nothing grow."""
    # failure 82
    file = SnapshotFile(
        keys={
            hashlib.sha256(b"gh-%d" % n).digest(): encode_principal(Principal(f"key_{n}", f"name {n}", "research"))
            for n in range(100_000)
        }
    )
    known = Snapshot(decode_snapshot(encode_snapshot(file)))
    made, _ = authenticator(known)
    assert len(known._found) == 0
    for n in (0, 5, 99_999, 5):
        sent = exchange(b"Bearer gh-%d" % n)
        made.authenticate(sent)
        assert sent.record.key_id == f"key_{n}"
    assert len(known._found) == len(known._principals) == 3
    digests = (secrets.token_bytes(32) for _ in range(100_000))
    assert all(known.principal(digest) is None for digest in digests)
    assert len(known._found) == len(known._principals) == 3
