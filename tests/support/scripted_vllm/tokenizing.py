"""vLLM's /tokenize and /detokenize. Sans-io, no clock.

A prompt has as many tokens here as its requests are told in `usage`. The numbers of the tokens are SmolLM2's for the words of
the captured answers, and made up for all others: those don't come back as the text that they were.
"""

from __future__ import annotations

import zlib
from typing import Final

import msgspec

from tests.support.scripted_vllm import generation, requests
from tests.support.scripted_vllm.events import Prepared
from tests.support.scripted_vllm.requests import Asked, Context, quote

_KNOWN: Final = {"Hello": 19556, " world": 905, "The": 504, " capital": 3575, " of": 282}
_TEXTS: Final = {number: text for text, number in _KNOWN.items()}
_VOCABULARY: Final = 49_152


class Tokenize(Asked, kw_only=True):
    prompt: str | None = None
    messages: msgspec.Raw = msgspec.Raw()
    return_token_strs: bool | None = None


class Detokenize(Asked, kw_only=True):
    tokens: list[int] | None = None


_tokenize_decoder = msgspec.json.Decoder(Tokenize)
_detokenize_decoder = msgspec.json.Decoder(Detokenize)


def read_tokenize(raw: bytes, content_type: bytes | None) -> Tokenize:
    """Raises Refused."""
    request = requests.read_as(_tokenize_decoder, raw)
    if request.prompt is None and not requests.present(request.messages):
        raise requests.invalid("missing", "body.prompt", "Field required", size=len(msgspec.json.decode(raw)))
    return request


def read_detokenize(raw: bytes, content_type: bytes | None) -> Detokenize:
    """Raises Refused."""
    request = requests.read_as(_detokenize_decoder, raw)
    if request.tokens is None:
        raise requests.invalid("missing", "body.tokens", "Field required", size=len(msgspec.json.decode(raw)))
    return request


def tokenize(request: Tokenize, context: Context) -> Prepared:
    """Raises Refused."""
    requests.check_model(request, context.models)
    if request.prompt is not None:
        texts = generation.pieces_of(request.prompt)
    else:
        texts = ["<|im_start|>"] * requests.count_messages(bytes(request.messages))
    tokens = [_KNOWN.get(text, zlib.crc32(text.encode()) % _VOCABULARY) for text in texts]
    strings = [text.replace(" ", "Ġ") for text in texts] if request.return_token_strs else None
    answer = {"count": len(tokens), "max_model_len": context.max_model_len, "tokens": tokens, "token_strs": strings}
    return Prepared(quote(answer))


def detokenize(request: Detokenize, context: Context) -> Prepared:
    """Raises Refused."""
    requests.check_model(request, context.models)
    return Prepared(quote({"prompt": "".join([_TEXTS.get(token) or f" {token}" for token in request.tokens or []])}))
