"""What is particular about servers of one kind: one file a kind, and this table. What all of them have in common is HTTP and
OpenAI's API, and that is in `call.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from proxy.relay.backends import openai, vllm
from proxy.relay.backends.kind import Kind, Verdict

KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in (openai.KIND, vllm.KIND)}

__all__ = ["KINDS", "Kind", "Verdict"]
