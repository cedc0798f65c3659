"""Hosts of a test's own: network namespaces, each with two cables to where the test runs. One is for everything, the other for
Redis alone, and that one can be cut: packets then vanish, and nobody is told.

It takes root on Linux and `ip`; where that can't be had the test is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import pytest

_FIRST: Final = 100
"""Of the addresses 10.213.x.y."""
_NOBODY: Final = "02:00:00:00:00:01"


class Host:
    """address: its own. home: the test's, as seen from there. redis: where it finds Redis. within: what runs a command there."""

    def __init__(self, number: int) -> None:
        self._name = f"gh{os.getpid()}-{number}"
        self._links = (f"gh{os.getpid() % 100_000}m{number}", f"gh{os.getpid() % 100_000}r{number}")
        self._nets = [f"10.213.{_FIRST + 2 * number + which}" for which in (0, 1)]
        self.address = f"{self._nets[0]}.2"
        self.home = f"{self._nets[0]}.1"
        self.redis = f"{self._nets[1]}.1"
        self.within = ("ip", "netns", "exec", self._name)

    def make(self) -> None:
        _ip("netns", "add", self._name)
        _ip("-n", self._name, "link", "set", "lo", "up")
        for link, net in zip(self._links, self._nets, strict=True):
            _ip("link", "add", link, "type", "veth", "peer", "name", f"{link}p", "netns", self._name)
            _ip("address", "add", f"{net}.1/24", "dev", link)
            _ip("link", "set", link, "up")
            _ip("-n", self._name, "address", "add", f"{net}.2/24", "dev", f"{link}p")
            _ip("-n", self._name, "link", "set", f"{link}p", "up")

    def remove(self) -> None:
        for link in self._links:
            subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", self._name], capture_output=True, check=False)

    def cut(self) -> None:
        """Packets between it and Redis go to a network card that nobody has."""
        _ip("-n", self._name, "neigh", "replace", self.redis, "lladdr", _NOBODY, "dev", f"{self._links[1]}p", "nud", "permanent")
        _ip("neigh", "replace", f"{self._nets[1]}.2", "lladdr", _NOBODY, "dev", self._links[1], "nud", "permanent")

    def heal(self) -> None:
        _ip("neigh", "delete", f"{self._nets[1]}.2", "dev", self._links[1])
        _ip("-n", self._name, "neigh", "delete", self.redis, "dev", f"{self._links[1]}p")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many, until the end of the block."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and `ip` (Debian: iproute2)")
    with ExitStack() as stack:
        made = [Host(number) for number in range(count)]
        for host in made:
            stack.callback(host.remove)
            try:
                host.make()
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces can't be made here: {error.stderr.decode().strip()}")
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)
