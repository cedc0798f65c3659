"""Who asks: from what a request presents to a Caller.

What is presented is the same as everywhere (`Authorization: Bearer SECRET` or `x-api-key: SECRET`): an admin key, an issuer's
token, or a key for the models, whose holder may ask what it was used for. Through the Unix socket a request needs nothing: who
may open that could open the database beside it. If it does present something, that counts.

Every request is looked up anew, so that a revoked admin key is of no use at once. Wrong ones are counted as workers count them.

What a token may do its issuer says: the role that the settings give to what is in its role claim, within the team that it names,
if it names one (a manager's must). One without a role is a key for the models.
"""

from __future__ import annotations

import hashlib
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING

from sqlalchemy import Connection
from starlette.datastructures import Headers

from proxy.addresses import household, plain_address
from proxy.auth import presented
from proxy.auth.guesses import Guesses
from proxy.control.access import Caller, Standing
from proxy.control.catalogue import digest_of
from proxy.control.errors import of_store
from proxy.control.state import State
from proxy.errors import InvalidRequest, ProxyError, RateLimited, Unauthenticated
from proxy.store import AdminRow, StoreError, find_admin, holder

if TYPE_CHECKING:
    from proxy.auth.tokens import Tokens

LOCAL_NAME = "local"


class Callers:
    def __init__(self, state: State) -> None:
        self._state = state
        self._guesses = Guesses()
        self._tokens: Tokens | None = None
        keys = state.settings.keys
        self._declared = {digest: name for name, key in keys.items() if (digest := digest_of(key)) is not None}

    async def identify(self, headers: Headers, address: str, local: bool) -> Caller:
        """Raises Unauthenticated; RateLimited instead, if what is wrong has come from there too often; InvalidRequest if two
        different things are presented; NotReady if the database can't say."""
        address = plain_address(address)
        authorization, api_key = _once(headers, "authorization"), _once(headers, "x-api-key")
        if local and authorization is None and api_key is None:
            return Caller(LOCAL_NAME, "admin")
        secret = presented(authorization, api_key)
        try:
            caller = await self._of_key(secret) or self._of_token(secret)
        except Unauthenticated as error:
            raise error if error.error_code == "expired_token" else self._wrong(address, error) from None
        return caller._replace(address=address)

    async def _of_key(self, secret: bytes) -> Caller | None:
        digest = hashlib.sha256(secret).digest()
        if (name := self._declared.get(digest)) is not None:
            return Caller(name, "holder", key=name)
        try:
            return await self._state.database.read(_known, digest, time_ns())
        except StoreError as error:
            raise of_store(error) from None

    def _of_token(self, token: bytes) -> Caller:
        """Raises Unauthenticated; Forbidden if it names a team that isn't there."""
        issuers = self._state.issuers.published()
        if not issuers or token.count(b".") != 2:
            raise Unauthenticated("The key isn't known here.")
        if self._tokens is None or self._tokens.issuers != issuers:
            from proxy.auth.tokens import Tokens  # only where there are issuers

            self._tokens = Tokens(issuers)
        identity = self._tokens.verify(token, time_ns())
        held = self._state.feed.known.declared.held
        name, team = f"{identity.user} ({identity.issuer})", identity.team(held.teams) or None
        if identity.role is None or (identity.role == "manager" and team is None):
            project = identity.project(held.projects) or None
            return Caller(name, "holder", team, key=identity.key_id, user=identity.user, project=project)
        if identity.role == "admin":
            return Caller(name, "admin")
        return Caller(name, _standing(identity.role, team), team)

    def _wrong(self, address: str, error: ProxyError) -> ProxyError:
        """`error`, or if that was one too many from there, how long to wait."""
        wait_ns = self._guesses.wait_ns(household(address), monotonic_ns())
        if wait_ns:
            return RateLimited("Too many requests with wrong keys came from your address.", wait_s=wait_ns / 1e9)
        return error


def _known(connection: Connection, digest: bytes, now_ns: int) -> Caller | None:
    if (admin := find_admin(connection, digest, now_ns)) is not None:
        return _admin(admin)
    key = holder(connection, digest, now_ns)
    return None if key is None else Caller(key.name, "holder", key=key.id)


def _admin(row: AdminRow) -> Caller:
    return Caller(row.name, _standing(row.role, row.team), row.team)


def _standing(role: str, team: str | None) -> Standing:
    """Raises KeyError for a role that there isn't, or that has no team and needs one."""
    standings: dict[tuple[str, bool], Standing] = {
        ("admin", False): "admin",
        ("manager", True): "manager",
        ("viewer", False): "viewer",
        ("viewer", True): "team_viewer",
    }
    return standings[role, team is not None]


def _once(headers: Headers, name: str) -> bytes | None:
    values = headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"The header {name} stands more than once.", param=name, code="conflicting_api_keys")
    return values[0].encode("latin-1") if values else None
