"""The official clients read an answer in another form as they read it in the one that it was made in.

A scripted vLLM sends the bytes; a client's own helpers put a stream together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from proxy.cache.entry import Entry, Form
from proxy.cache.forms import as_form
from tests.support.scripted_vllm import ScriptedVLLM
from tests.unit.cache.comparing import anonymous
from tests.unit.cache.test_forms import FULL_MESSAGE, ODD, PAIRS, entries, request_of, whole

HELLO: Any = [{"role": "user", "content": "Hi"}]


def names(operation: str) -> list[str]:
    return [name for name, pair in PAIRS.items() if pair["operation"] == operation and name not in ODD]


def both_forms(name: str, form: Form) -> tuple[Entry, Entry]:
    """(the answer in one piece, the stream made of it)."""
    entry = entries(name)[Form.WHOLE]
    made = as_form(entry, form, request_of(name))
    assert made is not None
    return entry, made


def sent(entry: Entry) -> dict[str, Any]:
    """What has a scripted vLLM send these very bytes; a stream as one chunk (RFC 9112 §7.1)."""
    head, body = entry.head, entry.body
    if not entry.sized:
        head, body = head + b"\r\ntransfer-encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return {"extra_body": {"script": {"raw": (head + b"\r\n\r\n" + body).decode("latin-1"), "raw_closes": False}}}


@pytest.fixture(scope="module")
def client(shared_vllm: ScriptedVLLM) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_vllm.url}/v1", api_key="unused", max_retries=0, timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def other(shared_vllm: ScriptedVLLM) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=shared_vllm.url, api_key="unused", max_retries=0, timeout=30) as made:
        yield made


def known(value: Any) -> Any:
    """Without what is null or empty: a client fills in what an engine doesn't say."""
    if isinstance(value, dict):
        return {name: said for name, each in value.items() if (said := known(each)) not in (None, [], {}) and name != "parsed"}
    if isinstance(value, list):
        return [known(each) for each in value]
    return value


CUT_OFF = [name for name in names("chat") if '"finish_reason":"length"' in PAIRS[name]["forms"]["0"]]
"""Of these OpenAI's helper makes an error."""


@pytest.mark.parametrize("name", [name for name in names("chat") if name not in CUT_OFF])
def test_chat(client: openai.OpenAI, name: str) -> None:
    def put_together(entry: Entry) -> str:
        with client.chat.completions.stream(model="m", messages=HELLO, **sent(entry)) as events:
            return anonymous(known(events.get_final_completion().model_dump(exclude={"metrics"})))

    entry, made = both_forms(name, Form.STREAM_WITH_USAGE)
    assert put_together(made) == put_together(entries(name)[Form.STREAM_WITH_USAGE])
    plain = client.chat.completions.create(model="m", messages=HELLO, **sent(entry))
    back = as_form(made, Form.WHOLE, request_of(name))
    assert back is not None
    assert client.chat.completions.create(model="m", messages=HELLO, **sent(back)) == plain


@pytest.mark.parametrize("name", names("completions"))
def test_completions(client: openai.OpenAI, name: str) -> None:
    entry, stream = both_forms(name, Form.STREAM_WITH_USAGE)
    plain = client.completions.create(model="m", prompt="Hi", **sent(entry))
    chunks = list(client.completions.create(model="m", prompt="Hi", stream=True, **sent(stream)))
    texts = [""] * len(plain.choices)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in plain.choices]
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert known(chunks[-1].usage.model_dump()) == known(plain.usage.model_dump())


@pytest.mark.parametrize("name", names("responses"))
def test_responses(client: openai.OpenAI, name: str) -> None:
    entry, stream = both_forms(name, Form.STREAM)
    plain = client.responses.create(model="m", input="Hi", **sent(entry)).model_dump()
    with client.responses.stream(model="m", input="Hi", **sent(stream)) as events:
        together = events.get_final_response().model_dump()
    for item in together["output"]:
        item.pop("parsed_arguments", None)
        if item["type"] == "reasoning":
            item["status"] = None  # which only a stream tells
    assert known(together) == known(plain)


@pytest.mark.parametrize("name", [*names("messages"), "full"])
def test_messages(other: anthropic.Anthropic, name: str) -> None:
    if name == "full":
        entry = whole("messages", FULL_MESSAGE)
        made = as_form(entry, Form.STREAM, b"{}")
        assert made is not None
    else:
        entry, made = both_forms(name, Form.STREAM)
    asked: Any = {"model": "m", "messages": HELLO, "max_tokens": 9}
    plain = other.messages.create(**asked, **sent(entry)).model_dump()
    with other.messages.stream(**asked, **sent(made)) as events:
        together = events.get_final_message().model_dump()
    assert known(together) == known(plain)
