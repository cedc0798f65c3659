"""OpenAI's API, as vLLM speaks it, as data: bytes in, facts out.

No socket, no clock, no asyncio: time comes in as an argument, so every rule here can be tested with a transcript. One file an
endpoint (`operations.py` is the table), `sse.py` frames events across any chunk borders, `stream.py` watches a stream go by and
takes out what the proxy had asked for, `usage.py` reads token counts, `body.py` reads and rewrites a request's top level.
"""
