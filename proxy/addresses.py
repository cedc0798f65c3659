"""Addresses of clients, as people write them and as they are counted."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address


def plain_address(host: str) -> str:
    """A peer's address as people write it: an IPv4 one that came through an IPv6 socket is an IPv4 one."""
    return host.removeprefix("::ffff:") if "." in host else host


def household(address: str) -> str:
    """Who is counted as one client: an IPv4 address, or the /64 of an IPv6 one, which is what one site gets."""
    if ":" not in address:
        return address
    return str(IPv6Address(int(ip_address(address.partition("%")[0])) >> 64 << 64))
