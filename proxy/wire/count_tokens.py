"""`POST /v1/messages/count_tokens`: how long a prompt is. Nothing is generated, so nothing is booked."""

from __future__ import annotations

from proxy.wire.caching import Caching
from proxy.wire.messages import error_body
from proxy.wire.operation import EngineOperation, as_it_came, nothing_to_estimate, nothing_to_observe, read_without_stream

OPERATION = EngineOperation(
    name="count_tokens",
    method=b"POST",
    path=b"/v1/messages/count_tokens",
    read=read_without_stream,
    prepare=as_it_came,
    observe=nothing_to_observe,
    estimate=nothing_to_estimate,
    counted=False,
    error=error_body,
    caching=Caching(holds="input_tokens"),
)
