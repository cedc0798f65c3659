"""`POST /v1/completions`. Its `prompt` may be a batch: a list of texts or of token lists, each with `n` choices of its own."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from proxy.exchange import Record
from proxy.wire.body import Integer, Reader
from proxy.wire.generation import CACHING, GenerationRequest, choices_of, prepare_generation, write_facts
from proxy.wire.operation import EngineOperation, estimate_output, observe_answer


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: Raw = Raw(b"")
    best_of: Integer | None = None


_read_request = Reader(CompletionRequest)
_list = msgspec.json.Decoder(list[Raw])


def _read(body: bytes, record: Record, content_type: bytes = b"") -> CompletionRequest:
    return _write_facts(_read_request(body), record)


def _write_facts(request: CompletionRequest, record: Record) -> CompletionRequest:
    write_facts(request, record)
    record.choices = choices_of(request) * _prompts(bytes(request.prompt))
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
    prompt=lambda request: (request.prompt,),
    facts=_write_facts,
    prepare=prepare_generation,
    observe=observe_answer,
    estimate=estimate_output,
    generates=True,
    caching=CACHING,
)
