"""`GET /openapi.json`: this API, for programs. It says nothing that the source doesn't, so whoever has a key may read it.

FastAPI knows the paths and their parameters; bodies and answers are msgspec's types, whose schemas are put in here.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.responses import Response

from proxy import __version__
from proxy.control.access import READERS, allow, allowed, is_open
from proxy.control.answers import answer, shown_types
from proxy.control.errors import MEDIA_TYPE

router = APIRouter(tags=["about"])

_REFERENCE = "#/components/schemas/{name}"
_WHO = "Who may: {}."
_METHODS = {"get", "put", "post", "patch", "delete"}


class ErrorFields(msgspec.Struct, kw_only=True):
    """As OpenAI's API has it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problem(msgspec.Struct, kw_only=True):
    """RFC 9457, and OpenAI's `error` beside it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: ErrorFields


@router.get("/openapi.json", response_class=Response, response_model=None, summary="This document")
@allow(*READERS, "holder")
async def openapi(request: Request) -> Response:
    return answer(document(request.app.routes))


def document(routes: list[Any]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    whole = get_openapi(title="Glasshouse control", version=__version__, routes=routes)
    _, schemas = msgspec.json.schema_components([Problem, *shown_types()], ref_template=_REFERENCE)
    whole["components"] = {
        "schemas": {name: _decimals(schema) for name, schema in schemas.items()},
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An admin key (gha-...) or an issuer's token"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same"},
        },
        "responses": {
            "Problem": {
                "description": "It wasn't done, and why",
                "content": {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(name="Problem")}}},
            }
        },
    }
    whole["security"] = [{"bearer": []}, {"header": []}]
    for route in routes:
        if isinstance(route, APIRoute):
            for method in route.methods or ():
                _complete(whole["paths"][route.path_format][method.lower()], route.endpoint)
    return whole


def _complete(operation: dict[str, Any], endpoint: object) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own form of a bad parameter
    problem = {"$ref": "#/components/responses/Problem"}
    responses |= {"4XX": problem, "5XX": problem}
    if is_open(endpoint):
        operation["security"] = []
    else:
        who = _WHO.format(", ".join(sorted(allowed(endpoint))))
        operation["description"] = f"{operation.get('description', '')}\n\n{who}".strip()


def _decimals(schema: Any) -> Any:
    """Exact numbers are written as text; as numbers they are taken too."""
    if isinstance(schema, list):
        return [_decimals(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "decimal":
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"}]}
    return {name: _decimals(each) for name, each in schema.items()}
