"""`POST /tokenize` and `/detokenize` (vLLM's API): text to tokens and back. Nothing is generated, so nothing is booked."""

from __future__ import annotations

from proxy.wire.caching import Caching
from proxy.wire.operation import EngineOperation, as_it_came, nothing_to_estimate, nothing_to_observe, read_without_stream

OPERATIONS = tuple(
    EngineOperation(
        name=path[1:].decode(),
        method=b"POST",
        path=path,
        read=read_without_stream,
        prepare=as_it_came,
        observe=nothing_to_observe,
        estimate=nothing_to_estimate,
        counted=False,
        caching=Caching(holds=holds),
    )
    for path, holds in ((b"/tokenize", "tokens"), (b"/detokenize", "prompt"))
)
