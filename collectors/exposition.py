"""`/metrics` over HTTP, in Prometheus' text format or OpenMetrics, whichever the scraper prefers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

from proxy.settings import address

StartResponse = Callable[..., Any]


class Exposition:
    """A server in threads of its own."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Raises OSError if the address can't be had."""
        host, port = address(listen)
        server: type[WSGIServer] = _Server6 if ":" in host else ThreadingWSGIServer
        self._server = make_server(host, port, _only_metrics(registry), server, handler_class=_Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics server", daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: a scrape is not news."""


def _only_metrics(registry: CollectorRegistry) -> Callable[[dict[str, Any], StartResponse], Iterable[bytes]]:
    metrics: Callable[[dict[str, Any], StartResponse], Iterable[bytes]] = make_wsgi_app(registry)

    def serve(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") == "/metrics":
            return metrics(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"There is only /metrics here.\n"]

    return serve
