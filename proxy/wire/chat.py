"""`POST /v1/chat/completions`."""

from __future__ import annotations

from proxy.exchange import Record
from proxy.wire.body import Request, read_request
from proxy.wire.generation import prepare_generation, write_request
from proxy.wire.operation import Operation, observe_answer


def _read(body: bytes, record: Record) -> Request:
    request = read_request(body)
    write_request(request, record)
    return request


OPERATION = Operation(
    name="chat",
    method=b"POST",
    path=b"/v1/chat/completions",
    read=_read,
    prepare=prepare_generation,
    observe=observe_answer,
)
