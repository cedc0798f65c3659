"""Addresses of clients."""

from __future__ import annotations

from proxy.addresses import household, plain_address


def test_addresses() -> None:
    assert plain_address("::ffff:192.0.2.7") == "192.0.2.7"
    assert plain_address("2001:db8::1") == "2001:db8::1"
    assert household("192.0.2.7") == "192.0.2.7"
    assert household("2001:db8:1:2:3:4:5:6") == household("2001:db8:1:2::") == "2001:db8:1:2::"
    assert household("2001:db8:1:3::") != household("2001:db8:1:2::")
    assert household("fe80::1%eth0") == "fe80::"
    assert household("") == ""
