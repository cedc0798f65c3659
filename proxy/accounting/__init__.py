"""7 account: what a request cost. Integers only: pico-units per token, nano-units per row, rounded once, half up."""

from __future__ import annotations

from proxy.exchange import Record
from proxy.snapshot import Model


def price(record: Record, model: Model, currency: str) -> None:
    """Write the cost on the record, at the price of the moment at which it was received."""
    tokens = record.input_tokens, record.cached_tokens, record.output_tokens
    record.cost_nano = cost_of(model, record.received_unix_ns, *tokens)
    record.currency = currency


def cost_of(model: Model, unix_ns: int, input_tokens: int, cached_tokens: int, output_tokens: int) -> int:
    """Nano-units, at the price of that moment. Cached input is part of input and has its own price."""
    valid = model.price_at(unix_ns) if model.later_prices else model
    pico = input_tokens * valid.input_pico + output_tokens * valid.output_pico
    if cached_tokens:
        pico -= cached_tokens * (valid.input_pico - valid.cached_input_pico)
    return (pico + 500) // 1000
