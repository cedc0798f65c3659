"""Prompts and answers out of raw bodies. One file an API, as in `proxy/wire`; `conversation.py` is what they make of it.

Bodies are whatever a caller and an engine wrote, possibly cut off: nothing here raises, and what can be read is read. Pictures,
sound and files become a note of what was there: their bytes would drown the text, and a URL in a trace would be fetched by
whoever looks at it. Calls of tools come whole, arguments and all.
"""

from __future__ import annotations

from collections.abc import Callable

from collectors.records.content.audio import read_audio
from collectors.records.content.chat import read_chat, read_completions, read_embeddings
from collectors.records.content.conversation import Conversation, Document, Message, Ranking
from collectors.records.content.messages import read_count_tokens, read_messages
from collectors.records.content.ranking import read_rerank, read_score
from collectors.records.content.responses import read_responses
from collectors.records.content.tokens import read_detokenize, read_tokenize
from proxy.journal import Content

__all__ = ["READERS", "Conversation", "Document", "Message", "Ranking", "read_content"]

READERS: dict[str, Callable[[bytes, bytes], Conversation]] = {
    "chat": read_chat,
    "completions": read_completions,
    "responses": read_responses,
    "messages": read_messages,
    "count_tokens": read_count_tokens,
    "embeddings": read_embeddings,
    "rerank": read_rerank,
    "score": read_score,
    "transcriptions": read_audio,
    "translations": read_audio,
    "tokenize": read_tokenize,
    "detokenize": read_detokenize,
}
"""By the operation's name: (request, answer) → what was said."""


def read_content(operation: str, content: Content) -> Conversation:
    """Never raises. An operation that isn't known has said nothing."""
    reader = READERS.get(operation)
    return Conversation() if reader is None else reader(content.request, content.answer)
