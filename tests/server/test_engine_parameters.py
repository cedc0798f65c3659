"""What steers an engine from inside is for whoever runs it to say: refused in words where a key may not, handed on where it may.
And the salt that the proxy says itself, so that a prompt, once computed, is of use to its tenant only. Failure 58."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, get_args

import anthropic
import openai
import pytest
from anthropic.types import MessageCountTokensParams, message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.audio import transcription_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from proxy.errors import Outcome
from proxy.nouns import EngineParameter
from proxy.snapshot import Model
from tests.server.conftest import StartWorker
from tests.server.test_operations import CASES, SOUND, Case, by_path, message
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply
from tests.support.worker import KEY, MODEL, Worker, backend, chat

NAMES: Final[tuple[str, ...]] = get_args(EngineParameter)
SECRET: Final = b"s" * 32
HI: Final = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def plain(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    """Nobody may do anything special here."""
    return shared_worker(shared_vllm.url)


def send(worker: Worker, case: Case, **more: Any) -> Reply:
    body, headers = message(case, **more)
    return worker.ask(body, case.path, headers=headers)


# -- refused --


@pytest.mark.parametrize("case", CASES, ids=by_path)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_in_words(plain: Worker, shared_vllm: ScriptedVLLM, case: Case, name: str) -> None:  # failure 58
    seen = len(shared_vllm.requests)
    reply = send(plain, case, **{name: "x"})
    error = reply.json()["error"]
    assert (reply.status, error["type"]) == (400, "invalid_request_error")
    assert f"`{name}`" in error["message"]
    if case.path.startswith("/v1/messages"):
        assert reply.json()["type"] == "error"
    elif (case.path, name) != ("/v1/responses", "request_id"):
        assert (error["param"], error["code"]) == (name, "parameter_not_allowed")
    assert len(shared_vllm.requests) == seen
    assert plain.record_of(reply).outcome == Outcome.CLIENT_ERROR


@pytest.mark.parametrize(
    "said",
    [
        {"cache_salt": ""},
        {"priority": 0},
        {"kv_transfer_params": {}, "stream": True},
        {"vllm_xargs": {"a": 1}, "n": "odd"},
        {"cach\\u0065_salt": "x"},
        {"internal": [], "priority": -5},
    ],
    ids=str,
)
def test_however_it_is_said(plain: Worker, shared_vllm: ScriptedVLLM, said: dict[str, Any]) -> None:  # failure 58
    seen = len(shared_vllm.requests)
    body = json.dumps(chat(stream=False) | said).replace("\\\\u", "\\u").encode()
    reply = plain.ask(body)
    assert (reply.status, reply.json()["error"]["code"]) == (400, "parameter_not_allowed")
    assert len(shared_vllm.requests) == seen


def test_null_is_nothing_said(plain: Worker, shared_vllm: ScriptedVLLM) -> None:
    body = chat(stream=False) | dict.fromkeys(NAMES)
    assert plain.ask(body).status == 200
    assert json.loads(shared_vllm.requests[-1].body) == body


def test_headers_say_nothing_either(plain: Worker, shared_vllm: ScriptedVLLM) -> None:  # failure 58
    """vLLM and others take some of them there."""
    names = ("X-Data-Parallel-Rank", "X-Session-Id", "X-Request-Id", "X-Vllm-Priority")
    assert plain.ask(chat(stream=False), headers=dict.fromkeys(names, "7")).status == 200
    sent = {name.lower(): value for name, value in shared_vllm.requests[-1].headers}
    assert b"7" not in sent.values()


# -- allowed --


LEVELS: Final[dict[str, dict[str, Any]]] = {
    "everyone": {"everyone": {"engine_parameters": ["priority"]}},
    "team": {"teams": {"t": {"engine_parameters": ["priority"]}}, "keys": {"name 0": {"team": "t"}}},
    "user": {"users": {"u": {"engine_parameters": ["priority"]}}, "keys": {"name 0": {"user": "u"}}},
    "project": {
        "teams": {"t": {}},
        "projects": {"p": {"team": "t", "engine_parameters": ["priority"]}},
        "keys": {"name 0": {"team": "t", "project": "p"}},
    },
    "key": {"keys": {"name 0": {"engine_parameters": ["priority"]}}},
}


@pytest.mark.parametrize("level", LEVELS)
def test_any_level_may_allow_it(worker: StartWorker, vllm: ScriptedVLLM, level: str) -> None:
    one = worker(vllm.url, config=LEVELS[level], keys=["gh-other"])
    body = chat(stream=False, priority=-5)
    assert one.ask(body).status == 200
    assert json.loads(vllm.requests[-1].body)["priority"] == -5
    assert one.ask(body, key="gh-other").status == (200 if level == "everyone" else 400)
    assert one.ask(body | {"cache_salt": "x"}).status == 400  # another one isn't


def test_levels_add_up(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    config = {"everyone": {"engine_parameters": ["priority"]}, "keys": {"name 0": {"engine_parameters": ["cache_salt"]}}}
    one = worker(vllm.url, config=config, keys=["gh-other"])
    both = chat(stream=False, priority=1, cache_salt="x")
    assert [one.ask(both, key=key).status for key in (KEY, "gh-other")] == [200, 400]


def test_what_is_allowed_is_allowed_everywhere(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, config={"everyone": {"engine_parameters": list(NAMES)}})
    for case in CASES:
        for name in NAMES:
            mine = (case.path, name) != ("/v1/responses", "request_id")  # the id of an answer there
            assert (send(one, case, **{name: "x"}).status == 200) == mine


# -- what SDKs send --

VALUES: Final[Mapping[str, Any]] = {
    "background": False,
    "best_of": 1,
    "dimensions": 3,
    "echo": False,
    "encoding_format": "float",
    "file": ("a.wav", SOUND),
    "functions": [],
    "include": [],
    "input": "Hi",
    "keywords": [],
    "known_speaker_names": [],
    "known_speaker_references": [],
    "languages": [],
    "logprobs": True,
    "max_completion_tokens": 9,
    "max_output_tokens": 20,
    "max_tokens": 9,
    "max_tool_calls": 1,
    "messages": HI,
    "metadata": {"a": "b"},
    "model": MODEL,
    "n": 1,
    "parallel_tool_calls": True,
    "prompt": "Hi",
    "reasoning": {},
    "stop_sequences": ["x"],
    "stream_options": {"include_usage": True},
    "suffix": None,
    "temperature": 0.5,
    "text": {"format": {"type": "text"}},
    "timestamp_granularities": ["word"],
    "tools": [],
    "top_logprobs": 1,
    "tool_choice": "auto",
    "top_p": 0.9,
}
"""Others are said with the value `x`: nobody on the way reads them."""


def every(documented: Any, **other: Any) -> dict[str, Any]:
    """All parameters that an SDK documents for an endpoint."""
    return {name: VALUES.get(name, "x") for name in documented.__annotations__} | other


def test_what_openai_documents_is_never_refused(plain: Worker) -> None:
    with openai.OpenAI(base_url=f"{plain.url}/v1", api_key=KEY, max_retries=0) as client:
        said = every(chat_create_params.CompletionCreateParamsBase)
        assert len(said) > 30
        assert client.chat.completions.create(**{**said, "stream_options": None}).choices
        assert list(client.chat.completions.create(**said, stream=True))
        said = every(completion_create_params.CompletionCreateParamsBase, logprobs=1, stream_options=None)
        assert client.completions.create(**said).choices
        said = every(response_create_params.ResponseCreateParamsBase, previous_response_id=None)
        assert client.responses.create(**said).output
        assert client.embeddings.create(**every(embedding_create_params.EmbeddingCreateParams)).data
        said = every(transcription_create_params.TranscriptionCreateParamsBase, response_format="json")
        assert client.audio.transcriptions.create(**said).text


def test_what_anthropic_documents_is_never_refused(plain: Worker) -> None:
    objects: dict[str, Any] = {"tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}, "output_config": {}}
    with anthropic.Anthropic(base_url=plain.url, auth_token=KEY, api_key=None, max_retries=0) as client:
        assert client.messages.create(**every(message_create_params.MessageCreateParamsBase, **objects)).content
        assert client.messages.count_tokens(**every(MessageCountTokensParams, **objects)).input_tokens


def test_sdks_tell_what_was_refused(plain: Worker) -> None:  # failure 58
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key=KEY, max_retries=0)
    with client, pytest.raises(openai.BadRequestError, match="priority") as raised:
        client.chat.completions.create(model=MODEL, messages=HI, extra_body={"priority": -1})  # type: ignore[arg-type]
    assert (raised.value.param, raised.value.code) == ("priority", "parameter_not_allowed")


# -- the proxy's own salt --


def isolate(worker: Worker, scope: str, secret: bytes = SECRET) -> None:
    worker.publish(models={MODEL: Model(MODEL, ("b0",), 1, 1, 1, prefix_isolation=scope)}, cache_secret=secret)


def salt_of(vllm: ScriptedVLLM) -> str | None:
    """That the engine got last."""
    salt = json.loads(vllm.requests[-1].body).get("cache_salt")
    assert salt is None or (len(salt) == 43 and salt.isascii())
    return str(salt) if salt is not None else None


def test_each_key_has_its_own(worker: StartWorker, vllm: ScriptedVLLM) -> None:  # failure 58
    one = worker(vllm.url, keys=["gh-other"])
    assert one.ask(chat()).status == 200
    assert salt_of(vllm) is None
    isolate(one, "key")
    salts = []
    for case in CASES:
        if case.path.startswith("/v1/audio") or case.path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
            continue
        for key in (KEY, "gh-other"):
            body, _ = message(case)
            assert one.ask(body, case.path, key=key).status == 200
            assert (sent := json.loads(vllm.requests[-1].body)).pop("cache_salt") == salt_of(vllm)
            assert sent == body
            salts.append(salt_of(vllm))
    assert len(set(salts[::2])) == len(set(salts[1::2])) == 1
    assert len(set(salts)) == 2
    isolate(one, "key", b"t" * 32)
    assert one.ask(chat()).status == 200
    assert salt_of(vllm) not in (None, *salts)


def test_a_team_has_one(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    keys = {"name 0": {"team": "t"}, "name 1": {"team": "t"}, "name 2": {"team": "u"}, "name 3": {}, "name 4": {}}
    one = worker(vllm.url, config={"teams": {"t": {}, "u": {}}, "keys": keys}, keys=["gh-1", "gh-2", "gh-3", "gh-4"])
    isolate(one, "team")
    salts = []
    for key in one.keys:
        assert one.ask(chat(), key=key).status == 200
        salts.append(salt_of(vllm))
    assert salts[0] == salts[1]
    assert len({*salts, None}) == 5


def test_who_may_say_another_keeps_it(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, config={"keys": {"name 0": {"engine_parameters": ["cache_salt"]}}})
    isolate(one, "key")
    assert one.ask(chat(cache_salt="m" * 43)).status == 200
    assert salt_of(vllm) == "m" * 43
    assert one.ask(chat(cache_salt=None)).status == 200
    assert salt_of(vllm) not in (None, "m" * 43)


def test_only_a_vllm_gets_it(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    """Others refuse what they don't know."""
    one = worker(backend(vllm.url, kind="openai"))
    isolate(one, "key")
    assert one.ask(chat()).status == 200
    assert salt_of(vllm) is None


