"""Where an issuer answers: an HTTP server that says what a test puts there.

with IssuerHost() as host:
    host.pages["/jwks"] = Page(b'{"keys":[]}')
"""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


class Page(NamedTuple):
    """`hangs`: it sends the head and the first half of the body, and then nothing until the host is closed."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012  (nobody changes it)
    hangs: bool = False


class IssuerHost:
    """`pages` by path; `asked` are the paths that somebody has asked for, in order."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[str] = []
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", port), self._handler())
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http{'' if tls is None else 's'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def discoverable(self, keys: bytes, **headers: str) -> None:
        """As OpenID Connect has it."""
        document = b'{"issuer":"%b","jwks_uri":"%b/keys"}' % (self.url.encode(), self.url.encode())
        self.pages["/.well-known/openid-configuration"] = Page(document)
        self.pages["/keys"] = Page(keys, headers=headers)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                page = host.pages.get(self.path, Page(b"no such page", 404))
                self.send_response(page.status)
                for name, value in {"content-length": str(len(page.body)), **page.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if page.hangs:
                    self.wfile.write(page.body[: len(page.body) // 2])
                    self.wfile.flush()
                    host._closing.wait(60)
                else:
                    self.wfile.write(page.body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return Handler

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves, or doesn't trust the certificate, is no error of the test."""
