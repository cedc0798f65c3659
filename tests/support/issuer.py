"""An issuer of tokens (JWT): keys of its own, what it publishes of them, and tokens, right ones and others."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from proxy.snapshot import Issuer as Published

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
CURVES: Final[dict[str, ec.EllipticCurve]] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}


@cache
def private_key(algorithm: str, number: int = 0, bits: int = 2048) -> PrivateKey:
    """A key for this algorithm, the same one for the same arguments: RSA's take long to find."""
    if algorithm in CURVES:
        return ec.generate_private_key(CURVES[algorithm])
    return ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else rsa.generate_private_key(65537, bits)


def as_jwk(key: PrivateKey, **fields: Any) -> dict[str, Any]:
    """What is published of a key (RFC 7517)."""
    name = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "EdDSA"
    public: dict[str, Any] = json.loads(jwt.get_algorithm_by_name(name).to_jwk(key.public_key()))
    public.pop("key_ops", None)
    return {**public, **fields}


def as_pem(key: PrivateKey) -> bytes:
    """The public half, as it stands in many a configuration."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def part(value: Any) -> bytes:
    """JSON, or bytes, as a part of a token."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return urlsafe_b64encode(data).rstrip(b"=")


class Issuer:
    """One that signs with `algorithm` and the key named `kid`. `number`: two issuers of one algorithm have different keys."""

    def __init__(
        self,
        name: str = "https://id.example",
        algorithm: str = "ES256",
        kid: str | None = "k1",
        number: int = 0,
        bits: int = 2048,
    ) -> None:
        self.name = name
        self.algorithm = algorithm
        self.kid = kid
        self.key = private_key(algorithm[:2] if algorithm[:2] in ("RS", "PS") else algorithm, number, bits)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Those of a token that is right for a minute; a claim that is changed to None isn't there."""
        now = int(time.time())
        claims = {"iss": self.name, "aud": "glasshouse", "sub": "u1", "iat": now, "exp": now + 60, **changes}
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, headers: Mapping[str, Any] | None = None, **changes: Any) -> bytes:
        """Signed, with these claims."""
        kid = {} if self.kid is None else {"kid": self.kid}
        return self.signed({"typ": "JWT", "alg": self.algorithm, **kid, **(headers or {})}, self.claims(**changes))

    def signed(self, header: Any, claims: Any) -> bytes:
        """Whatever these are."""
        algorithm = jwt.get_algorithm_by_name(self.algorithm)
        content = part(header) + b"." + part(claims)
        return content + b"." + part(algorithm.sign(content, self.key))

    def jwk(self, **fields: Any) -> dict[str, Any]:
        return as_jwk(self.key, **({} if self.kid is None else {"kid": self.kid}), **fields)

    def published(self, *keys: dict[str, Any], **fields: Any) -> Published:
        """As the snapshot has it. `keys`: what it publishes instead of its key."""
        key_set = json.dumps({"keys": list(keys) or [self.jwk()]}).encode()
        return Published(self.name, **{"audience": ("glasshouse",), "algorithms": (self.algorithm,), "keys": key_set, **fields})
