"""The control API in a test's own process: the app as control makes it, over a real database, without the loops that follow it;
and the control process itself.

    with ControlApi(tmp_path, teams={"research": {}}) as api:
        answer = api.get("/teams", key=api.admin)

Whoever may ask has a secret: `admin`, `viewer`, and `manager` and `team_viewer` of the team `a`, which is made with it, as are
the team `b` and its manager; `holder` is the secret of a key of team `a`.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from fastapi import FastAPI
from starlette.testclient import TestClient

from proxy.control.app import create_app
from proxy.control.database import Database
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.issuers import Issuers
from proxy.control.local import Local
from proxy.control.publish import Publisher
from proxy.control.state import State
from proxy.nouns import KeySettings, TeamSettings
from proxy.settings import Settings
from proxy.store import GLASSHOUSE, TEAMS, create_admin_key, create_key, open_database, put

PATIENCE = 30.0
Answer = Any
"""Of the test client, which has no types here."""


def state_of(settings: Settings) -> State:
    """A control process's parts, before its loops have done anything."""
    feed = CatalogueFeed(settings, None)
    inventory = Inventory(settings.bounds, feed.known.declared.held, None, time.time_ns())
    issuers = Issuers(settings.issuers, None)
    publisher = Publisher(settings, inventory, feed, issuers, None)
    return State(settings, Database(settings.database_url), inventory, feed, issuers, publisher)


class ControlApi:
    """`config`: settings. Requests come from 127.0.0.1, or through the Unix socket with `local=True`."""

    def __init__(self, state_dir: Path, **config: Any) -> None:
        self.settings = Settings.of({"state_dir": str(state_dir), "currency": "EUR", "phoenix": {"url": None}, **config})
        self.engine = open_database(self.settings.database_url)
        with self.engine.begin() as connection:
            for team in ("a", "b"):
                if team not in self.settings.teams:
                    put(connection, TEAMS, team, TeamSettings(), GLASSHOUSE)
            known = {"teams": self.settings.teams}
            self.admin, _ = create_admin_key(connection, "root", "admin")
            self.viewer, _ = create_admin_key(connection, "auditor", "viewer")
            self.manager, _ = create_admin_key(connection, "manager-a", "manager", "a", known=known)
            self.team_viewer, _ = create_admin_key(connection, "viewer-a", "viewer", "a", known=known)
            self.other_manager, _ = create_admin_key(connection, "manager-b", "manager", "b", known=known)
            self.holder, self.key = create_key(connection, "holder-a", KeySettings(team="a"), known=known)
        self.state = state_of(self.settings)
        self.app: FastAPI = create_app(self.state)
        self.client = self._client(self.app, ("127.0.0.1", 50000))

    def __enter__(self) -> Self:
        self.client.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.portal.call(self.state.database.close)
        self.client.__exit__(None, None, None)
        self.state.feed.close()
        self.engine.dispose()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str = "",
        local: bool = False,
        address: str = "127.0.0.1",
        headers: Any = None,
        **query: Any,
    ) -> Answer:
        """`local`: through the Unix socket; otherwise it comes from `address`."""
        sent = dict(headers or {})
        if key:
            sent["authorization"] = f"Bearer {key}"
        client = self._client(Local(self.app) if local else self.app, None if local else (address, 50000))
        client.portal = self.client.portal  # one event loop for all
        content: dict[str, Any] = {} if body is None else {"content": body} if isinstance(body, bytes) else {"json": body}
        return client.request(method, path, headers=sent, params=query or None, **content)

    def _client(self, app: Any, address: Any) -> Any:
        return TestClient(app, base_url="http://127.0.0.1:8401", raise_server_exceptions=False, client=address)

    def get(self, path: str, **more: Any) -> Answer:
        return self.ask("GET", path, **more)

    def put(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.ask("PUT", path, body, **more)

    def patch(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.ask("PATCH", path, body, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.ask("POST", path, body, **more)

    def delete(self, path: str, **more: Any) -> Answer:
        return self.ask("DELETE", path, **more)


class ControlProcess:
    """`python -m proxy.control` on a port and a Unix socket of its own, with the database beside it. `admin`: a secret for it.

    with ControlProcess(tmp_path, teams={"research": {}}) as control:
        status, headers, body = control.ask("GET", "/teams", key=control.admin)
    """

    def __init__(self, state_dir: Path, **config: Any) -> None:
        self.settings = Settings.of({"state_dir": str(state_dir), "phoenix": {"url": None}, **config})
        self.log = state_dir / "control.log"
        self._file = state_dir / "settings.json"
        engine = open_database(self.settings.database_url)
        with engine.begin() as connection:
            self.admin, _ = create_admin_key(connection, "root", "admin")
        engine.dispose()

    def __enter__(self) -> Self:
        self.settings.write(self._file)
        with socket.create_server(("127.0.0.1", 0)) as listener, self.log.open("ab") as log:
            self.host, self.port = listener.getsockname()
            fd = listener.fileno()
            command = [sys.executable, "-m", "proxy.control", "--settings", str(self._file), "--fd", str(fd)]
            self.process = subprocess.Popen(command, stderr=log, pass_fds=[fd])
        deadline = time.monotonic() + PATIENCE
        while not self.settings.control_socket_path.exists() or self.ask("GET", "/health")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s in vain for control"
            time.sleep(0.02)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.process.kill()
        self.process.wait()
        if error is not None:
            print(self.log.read_text())

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, *, key: str = "", local: bool = False
    ) -> tuple[int, dict[str, str], Any]:
        """→ status, headers, JSON."""
        data = None if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "host: localhost", "connection: close"]
        head += [f"authorization: Bearer {key}"] if key else []
        head += [] if data is None else ["content-type: application/json", f"content-length: {len(data)}"]
        return self.say("\r\n".join([*head, "", ""]).encode() + (data or b""), local=local)

    def say(self, request: bytes, *, local: bool = False) -> tuple[int, dict[str, str], Any]:
        """The same for the bytes of one request, as they are."""
        with self.connect(local=local) as connection:
            connection.sendall(request)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            content = answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(content or b"null")

    def connect(self, *, local: bool = False) -> socket.socket:
        if not local:
            return socket.create_connection((self.host, self.port), PATIENCE)
        directory = os.open(self.settings.state_path, os.O_PATH)
        try:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE)
            connection.connect(f"/proc/self/fd/{directory}/{self.settings.control_socket_path.name}")
        finally:
            os.close(directory)
        return connection
