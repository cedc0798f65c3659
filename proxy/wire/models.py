"""`GET /v1/models` and `GET /v1/models/{id}`: answered from the snapshot, with the engines' own entries."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from proxy.errors import InvalidRequest, NotFound
from proxy.wire.operation import Operation

PREFIX = b"/v1/models/"

LIST = Operation(name="models", method=b"GET", path=b"/v1/models")
RETRIEVE = Operation(name="model", method=b"GET", path=PREFIX)


def model_name(target: bytes) -> str:
    """The model that `/v1/models/{id}` names; ids may hold slashes and escapes (`Qwen/Qwen3-8B`)."""
    return unquote_to_bytes(target.partition(b"?")[0][len(PREFIX) :]).decode("utf-8", "replace")


def unknown_model(name: str) -> NotFound:
    """OpenAI's answer to a model that isn't there."""
    return NotFound(f"The model `{name[:256]}` does not exist.", param="model", code="model_not_found")


def unnamed_model() -> InvalidRequest:
    """A request without a model, where there are several to choose from, or none."""
    return InvalidRequest("You must name a model: `model` must be a string.", param="model")
