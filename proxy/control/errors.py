"""Errors, for programs of two kinds at once: a problem (RFC 9457) that also holds OpenAI's `error`. Nothing of our insides is in
them.

ProxyError
└── ClientFault
    └── Conflict               409  what is there doesn't allow it
        ├── DeclaredInFile         the file's, so the file has to be changed
        └── KeyReused          422  an Idempotency-Key that was used for something else
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from proxy.errors import ClientFault, InternalError, InvalidRequest, NotFound, NotReady, ProxyError
from proxy.store import BadCursor, InUse, NameTaken, NoSuch, NotAllowed, Repeated, StoreError, UnusableName, WeakSecret

MEDIA_TYPE = "application/problem+json"


class Conflict(ClientFault):
    status = 409
    code = "conflict"


class DeclaredInFile(Conflict):
    code = "declared_in_file"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is declared in the configuration file, and changed there")


class KeyReused(ClientFault):
    status = 422
    code = "idempotency_key_reused"


def database_unavailable() -> NotReady:
    return NotReady("the database can't be asked just now", code="database_unavailable")


def respond(error: ProxyError, path: str, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request for `path` that failed."""
    status = status or error.status
    fields = {"type": error.type, "message": error.message, "param": error.param, "code": error.error_code}
    problem: dict[str, Any] = {
        "type": f"urn:glasshouse:problem:{error.error_code or error.type}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.message,
        "instance": path,
        "error": fields,
    }
    answer = Response(json.dumps(problem), status, dict(headers or {}), media_type=MEDIA_TYPE)
    answer.headers.update(ALWAYS)
    for line in error.lines.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(": ")
        answer.headers[name] = value
    if error.retry_after_s is not None:
        answer.headers["retry-after"] = str(error.retry_after_s)
    if status == 401:
        answer.headers["www-authenticate"] = "Bearer"
    return answer


ALWAYS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""What every answer has: it may hold a secret, and it is never a page."""


def install(app: FastAPI) -> None:
    """Handlers for what can come out of a route. A bug's stack trace is logged by uvicorn."""
    app.add_exception_handler(ProxyError, _as_is)
    app.add_exception_handler(StoreError, _store)
    for kind in (OperationalError, InterfaceError, PoolTimeoutError, TimeoutError, OSError):
        app.add_exception_handler(kind, _unavailable)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _bug)


def of_store(error: StoreError) -> ProxyError:
    """The same, as an answer."""
    text = str(error)
    match error:
        case NoSuch():
            return NotFound(text, code="not_found")
        case NameTaken():
            return Conflict(text, code="name_taken")
        case InUse():
            return Conflict(text, code="in_use")
        case Repeated():
            return KeyReused(text)
        case UnusableName():
            return InvalidRequest(text, param="name", code="unusable_name")
        case WeakSecret():
            return InvalidRequest(text, code="weak_secret")
        case BadCursor():
            return InvalidRequest(text, param="after")
        case NotAllowed():
            return InvalidRequest(text)
    return database_unavailable()


async def _as_is(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProxyError)  # noqa: S101  (registered for it)
    return respond(error, request.scope["path"])


async def _store(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)  # noqa: S101  (registered for it)
    return respond(of_store(error), request.scope["path"])


async def _unavailable(request: Request, _: Exception) -> Response:
    return respond(database_unavailable(), request.scope["path"])


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  (registered for it)
    return respond(ClientFault(str(error.detail)), request.scope["path"], error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  (registered for it)
    first = error.errors()[0]
    name = ".".join(str(step) for step in first["loc"][1:]) or None
    return respond(InvalidRequest(f"{name}: {first['msg']}", param=name), request.scope["path"])


async def _bug(request: Request, __: Exception) -> Response:
    return respond(InternalError("something went wrong here; the log has more"), request.scope["path"])
