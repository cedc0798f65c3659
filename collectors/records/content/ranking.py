"""Rerank and score: documents by how well they answer a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from collectors.records.content.conversation import Conversation, Document, Ranking, plain_text
from collectors.records.content.loose_json import dict_of, list_of, number_of, parse_json

_PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
"""What score may call its two sides."""
_SHOWN = 200
"""Characters of each document in the text of an answer."""


def read_rerank(request: bytes, body: bytes) -> Conversation:
    asked = dict_of(parse_json(request))
    results = [dict_of(entry) for entry in list_of(dict_of(parse_json(body)).get("results"))]
    return _ranked(_text(asked.get("query")), _texts(asked.get("documents")), results, "relevance_score")


def read_score(request: bytes, body: bytes) -> Conversation:
    asked = dict_of(parse_json(request))
    one, other = next((pair for pair in _PAIRS if pair[0] in asked and pair[1] in asked), _PAIRS[0])
    results = [dict_of(entry) for entry in list_of(dict_of(parse_json(body)).get("data"))]
    return _ranked("\n".join(_texts(asked.get(one))), _texts(asked.get(other)), results, "score")


def _ranked(query: str, texts: Sequence[str], results: Sequence[dict[str, Any]], score: str) -> Conversation:
    ranked = []
    for position, result in enumerate(results):
        index = result.get("index")
        at = index if isinstance(index, int) else position
        ranked.append(Document(texts[at] if 0 <= at < len(texts) else "", number_of(result.get(score))))
    lines = [f"{'?' if each.score is None else f'{each.score:.4g}'}  {each.text[:_SHOWN]}" for each in ranked]
    return Conversation(query, "\n".join(lines), ranking=Ranking(query, [Document(text) for text in texts], ranked))


def _texts(value: object) -> list[str]:
    """Of one text, or of several."""
    return [_text(each) for each in (value if isinstance(value, list) else [value]) if each is not None]


def _text(value: object) -> str:
    fields = dict_of(value)
    return plain_text(next((fields[name] for name in ("text", "content") if name in fields), value))
