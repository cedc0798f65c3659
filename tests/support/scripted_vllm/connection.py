"""One client connection of the scripted server: requests in, the steps of their answers out."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import httptools

from tests.support.scripted_vllm.answers import Answer, Headers, Received, answer
from tests.support.scripted_vllm.framing import Step
from tests.support.scripted_vllm.generation import Call

if TYPE_CHECKING:
    from tests.support.scripted_vllm.server import ScriptedVLLM

_BURST: Final = 64  # steps without a wait before other connections get their turn
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends a reset
_INVALID: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: 31\r\n\r\nInvalid HTTP request received."
)


class Connection(asyncio.Protocol):
    """Requests that are pipelined wait for their turn."""

    def __init__(self, server: ScriptedVLLM) -> None:
        # for the life of the connection
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.number = 0
        self.blocked = False
        self.waiting: deque[tuple[Received, bool]] = deque()
        self.idle_since = 0.0
        self.idle_timer: asyncio.TimerHandle | None = None
        self.parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport
        # for the request that is being received
        self.receiving = False
        self.url = b""
        self.headers: Headers = []
        self.body: list[bytes] = []
        # for the request that is being answered
        self.current: Received | None = None
        self.call: Call | None = None
        self.steps: Iterator[Step] = iter(())
        self.pending: Step | None = None
        self.due = 0.0
        self.timer: asyncio.Handle | None = None
        self.hung = False
        self.stays = True

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a TCP server's transport is always a Transport
        self.server.connections += 1
        self.number = self.server.connections
        self.server.open.add(self)
        self.server.notify()

    def data_received(self, data: bytes) -> None:
        self.receiving = True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.write(_INVALID)
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.idle_timer is not None:
            self.idle_timer.cancel()
        self.timer = self.idle_timer = None
        self.waiting.clear()
        if self.current is not None:
            self._end("aborted")
        self.server.forget(self)

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        if self.current is not None and self.timer is None and not self.hung:
            self.advance()

    # --- httptools ---

    def on_message_begin(self) -> None:
        self.url, self.headers, self.body = b"", [], []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.receiving = False
        received = Received(
            self.parser.get_method().decode(),
            self.url.decode("latin-1"),
            self.headers,
            self.body[0] if len(self.body) == 1 else b"".join(self.body),
            time.monotonic(),
            self.number,
        )
        stays = self.parser.should_keep_alive()
        if self.server.remember:
            self.server.requests.append(received)
        if self.current is None:
            self._begin(received, stays)
        else:
            self.waiting.append((received, stays))

    # --- answering ---

    def _begin(self, received: Received, stays: bool) -> None:
        self.stays = stays
        found = answer(self.server, received)
        if found.data:
            self._answer_at_once(received, found)
            return
        self.current, self.call, self.steps = received, found.call, found.steps
        self.server.prompt_tokens += found.prompt_tokens
        self.server.in_flight += 1
        self.server.notify()
        self.due = self.loop.time()
        self.advance()

    def _answer_at_once(self, received: Received, found: Answer) -> None:
        if found.call is not None:
            self._count_prompt(found.call)
            received.generated = found.call.completion_tokens
            self.server.generated_tokens += received.generated
            self._count_finished(found.call)
        self.server.prompt_tokens += found.prompt_tokens
        received.sent = len(found.data)
        received.outcome = "done"
        self.transport.write(found.data)
        self.server.notify()
        self._next()

    def advance(self) -> None:
        """Take steps until one must wait: for time, for the client to read, for other connections, or for release()."""
        self.timer, self.hung = None, False
        for _ in range(_BURST):
            if self.current is None or self.blocked:
                return
            step, self.pending = self.pending, None
            if step is None:
                step = next(self.steps)
                self.due += step.wait
                if step.wait and self.due > self.loop.time():
                    self.pending = step
                    self.timer = self.loop.call_at(self.due, self.advance)
                    return
            self._take(self.current, step)
            if step.then:
                return
            if step.apart:
                break
        if self.current is not None:
            self.timer = self.loop.call_soon(self.advance)

    def _take(self, received: Received, step: Step) -> None:
        if step.tokens:
            if not received.generated and self.call is not None:
                self._count_prompt(self.call)
            received.generated += step.tokens
            self.server.generated_tokens += step.tokens
        if step.data:
            received.sent += len(step.data)
            self.transport.write(step.data)
        match step.then:
            case "end":
                if self.call is not None:
                    self._count_finished(self.call)
                self._end("done")
                self._next()
            case "hang":
                self.hung = True
                self.server.hold(self)
            case "close":
                self._end("cut")
                self.transport.close()
            case "reset":
                self._end("cut")
                self._reset_when_sent()
            case _ if step.data or step.tokens:
                self.server.notify()

    def _end(self, outcome: str) -> None:
        assert self.current is not None
        received, self.current = self.current, None
        received.outcome = outcome
        self.call, self.steps, self.pending = None, iter(()), None
        if outcome == "aborted" and self.server.remember:
            self.server.aborted.append(received)
        self.server.in_flight -= 1
        self.server.notify()

    def _next(self) -> None:
        if not self.stays:
            self.transport.close()
        elif self.waiting:
            self._begin(*self.waiting.popleft())
        else:
            self.idle_since = self.loop.time()
            if self.idle_timer is None:
                self.idle_timer = self.loop.call_later(self.server.keep_alive, self._idle)

    def _idle(self) -> None:
        """One timer a connection, set anew only when it fires: most connections are used again long before."""
        self.idle_timer = None
        if self.current is not None:
            return  # the end of the answer sets the timer again
        left = self.idle_since + self.server.keep_alive - self.loop.time()
        if left > 0 or self.receiving:
            self.idle_timer = self.loop.call_later(max(left, 0.01), self._idle)
        else:
            self.transport.close()

    def _count_prompt(self, call: Call) -> None:
        # vLLM counts a prompt once for each sequence made from it.
        self.server.prompt_tokens += sum(call.prompts[choice.prompt] for choice in call.choices)
        self.server.cached_tokens += call.script.cached_tokens or 0

    def _count_finished(self, call: Call) -> None:
        for choice in call.choices:
            self.server.finished["stop" if choice.finish == "tool_calls" else choice.finish] += 1

    # --- ending badly ---

    def _reset_when_sent(self) -> None:
        """What was written before the reset is to arrive; an abort would throw it away."""
        if self.transport.get_write_buffer_size():
            self.timer = self.loop.call_later(0.001, self._reset_when_sent)
        else:
            self.reset()

    def reset(self) -> None:
        if not self.transport.is_closing():
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
