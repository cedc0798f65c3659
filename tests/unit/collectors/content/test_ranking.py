"""Rerank and score."""

from __future__ import annotations

from typing import Any

import pytest

from collectors.records.content import Conversation, Document, Ranking
from tests.unit.collectors.content.said import read

QUERY = "What is the capital of France?"
DOCUMENTS = ["Bread is made of flour.", "Paris is the capital of France."]


def result(index: int, score: object, text: str | None) -> dict[str, Any]:
    return {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": score}


def test_a_rerank() -> None:
    answer = {"id": "score-1", "results": [result(1, 0.98765, DOCUMENTS[1]), result(0, 0.01, DOCUMENTS[0])]}
    said = read("rerank", {"query": QUERY, "documents": DOCUMENTS}, answer)
    assert said == Conversation(
        QUERY,
        "0.9877  Paris is the capital of France.\n0.01  Bread is made of flour.",
        ranking=Ranking(
            QUERY,
            [Document(text) for text in DOCUMENTS],
            [Document(DOCUMENTS[1], 0.98765), Document(DOCUMENTS[0], 0.01)],
        ),
    )


@pytest.mark.parametrize("names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")])
def test_a_score(names: tuple[str, str]) -> None:
    answer = {"data": [{"index": 0, "object": "score", "score": 0.25}, {"index": 1, "object": "score", "score": 1}]}
    said = read("score", dict(zip(names, (QUERY, DOCUMENTS), strict=True)), answer)
    assert said.ranking == Ranking(
        QUERY, [Document(text) for text in DOCUMENTS], [Document(DOCUMENTS[0], 0.25), Document(DOCUMENTS[1], 1.0)]
    )
    assert said.output_text == "0.25  Bread is made of flour.\n1  Paris is the capital of France."


def test_a_score_of_pairs() -> None:
    said = read("score", {"text_1": ["one", "two"], "text_2": ["eins", "zwei"]}, {"data": [{"index": 1, "score": 0.5}]})
    assert (said.input_text, said.output_text) == ("one\ntwo", "0.5  zwei")


def test_texts_in_all_their_shapes() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    documents = ["plain", {"text": "named"}, {"content": [{"type": "text", "text": "seen: "}, picture]}, {"title": "odd"}, None]
    said = read("rerank", {"query": {"content": [{"type": "text", "text": "Which?"}]}, "documents": documents})
    assert said.ranking is not None
    assert said.ranking.query == said.input_text == "Which?"
    shown = ["plain", "named", "seen: [image_url: image/png;base64, 26 characters]", '{"title":"odd"}']
    assert [document.text for document in said.ranking.documents] == shown
    assert read("rerank", {"query": "x", "documents": "only one"}).ranking == Ranking("x", [Document("only one")], [])


def test_odd_results() -> None:
    results = [result(7, 0.5, "x"), result(-1, 10**400, None), {"relevance_score": "high"}, 5]
    said = read("rerank", {"query": QUERY, "documents": DOCUMENTS}, {"results": results})
    assert said.ranking is not None
    assert said.ranking.ranked == [Document("", 0.5), Document("", None), Document("", None), Document("", None)]
    assert read("rerank", {}, {"error": {"message": "No."}}).ranking == Ranking("", [], [])
