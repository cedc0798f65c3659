"""Tokenize and detokenize."""

from __future__ import annotations

from collectors.records.content import Conversation, read_content
from proxy.journal import Content
from tests.unit.collectors.content.said import FIXTURES, fixture, read


def test_a_real_vllm() -> None:
    assert read_content("tokenize", fixture("tokenize")) == Conversation("Hello world", "[2 tokens]")
    assert read_content("tokenize", fixture("tokenize_chat")) == Conversation("What is the capital of France?", "[37 tokens]")
    assert read_content("detokenize", fixture("detokenize")) == Conversation("[3 tokens]", "The capital of")


def test_a_real_llama_cpp() -> None:
    answer = (FIXTURES / "llamacpp" / "tokenize.body").read_bytes()
    assert read_content("tokenize", Content(b'{"content":"Hello world"}', answer)) == Conversation("Hello world", "[2 tokens]")
    assert read("detokenize", {"tokens": [1]}, {"content": "Hello"}) == Conversation("[1 tokens]", "Hello")


def test_an_engines_error_says_nothing() -> None:
    assert read("tokenize", {}, {"error": {}}) == Conversation("", "")
    assert read("detokenize", {"tokens": "odd"}, {"error": {}}) == Conversation("[0 tokens]", "")
