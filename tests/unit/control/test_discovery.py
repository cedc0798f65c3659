"""Asking a backend: what counts as an answer, and what is said of everything else. The servers are real, and mostly bad."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.control.discovery import (
    ANSWER_BYTES,
    Answer,
    DiscoveryError,
    address_of,
    ask,
    ask_version,
    max_model_len,
    new_client,
    read_models,
    url_of,
)
from proxy.nouns import BackendSettings
from proxy.snapshot import Backend
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.tls import CA, OTHER_CA, server_context

# -- where --


@pytest.mark.parametrize(
    ("url", "host", "port", "base_path", "root"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1", 8000, "", "http://10.0.0.1:8000"),
        ("http://gpu/", "gpu", 80, "", "http://gpu:80"),
        ("http://gpu:8000/v1", "gpu", 8000, "", "http://gpu:8000"),
        ("http://gpu:8000/v1/", "gpu", 8000, "", "http://gpu:8000"),
        ("http://gpu:8000/llm/v1", "gpu", 8000, "/llm", "http://gpu:8000/llm"),
        ("http://gpu:8000/llm", "gpu", 8000, "/llm", "http://gpu:8000/llm"),
        ("http://[::1]:8000", "::1", 8000, "", "http://[::1]:8000"),
        ("https://gpu/llm/v1", "gpu", 443, "/llm", "https://gpu:443/llm"),
        ("https://[::1]:8443", "::1", 8443, "", "https://[::1]:8443"),
    ],
)
def test_a_url_with_and_without_v1(url: str, host: str, port: int, base_path: str, root: str) -> None:
    backend = address_of(BackendSettings(url=url), "b")
    assert (backend.host, backend.port, backend.base_path) == (host, port, base_path)
    assert url_of(backend) == root
    assert backend.tls == url.startswith("https")


# -- what --


def test_cards_are_kept_as_they_came() -> None:
    body = b'{"object":"list", "data": [ {"id": "a","owned_by":"x" , "n":1.50}, {"id":"b"} ],"more":1}'
    assert read_models(body) == Answer("openai", {"a": b'{"id": "a","owned_by":"x" , "n":1.50}', "b": b'{"id":"b"}'})


def test_one_entry_of_vllm_makes_it_a_vllm() -> None:
    assert read_models(b'{"data":[{"id":"a"},{"id":"b","owned_by":"vllm"}]}').kind == "vllm"
    assert read_models(b'{"data":[{"id":"a","owned_by":["vllm"]}]}').kind == "openai"


def test_entries_that_are_none_are_passed_over() -> None:
    entries = [
        '{"id":7}',
        '{"id":""}',
        "null",
        '"a"',
        "[]",
        "{}",
        '{"id":"good"}',
        '{"id":"good","again":1}',
        "[" * 200_000 + "]" * 200_000,
    ]
    assert read_models(f'{{"data":[{",".join(entries[:-1])}]}}'.encode()).cards == {"good": b'{"id":"good"}'}
    with pytest.raises(DiscoveryError):
        read_models(f'{{"data":[{entries[-1]}]}}'.encode())


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b"{}", b'{"data":{}}', b'{"data":[1', b'{"data":[{"id":"\xff"}]}x']
)
def test_what_is_no_list_of_models(body: bytes) -> None:  # failure 24
    with pytest.raises(DiscoveryError, match="not a list of models"):
        read_models(body)


@pytest.mark.parametrize(
    ("card", "length"),
    [
        (b'{"max_model_len":1024}', 1024),
        (b'{"meta":{"n_ctx":512}}', 512),
        (b'{"max_model_len":"many"}', None),
        (b'{"meta":[]}', None),
        (b"[]", None),
        (b"nonsense", None),
    ],
)
def test_the_context_length(card: bytes, length: int | None) -> None:
    assert max_model_len(card) == length


# -- how --


@asynccontextmanager
async def answering(answer: bytes, *, hang: bool = False) -> AsyncIterator[tuple[Backend, list[bytes]]]:
    """A server that says `answer` to whatever comes, and what came."""
    heard: list[bytes] = []
    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            heard.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            await writer.drain()
            if hang:
                await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Backend("b", "127.0.0.1", server.sockets[0].getsockname()[1]), heard
        await asyncio.gather(*(task for task in serving if task is not None))


def response(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def asked(
    answer: bytes, *, hang: bool = False, timeout_s: float = 20.0, api_key_env: str = ""
) -> tuple[Answer | str, bytes]:
    """(what was found or the error's text, the request)"""
    async with answering(answer, hang=hang) as (backend, heard), new_client(timeout_s) as client:
        backend = Backend("b", backend.host, backend.port, api_key_env=api_key_env)
        try:
            return await ask(client, backend, timeout_s), heard[0]
        except DiscoveryError as error:
            return str(error), b"".join(heard)


MODELS = b'{"data":[{"id":"a"}]}'


def test_a_vllm() -> None:
    async def run() -> tuple[Answer, str | None]:
        with ScriptedVLLM(models=["smollm2", "other"]) as vllm:
            backend = address_of(BackendSettings(url=vllm.url), "b")
            async with new_client(20) as client:
                return await ask(client, backend, 20), await ask_version(client, backend, 20)

    answer, version = asyncio.run(run())
    assert answer.kind == "vllm"
    assert list(answer.cards) == ["smollm2", "other"]
    assert json.loads(answer.cards["smollm2"])["id"] == "smollm2"
    assert max_model_len(answer.cards["smollm2"]) == 1024
    assert version is not None


def ask_over_tls(ca_file: Path, certificate: str = "server") -> Answer:
    async def run() -> Answer:
        with ScriptedVLLM(tls=server_context(certificate)) as vllm:
            backend = address_of(BackendSettings(url=vllm.url, ca_file=str(ca_file)), "b")
            async with new_client(20, backend.ca_file) as client:
                return await ask(client, backend, 20)

    return asyncio.run(run())


def test_a_vllm_that_speaks_tls() -> None:
    assert ask_over_tls(CA).kind == "vllm"


@pytest.mark.parametrize(
    ("certificate", "ca_file", "reason"),
    [
        ("expired", CA, "certificate has expired"),
        ("elsewhere", CA, "certificate is not valid for '127.0.0.1'"),
        ("server", OTHER_CA, "unable to get local issuer certificate"),
        ("server", Path("/nowhere.pem"), "ca_file: /nowhere.pem: No such file or directory"),
    ],
)
def test_what_cannot_be_trusted_is_not_asked(certificate: str, ca_file: Path, reason: str) -> None:
    with pytest.raises(DiscoveryError, match=re.escape(reason)):
        ask_over_tls(ca_file, certificate)


def test_a_good_answer_and_a_bare_request() -> None:
    answer, request = asyncio.run(asked(response(MODELS)))
    assert answer == Answer("openai", {"a": b'{"id":"a"}'})
    assert request.startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"authorization" not in request.lower()


def test_the_key_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", " canary\n")
    answer, request = asyncio.run(asked(response(MODELS), api_key_env="ENGINE_KEY"))
    assert isinstance(answer, Answer)
    assert b"authorization: bearer canary\r\n" in request.lower()


def test_a_key_that_no_header_can_hold_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:  # failure 76
    monkeypatch.setenv("ENGINE_KEY", "canary\nx: y")
    said, request = asyncio.run(asked(response(MODELS), api_key_env="ENGINE_KEY"))
    assert said == "the environment variable ENGINE_KEY holds what no header can hold"
    assert request == b""


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "`api_key_env` isn't set"),
        ("", "the environment variable ENGINE_KEY is empty"),
        ("canary", "it doesn't accept the key in ENGINE_KEY"),
    ],
)
def test_an_engine_that_wants_a_key(monkeypatch: pytest.MonkeyPatch, value: str | None, why: str) -> None:
    monkeypatch.setenv("ENGINE_KEY", value or "")
    said, _ = asyncio.run(asked(response(b"", "401 Unauthorized"), api_key_env="" if value is None else "ENGINE_KEY"))
    assert isinstance(said, str)
    assert said.startswith("/v1/models: HTTP 401")
    assert why in said
    assert "canary" not in said


