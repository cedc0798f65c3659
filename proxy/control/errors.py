"""Errors in OpenAI's shape, like everywhere else, and nothing of our insides in them."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from proxy.errors import ClientFault, InternalError, InvalidRequest, MethodNotAllowed, NotFound, ProxyError


def install(app: FastAPI) -> None:
    """Handlers for what can come out of a route, and for what can't reach one. A bug's stack trace is logged by uvicorn."""
    app.add_exception_handler(ProxyError, _as_is)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _bug)


def _answer(error: ProxyError, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    answer = Response(error.body(), status or error.status, headers, media_type="application/json")
    if error.retry_after_s is not None:
        answer.headers["retry-after"] = str(error.retry_after_s)
    return answer


async def _as_is(_: Request, error: Exception) -> Response:
    assert isinstance(error, ProxyError)  # noqa: S101  (that is what it is registered for)
    return _answer(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == 404:
        return _answer(NotFound(f"there is no {request.url.path} here"))
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "").encode()
        return _answer(MethodNotAllowed(f"{request.method} isn't possible here", allow=allow), headers=error.headers)
    return _answer(ClientFault(str(error.detail)), error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    return _answer(InvalidRequest(str(first["msg"]), param=".".join(str(step) for step in first["loc"][1:]) or None))


async def _bug(_: Request, __: Exception) -> Response:
    return _answer(InternalError("something went wrong here; the log has more"))
