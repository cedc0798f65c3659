"""`POST /v1/completions`. Its `prompt` may be a batch: a list of texts or of token lists, each with `n` choices of its own."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from proxy.exchange import Record
from proxy.wire.body import Request
from proxy.wire.generation import prepare_generation, read_generation
from proxy.wire.operation import EngineOperation, observe_answer

_list = msgspec.json.Decoder(list[Raw])


def _read(body: bytes, record: Record) -> Request:
    request = read_generation(body, record)
    record.choices *= _prompts(bytes(request.prompt))
    return request


def _prompts(prompt: bytes) -> int:
    if not prompt.startswith(b"["):
        return 1
    try:
        items = _list.decode(prompt)
    except msgspec.MsgspecError:
        return 1
    return len(items) if items and bytes(items[0]).startswith((b'"', b"[")) else 1


OPERATION = EngineOperation(
    name="completions",
    method=b"POST",
    path=b"/v1/completions",
    read=_read,
    prepare=prepare_generation,
    observe=observe_answer,
)
