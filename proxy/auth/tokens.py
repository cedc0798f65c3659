"""Tokens (JWT, RFC 7519): who somebody is, in the words of an issuer that is trusted here.

A token says itself how it wants to be checked, and nearly everything that ever went wrong with tokens came from believing it. So
(RFC 8725):

- The algorithm is one of the issuer's, all of which have a private and a public half, and the key is one that was made for it: a
  public key is never taken for a secret of both sides. What an issuer publishes is sorted by algorithm before a token is seen.
- `kid` chooses among the published keys by being equal. `jku`, `x5u`, `jwk` and `x5c` are not read. `crit` is refused, whatever
  it demands.
- The issuer is found by `iss`, literally, and only its keys count. `aud` must name us. `exp` must be there; it, `nbf` and `iat`
  may be off by the issuer's leeway.
- No token is read that is longer than `TOKEN_BYTES`, and none is repeated in an error.

What was verified is remembered by the token's sha256, until the token expires. Pure: the time is passed in. PyJWT and the
cryptography beneath it take 0.13 s and 10 MB to import, so this module is imported only where there are issuers.
"""

from __future__ import annotations

import hashlib
import logging
import re
from base64 import urlsafe_b64decode
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from proxy.errors import Forbidden, Unauthenticated
from proxy.snapshot import NEVER_NS, UNLIMITED, Issuer, Principal, Snapshot

log = logging.getLogger(__name__)

TOKEN_BYTES = 8192
REMEMBERED = 10_000
"""Verified tokens; the one that came first is forgotten first."""

_FORM = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_KEYS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", (None,))),
    "ES256": ("EC", ("P-256",)),
    "ES384": ("EC", ("P-384",)),
    "ES512": ("EC", ("P-521",)),
    "EdDSA": ("OKP", ("Ed25519", "Ed448")),
}
"""Algorithm → key type and curves that are made for it (RFC 7518 §3.1, RFC 8037). Others aren't taken from any issuer."""
T = TypeVar("T")
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Identity(NamedTuple):
    """Whom a verified token is about. `teams`, `projects`: what it names, the first that is known here counts. `models`:
    patterns; None where no claim is for them. `role`: on the control API. `expires_unix_ns`: the first moment at which it is of
    no use."""

    issuer: str
    subject: str
    user: str
    teams: tuple[str, ...]
    projects: tuple[str, ...]
    models: tuple[str, ...] | None
    role: str | None
    expires_unix_ns: int

    @property
    def key_id(self) -> str:
        """The same for all tokens of one person."""
        return "jwt:" + hashlib.sha256(f"{self.issuer}\0{self.subject}".encode()).hexdigest()[:16]

    def team(self, known: Container[str]) -> str:
        """The team of those `known`, "" if the token names none. Raises Forbidden."""
        return _first(self.teams, known, "team")

    def project(self, known: Container[str]) -> str:
        """The project of those `known`, "" if the token names none. Raises Forbidden."""
        return _first(self.projects, known, "project")


class Tokens:
    """The tokens of these issuers."""

    def __init__(self, issuers: tuple[Issuer, ...]) -> None:
        self.issuers = issuers
        self._keys = [_sorted_keys(issuer) for issuer in issuers]
        self._verified: dict[bytes, Identity] = {}

    def verify(self, token: bytes, now_unix_ns: int) -> Identity:
        """Whom it is about, whoever shows it: on the data plane as on the control API. Raises Unauthenticated: `expired_token` if
        only that is wrong with it, else `invalid_token`."""
        digest = hashlib.sha256(token).digest()
        identity = self._verified.get(digest)
        if identity is None:
            identity = self._verified[digest] = self._verify(token, now_unix_ns)
            if len(self._verified) > REMEMBERED:
                del self._verified[next(iter(self._verified))]
        if now_unix_ns >= identity.expires_unix_ns:
            del self._verified[digest]
            raise Unauthenticated("The token has expired.", code="expired_token")
        return identity

    def _verify(self, token: bytes, now_unix_ns: int) -> Identity:
        if len(token) > TOKEN_BYTES:
            raise _invalid(f"it is longer than {TOKEN_BYTES} bytes")
        if (parts := _FORM.fullmatch(token)) is None:
            raise _invalid("it isn't three parts of base64url")
        header, claims = _read(parts[1], _Header), _read(parts[2], _Claims)
        if header.crit is not msgspec.UNSET:
            raise _invalid("it demands extensions")
        named = [place for place, issuer in enumerate(self.issuers) if issuer.issuer == claims.iss]
        if not named:
            raise _invalid("its issuer isn't trusted here")
        signed, signature = token[: parts.end(2)], _decoded(parts[3])
        signers = [self.issuers[place] for place in named if self._has_signed(place, header, signed, signature)]
        if not signers:
            raise _invalid("none of its issuer's keys has signed it")
        audience = {claims.aud} if isinstance(claims.aud, str) else set(claims.aud)
        for issuer in signers:
            if not audience.isdisjoint(issuer.audience):
                return _identity(issuer, claims, _read(parts[2], dict), now_unix_ns)
        raise _invalid("it was made for another audience")

    def _has_signed(self, place: int, header: _Header, signed: bytes, signature: bytes) -> bool:
        keys = self._keys[place].get(header.alg, ())
        chosen = (key for kid, key in keys if header.kid is None or kid is None or kid == header.kid)
        return any(key.Algorithm.verify(signed, key.key, signature) for key in chosen)


