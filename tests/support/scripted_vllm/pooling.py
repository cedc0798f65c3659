"""Scores and ranks as vLLM 0.32 gives them: /v1/score and /v1/rerank, with their other paths. Sans-io, no clock.

Nothing was captured; the shapes are those of vLLM's protocol classes.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec

from tests.support.scripted_vllm import requests
from tests.support.scripted_vllm.events import Prepared
from tests.support.scripted_vllm.requests import Asked, Context, Refused, quote

_PAIRS: Final = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
_SEPARATORS: Final = 3  # of a query and a document in one prompt


class Score(Asked, kw_only=True):
    queries: Any = None
    documents: Any = None
    items: Any = None
    data_1: Any = None
    data_2: Any = None
    text_1: Any = None
    text_2: Any = None


class Rerank(Asked, kw_only=True):
    query: Any = None
    documents: Any = None
    top_n: int = 0


_score_decoder = msgspec.json.Decoder(Score)
_rerank_decoder = msgspec.json.Decoder(Rerank)


def read_score(raw: bytes, content_type: bytes | None) -> Score:
    """Raises Refused."""
    request = requests.read_as(_score_decoder, raw)
    if not any(getattr(request, one) is not None and getattr(request, other) is not None for one, other in _PAIRS):
        raise requests.invalid("missing", "body.queries", "Field required", size=len(msgspec.json.decode(raw)))
    return request


def read_rerank(raw: bytes, content_type: bytes | None) -> Rerank:
    """Raises Refused."""
    request = requests.read_as(_rerank_decoder, raw)
    for name in ("query", "documents"):
        if getattr(request, name) is None:
            raise requests.invalid("missing", f"body.{name}", "Field required", size=len(msgspec.json.decode(raw)))
    return request


def score(request: Score, context: Context) -> Prepared:
    """Raises Refused."""
    requests.check_pooling_model(request, context.models)
    ones, others = next(
        (_listed(getattr(request, one)), _listed(getattr(request, other)))
        for one, other in _PAIRS
        if getattr(request, one) is not None and getattr(request, other) is not None
    )
    if len(ones) not in (1, len(others)):
        raise Refused(400, "Input lengths must be either 1:1, 1:N or N:N")
    pairs = list(zip(ones * (len(others) // len(ones) or 1), others, strict=False))
    tokens = _tokens(pairs, context)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    answer = {
        "id": context.answer_id.decode(),
        "object": "list",
        "created": context.created,
        "model": request.model or context.models[0],
        "data": [{"index": i, "object": "score", "score": _score(*pair)} for i, pair in enumerate(pairs)],
        "usage": {**usage, "prompt_tokens_details": None, "completion_tokens_details": None},
    }
    return Prepared(quote(answer), prompt_tokens=tokens)


def rerank(request: Rerank, context: Context) -> Prepared:
    """Raises Refused."""
    requests.check_pooling_model(request, context.models)
    documents = _listed(request.documents)
    scores = [_score(request.query, document) for document in documents]
    best_first = sorted(range(len(documents)), key=scores.__getitem__, reverse=True)[: request.top_n or None]
    results = [{"index": i, "document": _document(documents[i]), "relevance_score": scores[i]} for i in best_first]
    tokens = _tokens([(request.query, document) for document in documents], context)
    answer = {
        "id": context.answer_id.decode(),
        "model": request.model or context.models[0],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results,
    }
    return Prepared(quote(answer), prompt_tokens=tokens)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _document(document: Any) -> dict[str, object]:
    if isinstance(document, str):
        return {"text": document, "multi_modal": None}
    return {"text": None, "multi_modal": document.get("content", [])}


def _score(query: object, document: object) -> float:
    """Some number between 0 and 1, the same for the same pair."""
    return (zlib.crc32(f"{query}\0{document}".encode()) % 1024) / 1024


def _tokens(pairs: list[tuple[object, object]], context: Context) -> int:
    return context.script.prompt_tokens or sum(
        requests.count_prompt(one) + requests.count_prompt(other) + _SEPARATORS for one, other in pairs
    )
