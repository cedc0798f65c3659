"""The embedded engine: SmolLM2-135M-Instruct on llama.cpp's HTTP server, speaking OpenAI's API. What it does: `llama_server`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from proxy.embedded import HOST, Companion, script_argv, sealed_environment

MODEL_NAME: Final = "smollm2-135m"

# 1024 tokens for each of four requests at once. 4096 tokens of context take 92 MiB; the weights and the rest 160 MiB.
SLOTS: Final = 4
CONTEXT_TOKENS: Final = 4096
# llama.cpp's default is 8 GiB, which a machine that also runs everything else does not have.
PROMPT_CACHE_MIB: Final = 64
# More threads than this make a model of this size no faster.
MAX_THREADS: Final = 4


def threads_each(engines: int, cpus: int) -> int:
    """How many threads each of `engines` gets on a machine of `cpus`, so that together they don't fight over the cores."""
    return max(1, min(MAX_THREADS, cpus // engines))


def engine(name: str, python: Path, port: int, threads: int = 1) -> Companion:
    """One engine called `name` on loopback; `python` is the interpreter of the environment `environments.ENGINE`.

    Its base URL as a backend is `http://127.0.0.1:<port>`, its model `MODEL_NAME`.
    """
    return Companion(
        name=name,
        argv=script_argv(
            python,
            "llama_server.py",
            f"--host={HOST}",
            f"--port={port}",
            f"--model-name={MODEL_NAME}",
            f"--threads={threads}",
            f"--slots={SLOTS}",
            f"--context={CONTEXT_TOKENS}",
            f"--prompt-cache-mib={PROMPT_CACHE_MIB}",
        ),
        env=sealed_environment(),
        ready_url=f"http://{HOST}:{port}/health",
        stop_timeout=5.0,
        notice=f"{name}: {MODEL_NAME} on llama.cpp, http://{HOST}:{port}, loopback only",
    )
