"""2 authenticate: whose key, or whose token, is it.

Keys are random and long (256 bits), so a plain sha256 is what they are stored and looked up by: nothing can be guessed, and the
look-up compares hashes of what the caller sent, never secrets. What was found is remembered per connection for as long as the
same header bytes come, the same snapshot holds and nothing has expired. Of wrong keys nothing is remembered but how many came
from where (`guesses.py`); who has a right one is never counted.

A key comes as `Authorization: Bearer KEY` (OpenAI's clients) or as `x-api-key: KEY` (Anthropic's). It is the same key by the same
look-up under the same rules; if both come they must agree, or each reader might take another. What is no key, and looks like a
token, is one if there are issuers (`tokens.py`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING

from proxy.addresses import household
from proxy.auth.guesses import Guesses
from proxy.errors import InvalidRequest, NotReady, ProxyError, RateLimited, Unauthenticated
from proxy.exchange import Exchange, Remembered
from proxy.snapshot import Issuer, Principal, Snapshot, SnapshotError, SnapshotFeed

if TYPE_CHECKING:
    from proxy.auth.tokens import Tokens

log = logging.getLogger(__name__)

_BEARER = b"bearer "


class Authenticator:
    """`wall_ns`: ns since 1970, now."""

    def __init__(self, feed: SnapshotFeed, wall_ns: Callable[[], int] = time_ns) -> None:
        self._feed = feed
        self._wall_ns = wall_ns
        self._guesses = Guesses()
        self._tokens: Tokens | None = None
        if feed.current is not None and feed.current.issuers:
            self._tokens = _tokens(feed.current.issuers)  # before there are streams that would wait for an import
        self.accepted = 0
        """Requests so far."""

    def authenticate(self, exchange: Exchange) -> Principal:
        """The caller's key → the exchange's Principal: from here on the request is accepted. Raises Unauthenticated;
        RateLimited instead, if wrong keys have come from there too often; InvalidRequest if there are two keys; Forbidden
        if a token names a team or project that isn't declared; NotReady while there is no snapshot."""
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
        record.user_name = principal.user
        record.project = principal.project
        record.authenticated_ns = elapsed_ns
        self.accepted += 1
        return principal

    def identify(self, headers: Mapping[bytes, bytes], remembered: Remembered, address: str) -> Principal:
        """Whose key it is, remembered for the connection. Raises like `authenticate`."""
        snapshot = self._feed.current
        if snapshot is None:
            raise NotReady("The proxy has no keys and models yet; try again in a moment.")
        authorization, api_key = headers.get(b"authorization"), headers.get(b"x-api-key")
        secret = presented(authorization, api_key)
        try:
            principal, ends_unix_ns = self._find(snapshot, secret, address)
            blocked, expires_unix_ns = snapshot.blocked(principal), snapshot.expires_unix_ns(principal)
        except SnapshotError as error:
            log.error("who asks can't be looked up", extra={"error": str(error)})
            raise NotReady("The proxy can't read its keys just now.") from None
        if blocked:
            raise Unauthenticated("The API key is blocked.", code="key_blocked")
        expires_unix_ns = min(expires_unix_ns, ends_unix_ns)
        if self._wall_ns() >= expires_unix_ns:
            raise Unauthenticated("The API key has expired.", code="expired_api_key")
        remembered.authorization, remembered.api_key = authorization, api_key
        remembered.principal, remembered.snapshot = principal, snapshot
        remembered.expires_unix_ns = expires_unix_ns
        return principal

    def _find(self, snapshot: Snapshot, secret: bytes, address: str) -> tuple[Principal, int]:
        """Whose it is, and when it ends."""
        found = snapshot.find(hashlib.sha256(secret).digest())
        if found is not None:
            return found
        if snapshot.issuers and secret.count(b".") == 2:
            return self._find_bearer(snapshot, secret, address)
        raise self._wrong(address, Unauthenticated("Incorrect API key provided."))

    def _find_bearer(self, snapshot: Snapshot, token: bytes, address: str) -> tuple[Principal, int]:
        from proxy.auth.tokens import principal_of  # only where there are issuers

        if self._tokens is None or self._tokens.issuers != snapshot.issuers:
            self._tokens = _tokens(snapshot.issuers)
        try:
            identity = self._tokens.verify(token, self._wall_ns())
        except Unauthenticated as error:
            raise error if error.error_code == "expired_token" else self._wrong(address, error) from None
        return principal_of(identity, snapshot), identity.expires_unix_ns

    def _wrong(self, address: str, error: ProxyError) -> ProxyError:
        """`error`, or if that was one too many from there, how long to wait."""
        wait_ns = self._guesses.wait_ns(household(address), monotonic_ns())
        if wait_ns:
            return RateLimited("Too many requests with incorrect API keys came from your address.", wait_s=wait_ns / 1e9)
        return error


def _tokens(issuers: tuple[Issuer, ...]) -> Tokens:
    from proxy.auth.tokens import Tokens  # what it imports is as large as a third of a worker

    return Tokens(issuers)


def presented(authorization: bytes | None, api_key: bytes | None) -> bytes:
    """The key or token that these two headers hold. Raises Unauthenticated if there is none, InvalidRequest if there are two."""
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
