"""7 account: what a request cost. Integers only: pico-units per token, nano-units per row, rounded once, half up."""

from __future__ import annotations

from proxy.exchange import Record
from proxy.snapshot import Model


def price(record: Record, model: Model, currency: str) -> None:
    """Write the cost on the record, at the price of the moment at which it was received. Cached input is part of input and has
    its own price."""
    valid = model.price_at(record.received_unix_ns) if model.later_prices else model
    pico = record.input_tokens * valid.input_pico + record.output_tokens * valid.output_pico
    if record.cached_tokens:
        pico -= record.cached_tokens * (valid.input_pico - valid.cached_input_pico)
    record.cost_nano = (pico + 500) // 1000
    record.currency = currency
