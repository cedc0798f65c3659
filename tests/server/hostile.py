"""Requests that were made to do harm, as bytes: what is sent, what must come back, and what of it an engine may see.

Every one has a good key and, where it has a body, the body of a request that would be served: only what is wrong with it stands
between it and an engine. `MARK` is in what must never get there.
"""

from __future__ import annotations

import gzip
import json
from typing import Final, NamedTuple

from tests.support.worker import CHAT, KEY, MODEL

MARK: Final = b"SMUGGLED"
AUTHORIZATION: Final = f"Authorization: Bearer {KEY}"
JSON: Final = "Content-Type: application/json"


class Hostile(NamedTuple):
    name: str
    data: bytes
    statuses: tuple[int, ...]
    """Of the answers that come, in their order; 200 only of those that an engine gives."""
    closed: bool = True
    """The connection is closed after them; otherwise it serves on."""


def body(user: bytes = MARK) -> bytes:
    message = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "user": user.decode()}
    return json.dumps({**message, "script": {"tokens": 1}}).encode()


def post(*fields: str | bytes, data: bytes | None = None, path: str = CHAT, line: bytes = b"", host: str | None = "x") -> bytes:
    """A request for generation. Its length is given unless one of `fields` says how it is framed."""
    data = body() if data is None else data
    given = [field if isinstance(field, bytes) else field.encode() for field in fields]
    framed = any(field.lower().startswith((b"content-length", b"transfer-encoding", b"content_length")) for field in given)
    lines = [line or f"POST {path} HTTP/1.1".encode()]
    lines += [f"Host: {host}".encode()] if host is not None else []
    lines += [AUTHORIZATION.encode(), *given]
    lines += [] if any(field.lower().startswith(b"content-type") for field in given) else [JSON.encode()]
    lines += [] if framed else [b"Content-Length: %d" % len(data)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def chunks(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)


def good(user: bytes = b"u") -> bytes:
    return post(data=body(user))


def with_length(value: str) -> bytes:
    return post(f"Content-Length: {value}")


def with_coding(*values: str | bytes) -> bytes:
    fields = [b"Transfer-Encoding: " + (value if isinstance(value, bytes) else value.encode()) for value in values]
    return post(*fields, data=chunks(body()))


def with_chunks(data: bytes) -> bytes:
    return post("Transfer-Encoding: chunked", data=data)


def with_line(line: bytes) -> bytes:
    """A header line that is none, in a request that is one otherwise."""
    return post(line)


def get(target: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (target, AUTHORIZATION.encode())


LENGTH: Final = len(body())
HEX: Final = b"%x" % LENGTH
SECOND: Final = post()
"""A request inside of another."""

# failure 30: two readings of one message
FRAMING: Final = [
    Hostile("both lengths", post(f"Content-Length: {LENGTH}", "Transfer-Encoding: chunked", data=chunks(body())), (400,)),
    Hostile("both lengths, the other way round", post("Transfer-Encoding: chunked", "Content-Length: 4", data=SECOND), (400,)),
    Hostile("two lengths that differ", post("Content-Length: 0", f"Content-Length: {len(SECOND)}", data=SECOND), (400,)),
    Hostile("two lengths that agree", post(f"Content-Length: {LENGTH}", f"Content-Length: {LENGTH}"), (400,)),
    *(
        Hostile(f"a length of {value!r}", with_length(value), (400,))
        for value in (
            *(f"{LENGTH}, {LENGTH}", f"+{LENGTH}", f"-{LENGTH}", f"0x{LENGTH:x}", "", f"{LENGTH} 0", f"{LENGTH}.0", f"{LENGTH};"),
            *("99999999999999999999999999", "1e3", "\u0661"),
        )
    ),
    *(
        Hostile(f"a coding of {value!r}", with_coding(value), (400,))
        for value in (
            *(
                "xchunked",
                "chunked, identity",
                "gzip, chunked",
                "identity",
                "",
                '"chunked"',
                "chunked;q=1",
                "chunked,",
                ",chunked",
            ),
            *(b"\x0bchunked", b"chunked\t", "chunke\u017f"),
        )
    ),
    Hostile("a coding twice", with_coding("chunked", "chunked"), (400,)),
    Hostile("a coding and another", with_coding("identity", "chunked"), (400,)),
    Hostile("a coding and none", with_coding("chunked", "identity"), (400,)),
    Hostile(
        "a coding in HTTP/1.0",
        post("Transfer-Encoding: chunked", data=chunks(body()), line=f"POST {CHAT} HTTP/1.0".encode()),
        (400,),
    ),
    Hostile("a length under another name", post("Content_Length: 9", data=good()), (400, 200), closed=False),
    *(
        Hostile(f"a chunk of {size!r}", with_chunks(size + b"\r\n" + body() + b"\r\n0\r\n\r\n"), (400,))
        for size in (
            *(
                b"0x" + HEX,
                b"+" + HEX,
                b"-" + HEX,
                b" " + HEX,
                HEX + b" ",
                b"",
                b"ffffffffffffffffff",
                HEX[:1] + b"_" + HEX[1:],
                b"g",
            ),
            *(HEX + b";a\rb", HEX + b';a="b\r\nc"', HEX + b";a\n"),
        )
    ),
    Hostile("chunks between bare line feeds", with_chunks(HEX + b"\n" + body() + b"\n0\n\n"), (400,)),
    Hostile("a chunk without an end", with_chunks(HEX + b"\r\n" + body() + b"0\r\n\r\n"), (400,)),
    Hostile("a chunk that is longer than it says", with_chunks(HEX + b"\r\n" + body() + b"x\r\n0\r\n\r\n"), (400,)),
]

# failure 30: lines and names
LINES: Final = [
    *(
        Hostile(name, with_line(line), (400,))
        for name, line in (
            ("a space before the colon", b"X-A : b"),
            ("a folded line", b"X-A: b\r\n c"),
            ("a NUL in a value", b"X-A: b\0c"),
            ("a NUL in a name", b"X-A\0: b"),
            ("a control character in a value", b"X-A: b\x01c"),
            ("a carriage return in a value", b"X-A: b\rX-C: d"),
            ("a line feed before a line", b"X-A: b\nX-C: d"),
            ("no name", b": b"),
            ("no colon", b"X-A"),
            ("a name that isn't ASCII", "X-\u00c4: b".encode()),
            ("a name of two words", b"X A: b"),
            ("a name in brackets", b"X(A): b"),
        )
    ),
    Hostile("a folded line first", good().replace(b"\r\nHost: x", b"\r\n X-A: b\r\nHost: x"), (400,)),
    Hostile("nothing but line feeds", post().replace(b"\r\n", b"\n"), (400,)),
    Hostile("nothing but carriage returns", post().replace(b"\r\n", b"\r"), (400,)),
    Hostile("a carriage return at the end of the head", post().replace(b"\r\n\r\n", b"\r\n\r", 1), (400,)),
    Hostile(
        "a head without end",
        b"POST /v1/chat/completions HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)),
        (431,),
    ),
    Hostile("a field without end", post(b"X-A: " + b"b" * 200_000), (431,)),
    Hostile("a target without end", get(b"/v1/models?" + b"x" * 200_000), (431,)),
]

REQUEST_LINES: Final = [
    *(
        Hostile(name, post(line=line), (400,))
        for name, line in (
            ("no version", b"POST /v1/chat/completions"),
            ("HTTP/2.0", b"POST /v1/chat/completions HTTP/2.0"),
            ("HTTP/1.2", b"POST /v1/chat/completions HTTP/1.2"),
            ("HTTP/0.9", b"POST /v1/chat/completions HTTP/0.9"),
            ("a version in small letters", b"POST /v1/chat/completions http/1.1"),
            ("tabs", b"POST\t/v1/chat/completions\tHTTP/1.1"),
            ("a space in the target", b"POST /v1/chat/completions /x HTTP/1.1"),
            ("a space at the beginning", b" POST /v1/chat/completions HTTP/1.1"),
            ("a method in small letters", b"post /v1/chat/completions HTTP/1.1"),
            ("a method that is none", b"SMUGGLE /v1/chat/completions HTTP/1.1"),
            ("a target without a slash", b"POST v1/chat/completions HTTP/1.1"),
            ("a NUL in the target", b"POST /v1/chat/completions\0 HTTP/1.1"),
            ("a control character in the target", b"POST /v1/chat/\x01completions HTTP/1.1"),
            ("a target that isn't ASCII", "POST /v1/chat/\u00e4 HTTP/1.1".encode()),
            ("a URL with a password", b"POST http://u:p@x/v1/chat/completions HTTP/1.1"),
            ("a URL without a host", b"POST http:///v1/chat/completions HTTP/1.1"),
        )
    ),
    Hostile("TLS where none is spoken", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    Hostile("HTTP/2 where none is spoken", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    Hostile("what llhttp takes for HTTP/1.0", post(data=body(b"u"), line=b"POST /v1/chat/completions RTSP/1.0"), (200,)),
    Hostile("SSH", b"SSH-2.0-OpenSSH_9.9\r\n", (400,)),
]

# failures 28, 31, 32, 34
FIELDS: Final = [
    Hostile("no host", post(host=None), (400,)),
    *(
        Hostile(f"the host {host!r}", post(host=host), (400,))
        for host in ("x/../admin", "x?y", "x#y", "user@x", "x y", "x\\y", "x:80:90", "[::1", "x, y/z")
    ),
    *(
        Hostile(f"{field.partition(':')[0]} twice", post(field, field.replace("x", "y")), (400,))
        for field in ("Host: x", AUTHORIZATION, "X-Api-Key: x", JSON, "Content-Encoding: identity")
    ),
    Hostile("two keys", post("X-Api-Key: another"), (400,), closed=False),
]

# failure 35: nothing is normalised, so nothing can be normalised in two ways; and it is a 404 also without a key
PATHS: Final = [
    Hostile(f"the path {path}", post(path=path).replace(AUTHORIZATION.encode(), b"X-No: key"), (404,), closed=False)
    for path in (
        *(
            "//v1/chat/completions",
            "/v1//chat/completions",
            "/v1/../v1/chat/completions",
            "/v1/./chat/completions",
            "/./v1/chat/completions",
        ),
        *("/v1/chat/completions/", "/v1/chat/completions;x=y", "/v1/chat%2fcompletions", "/v1/%2e%2e/v1/chat/completions"),
        *(
            "/%76%31/chat/completions",
            "/V1/chat/completions",
            "/v1/chat/Completions",
            "/v1/chat/completions%20",
            "/v1/chat/completions%00",
        ),
        *("/v1/chat/completions#x", "/v1\\chat\\completions", "http://x//v1/chat/completions", "http://x/metrics", "*"),
        *("/metrics", "/sleep", "/v1/load_lora_adapter", "/collective_rpc", "/inference/v1/generate", "/docs", "/openapi.json"),
    )
]

# failures 29, 40: what comes after a request
AFTER: Final = [
    Hostile("garbage after a request", good() + b"garbage" + MARK + b"\r\n\r\n", (200, 400)),
    Hostile("a smuggled request after a request", good() + post("Content-Length: 1", "Transfer-Encoding: chunked"), (200, 400)),
    Hostile("a length that is too short", post(f"Content-Length: {LENGTH - 3}"), (400, 400)),
    Hostile("a request after the last one", good().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) + SECOND, (200,)),
    Hostile("garbage after the last request", good().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) + b"\0\0", (200,)),
    Hostile("a request after one of HTTP/1.0", good().replace(b"HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.0\r\n", 1) + SECOND, (200,)),
    Hostile("empty lines between requests", b"\r\n\r\n" + good() + b"\r\n\r\n" + good() + b"\r\n", (200, 200), closed=False),
    Hostile("a tunnel", b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n" + SECOND, (404,)),
    Hostile(
        "a request in the body of one that offers HTTP/2",
        post("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", data=SECOND),
        (400,),
        closed=False,
    ),
    Hostile(
        "a request in the chunks of one that offers a web socket",
        post("Connection: Upgrade", "Upgrade: websocket", "Transfer-Encoding: chunked", data=chunks(SECOND)),
        (400,),
        closed=False,
    ),
    Hostile(
        "chunks of a request for nothing that offers a web socket",
        post("Connection: Upgrade", "Upgrade: websocket", "Transfer-Encoding: chunked", data=chunks(SECOND), path="/v1/nothing"),
        (404,),
    ),
    Hostile(
        "a request in the body of a GET",
        get(b"/v1/chat/completions")[:-2] + b"Content-Length: %d\r\n\r\n%b" % (len(SECOND), SECOND),
        (405,),
        closed=False,
    ),
]

# failure 40
TRAILERS: Final = [
    Hostile(
        "trailers that change the request",
        with_chunks(chunks(body(b"u"))[:-2] + b"Authorization: Bearer evil\r\nHost: evil\r\nX-Request-Id: SMUGGLED\r\n\r\n"),
        (200,),
        closed=False,
    ),
    Hostile("a trailer that says how long the body is", with_chunks(chunks(body())[:-2] + b"Content-Length: 9\r\n\r\n"), (400,)),
    Hostile(
        "a trailer that says how it is coded", with_chunks(chunks(body())[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"), (400,)
    ),
    Hostile("trailers without end", with_chunks(chunks(body())[:-2] + b"X-A: b\r\n" * 100_000), (431,)),
    Hostile("a trailer without end", with_chunks(chunks(body())[:-2] + b"X-A: " + b"b" * 1_000_000), (431,)),
    Hostile("an extension without end", with_chunks(HEX + b";" + b"a" * 1_000_000), (431,)),
]

# failures 26, 27, 36, 38, 39
BODIES: Final = [
    Hostile("a body that is too large", post("Content-Length: 999999999", data=b""), (413,)),
    Hostile("a body in gzip", post("Content-Encoding: gzip", data=gzip.compress(body())), (415,)),
    Hostile("a body in brotli", post("Content-Encoding: br"), (415,)),
    Hostile("a body that is coded twice", post("Content-Encoding: gzip, identity"), (415,)),
    *(
        Hostile(f"a body of type {media!r}", post(f"Content-Type: {media}"), (415,), closed=False)
        for media in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonp",
            "",
        )
    ),
    Hostile("another expectation", post("Expect: 200-ok"), (417,)),
    Hostile("a length of thousands of digits", post("Content-Length: " + "9" * 5000), (400,)),
    Hostile("a length behind thousands of zeros", post("Content-Length: " + "0" * 5000 + str(10**9)), (413,)),
    Hostile("two expectations", post("Expect: 100-continue", "Expect: 200-ok"), (417,)),
    Hostile(
        "a line break in the model's name", post(data=b'{"model":"x\\r\\nX-Evil: SMUGGLED","messages":[]}'), (404,), closed=False
    ),
]

# failure 33: nothing of these goes on
HARMLESS: Final = [
    Hostile(name, post(*fields, data=body(b"u")), (200,), closed=False)
    for name, fields in (
        ("fields that engines know", ("X-Request-Id: SMUGGLED", "X-Data-Parallel-Rank: 1", "X-Session-Id: SMUGGLED")),
        (
            "fields of proxies",
            ("X-Forwarded-For: SMUGGLED", "Forwarded: for=SMUGGLED", "X-Forwarded-Host: SMUGGLED", "Via: SMUGGLED"),
        ),
        (
            "fields of a single hop",
            ("Connection: X-A, close-not", "X-A: SMUGGLED", "TE: trailers, SMUGGLED", "Keep-Alive: SMUGGLED"),
        ),
        ("cookies", ("Cookie: a=SMUGGLED", "Proxy-Authorization: Basic SMUGGLED")),
        ("two traces", ("traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01", "traceparent: 00-SMUGGLED")),
        ("a trace that is none", ("traceparent: 00-SMUGGLED", "tracestate: a=SMUGGLED")),
        ("a trace's state that is none", ("traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01", b"tracestate: a=\xffSMUGGLED")),
        ("bytes that aren't ASCII", (b"X-A: \xff\xfeSMUGGLED", b"User-Agent: \xffSMUGGLED")),
        ("a length with zeros before it", ("Content-Length: " + "0" * 5000 + str(len(body(b"u"))),)),
        ("another method in a field", ("X-HTTP-Method-Override: DELETE", "X-Original-URL: /metrics", "X-Rewrite-URL: /metrics")),
    )
]

CORPUS: Final = [*FRAMING, *LINES, *REQUEST_LINES, *FIELDS, *PATHS, *AFTER, *TRAILERS, *BODIES, *HARMLESS]
