"""`POST /rerank`, `/v1/rerank`, `/v2/rerank`: documents by how well they answer a query (Jina's and Cohere's API, as vLLM serves
it). Never streams; only input tokens, of each pair."""

from __future__ import annotations

from proxy.wire.caching import Caching
from proxy.wire.operation import EngineOperation, as_it_came, estimate_input, observe_answer, read_without_stream

OPERATIONS = tuple(
    EngineOperation(
        name="rerank",
        method=b"POST",
        path=path,
        read=read_without_stream,
        prepare=as_it_came,
        observe=observe_answer,
        estimate=estimate_input,
        lists=1,
        caching=Caching(ignored=frozenset(("user", "request_id", "priority")), holds="results"),
    )
    for path in (b"/rerank", b"/v1/rerank", b"/v2/rerank")
)
