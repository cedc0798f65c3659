"""2 authenticate: whose key is it.

Keys are random and long (256 bits), so a plain sha256 is what they are stored and looked up by: nothing can be guessed, and the
look-up compares hashes of what the caller sent, never secrets. What was found is remembered per connection for as long as the
same header bytes come and the same snapshot holds.
"""

from __future__ import annotations

import hashlib
from time import monotonic_ns

from proxy.errors import NotReady, Unauthenticated
from proxy.exchange import Exchange, Remembered
from proxy.snapshot import Principal, SnapshotFeed

_BEARER = b"bearer "


class Authenticator:
    def __init__(self, feed: SnapshotFeed) -> None:
        self._feed = feed

    def authenticate(self, exchange: Exchange) -> None:
        """`Authorization: Bearer KEY` → the exchange's Principal: from here on the request is accepted. Raises Unauthenticated;
        NotReady while there is no snapshot."""
        authorization = exchange.headers.get(b"authorization")
        remembered = exchange.remembered
        principal = remembered.principal
        if principal is None or remembered.authorization != authorization or remembered.snapshot is not self._feed.current:
            principal = self.identify(authorization, remembered)
        exchange.principal = principal
        record = exchange.record
        record.key_id = principal.key_id
        record.key_name = principal.key_name
        record.authenticated_ns = monotonic_ns() - exchange.origin_ns

    def identify(self, authorization: bytes | None, remembered: Remembered) -> Principal:
        """Whose key it is, remembered for the connection. Raises like `authenticate`."""
        snapshot = self._feed.current
        if snapshot is None:
            raise NotReady("The proxy has no keys and models yet; try again in a moment.")
        if authorization is None:
            raise Unauthenticated(
                "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`.", code="missing_api_key"
            )
        if authorization[:7].lower() != _BEARER:
            raise Unauthenticated("The Authorization header must have the form `Bearer YOUR_KEY`.")
        principal = snapshot.principal(hashlib.sha256(authorization[7:].strip()).digest())
        if principal is None:
            raise Unauthenticated("Incorrect API key provided.")
        remembered.authorization, remembered.principal, remembered.snapshot = authorization, principal, snapshot
        return principal
