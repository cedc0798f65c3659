"""vLLM's own server. Source: vLLM 0.32, tried; its `api_server.py` and `protocol.py`."""

from __future__ import annotations

from proxy.relay.backends import openai
from proxy.relay.backends.kind import Kind, Verdict

_DEAD = ("EngineCore", "EngineDead", "cannot schedule new futures after shutdown")
"""The engine's process has died, or its server is being shut down: everything that is asked from then on gets one of these."""


def judge(status: int, error_type: str, message: str) -> Verdict:
    if status == 500 and any(words in message for words in _DEAD):
        return Verdict.DEAD
    if status == 404 and error_type == "NotFoundError" and "does not exist" in message:
        return Verdict.ELSEWHERE
    if status == 404 and message.startswith("Response with id"):
        return Verdict.STRANGER
    if status == 503:
        return Verdict.BUSY  # `--max-num-queued-reqs`: its queue is full
    return openai.judge(status, error_type, message)


KIND = Kind(name="vllm", judge=judge, health_path=b"/health")
