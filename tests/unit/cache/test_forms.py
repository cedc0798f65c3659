"""An answer given in another form than it was made in: what a vLLM itself says in that form.

`test_forms_pairs.json` has what a vLLM 0.32.0 answered to the same requests in each form: a tiny model of random weights with
Hermes' tool parser and Qwen's for reasoning, whose text a regular expression demanded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from proxy.cache.entry import Entry, Form
from proxy.cache.forms import as_form, split
from tests.support.scripted_vllm import captured
from tests.unit.cache.comparing import entry_of, head_of, told, without_metrics

PAIRS: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("test_forms_pairs.json").read_bytes())
ODD: Final = (
    *("chat_call_cut", "chat_call_stopped", "chat_required", "chat_named"),  # calls that were cut off
    *("completions_echo", "responses_logprobs", "responses_call_cut", "messages_tool_cut"),
)
"""Of these neither form can be made of the other."""
WHOLE, STREAM, WITH_USAGE, WITH_USAGES = Form
CHUNKED: Final = ("chat", "completions")


def entries(name: str) -> dict[Form, Entry]:
    pair = PAIRS[name]
    found = {}
    for number, text in pair["forms"].items():
        form, body = Form(int(number)), text.encode()
        found[form] = entry_of(pair["operation"], form, head_of(form, len(body)), body)
    if STREAM in found and WITH_USAGE in found:
        totals = json.loads(split(found[WITH_USAGE].body)[-2].removeprefix(b"data: "))
        found[STREAM] = msgspec.structs.replace(found[STREAM], usage=json.dumps(totals["usage"]).encode())
    return found


def request_of(name: str) -> bytes:
    return json.dumps(PAIRS[name]["request"]).encode()


def conversions() -> Iterator[Any]:
    for name, pair in PAIRS.items():
        forms = [Form(int(number)) for number in pair["forms"]]
        for old in forms:
            for new in forms:
                if old != new and new != WITH_USAGES and not (name in ODD and WHOLE in (old, new)):
                    yield pytest.param(name, old, new, id=f"{name}-{old.name}-{new.name}")


@pytest.mark.parametrize(("name", "old", "new"), list(conversions()))
def test_it_is_what_a_vllm_says_in_that_form(name: str, old: Form, new: Form) -> None:
    found = entries(name)
    made = as_form(found[old], new, request_of(name))
    assert made is not None
    expected = found[new]
    if old == STREAM and PAIRS[name]["operation"] in CHUNKED:
        expected = without_metrics(expected)  # these come with the usage, of which such an entry has only the counts
    assert told(made) == told(expected)
    assert made.head == head_of(new, len(made.body))
    assert (made.form, made.sized, made.streaming) == (new, new == WHOLE, new != WHOLE)


@pytest.mark.parametrize("name", ODD)
def test_what_the_forms_tell_differently_stays_as_it_is(name: str) -> None:
    for old, entry in entries(name).items():
        for new in Form:
            if old != new and WHOLE in (old, new):
                assert as_form(entry, new, request_of(name)) is None


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ODD])
def test_there_and_back_it_is_the_same_to_the_byte(name: str) -> None:
    found = entries(name)
    stream = WITH_USAGE if WITH_USAGE in found else STREAM
    made = as_form(found[WHOLE], stream, request_of(name))
    assert made is not None
    back = as_form(made, WHOLE, request_of(name))
    assert back is not None
    assert json.loads(back.body) == json.loads(found[WHOLE].body)
    assert list(json.loads(back.body)) == list(json.loads(found[WHOLE].body))


# -- answers with everything in them --

USAGE: Final = {
    "prompt_tokens": 9,
    "total_tokens": 16,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4, "created_cache_tokens": 5, "multimodal_tokens": {"image": 3}},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
METRICS: Final = {
    "time_to_first_token_ms": 29.76557000010871,
    "generation_time_ms": 123.0,
    "queue_time_ms": 0.5,
    "mean_itl_ms": 30.5,
    "tokens_per_second": 32.5,
    "speculative_decoding": {
        "mean_acceptance_length": 1.5,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": [1, 2],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 2,
        "num_draft_tokens": 4,
        "num_spec_tokens": 1,
        "per_step_accepted": [1, 0],
        "per_step_drafted": [2, 2],
    },
}


def token(text: str) -> dict[str, Any]:
    top = {"token": text, "logprob": -1.8095355033874512, "bytes": [*text.encode()]}
    return {**top, "top_logprobs": [top, {"token": "x", "logprob": -9999.0, "bytes": None}]}


def chat_choice(index: int, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None, "function_call": None}
    calls = {"tool_calls": message.pop("tool_calls")} if "tool_calls" in message else {}
    return {
        "index": index,
        "message": {**said, "content": message.pop("content", None), **calls, "reasoning": message.pop("reasoning", None)},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": None,
        "routed_experts": None,
        **message,
    }


def chat_answer(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1795144131,
        "model": "smollm2",
        "choices": list(choices),
        "service_tier": None,
        "system_fingerprint": "vllm-0.33.0-1",
        "usage": USAGE,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": METRICS,
        **more,
    }


CALLS: Final = [
    {"id": f"chatcmpl-tool-{number}", "type": "function", "function": {"name": f"get_{number}", "arguments": '{"city": "Paris"}'}}
    for number in range(2)
]
VERSIONS: Final = [{"start": 0, "end": 7, "version": "a"}]
FULL_CHAT: Final = chat_answer(
    chat_choice(
        0,
        content="The capital is né 👋🏽.\n",
        reasoning="What do I know?",
        tool_calls=CALLS,
        finish_reason="tool_calls",
        logprobs={"content": [token(text) for text in "abcdefg"]},
        stop_reason=151645,
        token_ids=[1, 2, 3, 4, 5, 6, 7],
        weight_versions=VERSIONS,
    ),
    chat_choice(1, content="", logprobs={"content": [token("x")]}, stop_reason=2, token_ids=[3], weight_versions=None),
    prompt_token_ids=[5, 6, 7],
    prompt_text="<|im_start|>",
)
FULL_COMPLETION: Final[dict[str, Any]] = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1795144131,
    "model": "smollm2",
    "choices": [
        {
            "index": index,
            "text": " né ok",
            "logprobs": {
                "text_offset": [0, 3, 6],
                "token_logprobs": [None, -0.5, -1e-07],
                "tokens": [" né", " ok", "</s>"],
                "top_logprobs": [None, {" ok": -0.5, "a": -1.0}, {"</s>": -1e-07}],
            },
            "finish_reason": "stop",
            "stop_reason": "halt",
            "token_ids": [4, 5, 6],
            "prompt_logprobs": None,
            "prompt_token_ids": [7 + index, 8],
            "routed_experts": None,
            "weight_versions": VERSIONS,
        }
        for index in range(2)
    ],
    "service_tier": None,
    "system_fingerprint": "vllm-0.33.0-1",
    "usage": USAGE,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "metrics": METRICS,
}
FULL_MESSAGE: Final[dict[str, Any]] = {
    "id": "chatcmpl-1",
    "type": "message",
    "role": "assistant",
    "content": [
        {"type": "thinking", "thinking": "Do I know?", "signature": "0" * 32},
        {"type": "text", "text": "So, né 👋🏽:"},
        {"type": "tool_use", "id": "chatcmpl-tool-1", "name": "get", "input": {"city": "Paris, é", "n": [1.0, None]}},
        {"type": "tool_use", "id": "chatcmpl-tool-2", "name": "get", "input": {}},
    ],
    "model": "smollm2",
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 5, "output_tokens": 8, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 32},
}
FULL_RESPONSE: Final = json.loads(PAIRS["responses_calls"]["forms"]["0"])
FULL_RESPONSE["output"].insert(1, json.loads(PAIRS["responses"]["forms"]["0"])["output"][0])
FULL_RESPONSE["metrics"] = METRICS
FULL: Final[dict[str, tuple[dict[str, Any], Form]]] = {
    "chat": (FULL_CHAT, WITH_USAGE),
    "completions": (FULL_COMPLETION, WITH_USAGE),
    "messages": (FULL_MESSAGE, STREAM),
    "responses": (FULL_RESPONSE, STREAM),
}


def whole(operation: str, answer: Any) -> Entry:
    body = msgspec.json.encode(answer)
    return entry_of(operation, WHOLE, head_of(WHOLE, len(body)), body)


def as_stream(operation: str, answer: Any, request: bytes = b"{}") -> Entry:
    made = as_form(whole(operation, answer), FULL[operation][1], request)
    assert made is not None
    return made


@pytest.mark.parametrize("operation", FULL)
def test_nothing_is_lost_there_and_back(operation: str) -> None:
    answer, _ = FULL[operation]
    made = as_stream(operation, answer)
    assert len(split(made.body)) >= 8
    back = as_form(made, WHOLE, b"{}")
    assert back is not None
    assert back.body == msgspec.json.encode(answer)


@pytest.mark.parametrize("operation", CHUNKED)
def test_usage_may_be_told_apart(operation: str) -> None:
    with_usage = as_stream(operation, FULL[operation][0])
    without = as_form(with_usage, STREAM, b"{}")
    assert without is not None
    assert json.loads(without.usage) == USAGE
    assert b'"usage"' not in without.body
    assert without.body.count(b'"system_fingerprint"') == 2  # where a choice ends
    again = as_form(without, WITH_USAGE)
    assert again is not None
    assert (again.usage, again.body) == (b"", without_metrics(with_usage).body)
    nobody_knows = msgspec.structs.replace(without, usage=b"")
    assert as_form(nobody_knows, WITH_USAGE) is None
    assert as_form(nobody_knows, WHOLE, b"{}") is None


@pytest.mark.parametrize("operation", CHUNKED)
def test_without_a_fingerprint(operation: str) -> None:
    answer = {**FULL[operation][0], "system_fingerprint": None}
    made = as_stream(operation, answer)
    assert b"fingerprint" not in made.body
    back = as_form(made, WHOLE, b"{}")
    assert back is not None
    assert back.body == msgspec.json.encode(answer)


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Those within whose members an engine names itself."""
    if isinstance(value, dict):
        yield value
        for name, each in value.items():
            if name not in ("multimodal_tokens", "top_logprobs", "weight_versions", "input", "tools", "part", "response"):
                yield from objects(each)
    elif isinstance(value, list):
        for each in value:
            yield from objects(each)


