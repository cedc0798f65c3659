"""`python -m tests.support.scripted_vllm --port 0`: prints {"port": …} once it listens, and serves until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import sys

import msgspec
import uvloop

from tests.support.scripted_vllm.script import Script
from tests.support.scripted_vllm.server import ScriptedVLLM


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripted_vllm", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", help="a name to serve (default: smollm2)")
    parser.add_argument("--script", default="{}", help="the script of requests that bring none, as JSON")
    parser.add_argument("--keep-alive", type=float, default=5.0)
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when standard input does")
    options = parser.parse_args()
    server = ScriptedVLLM(
        host=options.host,
        port=options.port,
        models=options.model or ("smollm2",),
        default=msgspec.json.decode(options.script, type=Script),
        keep_alive=options.keep_alive,
        remember=False,
    )
    uvloop.run(serve(server, with_stdin=options.exit_with_stdin))


async def serve(server: ScriptedVLLM, *, with_stdin: bool) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if with_stdin:
        loop.add_reader(sys.stdin.fileno(), stopped.set)
    await server.listen()
    print(json.dumps({"port": server.port, "url": server.url}), flush=True)
    gc.freeze()
    await stopped.wait()


if __name__ == "__main__":
    main()
