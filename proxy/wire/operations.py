"""The table: path → Operation. To add an endpoint, add a file and a row."""

from __future__ import annotations

from proxy.errors import MethodNotAllowed, NotFound
from proxy.wire import (
    audio,
    chat,
    completions,
    count_tokens,
    embeddings,
    messages,
    models,
    report,
    rerank,
    responses,
    score,
    tokenize,
)
from proxy.wire.operation import Operation

OPERATIONS: tuple[Operation, ...] = (
    chat.OPERATION,
    completions.OPERATION,
    responses.OPERATION,
    messages.OPERATION,
    count_tokens.OPERATION,
    embeddings.OPERATION,
    *rerank.OPERATIONS,
    *score.OPERATIONS,
    *audio.OPERATIONS,
    *tokenize.OPERATIONS,
    models.LIST,
    report.OPERATION,
)

_BY_PATH = {operation.path: operation for operation in OPERATIONS}


def find_operation(method: bytes, target: bytes) -> Operation:
    """The operation that a request line names. Raises NotFound, MethodNotAllowed.

    Only these paths exist: an engine's own (`/metrics`, `/sleep`, `/v1/load_lora_adapter`, ...) can't be reached from here.
    """
    operation = _BY_PATH.get(target)
    if operation is not None and operation.method == method:
        return operation
    path = target.partition(b"?")[0]
    operation = _BY_PATH.get(path)
    if operation is None and path.startswith(models.PREFIX) and len(path) > len(models.PREFIX):
        operation = models.RETRIEVE
    if operation is None:
        shown = path[:200].decode("ascii", "backslashreplace")
        raise NotFound(f"Invalid URL ({method.decode('ascii', 'replace')} {shown}). Paths are those of OpenAI's API, under /v1.")
    if method != operation.method:
        raise MethodNotAllowed(
            f"{method.decode('ascii', 'replace')} isn't allowed here; allowed: {operation.method.decode('ascii')}.",
            allow=b"GET, HEAD" if operation.method == b"GET" else operation.method,
        )
    return operation