@pytest.mark.parametrize("operation", FULL)
def test_a_member_that_nobody_knows_makes_it_odd(operation: str) -> None:
    answer, form = FULL[operation]
    if operation == "responses":
        answer = {name: value for name, value in answer.items() if name != "metrics"}  # which are the same in both forms
    count = len(list(objects(answer)))
    assert count >= 5
    for number in range(count):
        changed = json.loads(json.dumps(answer))
        list(objects(changed))[number]["surprise"] = None
        assert as_form(whole(operation, changed), form, b"{}") is None


@pytest.mark.parametrize("operation", ["chat", "completions", "messages"])
def test_a_member_that_nobody_knows_makes_a_stream_odd(operation: str) -> None:
    made = as_stream(operation, FULL[operation][0])
    events = split(made.body)
    for at, event in enumerate(events):
        name, _, data = event.decode().rpartition("data: ")
        if data.strip() == "[DONE]":
            continue
        for number in range(len(list(objects(json.loads(data))))):
            said = json.loads(data)
            list(objects(said))[number]["surprise"] = None
            changed = [*events[:at], f"{name}data: {json.dumps(said)}\n\n".encode(), *events[at + 1 :]]
            assert as_form(msgspec.structs.replace(made, body=b"".join(changed)), WHOLE, b"{}") is None


