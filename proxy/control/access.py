"""Who may do what: every request is stopped here unless its route says that this caller may.

Before any endpoint runs the guard goes through five questions, and the first bad answer is the last:

1. Is it for us? A page in somebody's browser can point a name of its own at 127.0.0.1 and read what is served there (DNS
   rebinding); what it can't do is to send another `Host` than that name. So only loopback names and the host that control listens
   on are answered, and, when it listens on every interface, addresses in numbers, which need no name to be pointed anywhere.
2. Is the path written in the one way that it can be? Nothing is normalised: what isn't rewritten can't be rewritten in two ways.
3. Who is it (`callers.py`)? Nobody gets further without being somebody, also on paths that don't exist.
4. Is there such a route, and such a method?
5. Does the route's endpoint name the caller's standing in its `allow`? One that says nothing is for nobody: who forgets the
   declaration has made a route that is always refused.

What a caller with a team may see of what such a route has is the endpoint's to say (`Caller.sees`). There are no cookies and no
CORS headers: a browser adds nothing by itself that would let a page act for its user.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from types import FunctionType
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.control.errors import respond
from proxy.errors import Forbidden, InvalidRequest, MethodNotAllowed, NotFound, ProxyError

Standing = Literal["admin", "viewer", "manager", "team_viewer", "holder"]
"""What somebody is here. admin: may do everything. viewer: may read everything. manager and team_viewer: the same within their
team. holder: has a key (or a token) for the models; he may know what it was used for."""

ADMIN: tuple[Standing, ...] = ("admin",)
MANAGERS: tuple[Standing, ...] = ("admin", "manager")
OVERSEERS: tuple[Standing, ...] = ("admin", "viewer")
READERS: tuple[Standing, ...] = ("admin", "viewer", "manager", "team_viewer")

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_allowed: dict[Callable[..., Any], frozenset[Standing]] = {}
_open: set[Callable[..., Any]] = set()


def allow(*standings: Standing) -> Callable[[Endpoint], Endpoint]:
    """Declares who may call an endpoint. It stands nearest to the function, under the route."""

    def declare(endpoint: Endpoint) -> Endpoint:
        _allowed[endpoint] = frozenset(standings)
        return endpoint

    return declare


def allow_everybody(endpoint: Endpoint) -> Endpoint:
    """Declares that an endpoint asks nobody who he is."""
    _open.add(endpoint)
    return endpoint


def allowed(endpoint: object) -> frozenset[Standing]:
    """Who may call it: nobody, if that was never declared."""
    return _allowed.get(endpoint, frozenset()) if isinstance(endpoint, FunctionType) else frozenset()


def is_open(endpoint: object) -> bool:
    return isinstance(endpoint, FunctionType) and endpoint in _open


class Caller(NamedTuple):
    """Who asks. `team`: whose things he sees, None: everything. Of holders: `key`, by which the ledger knows what they used (or
    the name of one that the file declares), and of those of a token `user` and `project`."""

    name: str
    standing: Standing
    team: str | None = None
    address: str = ""
    key: str = ""
    user: str | None = None
    project: str | None = None

    @property
    def role(self) -> str:
        """As it is written to the audit log."""
        return "viewer" if self.standing == "team_viewer" else self.standing

    def sees(self, team: str | None) -> bool:
        """Whether what is of `team` (None: of none) is there for him."""
        return self.team is None or self.team == team


# -- 1 is it for us --

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class KnownHosts:
    """Which `Host` is ours."""

    def __init__(self, listen_host: str) -> None:
        self._names = _LOOPBACK | {listen_host.casefold()}
        self._any_address = _is_any(listen_host)

    def check(self, hosts: Sequence[str]) -> None:
        """Raises InvalidRequest for one that is missing, doubled or not ours."""
        if len(hosts) != 1 or not self._is_ours(host_name(hosts[0])):
            raise InvalidRequest("this server isn't called that", code="host_not_allowed")

    def _is_ours(self, name: str) -> bool:
        return name in self._names or (self._any_address and _is_address(name))


_PORT = re.compile(r"(:[0-9]{0,5})?")


def host_name(host: str) -> str:
    """A `Host` header's value without its port and an IPv6 address's brackets, in lower case; "" for what has another form than
    `NAME[:PORT]` (RFC 9110 §7.2)."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        return name.casefold() if bracket and _PORT.fullmatch(port) else ""
    name, colon, port = host.partition(":")
    return name.casefold().removesuffix(".") if _PORT.fullmatch(colon + port) else ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_any(host: str) -> bool:
    return _is_address(host) and ip_address(host).is_unspecified


# -- 2 is the path plain --

_RAW = re.compile(rb"(?:/(?!\.{1,2}(?:/|\Z))(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})+)+|/")
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
_NEVER_ESCAPED = (
    frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/\\") | frozenset(range(32)) | {127}
)


def is_plain(raw_path: bytes, path: str) -> bool:
    """Whether a path says what it says in one way only: no empty, `.` or `..` segments, no parameters (`;`), nothing escaped that
    needn't be or that may not be there (a slash, a control character), and UTF-8 throughout. `path` is what the server made of
    it."""
    if not _RAW.fullmatch(raw_path) or any(int(byte, 16) in _NEVER_ESCAPED for byte in _ESCAPED.findall(raw_path)):
        return False
    try:
        return unquote_to_bytes(raw_path).decode() == path
    except UnicodeDecodeError:
        return False


# -- all of it --

CALLER = "glasshouse.caller"
"""Where in a request's scope its Caller is."""

LOCAL = "glasshouse.local"
"""Set in a request's scope if it came through the Unix socket; see `local.py`."""

Identify = Callable[[Headers, str, bool], Awaitable[Caller]]


class Guard:
    """ASGI middleware: only what is allowed comes through. `identify` says who sent these headers from that address, and through
    the Unix socket or not; it raises ProxyError if it can't."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], listen_host: str, identify: Identify) -> None:
        self._app = app
        self._routes = routes
        self._hosts = KnownHosts(listen_host)
        self._identify = identify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        try:
            await self._admit(scope)
        except ProxyError as error:
            return await respond(error, scope["path"])(scope, receive, send)
        return await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._hosts.check(headers.getlist("host"))
        if not is_plain(scope["raw_path"], scope["path"]):
            raise not_here(scope["path"])
        route, methods = self._find(scope)
        endpoint = getattr(route, "endpoint", None)  # what has none, such as an app that is mounted, is nobody's
        if is_open(endpoint):
            return
        client = scope.get("client")
        caller = scope[CALLER] = await self._identify(headers, client[0] if client else "", LOCAL in scope)
        if route is None:
            raise (
                MethodNotAllowed(f"{scope['method']} isn't possible here", allow=methods) if methods else not_here(scope["path"])
            )
        if caller.standing not in allowed(endpoint):
            raise Forbidden("you may not do this")

    def _find(self, scope: Scope) -> tuple[BaseRoute | None, bytes]:
        """The route that would be taken, or the methods for which there is one."""
        methods: set[str] = set()
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route, b""
            if match is Match.PARTIAL and isinstance(route, Route):
                methods |= route.methods or set()
        return None, ", ".join(sorted(methods)).encode()


def not_here(path: str) -> NotFound:
    return NotFound(f"there is no {path} here", code="not_found")
