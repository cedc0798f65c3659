"""Certificates for tests, and clients that trust them. How they were made: `tests/fixtures/tls/make.sh`."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[1] / "fixtures" / "tls"
CA: Final = FOLDER / "ca.pem"
OTHER_CA: Final = FOLDER / "other-ca.pem"


def certificate(name: str) -> Path:
    """server, renewed (both good for localhost and 127.0.0.1), expired, elsewhere (another host's)."""
    return FOLDER / f"{name}.pem"


def key(name: str) -> Path:
    return FOLDER / f"{name}.key"


def client_context(ca: Path = CA) -> ssl.SSLContext:
    """Of a client that trusts what this authority vouches for, and nothing else."""
    return ssl.create_default_context(cafile=ca)


def server_context(name: str = "server") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(name), key(name))
    return context
