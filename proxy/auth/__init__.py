"""2 authenticate: whose key is it.

Keys are random and long (256 bits), so a plain sha256 is what they are stored and looked up by: there is nothing to guess, and the
look-up compares hashes of what the caller sent, never secrets. What was found is remembered per connection for as long as the
same header bytes come and the same snapshot holds.
"""

from __future__ import annotations

import hashlib

from proxy.errors import NotReady, Unauthenticated
from proxy.exchange import Remembered
from proxy.snapshot import Principal, SnapshotFeed

_BEARER = b"bearer "


class Authenticator:
    def __init__(self, feed: SnapshotFeed) -> None:
        self._feed = feed

    def authenticate(self, authorization: bytes | None, remembered: Remembered) -> Principal:
        """`Authorization: Bearer KEY` → Principal. Raises Unauthenticated; NotReady while there is no snapshot."""
        snapshot = self._feed.current
        if remembered.principal is not None and remembered.authorization == authorization and remembered.snapshot is snapshot:
            return remembered.principal
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
