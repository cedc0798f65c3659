"""What a request will take, guessed before it runs: limits and budgets set so much aside, and the true count replaces it."""

from __future__ import annotations

from proxy.admission.standing import Costs
from proxy.exchange import Record
from proxy.snapshot import Model

BYTES_A_TOKEN = 4
"""Of JSON in most languages, its punctuation and names included; the usual guess."""
INLINE_FILE = b";base64,"
INLINE_FILE_TOKENS = 1000
"""What engines make of a picture is by its size in pixels; by its bytes it would look like a book."""
_SMALL = 4096


def input_tokens(body: bytes, model: Model) -> int:
    """Of a prompt; never more than the model can read."""
    length, files = len(body), 0
    if length > _SMALL and INLINE_FILE in body:
        length, files = _without_files(body)
    tokens = length // BYTES_A_TOKEN + 1 + files * INLINE_FILE_TOKENS
    return min(tokens, model.context_tokens) if model.context_tokens else tokens


def output_tokens(record: Record, model: Model, prompt: int) -> int:
    """Of an answer, all its choices together: as many as the caller allows, else what is assumed for the model."""
    said = record.max_tokens
    most = model.assumed_output_tokens if said is None else max(0, said)
    if model.context_tokens:
        most = min(most, max(0, model.context_tokens - prompt))
    return most * record.choices


def costs_of(prompt: int, answer: int, model: Model, unix_ns: int) -> Costs:
    """At the price of that moment. Cached input may turn out cheaper; nobody knows yet. Nor what it takes of a GPU."""
    valid = model.price_at(unix_ns) if model.later_prices else model
    return ((prompt * valid.input_pico + answer * valid.output_pico + 500) // 1000, prompt + answer, 0)


def _without_files(body: bytes) -> tuple[int, int]:
    """How long the body is but for files written into it, and how many of those there are."""
    length, files, at = len(body), 0, 0
    while (start := body.find(INLINE_FILE, at)) >= 0:
        at = body.find(b'"', start)
        if at < 0:
            break
        length -= at - start
        files += 1
    return length, files
