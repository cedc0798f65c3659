"""`POST /v1/chat/completions`."""

from __future__ import annotations

from msgspec import Raw

from proxy.exchange import Record
from proxy.wire.body import Reader
from proxy.wire.generation import CACHING, GenerationRequest, prepare_generation, write_facts
from proxy.wire.operation import EngineOperation, estimate_output, observe_answer


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Raw = Raw(b"")
    functions: Raw = Raw(b"")


_read_request = Reader(ChatRequest)


def _read(body: bytes, record: Record, content_type: bytes = b"") -> ChatRequest:
    return write_facts(_read_request(body), record)


OPERATION = EngineOperation(
    name="chat",
    method=b"POST",
    path=b"/v1/chat/completions",
    read=_read,
    prompt=lambda request: (request.tools, request.messages),
    facts=write_facts,
    prepare=prepare_generation,
    observe=observe_answer,
    estimate=estimate_output,
    generates=True,
    caching=CACHING,
)