def members() -> Iterator[Any]:
    for operation, (answer, _) in FULL.items():
        for name in answer:
            if name not in ("metrics", "stop_reason", "stop_sequence"):  # which may be missing, or come from later versions
                yield pytest.param(operation, name, id=f"{operation}-{name}")
        if operation in CHUNKED:
            for name in answer["choices"][0]:
                if name != "weight_versions":
                    yield pytest.param(operation, f"choices.{name}", id=f"{operation}-choices-{name}")


@pytest.mark.parametrize(("operation", "path"), list(members()))
def test_a_member_that_is_missing_makes_it_odd(operation: str, path: str) -> None:
    changed = json.loads(json.dumps(FULL[operation][0]))
    first, _, second = path.partition(".")
    if second:
        del changed[first][0][second]
    else:
        del changed[first]
    assert as_form(whole(operation, changed), FULL[operation][1], b"{}") is None


UNSAYABLE: Final = {
    "chat": ["service_tier", "prompt_logprobs", "kv_transfer_params", "ec_transfer_params"],
    "completions": ["service_tier", "kv_transfer_params", "ec_transfer_params"],
    "responses": ["kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages"],
}


@pytest.mark.parametrize(("operation", "name"), [(operation, name) for operation, names in UNSAYABLE.items() for name in names])
def test_what_a_stream_never_says_makes_it_odd(operation: str, name: str) -> None:
    answer, form = FULL[operation]
    assert as_form(whole(operation, {**answer, name: {"a": 1}}), form, b"{}") is None


@pytest.mark.parametrize("operation", CHUNKED)
def test_what_a_stream_never_says_of_a_choice_makes_it_odd(operation: str) -> None:
    for name in ("routed_experts", "prompt_logprobs"):
        changed = json.loads(json.dumps(FULL[operation][0]))
        changed["choices"][0][name] = "AAAA"
        assert as_form(whole(operation, changed), WITH_USAGE, b"{}") is None


# -- what a request decides --

WEATHER: Final = {"tools": [{"type": "function", "function": {"name": "get_0"}}]}
NAMED: Final = {**WEATHER, "tool_choice": {"type": "function", "function": {"name": "get_0"}}}
REQUIRED: Final = {**WEATHER, "tool_choice": "required"}
CALL: Final = {"tool_calls": CALLS[:1], "finish_reason": "tool_calls"}


@pytest.mark.parametrize(
    ("request_", "choice"),
    [
        (WEATHER, {**CALL, "content": None}),
        (WEATHER, {**CALL, "content": "So:"}),
        (REQUIRED, {**CALL, "content": ""}),
        (NAMED, {**CALL, "content": "", "finish_reason": "stop"}),
        (WEATHER, {"content": "No."}),
        (WEATHER, {"content": None, "reasoning": "Hm"}),
        (REQUIRED | {"tool_choice": "none"}, {"content": "cut", "finish_reason": "length"}),
        ({"tools": []}, {"content": "cut", "finish_reason": "length"}),
        ({}, {"content": "cut", "finish_reason": "length"}),
        ({}, {"content": "", "finish_reason": "length"}),
        ({}, {"content": "cut", "stop_reason": "here"}),
        (WEATHER, {"content": "ended", "stop_reason": 2}),
        ({}, {"content": "aborted", "finish_reason": "abort"}),
    ],
)
def test_content_beside_tool_calls(request_: dict[str, Any], choice: dict[str, Any]) -> None:
    answer, request = chat_answer(chat_choice(0, **choice)), json.dumps(request_).encode()
    back = as_form(as_stream("chat", answer, request), WHOLE, request)
    assert back is not None
    assert json.loads(back.body) == answer


@pytest.mark.parametrize(
    ("request_", "choice"),
    [
        (NAMED, {**CALL, "content": ""}),
        (WEATHER, {**CALL, "content": None, "finish_reason": "stop"}),
        (WEATHER, {**CALL, "content": None, "finish_reason": "length"}),
        (WEATHER, {"content": None, "finish_reason": "tool_calls"}),
        (WEATHER, {"content": "<tool_c", "finish_reason": "length"}),
        (WEATHER, {"content": "<tool_c", "stop_reason": "all"}),
        (REQUIRED, {"content": "No.", "finish_reason": "stop"}),
        ({"echo": True}, {"content": "Hi"}),
        ({}, {"content": "Hi", "reasoning": ""}),
    ],
)
def test_what_the_request_makes_odd(request_: dict[str, Any], choice: dict[str, Any]) -> None:
    answer, request = chat_answer(chat_choice(0, **choice)), json.dumps(request_).encode()
    assert as_form(whole("chat", answer), WITH_USAGE, request) is None


