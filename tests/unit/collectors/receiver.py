"""A small Phoenix: takes OTLP traces over HTTP, and has a price table. What it answers can be set."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver:
    """`status`: what /v1/traces answers. `hold`: it answers only once that is set."""

    def __init__(self) -> None:
        self.status = 200
        self.content_type = "application/x-protobuf"
        self.body = b""
        """The body of an answer to spans."""
        self.graphql_status = 200
        self.graphql_body: bytes | None = None
        """Instead of an answer."""
        self.refuse: set[str] = set()
        """Trace ids (hex) for which the whole request gets 400."""
        self.delay = 0.0
        """Seconds that each answer to spans takes."""
        self.hold = threading.Event()
        self.hold.set()
        self.posts: list[tuple[str, dict[str, str], int]] = []
        """(path, headers in lower case, spans)"""
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.prices: list[dict[str, Any]] = []
        self.mutations = 0
        self.changed = threading.Condition()
        self._connections: list[socket.socket] = []
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Receiver:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                headers = {name.lower(): value for name, value in self.headers.items()}
                kind, status, answer = receiver._answer(self.path, headers, body)
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(self, request: Any, client_address: Any) -> None:
                receiver._connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that left is no news."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self.hold.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()
            self._server = None

    def _answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[str, int, bytes]:
        if path.endswith("/graphql"):
            return "application/json", self.graphql_status, self._graphql(json.loads(body), headers)
        request = ExportTraceServiceRequest.FromString(body)
        spans = [span for of in request.resource_spans for scope in of.scope_spans for span in scope.spans]
        with self.changed:
            self.posts.append((path, headers, len(spans)))
            self.changed.notify_all()
        self.hold.wait()
        time.sleep(self.delay)
        if any(span.trace_id.hex() in self.refuse for span in spans):
            return "text/plain", 400, b"no"
        if self.status == 200:
            with self.changed:
                self.spans += spans
                for of in request.resource_spans:
                    self.resources.append({each.key: each.value.string_value for each in of.resource.attributes})
                self.changed.notify_all()
        return self.content_type, self.status, self.body

    def _graphql(self, request: dict[str, Any], headers: dict[str, str]) -> bytes:
        with self.changed:
            self.posts.append(("/graphql", headers, 0))
            self.changed.notify_all()
        if self.graphql_body is not None:
            return self.graphql_body
        query, variables = request["query"], request["variables"]
        if "createModel" in query or "updateModel" in query:
            self.mutations += 1
            given = dict(variables["input"])
            if "updateModel" in query:
                self.prices = [price for price in self.prices if price["id"] != given["id"]]
            self.prices.append({"id": f"id-{self.mutations}", **given})
            return json.dumps({"data": {"createModel": {"model": {"id": "x"}}, "updateModel": {"model": {"id": "x"}}}}).encode()
        if "deleteModel" in query:
            self.mutations += 1
            self.prices = [price for price in self.prices if price["id"] != variables["input"]["id"]]
            return json.dumps({"data": {"deleteModel": {"model": {"id": "x"}}}}).encode()
        at = int(variables["after"] or 0)
        own = [self._node(price) for price in self.prices]
        built_in: dict[str, Any] = {
            "id": "b",
            "name": "gpt",
            "kind": "BUILT_IN",
            "namePattern": "x",
            "provider": None,
            "startTime": None,
            "tokenPrices": [],
        }
        edges = [{"node": node} for node in [*own, built_in][at : at + 2]]
        page = {"hasNextPage": at + 2 < len(own) + 1, "endCursor": str(at + 2)}
        return json.dumps({"data": {"generativeModels": {"pageInfo": page, "edges": edges}}}).encode()

    @staticmethod
    def _node(price: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": price["id"],
            "name": price["name"],
            "kind": "CUSTOM",
            "namePattern": price["namePattern"],
            "provider": None,
            "startTime": price["startTime"],
            "tokenPrices": price["costs"],
        }

    def wait(self, spans: int = 0, posts: int = 0, timeout: float = 20.0) -> None:
        """Until so many spans were taken and so many requests came."""
        with self.changed:
            arrived = self.changed.wait_for(lambda: len(self.spans) >= spans and len(self.posts) >= posts, timeout)
        assert arrived, f"{len(self.spans)} spans in {len(self.posts)} requests"

    def traces(self) -> list[str]:
        """The root spans' traces, in the order of their arrival."""
        return [span.trace_id.hex() for span in self.spans if not span.parent_span_id]


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver().start()
    try:
        yield receiver
    finally:
        receiver.stop()
