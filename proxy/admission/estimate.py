"""What a request will take, guessed before it runs: limits and budgets set so much aside, and the true count replaces it."""

from __future__ import annotations

from proxy.admission.standing import Costs
from proxy.exchange import Record
from proxy.snapshot import Model
from proxy.wire.prompt import prompt_tokens


def input_tokens(body: bytes, model: Model) -> int:
    """Of a prompt; never more than the model can read."""
    tokens = prompt_tokens(body)
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