@pytest.mark.parametrize(
    ("request_", "choice"),
    [
        (NAMED, CALL),
        (WEATHER, {**CALL, "finish_reason": "stop"}),
        (WEATHER, {**CALL, "finish_reason": "length"}),
        (NAMED, {**CALL, "finish_reason": "length"}),
        (WEATHER, {"content": "No.", "finish_reason": "tool_calls"}),
        (WEATHER, {"content": "So:", "finish_reason": "length"}),
        (WEATHER, {"content": "So:", "stop_reason": "all"}),
        (REQUIRED, {"content": "No."}),
    ],
)
def test_what_the_request_makes_odd_of_a_stream(request_: dict[str, Any], choice: dict[str, Any]) -> None:
    reasons = {"finish_reason": "tool_calls" if "tool_calls" in choice else "stop", "stop_reason": None}
    made = as_stream("chat", chat_answer(chat_choice(0, **{**choice, **reasons})))
    said = [
        json.dumps({**reasons, **({name: choice[name] for name in reasons if name in choice} if new else {})}) for new in (0, 1)
    ]
    old, new = (text.replace(" ", "")[1:-1].encode() for text in said)
    assert old in made.body
    assert as_form(msgspec.structs.replace(made, body=made.body.replace(old, new)), WHOLE, json.dumps(request_).encode()) is None


