"""Asking a backend what it serves: `GET /v1/models`, and a vLLM which one it is: `GET /version`.

What a backend says is kept as it said it: the entry of a model is its *card*, raw JSON, which workers hand on to clients.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx2
import msgspec

from proxy.nouns import BackendSettings
from proxy.snapshot import Backend
from proxy.tls import said, upstream_context

ANSWER_BYTES = 8 * 1024 * 1024
"""More than this is no list of models."""

MOST_TOKENS = 2**53
"""What a number in JSON can count exactly. More is no length."""

Kind = Literal["vllm", "openai"]


class DiscoveryError(Exception):
    """A backend didn't say what it serves; the text says why, for people."""


class Answer(msgspec.Struct, frozen=True):
    """What a backend serves: model → card, in the backend's order. `version`: of its engine; "": it doesn't say."""

    kind: Kind
    cards: dict[str, bytes]
    version: str = ""


class _Models(msgspec.Struct):
    data: list[msgspec.Raw]


class _Entry(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1)]
    owned_by: Any = None


class _Version(msgspec.Struct):
    version: str


_models = msgspec.json.Decoder(_Models)
_version = msgspec.json.Decoder(_Version)
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def address_of(settings: BackendSettings, name: str) -> Backend:
    """The backend as workers call it: host, port, and what precedes `/v1` in its URL. `kind` is what is declared, or "openai"."""
    parts = urlsplit(settings.url)
    tls = parts.scheme == "https"
    return Backend(
        name=name,
        host=parts.hostname or "",
        port=parts.port or (443 if tls else 80),
        kind="openai" if settings.kind == "auto" else settings.kind,
        base_path=parts.path.rstrip("/").removesuffix("/v1").rstrip("/"),
        api_key_env=settings.api_key_env or "",
        tls=tls,
        ca_file=settings.ca_file or "",
    )


def url_of(backend: Backend) -> str:
    """The backend's root, without `/v1`."""
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    return f"{'https' if backend.tls else 'http'}://{host}:{backend.port}{backend.base_path}"


def new_client(timeout_s: float, ca_file: str = "") -> httpx2.AsyncClient:
    """A client for backends: goes through no proxy, follows no redirect (it would take the backend's key elsewhere), and takes
    the certificates that workers take. Raises DiscoveryError if `ca_file` can't be used."""
    try:
        context = upstream_context(ca_file)
    except OSError as error:
        raise DiscoveryError(f"ca_file: {ca_file}: {said(error)}") from None
    return httpx2.AsyncClient(timeout=timeout_s, verify=context, follow_redirects=False, trust_env=False)


async def ask(client: httpx2.AsyncClient, backend: Backend, timeout_s: float) -> Answer:
    """What `backend` serves. Raises DiscoveryError."""
    return read_models(await _get(client, backend, "/v1/models", timeout_s))


async def ask_version(client: httpx2.AsyncClient, backend: Backend, timeout_s: float) -> str | None:
    """The engine's version, if it has an answer at vLLM's `/version`."""
    try:
        return _version.decode(await _get(client, backend, "/version", timeout_s)).version
    except (DiscoveryError, *_UNREADABLE):
        return None


def read_models(body: bytes) -> Answer:
    """An OpenAI model list. Entries without an id are passed over. Raises DiscoveryError."""
    try:
        entries = _models.decode(body).data
    except _UNREADABLE as error:
        raise DiscoveryError(f"/v1/models: not a list of models: {error}") from None
    cards: dict[str, bytes] = {}
    kind: Kind = "openai"
    for raw in entries:
        try:
            fields = msgspec.json.decode(raw)  # in full: workers hand the card on, and nobody looks at it again
            entry = msgspec.convert(fields, _Entry)
        except _UNREADABLE:
            continue
        cards.setdefault(entry.id, bytes(raw))
        if entry.owned_by == "vllm":
            kind = "vllm"
    return Answer(kind, cards)


def max_model_len(card: bytes) -> int | None:
    """The context length that a card tells: vLLM's `max_model_len`, llama.cpp's `meta.n_ctx`."""
    try:
        fields = msgspec.json.decode(card)
    except msgspec.MsgspecError:
        return None
    if not isinstance(fields, dict):
        return None
    meta = fields.get("meta")
    found = fields.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return found if type(found) is int and 0 < found <= MOST_TOKENS else None  # type(): a bool is an int too


async def _get(client: httpx2.AsyncClient, backend: Backend, path: str, timeout_s: float) -> bytes:
    """The body of a 200. `timeout_s` is for all of it. Raises DiscoveryError."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("GET", url_of(backend) + path, headers=_headers(backend)) as response,
        ):
            if response.status_code != 200:
                raise DiscoveryError(f"{path}: HTTP {response.status_code}{_why(response.status_code, backend)}")
            return await _body(response, path)
    except TimeoutError:
        raise DiscoveryError(f"{path}: no complete answer within {timeout_s:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DiscoveryError(f"{path}: {str(error) or type(error).__name__}") from None


async def _body(response: httpx2.Response, path: str) -> bytes:
    parts = bytearray()
    async for part in response.aiter_bytes():
        parts += part
        if len(parts) > ANSWER_BYTES:
            raise DiscoveryError(f"{path}: an answer of more than {ANSWER_BYTES} bytes")
    return bytes(parts)


def _headers(backend: Backend) -> dict[str, str]:
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    if key := os.environ.get(backend.api_key_env, "").strip():
        if not (key.isascii() and key.isprintable()):  # a client library would say so too, with the key in its text
            raise DiscoveryError(f"the environment variable {backend.api_key_env} holds what no header can hold")
        headers["authorization"] = f"Bearer {key}"
    return headers


def _why(status: int, backend: Backend) -> str:
    if status not in (401, 403):
        return ""
    if not backend.api_key_env:
        return " (it wants a key, and `api_key_env` isn't set)"
    if not os.environ.get(backend.api_key_env, "").strip():
        return f" (it wants a key, and the environment variable {backend.api_key_env} is empty)"
    return f" (it doesn't accept the key in {backend.api_key_env})"
