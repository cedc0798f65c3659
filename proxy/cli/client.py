"""Asking the control API, whichever way there is:

    --url or GLASSHOUSE_URL     over the network, with the admin key in GLASSHOUSE_ADMIN_KEY
    the state directory's       the running control, through its Unix socket: who may open that needs no key
    neither                     nothing runs here: the same API in this process, on the same database

The key is never an option: it would be in the list of processes and in the shell's history. Whatever way is taken, it is the API
that changes something, with its checks and its audit log.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import click
import msgspec

from proxy.cli.config import config_option, running_settings, state_directory
from proxy.cli.report import printable
from proxy.settings import Settings

if TYPE_CHECKING:
    import httpx2

URL_VARIABLE, KEY_VARIABLE = "GLASSHOUSE_URL", "GLASSHOUSE_ADMIN_KEY"
CONNECT_S, ANSWER_S = 5.0, 60.0
PAGE = 500
_exactly = msgspec.json.Encoder(decimal_format="number")
_SUN_PATH = 107
"""Bytes that a Unix socket's address has room for."""

R = TypeVar("R")
Json = Any


class ApiError(click.ClickException):
    """The API said no. `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(printable(text))
        self.status = status


class Api:
    """The control API. Methods return decoded JSON and raise click.ClickException with a text for people."""

    def __init__(self, client: httpx2.Client, where: str) -> None:
        self._client = client
        self.where = where

    def get(self, path: str, **query: object) -> Json:
        return self._ask("GET", path, query)

    def put(self, path: str, body: object, **query: object) -> Json:
        return self._ask("PUT", path, query, body)

    def patch(self, path: str, body: object, **query: object) -> Json:
        return self._ask("PATCH", path, query, body)

    def post(self, path: str, body: object = None, **query: object) -> Json:
        return self._ask("POST", path, query, body)

    def delete(self, path: str, **query: object) -> Json:
        return self._ask("DELETE", path, query)

    def text(self, path: str) -> str:
        """An answer that isn't JSON."""
        return self._answer("GET", path, {}, None).text

    def pages(self, path: str, query: Mapping[str, object], most: int | None = None) -> list[dict[str, Json]]:
        """All of a list, or the first `most` of it, however many answers that takes."""
        found: list[dict[str, Json]] = []
        after = ""
        while True:
            wanted = PAGE if most is None else min(PAGE, most - len(found))
            answer = self.get(path, **{**query, "limit": wanted, "after": after or None})
            if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
                raise click.ClickException(f"{self.where} isn't Glasshouse's control: its answer is no list")
            found += answer["data"]
            after = answer.get("next") or ""
            if not after or (most is not None and len(found) >= most):
                return found

    def _ask(self, method: str, path: str, query: Mapping[str, object], body: object = None) -> Json:
        answer = self._answer(method, path, query, body)
        if not answer.content:
            return None
        try:
            return msgspec.json.decode(answer.content)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise click.ClickException(f"{self.where} isn't Glasshouse's control: its answer is no JSON") from None

    def _answer(self, method: str, path: str, query: Mapping[str, object], body: object) -> httpx2.Response:
        import httpx2

        content = None if body is None else _exactly.encode(body)
        headers = {} if body is None else {"content-type": "application/json"}
        said = {name: _text(value) for name, value in query.items() if value is not None}
        try:
            answer = self._client.request(method, path, params=said, content=content, headers=headers)
        except httpx2.TimeoutException:
            raise click.ClickException(f"{self.where} doesn't answer") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise click.ClickException(f"{self.where} can't be asked: {printable(str(error)) or type(error).__name__}") from None
        if answer.is_success:
            return answer
        raise ApiError(answer.status_code, self._refusal(answer))

    def _refusal(self, answer: httpx2.Response) -> str:
        """In the API's words; where it has none, in ours."""
        if answer.is_redirect:
            return f"{self.where} sends elsewhere ({answer.headers.get('location', '')}); allowed: control's own address"
        said = _said(answer.content)
        if answer.status_code == 401:
            return f"{self.where}: {said.removesuffix('.') or 'not allowed'}; {KEY_VARIABLE} must hold an admin key in use"
        return said or f"{self.where} answered {answer.status_code} {answer.reason_phrase}"