def test_space_beside_tool_calls_is_none_in_one_piece() -> None:
    request = json.dumps(WEATHER).encode()
    stream = as_stream("chat", chat_answer(chat_choice(0, **CALL, content="So:")), request)
    spaced = msgspec.structs.replace(stream, body=stream.body.replace(b'"content":"So:"', b'"content":"\\n"'))
    made = as_form(spaced, WHOLE, request)
    assert made is not None
    assert json.loads(made.body)["choices"][0]["message"]["content"] is None
    demanded = as_form(spaced, WHOLE, json.dumps(REQUIRED).encode())
    assert demanded is not None
    assert json.loads(demanded.body)["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("request_", [b"", b"[]", b"nonsense"])
def test_without_a_request_what_hangs_on_it_stays(request_: bytes) -> None:
    assert as_form(whole("chat", FULL_CHAT), WITH_USAGE, request_) is None
    made = as_stream("chat", FULL_CHAT)
    assert as_form(made, WHOLE, request_) is None
    assert as_form(made, STREAM, request_) is not None


# -- chunks that aren't what they should be --

Edit = Callable[[list[bytes]], list[bytes]]


def replaced(at: int, old: bytes, new: bytes) -> Edit:
    def edit(events: list[bytes]) -> list[bytes]:
        changed = events[at].replace(old, new, 1)
        assert changed != events[at]
        return [*events[:at], changed, *events[at % len(events) + 1 :]]

    return edit


def added(at: int, members: bytes) -> Edit:
    """At the end of an event's object."""

    def edit(events: list[bytes]) -> list[bytes]:
        end = events[at].rindex(b"}")
        return [*events[:at], events[at][:end] + members + events[at][end:], *events[at % len(events) + 1 :]]

    return edit


def without(at: int) -> Edit:
    return lambda events: [*events[:at], *events[at % len(events) + 1 :]]


def put(at: int, event: bytes) -> Edit:
    return lambda events: [*events[:at], event, *events[at:]]


def twice(at: int) -> Edit:
    return lambda events: [*events[: at % len(events)], events[at], *events[at % len(events) :]]


BROKEN_CHUNKS: Final = {
    "no end": without(-1),
    "no totals": without(-2),
    "no finish": without(-3),
    "finish twice": twice(-3),
    "totals twice": twice(-2),
    "more after the end": put(99, b": later\n\ndata: {}\n\n"),
    "an error": put(2, b'data: {"error":{"message":"no","type":"x","param":null,"code":500}}\n\n'),
    "a typed event": put(2, b'event: ping\ndata: {"type":"ping"}\n\n'),
    "an event with an id": replaced(1, b"data: ", b"id: 1\ndata: "),
    "an event on two lines": replaced(1, b',"object"', b',\ndata: "object"'),
    "another id": replaced(1, b"-1", b"-2"),
    "another time": replaced(1, b"1795144131", b"1795144132"),
    "another model": replaced(1, b"smollm2", b"smollm3"),
    "another object": replaced(1, b'"object":"', b'"object":"x'),
    "another choice": replaced(-3, b'"index":0', b'"index":1'),
    "a choice before the first": replaced(1, b'"index":0', b'"index":-1'),
    "usage that wasn't asked for": added(1, b',"usage":{"prompt_tokens":9}'),
    "an early fingerprint": added(1, b',"system_fingerprint":"vllm-0.33.0-1"'),
    "two fingerprints": added(-3, b',"system_fingerprint":"vllm-0.33.0-1"'),
    "another end": replaced(-1, b"[DONE]", b"[DONT]"),
    "a chunk with a name": replaced(1, b"data: ", b"event: chunk\ndata: "),
    "chunks of something else": lambda events: [event.replace(b"completion.chunk", b"completion") for event in events],
    "two choices in one chunk": replaced(1, b'"choices":[', b'"choices":[{"index":0,"delta":{"content":""}},'),
    "rubbish": replaced(1, b"{", b"[{"),
    "an unfinished event with an id": replaced(-1, b"\n\n", b"\nid: 1\n"),
    "an unfinished event": replaced(-1, b"\n\n", b"\n"),
}


def plain_chat() -> Entry:
    choice = chat_choice(0, content="The capital is Paris.", logprobs={"content": [token("a")]}, token_ids=[1, 2])
    return as_stream("chat", chat_answer(choice, prompt_token_ids=[7], prompt_text="<"))


def edited(entry: Entry, edit: Edit) -> Entry:
    return msgspec.structs.replace(entry, body=b"".join(edit(split(entry.body))))


@pytest.mark.parametrize("edit", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_a_stream_that_is_not_what_it_should_be(edit: Edit) -> None:
    broken = edited(plain_chat(), edit)
    assert as_form(broken, WHOLE, b"{}") is None
    assert as_form(broken, STREAM, b"{}") is None


BROKEN_CHAT: Final = {
    "an early stop": replaced(1, b'"finish_reason":null', b'"finish_reason":null,"stop_reason":null'),
    "early versions": replaced(1, b'"finish_reason":null', b'"finish_reason":null,"weight_versions":null'),
    "no role": without(0),
    "a role twice": replaced(1, b'{"content"', b'{"role":"assistant","content"'),
    "a role with text": replaced(0, b'"content":""', b'"content":"a"'),
    "the prompt twice": added(1, b',"prompt_token_ids":[7]'),
    "the prompt's text twice": added(1, b',"prompt_text":"<"'),
    "a version without the prompt's text": replaced(0, b',"prompt_text":"<"', b""),
    "a version without the prompt's tokens": replaced(0, b'"prompt_token_ids":[7],', b""),
}


@pytest.mark.parametrize("edit", BROKEN_CHAT.values(), ids=BROKEN_CHAT)
def test_a_chat_that_is_not_what_it_should_be(edit: Edit) -> None:
    assert as_form(edited(plain_chat(), edit), WHOLE, b"{}") is None


@pytest.mark.parametrize("old", [b'"prompt_token_ids":[7]', b'"prompt_text":"<"'])
def test_choices_of_two_prompts_are_odd(old: bytes) -> None:
    answer = chat_answer(chat_choice(0, content="a"), chat_choice(1, content="b"), prompt_token_ids=[7], prompt_text="<")
    assert as_form(edited(as_stream("chat", answer), replaced(1, old, old[:-2] + b"8" + old[-1:])), WHOLE, b"{}") is None


def test_only_the_chunk_that_ends_a_choice_has_the_fingerprint() -> None:
    without_usage = as_form(plain_chat(), STREAM)
    assert without_usage is not None
    assert as_form(without_usage, WHOLE, b"{}") is not None
    for name in (b"vllm-0.33.0-1", b"other"):
        early = edited(without_usage, added(1, b',"system_fingerprint":"%b"' % name))
        assert as_form(early, WHOLE, b"{}") is None
        assert as_form(early, WITH_USAGE, b"{}") is None


BROKEN_CALLS: Final = {
    "no function": replaced(1, b'"function":{"name":"get_0"}', b'"function":null'),
    "no name": replaced(1, b'"name":"get_0"', b'"name":null'),
    "no id": replaced(1, b'"id":"chatcmpl-tool-0"', b'"id":null'),
    "no type": replaced(1, b'"type":"function"', b'"type":null'),
    "no index": replaced(1, b'"index":0,"function"', b'"function"'),
    "two names": twice(1),
    "another id": replaced(2, b'{"index":0,"function"', b'{"id":"x","index":0,"function"'),
    "another type": replaced(2, b'{"index":0,"function"', b'{"type":"x","index":0,"function"'),
    "a second call first": replaced(1, b'"index":0,"function"', b'"index":1,"function"'),
    "half its arguments": without(2),
    "the first call once more": replaced(6, b'"index":1,"function"', b'"index":0,"function"'),
}


@pytest.mark.parametrize("edit", BROKEN_CALLS.values(), ids=BROKEN_CALLS)
def test_calls_that_are_not_what_they_should_be(edit: Edit) -> None:
    choice = chat_choice(0, tool_calls=CALLS, finish_reason="tool_calls")
    assert as_form(edited(as_stream("chat", chat_answer(choice)), edit), WHOLE, b"{}") is None


BROKEN_COMPLETIONS: Final = {
    "the prompt twice": replaced(1, b'"prompt_token_ids":null', b'"prompt_token_ids":[7,8]'),
    "an early stop": replaced(0, b'"stop_reason":null', b'"stop_reason":"halt"'),
    "early versions": replaced(0, b'"weight_versions":null', b'"weight_versions":[]'),
    "offsets that jump": replaced(1, b'"text_offset":[3]', b'"text_offset":[4]'),
    "columns of different lengths": replaced(0, b'"text_offset":[0]', b'"text_offset":[0,3]'),
}


@pytest.mark.parametrize("edit", BROKEN_COMPLETIONS.values(), ids=BROKEN_COMPLETIONS)
def test_completions_that_are_not_what_they_should_be(edit: Edit) -> None:
    assert as_form(edited(as_stream("completions", FULL_COMPLETION), edit), WHOLE, b"{}") is None


@pytest.mark.parametrize("operation", CHUNKED)
def test_an_echo_stays_as_it_is(operation: str) -> None:
    answer, _ = FULL[operation]
    made = as_stream(operation, answer)
    for echo, possible in ((b'{"echo":true}', False), (b'{"echo":false}', True)):
        assert (as_form(whole(operation, answer), WITH_USAGE, echo) is not None) is possible
        assert (as_form(made, WHOLE, echo) is not None) is possible


@pytest.mark.parametrize("operation", CHUNKED)
def test_choices_that_are_not_what_they_should_be(operation: str) -> None:
    answer = FULL[operation][0]
    said: list[Any] = answer["choices"]
    for choices in ([], said[1:], said[::-1]):
        assert as_form(whole(operation, {**answer, "choices": choices}), WITH_USAGE, b"{}") is None
    assert as_form(whole(operation, {**answer, "object": "list"}), WITH_USAGE, b"{}") is None


# -- typed events --


def message_without(*kinds: str) -> dict[str, Any]:
    return {**FULL_MESSAGE, "content": [block for block in FULL_MESSAGE["content"] if block["type"] not in kinds]}


def ended(message: dict[str, Any], reason: str, sequence: str | None = None) -> dict[str, Any]:
    """The members in Anthropic's order, what is null left out."""
    order = ("id", "type", "role", "content", "model")
    more = {} if sequence is None else {"stop_sequence": sequence}
    return {**{name: message[name] for name in order}, "stop_reason": reason, **more, "usage": message["usage"]}


@pytest.mark.parametrize(
    "message",
    [
        ended(message_without("tool_use"), "end_turn"),
        ended(message_without("tool_use", "thinking"), "max_tokens"),
        ended(message_without("tool_use", "text"), "max_tokens"),
        ended(message_without("tool_use"), "stop_sequence", "Par"),
        ended({**FULL_MESSAGE, "content": [{"type": "text", "text": ""}]}, "end_turn"),
        {name: value for name, value in message_without("tool_use").items() if name != "stop_reason"},
    ],
)
def test_messages_there_and_back(message: dict[str, Any]) -> None:
    back = as_form(as_stream("messages", message), WHOLE, b"{}")
    assert back is not None
    assert back.body == msgspec.json.encode(message)


def test_an_empty_message_has_no_block_in_a_stream() -> None:
    made = as_stream("messages", ended({**FULL_MESSAGE, "content": [{"type": "text", "text": ""}]}, "end_turn"))
    assert [event.split()[1] for event in split(made.body)] == [b"message_start", b"message_delta", b"message_stop"]


def test_a_message_begins_without_what_the_cache_had() -> None:
    start = json.loads(split(as_stream("messages", FULL_MESSAGE).body)[0].split(b"data: ")[1])
    assert start["message"]["usage"] == {"input_tokens": 40, "output_tokens": 0}


TOOLS: Final = {"tools": [{"name": "get", "input_schema": {}}]}


@pytest.mark.parametrize(
    ("message", "request_", "possible"),
    [
        (ended(FULL_MESSAGE, "max_tokens"), {}, False),
        (ended(FULL_MESSAGE, "stop_sequence", "x"), {}, False),
        (ended(message_without("tool_use"), "tool_use"), {}, False),
        (ended(message_without("tool_use"), "max_tokens"), TOOLS, False),
        (ended(message_without("tool_use"), "stop_sequence", "x"), TOOLS, False),
        (ended(message_without("tool_use"), "max_tokens"), {**TOOLS, "tool_choice": {"type": "none"}}, True),
        (ended(message_without("tool_use"), "end_turn"), TOOLS, True),
    ],
)
def test_a_tool_that_may_have_been_cut_off(message: dict[str, Any], request_: dict[str, Any], possible: bool) -> None:
    request = msgspec.json.encode(request_)
    assert (as_form(whole("messages", message), STREAM, request) is not None) is possible
    tools = any(block["type"] == "tool_use" for block in message["content"])
    stream = as_stream("messages", FULL_MESSAGE if tools else ended(message_without("tool_use"), "end_turn"))
    reason = json.dumps(message["stop_reason"]).encode()
    changed = edited(
        stream,
        lambda events: [
            event.replace(b'"tool_use","stop_sequence"', reason + b',"stop_sequence"').replace(
                b'"end_turn","stop_sequence"', reason + b',"stop_sequence"'
            )
            for event in events
        ],
    )
    assert (as_form(changed, WHOLE, request) is not None) is possible


BROKEN_MESSAGES: Final = {
    "no start": without(0),
    "no end": without(-1),
    "no reason": without(-2),
    "a block without an end": without(-3),
    "an error": put(2, b'event: error\ndata: {"type":"error"}\n\n'),
    "a ping": put(2, b'event: ping\ndata: {"type":"ping"}\n\n'),
    "another name": replaced(2, b'{"type":"content_block_delta"', b'{"type":"content_block_deltas"'),
    "a block within a block": twice(1),
    "an end twice": twice(-3),
    "a block out of order": replaced(1, b'"index":0', b'"index":1'),
    "a delta of another": replaced(2, b'"index":0', b'"index":1'),
    "an end of another": replaced(-3, b'"index":3', b'"index":2'),
    "an unknown block": replaced(1, b'"thinking":""', b'"thinking":"x"'),
    "a block of another kind": replaced(1, b'"type":"thinking","thinking"', b'"type":"redacted","thinking"'),
    "a delta of another kind": replaced(2, b"thinking_delta", b"text_delta"),
    "a delta of two kinds": replaced(2, b'"delta":{', b'"delta":{"text":"x",'),
    "no signature": without(5),
    "two signatures": twice(5),
    "an end in the middle": put(2, b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    "begun already": replaced(0, b'"content":[]', b'"content":[{"type":"text","text":""}]'),
    "over already": replaced(0, b'"stop_reason":null', b'"stop_reason":"end_turn"'),
    "a tool without a name": replaced(-5, b'"name":"get",', b""),
    "a tool without an id": replaced(-5, b'"id":"chatcmpl-tool-2",', b""),
    "half an input": replaced(-4, b'"{}"', b'"{"'),
}


@pytest.mark.parametrize("edit", BROKEN_MESSAGES.values(), ids=BROKEN_MESSAGES)
def test_a_message_that_is_not_what_it_should_be(edit: Edit) -> None:
    assert as_form(edited(as_stream("messages", FULL_MESSAGE), edit), WHOLE, b"{}") is None


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b", "signature": "c"}],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        [{"type": "thinking", "thinking": "b", "signature": "c"}, {"type": "thinking", "thinking": "b", "signature": "c"}],
    ],
)
def test_blocks_in_another_order_are_odd(content: list[Any]) -> None:
    made = as_stream("messages", ended({**FULL_MESSAGE, "content": content}, "end_turn"))
    assert as_form(made, WHOLE, b"{}") is None


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "b"},
        {"type": "text"},
        {"type": "text", "text": "a", "signature": "b"},
        {"type": "tool_use", "id": "a", "input": {}},
        {"type": "tool_use", "name": "a", "input": {}},
        {"type": "tool_use", "id": "a", "name": "a"},
        {"type": "image", "text": "a"},
    ],
)
def test_an_unknown_block_is_odd(block: dict[str, Any]) -> None:
    for reason in ("end_turn", "tool_use"):
        assert as_form(whole("messages", ended({**FULL_MESSAGE, "content": [block]}, reason)), STREAM, b"{}") is None