def test_a_redirect_is_not_followed() -> None:  # failure 23
    async def run() -> tuple[Answer | str, list[bytes]]:
        async with answering(response(MODELS)) as (elsewhere, heard):
            said, _ = await asked(response(b"", "307 Temporary Redirect", f"location: {url_of(elsewhere)}/v1/models"))
            return said, heard

    assert asyncio.run(run()) == ("/v1/models: HTTP 307", [])


def test_no_proxy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:  # failure 72
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    answer, _ = asyncio.run(asked(response(MODELS)))
    assert isinstance(answer, Answer)


@pytest.mark.parametrize("hung", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"])
def test_a_hanging_engine(hung: bytes) -> None:  # failure 11
    said, _ = asyncio.run(asked(hung, hang=True, timeout_s=0.2))
    assert isinstance(said, str)


def test_an_answer_by_drops() -> None:
    """Each read succeeds in time; all of them together don't."""

    async def run() -> str:
        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.set_result(asyncio.current_task())
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.01)
            writer.close()

        served: asyncio.Future[asyncio.Task[None] | None] = asyncio.get_running_loop().create_future()
        async with await asyncio.start_server(drip, "127.0.0.1", 0) as server, new_client(20) as client:
            backend = Backend("b", "127.0.0.1", server.sockets[0].getsockname()[1])
            with pytest.raises(DiscoveryError) as caught:
                await ask(client, backend, 0.2)
            if (task := await served) is not None:
                await task
        return str(caught.value)

    assert asyncio.run(run()) == "/v1/models: no complete answer within 0.2 s"


def test_an_answer_without_end() -> None:  # failure 26
    said, _ = asyncio.run(asked(response(b"x" * (ANSWER_BYTES + 1))))
    assert said == f"/v1/models: an answer of more than {ANSWER_BYTES} bytes"


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", response(b"<html>hello</html>")]
)
def test_what_is_no_engine(answer: bytes) -> None:  # failure 24
    said, _ = asyncio.run(asked(answer))
    assert isinstance(said, str)
    assert said.startswith("/v1/models: ")


def test_nobody_there() -> None:
    async def run() -> None:
        async with answering(b"") as (backend, _):
            pass
        async with new_client(20) as client:
            with pytest.raises(DiscoveryError, match="/v1/models: "):
                await ask(client, backend, 20)
            assert await ask_version(client, backend, 20) is None

    asyncio.run(run())
