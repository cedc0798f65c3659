"""Whom control answers: requests that name it by an address it really has.

A page in somebody's browser can point a name of its own at 127.0.0.1 and read what is served there (DNS rebinding); what it
can't do is to send another `Host` than that name. So only loopback names and the host that control listens on are answered,
and, when it listens on every interface, addresses in numbers, which need no name to be pointed anywhere.
"""

from __future__ import annotations

from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.errors import InvalidRequest

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class KnownHosts:
    """ASGI middleware: 400 for a request whose `Host` is missing, doubled or not ours."""

    def __init__(self, app: ASGIApp, listen_host: str) -> None:
        self._app = app
        self._names = _LOOPBACK | {listen_host.casefold()}
        self._any_address = _is_any(listen_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_ours(Headers(scope=scope).getlist("host")):
            error = InvalidRequest("this server isn't called that", code="host_not_allowed")
            await Response(error.body(), error.status, media_type="application/json")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        name = host_name(hosts[0])
        return name in self._names or (self._any_address and _is_address(name))


def host_name(host: str) -> str:
    """A `Host` header's value without its port and an IPv6 address's brackets, in lower case."""
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name.casefold() if not rest or rest.startswith(":") else host
    return host.partition(":")[0].casefold().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_any(host: str) -> bool:
    return _is_address(host) and ip_address(host).is_unspecified
