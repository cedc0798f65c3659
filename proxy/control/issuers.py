"""Fetching the public keys of the issuers whose tokens are taken. Workers ask nobody: they have the keys from the snapshot.

Where the keys are is said (`jwks_url`, `jwks_file`), or the issuer is asked (OpenID Connect Discovery 1.0 §4). They are fetched
again when the issuer's word on their age is over, and after `SLOWEST_S` at the latest: a token that is signed with a key that was
published since the last look is refused until the next. An issuer that doesn't answer keeps the keys that were known of it, also
those of the snapshot of the process before; it is asked again soon.

What is fetched is judged before anybody sees it: its size, that it came from where it was asked for (redirects are not followed),
that what an `https` issuer names is `https` too. Of a key only the public half is taken over, and of a symmetric one nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec

from proxy.control.discovery import DiscoveryError, new_client
from proxy.settings import IssuerSettings
from proxy.snapshot import Issuer, SnapshotFile

DOCUMENT_BYTES = 512 * 1024
"""More than this is no set of keys."""
MOST_KEYS = 100

USUAL_S = 60.0
FASTEST_S = 10.0
SLOWEST_S = 300.0
"""How long keys are good for: what an issuer says of it (`cache-control: max-age`) counts between these two."""
AGAIN_S = (5.0, 60.0)
"""After a failure: the first pause, the longest."""

_PUBLIC = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
"""Key type → the members of its public half (RFC 7518 §6, RFC 8037 §2)."""
_ABOUT = ("kty", "kid", "alg", "use", "key_ops")
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})", re.IGNORECASE)


class Fetched(msgspec.Struct, frozen=True):
    """A JSON Web Key Set of public keys, and after how many seconds it is to be fetched again."""

    keys: bytes
    again_s: float


class KnownIssuer:
    """One issuer. `keys` is None until something is known. Times are ns since 1970, 0 = never."""

    def __init__(self, settings: IssuerSettings) -> None:
        self.settings = settings
        self.keys: bytes | None = None
        self.error = ""
        self.asked_unix_ns = 0
        self.answered_unix_ns = 0
        self._pause_s = AGAIN_S[0]

    def answered(self, fetched: Fetched, now_ns: int) -> bool:
        """True if that changes anything for workers."""
        self.error, self.asked_unix_ns, self.answered_unix_ns = "", now_ns, now_ns
        self._pause_s = AGAIN_S[0]
        changed = fetched.keys != self.keys
        self.keys = fetched.keys
        return changed

    def failed(self, error: str, now_ns: int) -> float:
        """→ seconds after which to ask again."""
        self.error, self.asked_unix_ns = error, now_ns
        pause, self._pause_s = self._pause_s, min(AGAIN_S[1], 2 * self._pause_s)
        return pause

    def published(self) -> Issuer:
        """As workers know it. Without keys nothing of it is taken."""
        settings, claims = self.settings, self.settings.claims
        return Issuer(
            issuer=settings.issuer,
            audience=settings.audience,
            algorithms=settings.algorithms,
            keys=self.keys or b'{"keys":[]}',
            user_claim=tuple(claims.user.split(".")),
            team_claim=_path(claims.team),
            project_claim=_path(claims.project),
            models_claim=_path(claims.models),
            role_claim=_path(claims.role),
            roles=dict(settings.roles),
            leeway_s=settings.leeway,
        )


class Issuers:
    """All issuers of the settings."""

    def __init__(self, settings: Sequence[IssuerSettings], previous: SnapshotFile | None) -> None:
        self.known = [KnownIssuer(each) for each in settings]
        before = {} if previous is None else {each.issuer: each.keys for each in previous.issuers}
        for each in self.known:
            each.keys = before.get(each.settings.issuer)

    @property
    def complete(self) -> bool:
        """Every one was asked at least once."""
        return all(each.asked_unix_ns for each in self.known)

    def published(self) -> tuple[Issuer, ...]:
        return tuple(each.published() for each in self.known)


async def fetch(settings: IssuerSettings, timeout_s: float) -> Fetched:
    """The keys of an issuer. `timeout_s` is for all of it. Raises DiscoveryError."""
    if settings.jwks_file is not None:
        return Fetched(public_keys(await asyncio.to_thread(_read, Path(settings.jwks_file))), FASTEST_S)
    try:
        async with asyncio.timeout(timeout_s), new_client(timeout_s, settings.ca_file or "") as client:
            url = settings.jwks_url or await _jwks_uri(client, settings.issuer)
            body, headers = await _get(client, url)
            return Fetched(public_keys(body), _good_for(headers.get("cache-control", "")))
    except TimeoutError:
        raise DiscoveryError(f"no complete answer within {timeout_s:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DiscoveryError(str(error) or type(error).__name__) from None


def public_keys(document: bytes) -> bytes:
    """A JSON Web Key Set (RFC 7517 §5) → one of the public halves of those of its keys that can sign tokens. What can't be one is
    passed over. Raises DiscoveryError."""
    keys = _object(document).get("keys")
    if not isinstance(keys, list):
        raise DiscoveryError("not a set of keys: it has no list `keys`")
    public = [found for key in keys if (found := _public(key)) is not None]
    if len(public) > MOST_KEYS:
        raise DiscoveryError(f"a set of {len(public)} keys; at most {MOST_KEYS} are taken")
    return msgspec.json.encode({"keys": public})


def _public(key: Any) -> dict[str, Any] | None:
    if not isinstance(key, dict) or (needed := _PUBLIC.get(str(key.get("kty")))) is None:
        return None
    if not all(isinstance(key.get(name), str) for name in needed):
        return None
    return {name: key[name] for name in (*_ABOUT, *needed) if name in key}


async def _jwks_uri(client: httpx2.AsyncClient, issuer: str) -> str:
    """What the issuer says of where its keys are."""
    body, _ = await _get(client, issuer.rstrip("/") + "/.well-known/openid-configuration")
    document = _object(body)
    if document.get("issuer") != issuer:
        raise DiscoveryError("the issuer calls itself otherwise than it is called here")
    url = document.get("jwks_uri")
    scheme = urlsplit(url).scheme if isinstance(url, str) else ""
    if not isinstance(url, str) or scheme not in ("https", urlsplit(issuer).scheme):
        raise DiscoveryError("the issuer doesn't say where its keys are (`jwks_uri`), or not as safely as it is asked itself")
    return url


async def _get(client: httpx2.AsyncClient, url: str) -> tuple[bytes, httpx2.Headers]:
    async with client.stream("GET", url, headers={"accept": "application/json", "accept-encoding": "identity"}) as response:
        if response.status_code != 200:
            raise DiscoveryError(f"{url}: HTTP {response.status_code}")
        body = bytearray()
        async for part in response.aiter_bytes():
            body += part
            if len(body) > DOCUMENT_BYTES:
                raise DiscoveryError(f"{url}: an answer of more than {DOCUMENT_BYTES} bytes")
        return bytes(body), response.headers


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(DOCUMENT_BYTES + 1)
    except OSError as error:
        raise DiscoveryError(f"{path}: {error.strerror or error}") from None
    if len(data) > DOCUMENT_BYTES:
        raise DiscoveryError(f"{path}: more than {DOCUMENT_BYTES} bytes")
    return data


def _object(document: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DiscoveryError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DiscoveryError("not an object of JSON")
    return fields


def _good_for(cache_control: str) -> float:
    said = _MAX_AGE.search(cache_control)
    return USUAL_S if said is None else min(SLOWEST_S, max(FASTEST_S, float(said[1])))


def _path(claim: str | None) -> tuple[str, ...] | None:
    return None if claim is None else tuple(claim.split("."))
