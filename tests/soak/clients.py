"""The load of a soak: clients of every kind, the good, the slow and the bad, each on a connection that it keeps while it may."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from tests.server.test_operations import CASES, FORM, STREAMS, Case, form
from tests.soak.exact import Asked
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, MODEL

PATIENCE: Final = 60.0
NO_MEMORY: Final = "The engine is out of memory."
"""Who says that he is dead must be: otherwise he loses requests that he would have answered."""
_TEXT: Final = re.compile(rb'^(?:event: [a-z_.]*delta\ndata: |data: .*"choices":).*"(?:content|text|delta)": ?"(?!")', re.DOTALL)
"""An event that brings a token: of chunks any with text, of typed events a delta."""
MESSAGE_TOKENS: Final = 50
"""What the requests for messages allow."""
_names = count(1)


@dataclass
class Key:
    secret: str
    revoked: bool = False


@dataclass
class Keys:
    """Those that work, and one that did."""

    working: list[Key]
    revoked: list[Key] = field(default_factory=list)


class Clients:
    """`with Clients(url, keys, number, seed) as clients:` is load. `asked` is all that was asked so far."""

    def __init__(self, url: str, keys: Keys, number: int, seed: int, pause_s: float) -> None:
        self.url = url
        self.keys = keys
        self.pause_s = pause_s
        self.asked: list[Asked] = []
        self.over = threading.Event()
        self.broken: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(random.Random(seed + each),)) for each in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, dice: random.Random) -> None:
        client = _Client(self, dice)
        try:
            while not self.over.is_set():
                client.ask()
                self.over.wait(dice.expovariate(1 / self.pause_s))
        except BaseException as error:
            self.broken.append(error)
            self.over.set()
        finally:
            client.leave()


class _Client:
    def __init__(self, load: Clients, dice: random.Random) -> None:
        self._load = load
        self._dice = dice
        self._client: WireClient | None = None
        self._connected = 0.0
        self._key = load.keys.working[0]
        self._kinds: list[Callable[[], None]] = []
        for weight, kind in (
            *((6, self.whole), (8, self.stream), (4, self.leave_a_stream), (2, self.leave_an_answer), (1, self.reset_a_stream)),
            *(
                (2, self.read_slowly),
                (0.3, self.stop_reading),
                (1, self.be_refused),
                (2, self.use_a_bad_key),
                (0.5, self.talk_rubbish),
            ),
            *((1, self.meet_a_failing_engine), (0.2, self.meet_a_silent_engine), (0.5, self.send_two_at_once)),
        ):
            self._kinds += [kind] * round(10 * weight)

    def ask(self) -> None:
        self._dice.choice(self._kinds)()

    def leave(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # -- kinds of requests --

    def whole(self) -> None:
        case = self._dice.choice(CASES)
        tokens, prompt = self._dice.randint(1, 40), self._dice.randint(1, 500)
        script = {"tokens": tokens, "prompt_tokens": prompt, "interval": self._dice.choice([0, 0, 0.01])}
        self._exchange(f"whole {case.path}", case, {"script": script}, tokens=None, most=None, read_usage=True)

    def stream(self) -> None:
        case = self._dice.choice(STREAMS)
        tokens, prompt, choices = self._dice.randint(1, 60), self._dice.randint(1, 500), 1
        more: dict[str, Any] = {"stream": True, "script": self._timing(tokens, prompt)}
        if case.path.endswith("completions"):
            choices = more["n"] = self._dice.choice([1, 1, 1, 2, 4])
            if self._dice.random() < 0.5:
                more["stream_options"] = {"include_usage": True}
        tokens = tokens * choices if "messages" not in case.path else min(tokens, MESSAGE_TOKENS)
        self._exchange(f"stream {case.path}", case, more, tokens=(prompt, tokens), most=tokens)

    def leave_a_stream(self) -> None:
        """After some events, or before any."""
        case, tokens = self._dice.choice(STREAMS), self._dice.randint(10, 80)
        more = {"stream": True, "script": self._timing(tokens, 7)}
        asked = self._begin(f"left {case.path}", case, more, most=tokens)
        if asked is None or self._client is None:
            return
        events = self._dice.choice([0, 1, 5, 20])
        if events == 0:
            self._load.over.wait(self._dice.uniform(0, 0.3))
            self._left(asked, None)
            return
        with contextlib.suppress(OSError):
            self._left(asked, self._client.read(events=events))
        self._end(asked)

    def leave_an_answer(self) -> None:
        """That isn't streamed, while the engine works at it."""
        case = self._dice.choice(STREAMS)
        script = {"tokens": 40, "prompt_tokens": 7, "interval": 0.02}
        asked = self._begin(f"left whole {case.path}", case, {"script": script}, most=None)
        if asked is not None:
            self._load.over.wait(self._dice.uniform(0, 0.6))
            self._left(asked, None)

    def reset_a_stream(self) -> None:
        tokens = 60
        more = {"stream": True, "script": {"tokens": tokens, "prompt_tokens": 7, "interval": 0.02}}
        asked = self._begin("reset", CASES[0], more, most=tokens)
        if asked is None or self._client is None:
            return
        with contextlib.suppress(OSError):
            self._saw(asked, self._client.read(events=3))
        if self._client is not None:
            self._client.reset()
        self._left(asked, None)

    def read_slowly(self) -> None:
        """A few KB at a time, from a small buffer: the engine is made to wait."""
        self.leave()
        tokens = 400
        more = {"stream": True, "script": {"tokens": tokens, "prompt_tokens": 7}}
        asked = self._begin("slow", CASES[0], more, most=tokens, receive_buffer=4096)
        if asked is None or self._client is None:
            return
        asked.tokens = (7, tokens)
        try:
            reply = self._client.read_head()
            while reply.ending == "open":
                reply = self._client.read(events=len(reply.events) + 40, size=4096)
                time.sleep(self._dice.uniform(0, 0.2))
            self._saw(asked, reply)
        except OSError as error:
            asked.ending, asked.detail = "failed", repr(error)
        self._end(asked)
        self.leave()

    def stop_reading(self) -> None:
        """Never read a byte: after `client_write` the proxy lets go."""
        self.leave()
        more = {"stream": True, "script": {"tokens": 1000, "prompt_tokens": 7, "content": "word " * 1000 * 12}}
        asked = self._begin("stopped", CASES[0], more, most=12_001, receive_buffer=4096)
        if asked is None:
            return
        asked.sound, asked.outcomes = False, frozenset({"client_gone"})
        self._load.over.wait(8)
        self._left(asked, None)

    def be_refused(self) -> None:
        """By us, or by an engine."""
        wrong: list[tuple[str, dict[str, Any], dict[str, str], str]] = [
            ("no model", {"model": "no-such-model"}, {}, "client_error"),
            ("too many", {"n": 10_000}, {}, "client_error"),
            ("twice", {}, {}, "client_error"),
            ("media", {}, {"Content-Type": "text/plain"}, "client_error"),
            ("engine 400", {"script": {"status": 400}}, {}, "client_error"),
            ("engine 429", {"script": {"status": 429}}, {}, "upstream_error"),
            ("engine 500", {"script": {"status": 500}}, {}, "upstream_error"),
            ("engine 503", {"script": {"status": 503}, "stream": True}, {}, "upstream_error"),
        ]
        kind, more, headers, outcome = self._dice.choice(wrong)
        body: object = {"model": MODEL, **CASES[0].fields, **more}
        if kind == "twice":
            body = b'{"model":"smollm2","model":"smollm2","messages":[]}'
        self._send(f"refused: {kind}", CHAT, body, headers, sound=False, outcomes=frozenset({outcome}))

    def use_a_bad_key(self) -> None:
        """So often that they are more than an address may try."""
        revoked = self._load.keys.revoked
        key = revoked[-1].secret if revoked and self._dice.random() < 0.5 else "gh-" + "x" * 43
        self._send("bad key", CHAT, {"model": MODEL, **CASES[0].fields}, {}, sound=False, accepted=False, wrong_key=True, key=key)

    def talk_rubbish(self) -> None:
        """What is no HTTP, or no path of ours."""
        if self._dice.random() < 0.5:
            self._send("no path", "/v1/nothing", {}, {}, sound=False, accepted=False)
            return
        self.leave()
        asked = self._made("rubbish", sound=False, accepted=False)
        with contextlib.suppress(OSError):
            self._connect(None).send(bytes(self._dice.randrange(256) for _ in range(200)) + b"\r\n\r\n")
        self._left(asked, None)

    def meet_a_failing_engine(self) -> None:
        case, tokens = self._dice.choice([CASES[0], CASES[1]]), 20
        faults: list[dict[str, Any]] = [
            {"cut_after_events": 5},
            {"cut_after_events": 5, "cut": "close"},
            {"cut_after_events": 0},
            {"error_event_after": 0, "error": NO_MEMORY},
            {"error_event_after": 4, "error": NO_MEMORY},
            {"no_done": True, "no_finish": True},
        ]
        more = {"stream": True, "script": {"tokens": tokens, "prompt_tokens": 7, **self._dice.choice(faults)}}
        outcomes = frozenset({"upstream_error"})
        self._exchange(f"fault {case.path}", case, more, tokens=None, most=tokens, sound=False, outcomes=outcomes)

    def meet_a_silent_engine(self) -> None:
        more = {"script": {"hang": True}}
        self._exchange("silent", CASES[0], more, tokens=None, most=0, sound=False, outcomes=frozenset({"timeout"}))

    def send_two_at_once(self) -> None:
        """Pipelined on one connection: answered in order."""
        both = [self._made("pipelined"), self._made("pipelined")]
        key = self._key = self._dice.choice(self._load.keys.working)
        body = {"model": MODEL, **CASES[0].fields, "script": {"tokens": 3, "prompt_tokens": 7}}
        try:
            client = self._connection(None)
            for asked in both:
                asked.connected = self._connected
            client.send(b"".join(request(CHAT, body, key=key.secret, headers={"X-Request-Id": each.name}) for each in both))
            for asked in both:
                if self._client is None:
                    if both[0].ending == "complete":  # it was said to be the last answer: the second request would be sent again
                        asked.accepted = asked.sound = False
                    asked.ending = "left"
                    continue
                asked.tokens = (7, 3)
                self._saw(asked, client.read())
        except OSError as error:
            for asked in both:
                asked.ending, asked.detail = asked.ending or "failed", repr(error)
            self.leave()
        for asked in both:
            self._end(asked)

    # -- one of them --

    def _timing(self, tokens: int, prompt: int) -> dict[str, Any]:
        interval, first = self._dice.choice([0, 0.002, 0.02, 0.05]), self._dice.choice([0, 0, 0.05, 0.3])
        return {"tokens": tokens, "prompt_tokens": prompt, "interval": interval, "first": first}

    def _exchange(
        self,
        kind: str,
        case: Case,
        more: dict[str, Any],
        *,
        tokens: tuple[int, int] | None,
        most: int | None,
        read_usage: bool = False,
        **facts: Any,
    ) -> None:
        asked = self._begin(kind, case, more, most=most, **facts)
        if asked is None or self._client is None:
            return
        asked.tokens = tokens
        try:
            reply = self._client.read()
            self._saw(asked, reply)
            if read_usage and reply.status == 200 and reply.ending == "complete":
                asked.tokens = _usage(reply.json())
        except OSError as error:
            asked.ending, asked.detail = "failed", repr(error)
            self.leave()
        self._end(asked)

    def _begin(
        self, kind: str, case: Case, more: dict[str, Any], *, most: int | None, receive_buffer: int | None = None, **facts: Any
    ) -> Asked | None:
        """Send it; None if that failed, which is then on record."""
        fields = {"model": MODEL, **case.fields, **more}
        body, headers = (form(fields), FORM) if "file" in case.fields else (fields, {})
        asked = self._made(kind, most_tokens=most, **facts)
        key = self._key = self._dice.choice(self._load.keys.working)
        name = {"X-Request-Id": asked.name, **({"x-api-key": key.secret} if case.path.startswith("/v1/messages") else {})}
        bearer = None if "x-api-key" in name else key.secret
        try:
            client = self._connection(receive_buffer)
            asked.connected = self._connected
            client.send(request(case.path, body, key=bearer, headers={**headers, **name}))
        except OSError as error:
            asked.ending, asked.detail = "failed", repr(error)
            self.leave()
            self._end(asked)
            return None
        return asked

    def _send(self, kind: str, path: str, body: object, headers: dict[str, str], *, key: str = "", **facts: Any) -> None:
        asked = self._made(kind, **facts)
        self._key = self._load.keys.working[0]
        secret = key or self._key.secret
        try:
            client = self._connection(None)
            asked.connected = self._connected
            self._saw(asked, client.ask(path, body, key=secret, headers={"X-Request-Id": asked.name, **headers}))
        except OSError as error:
            asked.ending, asked.detail = "failed", repr(error)
            self.leave()
        self._end(asked)

    def _made(self, kind: str, **facts: Any) -> Asked:
        now = time.monotonic()
        return Asked(f"soak-{next(_names)}", kind, connected=now, began=now, **facts)

    def _connection(self, receive_buffer: int | None) -> WireClient:
        return self._client if self._client is not None else self._connect(receive_buffer)

    def _connect(self, receive_buffer: int | None) -> WireClient:
        self._connected = time.monotonic()
        self._client = WireClient(self._load.url, timeout=PATIENCE, receive_buffer=receive_buffer)
        return self._client

    def _saw(self, asked: Asked, reply: Reply) -> None:
        asked.status, asked.ending = reply.status, reply.ending
        asked.detail = repr(reply.body[-300:])
        asked.seen_tokens = sum(_TEXT.search(event) is not None for event in reply.events)
        if reply.ending != "complete" or reply.header("connection") == "close":
            self.leave()

    def _left(self, asked: Asked, reply: Reply | None) -> None:
        """Go away in the middle of it."""
        if reply is not None:
            self._saw(asked, reply)
        if asked.ending in ("", "open"):
            asked.ending = "left"
        self.leave()
        self._end(asked)

    def _end(self, asked: Asked) -> None:
        if not asked.ended:
            asked.ended = time.monotonic()
            asked.key_revoked = self._key.revoked
            self._load.asked.append(asked)


def _usage(answer: Any) -> tuple[int, int] | None:
    """What a whole answer says that it took."""
    usage = answer.get("usage")
    if usage is None or "seconds" in usage:
        return None
    return usage.get("prompt_tokens") or usage["input_tokens"], usage.get("completion_tokens") or usage.get("output_tokens", 0)
