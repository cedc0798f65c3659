"""`POST /v1/chat/completions`."""

from __future__ import annotations

from proxy.wire.generation import prepare_generation, read_generation
from proxy.wire.operation import EngineOperation, observe_answer

OPERATION = EngineOperation(
    name="chat",
    method=b"POST",
    path=b"/v1/chat/completions",
    read=read_generation,
    prepare=prepare_generation,
    observe=observe_answer,
)
