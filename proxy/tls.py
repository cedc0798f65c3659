"""TLS on both sides: what the listener shows its clients, and whom a backend's certificate must be from.

Verification of backends is always on; there is no setting that switches it off.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from proxy.settings import Settings, SettingsError, TlsSettings

_PROTOCOLS = ["http/1.1"]


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """For the listener: its certificate and key. Raises OSError (also ssl.SSLError) if they can't be used, or not together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(_PROTOCOLS)
    context.load_cert_chain(tls.certificate, tls.key, password="")  # an encrypted key: nobody is asked
    return context


def upstream_context(ca_file: str) -> ssl.SSLContext:
    """For connections to backends: the system's authorities, or those in `ca_file` and no others. A changed file is read anew.
    Blocks (tens of ms) when it reads. Raises OSError (also ssl.SSLError) if the file can't be used."""
    return _upstream_context(ca_file, Path(ca_file).stat().st_mtime_ns if ca_file else 0)


@lru_cache(maxsize=32)
def _upstream_context(ca_file: str, _version: int) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(_PROTOCOLS)
    return context


def check_files(settings: Settings) -> None:
    """Can the files that the settings name be used? Raises SettingsError."""
    if settings.tls is not None:
        try:
            server_context(settings.tls)
        except OSError as error:
            raise SettingsError(
                f"tls: {settings.tls.certificate!r} with {settings.tls.key!r} can't be used ({said(error)}); "
                "allowed: PEM files, a certificate and its key without a passphrase"
            ) from None
    named = [(f"backends[{index}]", each.ca_file) for index, each in enumerate(settings.backends)]
    named += [(f"issuers[{index}]", each.ca_file) for index, each in enumerate(settings.issuers)]
    for section, ca_file in named:
        try:
            if ca_file is not None:
                upstream_context(ca_file)
        except OSError as error:
            raise SettingsError(f"{section}.ca_file: {ca_file!r} can't be used ({said(error)}); allowed: a PEM file") from None


def said(error: OSError) -> str:
    """Why TLS failed, in the words of OpenSSL or of the system."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error) or type(error).__name__


def expiry_unix_s(certificate: Path) -> int:
    """When the first certificate in a PEM file ceases to be valid (RFC 5280 §4.1.2.5). The standard library tells this of a
    peer's certificate only, so the few fields before it are passed over here. Raises OSError, ValueError."""
    text = certificate.read_text("ascii", "replace")
    begin, end = text.find(ssl.PEM_HEADER), text.find(ssl.PEM_FOOTER)
    if begin < 0 or end < begin:
        raise ValueError("no certificate in it")
    der = ssl.PEM_cert_to_DER_cert(text[begin : end + len(ssl.PEM_FOOTER)])
    _, at, _ = _element(der, 0)  # Certificate
    _, at, _ = _element(der, at)  # TBSCertificate
    if der[at] == 0xA0:  # the version, which the oldest don't have
        _, _, at = _element(der, at)
    for _ in range(3):  # serial number, signature algorithm, issuer
        _, _, at = _element(der, at)
    _, at, _ = _element(der, at)  # Validity
    _, _, at = _element(der, at)  # not before
    tag, at, end = _element(der, at)  # not after
    utc_time = 0x17
    moment = datetime.strptime(der[at:end].decode("ascii"), "%y%m%d%H%M%SZ" if tag == utc_time else "%Y%m%d%H%M%SZ")
    return int(moment.replace(tzinfo=UTC).timestamp())


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """(tag, where its content begins, where it ends) of the DER element at `at`."""
    tag, length = der[at], der[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[at : at + size])
        at += size
    return tag, at, at + length