def test_space_beside_tools_is_no_block_in_one_piece() -> None:
    message = ended(message_without("thinking"), "tool_use")
    message["content"][0] = {"type": "text", "text": "\n"}
    made = as_form(as_stream("messages", message), WHOLE, b"{}")
    assert made is not None
    assert [block["type"] for block in json.loads(made.body)["content"]] == ["tool_use", "tool_use"]


def response_with(**more: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(FULL_RESPONSE)), **more}


def output_item(number: int, **more: Any) -> dict[str, Any]:
    response = response_with()
    response["output"][number] |= more
    return response


REASONING, TEXT, CALLED = 0, 1, 2
THOUGHT: Final = {"text": "Hm", "type": "reasoning_text"}
PART: Final[dict[str, Any]] = {"annotations": [], "text": "a", "type": "output_text", "logprobs": None}
ODD_RESPONSES: Final = {
    "nothing": response_with(output=[]),
    "another order": response_with(output=FULL_RESPONSE["output"][::-1]),
    "two messages": response_with(output=[FULL_RESPONSE["output"][TEXT]] * 2),
    "reasoning twice": response_with(output=[FULL_RESPONSE["output"][REASONING]] * 2),
    "a tool of its own": output_item(REASONING, type="web_search_call"),
    "two parts": output_item(TEXT, content=[PART, PART]),
    "no part": output_item(TEXT, content=[]),
    "no text": output_item(TEXT, content=[{**PART, "text": ""}]),
    "space beside calls": output_item(TEXT, content=[{**PART, "text": "\n"}]),
    "logprobs": output_item(TEXT, content=[{**PART, "logprobs": []}]),
    "annotations": output_item(TEXT, content=[{**PART, "annotations": [{}]}]),
    "a refusal": output_item(TEXT, content=[{**PART, "type": "refusal"}]),
    "two thoughts": output_item(REASONING, content=[THOUGHT, THOUGHT]),
    "no thoughts": output_item(REASONING, content=None),
    "an empty thought": output_item(REASONING, content=[{**THOUGHT, "text": ""}]),
    "another thought": output_item(REASONING, content=[{**THOUGHT, "type": "text"}]),
    "a summary": output_item(REASONING, summary=[{}]),
    "half its arguments": output_item(CALLED, arguments='{"a'),
    "failed": response_with(status="failed"),
    "failed without tools": response_with(status="failed", tools=[], output=[FULL_RESPONSE["output"][TEXT]]),
    "cut off": response_with(status="incomplete"),
    "something else": response_with(object="list"),
    "no usage": response_with(usage=None),
}


