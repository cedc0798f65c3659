"""Tokenize and detokenize: a text and how long it is, or tokens and their text. llama.cpp calls a text `content`."""

from __future__ import annotations

from collectors.records.content.chat import chat_messages
from collectors.records.content.conversation import Conversation, conversation, plain_text, token_note
from collectors.records.content.loose_json import dict_of, list_of, parse_json, text_of


def read_tokenize(request: bytes, body: bytes) -> Conversation:
    asked = dict_of(parse_json(request))
    text = plain_text(asked.get("prompt", asked.get("content"))) or conversation(chat_messages(asked.get("messages"))).input_text
    answered = dict_of(parse_json(body))
    return Conversation(text, token_note(list_of(answered["tokens"])) if "tokens" in answered else "")


def read_detokenize(request: bytes, body: bytes) -> Conversation:
    tokens = list_of(dict_of(parse_json(request)).get("tokens"))
    answered = dict_of(parse_json(body))
    return Conversation(token_note(tokens), text_of(answered.get("prompt", answered.get("content"))))
