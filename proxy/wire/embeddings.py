"""`POST /v1/embeddings`. Never streams; only input tokens."""

from __future__ import annotations

from proxy.exchange import Record
from proxy.wire.body import Reader, Request
from proxy.wire.caching import Caching
from proxy.wire.operation import MAX_TEXT, EngineOperation, as_it_came, estimate_input, observe_answer


class EmbeddingRequest(Request, kw_only=True):
    user: str | None = None


_read_request = Reader(EmbeddingRequest)


def _read(body: bytes, record: Record, content_type: bytes = b"") -> EmbeddingRequest:
    request = _read_request(body)
    request.stream = False
    record.model = (request.model or "")[:MAX_TEXT]
    record.user = (request.user or "")[:MAX_TEXT]
    return request


OPERATION = EngineOperation(
    name="embeddings",
    method=b"POST",
    path=b"/v1/embeddings",
    read=_read,
    prepare=as_it_came,
    observe=observe_answer,
    estimate=estimate_input,
    caching=Caching(ignored=frozenset(("user", "request_id", "priority")), holds="data"),
)