@pytest.mark.parametrize("response", ODD_RESPONSES.values(), ids=ODD_RESPONSES)
def test_a_response_that_is_odd(response: dict[str, Any]) -> None:
    assert as_form(whole("responses", response), STREAM, b"{}") is None
    made = as_stream("responses", FULL_RESPONSE)
    end = json.dumps({"response": response, "sequence_number": len(split(made.body)) - 1, "type": "response.completed"})
    told_so = edited(made, lambda events: [*events[:-1], b"event: response.completed\ndata: %b\n\n" % end.encode()])
    assert as_form(told_so, WHOLE, b"{}") is None


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_model_with_channels_streams_in_its_own_way(side: str) -> None:
    response = response_with()
    response["usage"][f"{side}_tokens_details"][f"{side}_tokens_per_turn"] = [5]
    assert as_form(whole("responses", response), STREAM, b"{}") is None


LATER: Final = {"prompt_cache_options": None, "prompt_cache_key": None, "prompt_cache_retention": None, "safety_identifier": None}


@pytest.mark.parametrize(
    ("more", "end", "status"),
    [({}, "response.completed", "completed"), (LATER, "response.incomplete", "incomplete")],
)
def test_what_is_incomplete_has_an_end_of_its_own_in_later_versions(more: dict[str, Any], end: str, status: str) -> None:
    cut = response_with(status="incomplete", tools=[], incomplete_details={"reason": "max_output_tokens"}, **more)
    del cut["output"][1:]
    made = as_stream("responses", cut)
    events = split(made.body)
    assert events[-1].startswith(b"event: %b\n" % end.encode())
    assert json.loads(events[-2].split(b"data: ")[1])["item"]["status"] == status
    back = as_form(made, WHOLE, b"{}")
    assert back is not None
    assert json.loads(back.body) == cut
    begun = json.loads(events[0].split(b"data: ")[1])["response"]
    assert (begun["status"], begun["output"], begun["usage"], begun["incomplete_details"]) == ("in_progress", [], None, None)
    assert "metrics" not in begun


