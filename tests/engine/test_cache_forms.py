"""What the cache makes of a real vLLM's answer in one form is what this vLLM says in the other: the same requests in every form.

The engine has parsers for tools and reasoning. Its weights are random, so what it is to say is demanded by a regular expression.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
import pytest

from proxy.cache.entry import Entry, Form
from proxy.cache.forms import as_form, split
from tests.engine.vllm import PATIENCE, TINY, Engine, Engines, Kind
from tests.support.wire_client import WireClient
from tests.unit.cache.comparing import entry_of, told, without_metrics
from tests.unit.cache.test_forms import ODD, PAIRS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PARSING: Final = Kind(
    TINY.model,
    TINY.threads,
    (
        *TINY.arguments,
        *("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3"),
        "--structured-outputs-config.enable_in_reasoning=true",
    ),
)
PATHS: Final = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
ASKED: Final[dict[Form, dict[str, Any]]] = {
    Form.WHOLE: {},
    Form.STREAM: {"stream": True},
    Form.STREAM_WITH_USAGE: {"stream": True, "stream_options": {"include_usage": True}},
    Form.STREAM_WITH_USAGES: {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}
ALIKE: Final[dict[str, dict[str, Any]]] = {
    "chat_choices": {"allowed_token_ids": [504], "logprobs": False},
    "completions_batch": {"allowed_token_ids": [504], "logprobs": None},
}
"""Several choices are drawn by chance, and how likely a token was depends on what is computed beside it."""
SINGLE: Final = frozenset(("connection", "date", "content-length", "transfer-encoding"))


@pytest.fixture(scope="module")
def engine(engines: Engines) -> Engine:
    return engines.get("parsing", PARSING)


def ask(engine: Engine, operation: str, body: dict[str, Any], form: Form) -> Entry:
    with WireClient(engine.url, timeout=PATIENCE) as client:
        reply = client.ask(PATHS[operation], body | ASKED[form])
    assert reply.status == 200, reply.body
    lines = [f"{name}: {value}" for name, value in reply.headers if name not in SINGLE]
    return entry_of(operation, form, "\r\n".join(["HTTP/1.1 200 OK", *lines]).encode(), reply.body)


def ask_all(engine: Engine, operation: str, body: dict[str, Any]) -> dict[Form, Entry]:
    forms = list(Form) if operation in ("chat", "completions") else [Form.WHOLE, Form.STREAM]
    ask(engine, operation, body, Form.WHOLE)  # from here on its prompt is in the prefix cache, and every answer says so
    found = {form: ask(engine, operation, body, form) for form in forms}
    if Form.STREAM_WITH_USAGE in found:
        totals = json.loads(split(found[Form.STREAM_WITH_USAGE].body)[-2].removeprefix(b"data: "))
        found[Form.STREAM] = msgspec.structs.replace(found[Form.STREAM], usage=json.dumps(totals["usage"]).encode())
    return found


def head(entry: Entry) -> list[bytes]:
    return [line for line in entry.head.split(b"\r\n") if not line.startswith(b"content-length")]


@pytest.mark.parametrize("name", PAIRS)
def test_an_answer_in_another_form_is_the_engine_s(engine: Engine, name: str) -> None:
    operation, request = PAIRS[name]["operation"], PAIRS[name]["request"] | ALIKE.get(name, {})
    found = ask_all(engine, operation, request)
    for old, entry in found.items():
        for new, expected in found.items():
            made = as_form(entry, new, json.dumps(request).encode())
            if old == new:
                assert made is entry
            elif new == Form.STREAM_WITH_USAGES or (name in ODD and Form.WHOLE in (old, new)):
                assert made is None
            else:
                assert made is not None
                known = without_metrics(expected) if old == Form.STREAM and operation in ("chat", "completions") else expected
                assert (told(made), head(made)) == (told(known), head(known))
