"""A real HTTP/1.1 server that plays vLLM 0.32: true shapes, scripted behaviour.

    with ScriptedVLLM() as vllm:
        post(vllm.url + "/v1/chat/completions", {..., "script": {"tokens": 64, "interval": 0.01}})

or, as a process: `python -m tests.support.scripted_vllm --port 0`.
"""

from tests.support.scripted_vllm.answers import Received
from tests.support.scripted_vllm.script import Script
from tests.support.scripted_vllm.server import ScriptedVLLM

__all__ = ["Received", "Script", "ScriptedVLLM"]