BROKEN_RESPONSES: Final = {
    "no end": without(-1),
    "an end too early": put(99, b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'),
    "an unknown event": put(3, b'event: response.mcp_call.in_progress\ndata: {"type":"response.mcp_call.in_progress"}\n\n'),
    "another event": lambda events: [event.replace(b"content_part.added", b"mcp_call.added") for event in events],
    "an event with two names": replaced(3, b'"type":"response.content', b'"type":"response.contents'),
    "one left out": without(4),
    "it failed": replaced(-1, b"event: response.completed", b"event: response.failed"),
    "another end": lambda events: [*events[:-1], events[-1].replace(b"response.completed", b"response.incomplete")],
}


@pytest.mark.parametrize("edit", BROKEN_RESPONSES.values(), ids=BROKEN_RESPONSES)
def test_events_of_a_response_that_are_not_what_they_should_be(edit: Edit) -> None:
    assert as_form(edited(as_stream("responses", FULL_RESPONSE), edit), WHOLE, b"{}") is None


@pytest.mark.parametrize("operation", ["messages", "responses"])
def test_typed_events_have_two_forms(operation: str) -> None:
    made = as_stream(operation, FULL[operation][0])
    for form in (WITH_USAGE, WITH_USAGES):
        assert as_form(whole(operation, FULL[operation][0]), form, b"{}") is None
        assert as_form(made, form, b"{}") is None
        assert as_form(msgspec.structs.replace(made, form=form), WHOLE, b"{}") is None


# -- heads, and the rest --


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"content-type: application/json", b"content-type: text/plain"),
        (b"content-type: application/json\r\n", b""),
        (b"vary: Origin", b"content-type: application/json"),
        (b"vary: Origin", b"Content-Encoding: gzip"),
    ],
)
def test_a_head_of_something_else_is_odd(old: bytes, new: bytes) -> None:
    entry = whole("chat", FULL_CHAT)
    assert as_form(msgspec.structs.replace(entry, head=entry.head.replace(old, new)), STREAM, b"{}") is None


def test_other_lines_of_a_head_stay() -> None:
    entry = whole("chat", FULL_CHAT)
    head = entry.head.replace(b"vary", b"X-Some-Thing: a:b\r\nvary").replace(b"content-length", b"Content-Length")
    made = as_form(msgspec.structs.replace(entry, head=head), STREAM, b"{}")
    assert made is not None
    assert made.head == head_of(STREAM).replace(b"vary", b"X-Some-Thing: a:b\r\nvary")


def test_it_is_the_same_answer_but_for_its_form() -> None:
    entry = whole("chat", FULL_CHAT)
    made = as_form(entry, STREAM, b"{}")
    assert made is not None
    assert made.chunks == made.body.count(b"data: {")
    assert msgspec.structs.replace(made, form=WHOLE, head=entry.head, sized=True, body=entry.body, chunks=0, usage=b"") == entry
    assert as_form(entry, WHOLE) is entry
    back = as_form(made, WHOLE, b"{}")
    assert back is not None
    assert (back.chunks, back.usage) == (0, b"")


def test_what_never_streams_has_one_form() -> None:
    assert as_form(whole("embeddings", FULL_CHAT), STREAM, b"{}") is None


def test_running_counts_are_nobody_s_to_make_up() -> None:
    assert as_form(whole("chat", FULL_CHAT), WITH_USAGES, b"{}") is None
    assert as_form(plain_chat(), WITH_USAGES) is None


def test_a_comment_says_nothing() -> None:  # ": waiting" of ours, ": keep-alive" of others
    made = plain_chat()
    kept = as_form(made, WHOLE, b"{}")
    assert kept is not None
    waited = as_form(msgspec.structs.replace(made, body=b": waiting\n\n" + made.body), WHOLE, b"{}")
    assert waited == kept
    more = msgspec.structs.replace(made, body=b": a\ndata: {}\n\n" + made.body)
    assert as_form(more, WHOLE, b"{}") is None


def test_text_is_cut_about_as_engines_cut_it() -> None:
    text = "The  capital\nof France is " + "a" * 40 + ".\n\n"
    made = as_stream("chat", chat_answer(chat_choice(0, content=text)))
    deltas = [json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"] for event in split(made.body)[1:-2]]
    texts = [delta["content"] for delta in deltas]
    assert "".join(texts) == text
    assert texts[:4] == ["The", "  capital", "\nof", " France"]
    assert max(map(len, texts)) <= 20


def test_text_whose_tokens_are_known_is_cut_by_token() -> None:
    texts = ["L", "'", "Am", "é", "<end>"]
    choice = chat_choice(0, content="L'Amé", logprobs={"content": [token(text) for text in texts]}, token_ids=[1, 2, 3, 4, 5])
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in split(as_stream("chat", chat_answer(choice)).body)[1:-2]]
    said = [chunk["choices"][0] for chunk in chunks]
    assert [each["delta"]["content"] for each in said] == [*texts[:4], ""]
    assert [[token["token"] for token in each["logprobs"]["content"]] for each in said] == [[text] for text in texts]
    assert [each["token_ids"] for each in said] == [[1], [2], [3], [4], [5]]


@pytest.mark.parametrize("name", captured.names(streamed=True))
def test_captured_streams_are_split_into_what_they_are_made_of(name: str) -> None:
    kept = captured.load(name)
    assert split(kept.body) == kept.blocks()


@pytest.mark.parametrize("name", [name for name in captured.names(streamed=True) if "llama" in name])
def test_what_another_server_says_is_odd(name: str) -> None:
    body = captured.load(name).body
    for operation in FULL:
        for form in (STREAM, WITH_USAGE):
            assert as_form(entry_of(operation, form, head_of(form), body, b"{}"), WHOLE, b"{}") is None