def principal_of(identity: Identity, snapshot: Snapshot) -> Principal:
    """What somebody with a token is on the data plane. The token's models are what his key would be allowed; what is declared for
    the user, the team and the project counts besides. Raises Forbidden for a team or project that isn't declared."""
    allowance = UNLIMITED if identity.models is None else msgspec.structs.replace(UNLIMITED, models=identity.models)
    team, project = identity.team(snapshot.teams), identity.project(snapshot.projects)
    return snapshot.interned(Principal(identity.key_id, identity.user, team, allowance, identity.user, project))


# -- what issuers publish --


class _Key(msgspec.Struct, omit_defaults=True):
    """What is read of a published key (RFC 7517, 7518 §6): nothing of a private half that was published by mistake."""

    kty: str
    kid: str | None = None
    alg: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    crv: str | None = None
    n: str | None = None
    e: str | None = None
    x: str | None = None
    y: str | None = None

    def is_for(self, algorithm: str) -> bool:
        kty, curves = _KEYS[algorithm]
        verifies = self.use in (None, "sig") and (self.key_ops is None or "verify" in self.key_ops)
        return self.kty == kty and self.crv in curves and self.alg in (None, algorithm) and verifies


class _KeySet(msgspec.Struct):
    keys: list[msgspec.Raw]


def _sorted_keys(issuer: Issuer) -> dict[str, list[tuple[str | None, PyJWK]]]:
    """Algorithm → (kid, key) of all published keys that were made for it."""
    published = list(_published(issuer))
    return {
        algorithm: [(key.kid, usable) for key in published if (usable := _usable(key, algorithm, issuer)) is not None]
        for algorithm in issuer.algorithms
        if algorithm in _KEYS
    }


def _published(issuer: Issuer) -> Iterator[_Key]:
    """Those that can be read; one that can't doesn't spoil the others."""
    for raw in msgspec.json.decode(issuer.keys, type=_KeySet).keys:
        try:
            yield msgspec.json.decode(raw, type=_Key)
        except msgspec.MsgspecError as error:
            log.warning("an issuer's key can't be read", extra={"issuer": issuer.issuer, "error": str(error)})


def _usable(key: _Key, algorithm: str, issuer: Issuer) -> PyJWK | None:
    if not key.is_for(algorithm):
        return None
    try:
        usable = PyJWK(msgspec.to_builtins(key), algorithm)
        weakness = usable.Algorithm.check_key_length(usable.key)
    except PyJWTError as error:
        weakness = str(error)
    if weakness:
        log.warning("an issuer's key is of no use", extra={"issuer": issuer.issuer, "kid": key.kid, "error": weakness})
        return None
    return usable


# -- what a token says --


class _Header(msgspec.Struct):
    alg: str
    kid: str | None = None
    crit: Any = msgspec.UNSET


class _Claims(msgspec.Struct):
    """Those of RFC 7519 §4.1 that count here. Times are seconds since 1970."""

    iss: str
    aud: str | list[str]
    exp: Seconds
    nbf: Seconds = 0.0
    iat: Seconds = 0.0
    sub: str | None = None


def _identity(issuer: Issuer, claims: _Claims, said: Mapping[str, Any], now_unix_ns: int) -> Identity:
    leeway_ns = int(issuer.leeway_s * 1e9)
    if max(claims.nbf, claims.iat) * 1e9 > now_unix_ns + leeway_ns:
        raise _invalid("it isn't valid yet")
    user = _names(said, issuer.user_claim)[:1]
    if not user:
        raise _invalid(f"it has no claim {_shown(issuer.user_claim)}")
    models = None if issuer.models_claim is None else _names(said, issuer.models_claim, split=True)
    roles = [issuer.roles[name] for name in _names(said, issuer.role_claim) if name in issuer.roles]
    return Identity(
        issuer=issuer.issuer,
        subject=claims.sub or user[0],
        user=user[0],
        teams=_names(said, issuer.team_claim),
        projects=_names(said, issuer.project_claim),
        models=models,
        role=roles[0] if roles else None,
        expires_unix_ns=min(int(claims.exp * 1e9) + leeway_ns, NEVER_NS),
    )


def _names(said: Mapping[str, Any], claim: tuple[str, ...] | None, *, split: bool = False) -> tuple[str, ...]:
    """The names that a claim holds, none if the token lacks it: a text is one, or with `split` as many as it has words."""
    value: Any = said
    for step in claim or ():
        value = value.get(step) if isinstance(value, dict) else None
    if claim is None or value is None:
        return ()
    names = value if isinstance(value, list) else value.split() if split and isinstance(value, str) else [value]
    if not all(isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable() for name in names):
        raise _invalid(f"its claim {_shown(claim)} isn't a name or a list of names")
    return tuple(names)


def _first(names: tuple[str, ...], known: Container[str], what: str) -> str:
    found = next((name for name in names if name in known), "")
    if names and not found:
        raise Forbidden(f"The token's {what} isn't known here.", code=f"unknown_{what}")
    return found


def _shown(claim: tuple[str, ...]) -> str:
    return f"`{'.'.join(claim)}`"


def _read(part: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(_decoded(part), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _invalid("its header or a claim is missing, or not of the type that it must be") from None


def _decoded(part: bytes) -> bytes:
    if len(part) % 4 == 1:
        raise _invalid("it was cut off")
    return urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def _invalid(why: str) -> Unauthenticated:
    return Unauthenticated(f"The token isn't valid: {why}.", code="invalid_token")
