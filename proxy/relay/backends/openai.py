"""Any server with OpenAI's API: llama.cpp, TensorRT-LLM's trtllm-serve, TGI, SGLang, another proxy, a provider."""

from __future__ import annotations

from proxy.relay.backends.kind import Kind, Verdict


def judge(status: int, error_type: str, message: str) -> Verdict:
    """By the status alone: what the words mean differs."""
    if status == 429:
        return Verdict.BUSY
    if status in (502, 503, 504):
        return Verdict.FAILING
    return Verdict.BROKEN if status >= 500 else Verdict.FINE


KIND = Kind(name="openai", judge=judge)
