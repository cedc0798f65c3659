"""`POST /v1/embeddings`. Never streams; only input tokens."""

from __future__ import annotations

from proxy.exchange import Record
from proxy.wire.body import Request, read_request
from proxy.wire.operation import MAX_TEXT, EngineOperation, Upstream, observe_answer
from proxy.wire.stream import Terms

_TERMS = Terms()


def _read(body: bytes, record: Record) -> Request:
    request = read_request(body)
    request.stream = False
    record.model = request.model[:MAX_TEXT]
    record.user = (request.user or "")[:MAX_TEXT]
    return request


def _prepare(body: bytes, request: Request, kind: str) -> Upstream:
    return body, _TERMS


OPERATION = EngineOperation(
    name="embeddings",
    method=b"POST",
    path=b"/v1/embeddings",
    read=_read,
    prepare=_prepare,
    observe=observe_answer,
    generates=False,
)
