"""`POST /score`, `/v1/score`: how alike two texts are (vLLM's API). Never streams; only input tokens, of each pair."""

from __future__ import annotations

from proxy.wire.caching import Caching
from proxy.wire.operation import EngineOperation, as_it_came, estimate_input, observe_answer, read_without_stream

OPERATIONS = tuple(
    EngineOperation(
        name="score",
        method=b"POST",
        path=path,
        read=read_without_stream,
        prepare=as_it_came,
        observe=observe_answer,
        estimate=estimate_input,
        lists=1,
        caching=Caching(ignored=frozenset(("user", "request_id", "priority")), holds="data"),
    )
    for path in (b"/score", b"/v1/score")
)
