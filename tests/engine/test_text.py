"""A model that makes sense, from the official client to the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import openai
import pytest

from tests.conftest import Start
from tests.engine.vllm import NAME, PATIENCE, Engine

TALK: Final[Any] = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def straight(smollm2: Engine) -> Iterator[openai.OpenAI]:
    with client(smollm2.url, "unused") as made:
        yield made


def test_an_answer_that_makes_sense(glasshouse: Start, smollm2: Engine, straight: openai.OpenAI) -> None:
    proxy = glasshouse([smollm2.url], {"models": {NAME: {"price": {"input": 1, "output": 2}}}})
    asking: Any = {"model": NAME, "messages": TALK, "max_tokens": 30, "temperature": 0}
    told = straight.chat.completions.create(**asking)
    with client(proxy.url, proxy.key) as ours:
        whole = ours.chat.completions.create(**asking)
        stream = ours.chat.completions.create(**asking, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "Paris" in (told.choices[0].message.content or "")
    assert whole.choices[0].message.content == told.choices[0].message.content == "".join(pieces)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert told.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (told.usage.prompt_tokens, told.usage.completion_tokens)

    length = smollm2.tokenize({"messages": TALK})
    tokens = told.usage.completion_tokens
    assert tokens == smollm2.tokenize({"prompt": whole.choices[0].message.content}) + 1  # and the token that ends it
    for row in proxy.rows(2):
        assert (row["outcome"], row["input_tokens"], row["output_tokens"]) == ("ok", length, tokens)
        assert row["cost_nano"] == length * 1000 + tokens * 2000
        assert row["engine_decode_ms"] > 0
