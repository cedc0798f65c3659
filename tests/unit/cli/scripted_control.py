"""Something that answers like a control, or not at all: a real HTTP server on TCP or on a Unix socket."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Answer(NamedTuple):
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = MappingProxyType({})


Script = Callable[[Asked], Answer]


class ScriptedControl:
    """`asked` is what came; `release` lets go of whoever was left waiting."""

    def __init__(self, script: Script) -> None:
        self.asked: list[Asked] = []
        self.url = ""
        self.script = script
        self.release = threading.Event()


class _Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> Any:
        connection, _ = super().get_request()
        return connection, ("unix", 0)


@contextmanager
def scripted_control(script: Script, path: Path | None = None) -> Iterator[ScriptedControl]:
    """On a free port, or on the Unix socket `path`, of any length."""
    control = ScriptedControl(script)

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            asked = Asked(self.command, self.path, {name.lower(): text for name, text in self.headers.items()}, body)
            control.asked.append(asked)
            answer = control.script(asked)
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, text in {"content-length": str(len(data)), **answer.headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815  http.server's names

        def log_message(self, *_: object) -> None:
            pass

    server: socketserver.BaseServer
    if path is None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        control.url = f"http://127.0.0.1:{server.server_address[1]}"
    else:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        server = _Unix(f"/proc/self/fd/{directory}/{path.name}", Handler)
        os.close(directory)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield control
    finally:
        control.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


def nothing_there(_: Asked) -> Answer:
    return Answer(200, {"object": "list", "data": [], "has_more": False, "next": None})


def problem(status: int, detail: str) -> Answer:
    """As the API says it."""
    return Answer(status, {"type": "about:blank", "status": status, "detail": detail, "error": {"message": detail}})
