"""What is measured side by side: the upstream itself, nginx, Glasshouse, and any other gateway that a command starts.

A target is started in front of one upstream and says which processes do its work, by role. The role "worker" is what is
compared; the others are printed beside it.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from proxy.settings import JournalSettings
from tests.bench.processes import children, free_port, wait_for_port
from tests.support import glasshouse

_NGINX_CONFIGURATION: Final = """\
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log crit;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    upstream backend {{
        server {upstream};
        keepalive 512;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class Target(Protocol):
    name: str
    url: str
    key: str | None

    def start(self, upstream: str) -> None: ...

    def pids(self) -> dict[str, list[int]]: ...

    def stop(self) -> None: ...


class Direct:
    """Nothing between: what the load generator and the upstream can do alone."""

    name = "direct"
    key: str | None = None

    def __init__(self) -> None:
        self.url = ""

    def start(self, upstream: str) -> None:
        self.url = upstream

    def pids(self) -> dict[str, list[int]]:
        return {}

    def stop(self) -> None:
        pass


class Nginx:
    """The bar: a proxy in C that knows nothing about what it carries."""

    name = "nginx"
    key: str | None = None

    def __init__(self) -> None:
        self.url = ""
        self._folder = tempfile.TemporaryDirectory(prefix="bench-nginx-")
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def installed() -> bool:
        return shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") is not None

    def start(self, upstream: str) -> None:
        port, folder = free_port(), Path(self._folder.name)
        configuration = folder / "nginx.conf"
        address = urlsplit(upstream).netloc
        configuration.write_text(_NGINX_CONFIGURATION.format(folder=folder, upstream=address, port=port))
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") or "nginx"
        self._process = subprocess.Popen([program, "-c", str(configuration), "-e", str(folder / "error.log")])
        wait_for_port(port, self._process)
        self.url = f"http://127.0.0.1:{port}"

    def pids(self) -> dict[str, list[int]]:
        assert self._process is not None
        return {"worker": children(self._process.pid), "master": [self._process.pid]}

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._folder.cleanup()


class Glasshouse:
    """The proxy of this repository, as `glasshouse up` runs it. `config`: more of its settings."""

    name = "glasshouse"

    def __init__(self, name: str = name, config: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.url = ""
        self._config = config or {}
        self.key: str | None = None
        self._proxy: glasshouse.Glasshouse | None = None

    def start(self, upstream: str) -> None:
        # The product's own segment size: the tests' small one would have the worker change files all the time.
        journal = {"segment_bytes": JournalSettings().segment_bytes}
        self._proxy = glasshouse.Glasshouse([upstream], {"journal": journal, **self._config}).start()
        self.url, self.key = self._proxy.url, self._proxy.key

    def pids(self) -> dict[str, list[int]]:
        assert self._proxy is not None
        return self._proxy.pids()

    def recorded(self, expected: int, seconds: float = 60.0) -> int:
        """How many requests the ledger has, as soon as it has as many as expected or time is up."""
        return self._count("SELECT COUNT(*) FROM requests", expected, seconds)

    def given_again(self, expected: int, seconds: float = 60.0) -> int:
        """How many of them were hits, likewise."""
        return self._count("SELECT COUNT(*) FROM requests WHERE cache = 'hit'", expected, seconds)

    def _count(self, query: str, expected: int, seconds: float) -> int:
        assert self._proxy is not None
        path = self._proxy.settings.database_url.removeprefix("sqlite:///")
        deadline = time.monotonic() + seconds
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=seconds)) as database:
            while True:
                [count] = database.execute(query).fetchone()
                if count >= expected or time.monotonic() > deadline:
                    return int(count)
                time.sleep(0.1)

    def stop(self) -> None:
        if self._proxy is not None:
            self._proxy.stop()


class Command:
    """Any other gateway: a command line with {port}, {upstream_port} and {folder} in it."""

    def __init__(self, name: str, command: str, key: str | None) -> None:
        self.name = name
        self.key = key
        self.url = ""
        self._command = command
        self._folder = tempfile.TemporaryDirectory(prefix="bench-command-")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, upstream: str) -> None:
        port = free_port()
        words = [
            word.format(port=port, upstream_port=urlsplit(upstream).port, folder=self._folder.name)
            for word in shlex.split(self._command)
        ]
        self._process = subprocess.Popen(words)
        wait_for_port(port, self._process)
        self.url = f"http://127.0.0.1:{port}"

    def pids(self) -> dict[str, list[int]]:
        assert self._process is not None
        return {"worker": [self._process.pid, *children(self._process.pid)]}

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._folder.cleanup()
