"""2 authenticate: whose key is it.

Keys are random and long (256 bits), so a plain sha256 is what they are stored and looked up by: nothing can be guessed, and the
look-up compares hashes of what the caller sent, never secrets. What was found is remembered per connection for as long as the
same header bytes come and the same snapshot holds.

A key comes as `Authorization: Bearer KEY` (OpenAI's clients) or as `x-api-key: KEY` (Anthropic's). It is the same key by the same
look-up under the same rules; if both come they must agree, or each reader might take another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from time import monotonic_ns

from proxy.errors import InvalidRequest, NotReady, Unauthenticated
from proxy.exchange import Exchange, Remembered
from proxy.snapshot import Principal, SnapshotFeed

_BEARER = b"bearer "


class Authenticator:
    def __init__(self, feed: SnapshotFeed) -> None:
        self._feed = feed

    def authenticate(self, exchange: Exchange) -> None:
        """The caller's key → the exchange's Principal: from here on the request is accepted. Raises Unauthenticated;
        InvalidRequest if there are two keys; NotReady while there is no snapshot."""
        headers = exchange.headers
        remembered = exchange.remembered
        principal = remembered.principal
        if (
            principal is None
            or remembered.authorization != headers.get(b"authorization")
            or remembered.api_key != headers.get(b"x-api-key")
            or remembered.snapshot is not self._feed.current
        ):
            principal = self.identify(headers, remembered)
        exchange.principal = principal
        record = exchange.record
        record.key_id = principal.key_id
        record.key_name = principal.key_name
        record.authenticated_ns = monotonic_ns() - exchange.origin_ns

    def identify(self, headers: Mapping[bytes, bytes], remembered: Remembered) -> Principal:
        """Whose key it is, remembered for the connection. Raises like `authenticate`."""
        snapshot = self._feed.current
        if snapshot is None:
            raise NotReady("The proxy has no keys and models yet; try again in a moment.")
        authorization, api_key = headers.get(b"authorization"), headers.get(b"x-api-key")
        principal = snapshot.principal(hashlib.sha256(_key(authorization, api_key)).digest())
        if principal is None:
            raise Unauthenticated("Incorrect API key provided.")
        remembered.authorization, remembered.api_key = authorization, api_key
        remembered.principal, remembered.snapshot = principal, snapshot
        return principal


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
