"""What a request's head must be before anything is done for it. Pure: bytes in, a fact or an error out.

The parser has refused what isn't HTTP. What is checked here is well-formed and still means trouble: two readings of one request,
by us and by whoever stands before us, are what smuggling is made of.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address, ip_network

from proxy.errors import InvalidRequest

ONCE = frozenset((b"authorization", b"x-api-key", b"host", b"content-type", b"content-encoding"))
"""Of these a request has one at most: of two, each reader might take another."""

_AUTHORITY = rb"(?:\[[0-9A-Za-z:.%]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?"
_HOST = re.compile(_AUTHORITY)
_ABSOLUTE = re.compile(rb"https?://(%b)(/.*|\?.*|)" % _AUTHORITY, re.IGNORECASE | re.DOTALL)
_HOPS = 32
"""So many entries of `X-Forwarded-For` are looked at, from the right."""


def check_host(host: bytes) -> None:
    """RFC 9110 §7.2. Raises InvalidRequest."""
    if not _HOST.fullmatch(host):
        raise InvalidRequest("The Host header isn't a host with an optional port.", param="Host")


def check_transfer_encoding(coding: bytes, version: str) -> None:
    """RFC 9112 §6.1. What the parser takes for a list that ends in `chunked` isn't what we can read; an HTTP/1.0 message with
    one has passed somebody who doesn't know it. Raises InvalidRequest."""
    if coding.lower() != b"chunked" or version == "1.0":
        raise InvalidRequest(
            "The Transfer-Encoding must be `chunked`, in HTTP/1.1, or there must be none.", param="Transfer-Encoding"
        )


def origin_form(target: bytes) -> bytes:
    """The path and query of a target that may be a whole URL (RFC 9112 §3.2.2). Anything else stays as it is. Raises
    InvalidRequest."""
    if target.startswith(b"/") or b"://" not in target:
        return target
    url = _ABSOLUTE.fullmatch(target)
    if url is None or not url[1]:
        raise InvalidRequest("The request's target isn't a URL that is served here.")
    path = url[2]
    return path if path.startswith(b"/") else b"/" + path


class TrustedProxies:
    """The peers whose `X-Forwarded-For` is believed. `networks` as in the settings, checked."""

    def __init__(self, networks: list[str]) -> None:
        self._networks = [ip_network(each) for each in networks]

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        try:
            ip = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(ip in network for network in self._networks)

    def client(self, peer: str, forwarded_for: bytes) -> str:
        """The rightmost address that isn't a trusted proxy's: what stands left of it anybody may have written. `peer` if there
        is none."""
        client = peer
        for entry in reversed(forwarded_for.rsplit(b",", _HOPS)[-_HOPS:]):
            address = _address(entry.strip().decode("ascii", "replace"))
            if not address:
                break
            client = address
            if address not in self:
                break
        return client


def _address(text: str) -> str:
    """An entry of `X-Forwarded-For`, without the port that some proxies add; "" if it is no address."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return ""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)
