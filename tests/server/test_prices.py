"""Prices from end to end: what a model is said to cost is what its requests are charged, wherever one looks."""

from __future__ import annotations

import json

from proxy.pricelist import pricelist
from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import ask

PATH = "/v1/chat/completions"
SOLD, OWN, FREE = "gpt-4o-mini", "qwen3-8b", "gpt-4o"


def test_a_model_with_a_price_from_the_price_list() -> None:
    """And beside it, on the same engine, a price of one's own, and a model that only has a cloud's name."""
    row = pricelist().rows[SOLD]
    assert row.cached_input is not None
    assert FREE in pricelist().rows
    own = {"input": "0.1", "cached_input": "0.02", "output": "0.4"}
    models = {SOLD: {"price": {"from": SOLD}}, OWN: {"price": own}}
    with ScriptedVLLM(models=[SOLD, OWN, FREE]) as vllm, Glasshouse([vllm.url], {"models": models}) as glasshouse:
        for model in (SOLD, OWN, FREE):
            body = {"model": model, "messages": [{"role": "user", "content": "Say something."}]}
            answer = ask(glasshouse.url, PATH, {**body, "script": {"tokens": 7, "cached_tokens": 16}}, key=glasshouse.key)
            assert answer.status == 200
        rows = {each["model"]: each for each in glasshouse.rows(3)}
        listed = json.loads(glasshouse.command("models", "list", "--json").stdout)
        prices = {each["id"]: each["price"] for each in listed}
        glasshouse.wait_metric("glasshouse_requests_total", 3)
        metrics = glasshouse.metrics()

    tokens, cached, output = (rows[SOLD][name] for name in ("input_tokens", "cached_tokens", "output_tokens"))
    assert (cached, output) == (16, 7)
    assert tokens > cached
    dollars = ((tokens - cached) * row.input + cached * row.cached_input + output * row.output) / 10**6
    assert rows[SOLD]["cost_nano"] == dollars * 10**9 > 0
    assert rows[OWN]["cost_nano"] == (tokens - cached) * 100 + cached * 20 + output * 400
    assert rows[FREE]["cost_nano"] == 0
    for model in (SOLD, OWN, FREE):
        assert round(metrics.total("glasshouse_cost_total", model=model) * 10**9) == rows[model]["cost_nano"]
    assert {model: (price["source"], price["row"]) for model, price in prices.items()} == {
        SOLD: ("table", SOLD),
        OWN: ("configured", None),
        FREE: ("none", None),
    }