def path_of(noun: str, name: str) -> str:
    """Of the one of this name. Raises click.ClickException: no path leads there."""
    if not name or any(step in ("", ".", "..") for step in name.split("/")):
        raise click.ClickException(f"{noun}: {printable(repr(name))} is no name")
    return f"/{noun}/{quote(name)}"


def url_option(command: Callable[..., R]) -> Callable[..., R]:
    option = click.option(
        "--url", envvar=URL_VARIABLE, metavar="URL", help=f"Of a control elsewhere, with its key in ${KEY_VARIABLE}."
    )
    return option(command)


def api_command(command: Callable[..., R]) -> Callable[..., R]:
    """`--url` and `--config`, handed on as what they lead to: `command(api, ...)`."""

    @functools.wraps(command)
    def run(*arguments: Any, url: str | None, config: Path | None, **options: Any) -> R:
        with connected(url, config) as api:
            return command(api, *arguments, **options)

    return url_option(config_option(run))


@contextmanager
def connected(url: str | None, config: Path | None, answer_s: float = ANSWER_S) -> Iterator[Api]:
    """The API by the first way that there is. Raises click.ClickException: there is none."""
    with _way(url, config, answer_s) as api:
        yield api


@contextmanager
def running(url: str | None, config: Path | None, answer_s: float) -> Iterator[Api | None]:
    """The same, if somebody else is there to answer."""
    if url is None and not _listens(_socket(config)):
        yield None
    else:
        with _way(url, config, answer_s) as api:
            yield api


def _way(url: str | None, config: Path | None, answer_s: float) -> AbstractContextManager[Api]:
    if url is not None:
        return _elsewhere(url, answer_s)
    if _listens(path := _socket(config)):
        return _beside(path, answer_s)
    return _here(running_settings(config))


def _socket(config: Path | None) -> Path:
    return Settings(state_dir=str(state_directory(config))).control_socket_path


@contextmanager
def _elsewhere(url: str, answer_s: float) -> Iterator[Api]:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise click.ClickException(f"{KEY_VARIABLE} is not set: the admin key for {url}")
    if not key.isascii() or not key.isprintable():
        raise click.ClickException(f"{KEY_VARIABLE} holds no admin key: it has characters that none has")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.password is not None:
        raise click.ClickException("--url: not usable as control's address; allowed: http[s]://HOST[:PORT][/PATH]")
    with _client(url, answer_s, headers={"authorization": f"Bearer {key}"}) as client:
        yield Api(client, url)


@contextmanager
def _beside(path: Path, answer_s: float) -> Iterator[Api]:
    import httpx2

    with reachable(path) as short, _client("http://localhost", answer_s, transport=httpx2.HTTPTransport(uds=short)) as client:
        yield Api(client, f"the control on {path}")


@contextmanager
def _here(settings: Settings) -> Iterator[Api]:
    from proxy.cli.local import local_transport  # FastAPI and SQLAlchemy: half a second that the other ways don't take

    with local_transport(settings) as transport, _client("http://localhost", ANSWER_S, transport=transport) as client:
        yield Api(client, f"the catalogue of {settings.state_path}")


def _client(url: str, answer_s: float, **more: Any) -> httpx2.Client:
    import httpx2

    timeout = httpx2.Timeout(answer_s, connect=min(CONNECT_S, answer_s))
    return httpx2.Client(base_url=url, timeout=timeout, follow_redirects=False, **more)


def _listens(path: Path) -> bool:
    with reachable(path) as short, socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(short)
        except OSError:
            return False
    return True


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """An address of the socket that is short enough for the kernel."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield str(path)
        return
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        yield str(path)  # it isn't there either
        return
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _said(body: bytes) -> str:
    """What the answer says, as far as it says it in one of the ways that are usual."""
    try:
        problem = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ""
    match problem:
        case {"detail": str() as detail}:
            return detail
        case {"error": {"message": str() as message}}:
            return message
        case _:
            return ""


def _text(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