def test_it_stands_beside_everything_else(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url)
    vllm.models = ("other",)
    other = Model("other", ("b0",), 1, 1, 1, defaults=(("top_k", b"5"),), prefix_isolation="key")
    one.publish(models={"alias": other}, cache_secret=SECRET)
    reply = one.ask(chat(model="alias"))
    assert reply.status == 200
    sent = json.loads(vllm.requests[-1].body)
    assert (sent["model"], sent["top_k"], sent["stream_options"]["include_usage"]) == ("other", 5, True)
    assert salt_of(vllm) is not None
    assert reply.body.endswith(b"data: [DONE]\n\n")


def test_a_model_that_answers_instead_has_its_own_rule(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    one = worker(vllm.url, "http://127.0.0.1:9")
    here, gone = ("b0",), ("b1",)
    vllm.models = ("isolated", "shared")
    models = {
        MODEL: Model(MODEL, gone, 1, 1, 1, prefix_isolation="key", fallbacks=("shared",)),
        "first": Model("first", gone, 1, 1, 1, fallbacks=("isolated",)),
        "isolated": Model("isolated", here, 1, 1, 1, prefix_isolation="key"),
        "shared": Model("shared", here, 1, 1, 1),
    }
    one.publish(models=models, cache_secret=SECRET)
    assert one.ask(chat()).status == 200
    assert salt_of(vllm) is None
    assert one.ask(chat(model="first")).status == 200
    assert salt_of(vllm) is not None
