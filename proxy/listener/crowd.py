"""Who is connected, and who may still come. It counts and decides; closing is the connections' own.

Both limits hold from the first packet on, before a byte is read: a connection costs a file descriptor also if nothing is ever
said on it.
"""

from __future__ import annotations

from itertools import islice
from typing import Protocol

from proxy.errors import TooManyConnections

_LOOKS = 256
"""At so many connections a newcomer's place is looked for."""


class Guest(Protocol):
    """A connection, as far as this matters."""

    @property
    def idle_since_ns(self) -> int | None:
        """None while it does anything."""

    def make_room(self) -> None:
        """Close at once."""


class Crowd:
    """`most` in all; `most_per_client` of one client."""

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._clients: dict[Guest, str] = {}
        """Who hasn't been looked at for longest comes first."""
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, guest: Guest) -> bool:
        return guest in self._clients

    def enter(self, guest: Guest, client: str) -> None:
        """Count it in. When all places are taken, the connection that has been idle for longest makes room. `client` "" is
        exempt from its limit. Raises TooManyConnections."""
        counts = self._counts
        if client and counts.get(client, 0) >= self._most_per_client:
            raise TooManyConnections(
                f"Your address has {self._most_per_client} connections already (limits.connections_per_client).",
                code="too_many_connections_per_client",
            )
        if len(self._clients) >= self._most and not self._make_room():
            raise TooManyConnections(f"The proxy has {self._most} connections already, and all of them are in use.")
        self._clients[guest] = client
        if client:
            counts[client] = counts.get(client, 0) + 1

    def leave(self, guest: Guest) -> None:
        """Its place is free. Nothing if it had none."""
        client = self._clients.pop(guest, "")
        if client:
            left = self._counts[client] - 1
            if left:
                self._counts[client] = left
            else:
                del self._counts[client]

    def _make_room(self) -> bool:
        longest: Guest | None = None
        since_ns = 0
        for guest in list(islice(self._clients, _LOOKS)):
            self._clients[guest] = self._clients.pop(guest)  # behind the others, who come first the next time
            idle_ns = guest.idle_since_ns
            if idle_ns is not None and (longest is None or idle_ns < since_ns):
                longest, since_ns = guest, idle_ns
        if longest is None:
            return False
        self.leave(longest)
        longest.make_room()
        return True
