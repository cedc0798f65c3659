"""2 authenticate: whose key is it.

Keys are random and long (256 bits), so a plain sha256 is what they are stored and looked up by: nothing can be guessed, and the
look-up compares hashes of what the caller sent, never secrets. What was found is remembered per connection for as long as the
same header bytes come, the same snapshot holds and the key hasn't expired. Of wrong keys nothing is remembered but how many came
from where (`guesses.py`); who has a right one is never counted.

A key comes as `Authorization: Bearer KEY` (OpenAI's clients) or as `x-api-key: KEY` (Anthropic's). It is the same key by the same
look-up under the same rules; if both come they must agree, or each reader might take another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from time import monotonic_ns, time_ns

from proxy.addresses import household
from proxy.auth.guesses import Guesses
from proxy.errors import InvalidRequest, NotReady, ProxyError, RateLimited, Unauthenticated
from proxy.exchange import Exchange, Remembered
from proxy.snapshot import Principal, SnapshotFeed

_BEARER = b"bearer "


class Authenticator:
    """`wall_ns`: ns since 1970, now."""

    def __init__(self, feed: SnapshotFeed, wall_ns: Callable[[], int] = time_ns) -> None:
        self._feed = feed
        self._wall_ns = wall_ns
        self._guesses = Guesses()
        self.accepted = 0
        """Requests so far."""

    def authenticate(self, exchange: Exchange) -> Principal:
        """The caller's key → the exchange's Principal: from here on the request is accepted. Raises Unauthenticated;
        RateLimited instead, if wrong keys have come from there too often; InvalidRequest if there are two keys; NotReady while
        there is no snapshot."""
        headers = exchange.headers
        remembered = exchange.remembered
        record = exchange.record
        principal = remembered.principal
        elapsed_ns = monotonic_ns() - exchange.origin_ns
        if (
            principal is None
            or remembered.authorization != headers.get(b"authorization")
            or remembered.api_key != headers.get(b"x-api-key")
            or remembered.snapshot is not self._feed.current
            or record.received_unix_ns + elapsed_ns >= remembered.expires_unix_ns
        ):
            principal = self.identify(headers, remembered, record.client_address)
            elapsed_ns = monotonic_ns() - exchange.origin_ns
        exchange.principal = principal
        record.key_id = principal.key_id
        record.key_name = principal.key_name
        record.team = principal.team
        record.authenticated_ns = elapsed_ns
        self.accepted += 1
        return principal

    def identify(self, headers: Mapping[bytes, bytes], remembered: Remembered, address: str) -> Principal:
        """Whose key it is, remembered for the connection. Raises like `authenticate`."""
        snapshot = self._feed.current
        if snapshot is None:
            raise NotReady("The proxy has no keys and models yet; try again in a moment.")
        authorization, api_key = headers.get(b"authorization"), headers.get(b"x-api-key")
        principal = snapshot.principal(hashlib.sha256(_key(authorization, api_key)).digest())
        if principal is None:
            raise self._wrong(address)
        expires_unix_ns = snapshot.expires_unix_ns(principal)
        if self._wall_ns() >= expires_unix_ns:
            raise Unauthenticated("The API key has expired.", code="expired_api_key")
        remembered.authorization, remembered.api_key = authorization, api_key
        remembered.principal, remembered.snapshot = principal, snapshot
        remembered.expires_unix_ns = expires_unix_ns
        return principal

    def _wrong(self, address: str) -> ProxyError:
        wait_ns = self._guesses.wait_ns(household(address), monotonic_ns())
        if wait_ns:
            return RateLimited("Too many requests with incorrect API keys came from your address.", wait_s=wait_ns / 1e9)
        return Unauthenticated("Incorrect API key provided.")


def _key(authorization: bytes | None, api_key: bytes | None) -> bytes:
    if authorization is None:
        if api_key is None:
            raise Unauthenticated(
                "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY` or as `x-api-key: YOUR_KEY`.",
                code="missing_api_key",
            )
        return api_key.strip()
    bearer = authorization[7:].strip() if authorization[:7].lower() == _BEARER else None
    if api_key is not None and bearer != api_key.strip():
        raise InvalidRequest(
            "The headers Authorization and x-api-key hold different keys.", param="x-api-key", code="conflicting_api_keys"
        )
    if bearer is None:
        raise Unauthenticated("The Authorization header must have the form `Bearer YOUR_KEY`.")
    return bearer
