"""What a request's key in the cache stands for: requests that mean the same have the same one, and no others do.

What a body means is what Python's own `json` makes of it, which is what vLLM reads bodies with.
"""

from __future__ import annotations

import json
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.key import key_of
from proxy.wire.caching import Caching
from tests.fuzz.effort import effort
from tests.fuzz.mutation import ODD_VALUES, edited, edits, odd_values
from tests.fuzz.test_bodies import DEEP, depth

SECRET: Final = b"s" * 32
ANY: Final = Caching(ignored=frozenset(("user",)), never=frozenset(("store",)))
SEEDS: Final = (
    b'{"model":"m","messages":[{"role":"user","content":"Hi \\u00e9\\n"}],"temperature":0.5,"n":1}',
    b'{"messages" : [ {"content" : "Hi", "role" : "user"} ] , "stop":["a","b"], "seed":7}',
    b'{"tools":[{"a":{"x":1,"y":[2.50,{}]}}],"text":{"b":1,"a":2},"logit_bias":{"1":1e1,"2":-0.0}}',
    b'{"messages":[{"content":[{"type":"tool_use","input":{"b":1,"a":2}}]}],"user":"u","x":null}',
    b"{}",
)
PIECES: Final = (
    b'"',
    b"\\",
    b",",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b" ",
    b"\\u0061",
    b'"a":1,',
    b'"user":1,',
    b"e0",
    b".0",
    b"0",
    b"-",
)


def meaning(body: bytes, *, ordered: bool) -> Any:
    """The same for what is the same, None for what is no object that can be read in one way. `ordered`: of an object inside of
    another, whose members may be in an order."""
    try:
        said = json.loads(body.decode(), parse_constant=_no_constant)
        said = said if isinstance(said, dict) else None
        json.dumps(said, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if said is None or said.get("store") not in (None, False):
        return None
    return frozenset((name, _told(value, ordered)) for name, value in said.items() if name not in ("model", "user"))


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _told(value: Any, ordered: bool) -> Any:
    """Python's own equality takes 1, 1.0 and True for one."""
    match value:
        case dict():
            members = [(name, _told(inner, ordered)) for name, inner in value.items()]
            return ("object", tuple(members) if ordered else frozenset(members))
        case list():
            return ("list", tuple(_told(inner, ordered) for inner in value))
        case _:
            return type(value).__name__, repr(value)


def key(body: bytes) -> bytes | None:
    return key_of(SECRET, "any", ANY, "m", "", "key:k", body)


_change = odd_values() | edits(PIECES)
_bodies = st.sampled_from(SEEDS).flatmap(lambda body: edited(body, _change, most=3))


@effort(600)
@given(_bodies, st.data())
def test_a_key_stands_for_what_is_meant(body: bytes, data: st.DataObject) -> None:  # failure 57
    other = data.draw(edited(body, _change, most=2) | _bodies)
    if max(depth(body), depth(other)) > DEEP:
        return
    one, two = key(body), key(other)
    if one is not None:
        assert meaning(body, ordered=False) is not None
        if one == two:
            assert meaning(body, ordered=False) == meaning(other, ordered=False)
    if one is not None and two is not None and meaning(body, ordered=True) == meaning(other, ordered=True):
        assert one == two


@effort(200)
@given(_bodies, st.sampled_from(ODD_VALUES), st.sampled_from([b"x", b"messages", b"tools"]))
def test_written_otherwise_it_is_the_same(body: bytes, value: bytes, name: bytes) -> None:
    if depth(value) > DEEP:
        return
    body = body.rstrip()[:-1] + b'%b"%b":%b}' % (b"" if body.strip() == b"{}" else b",", name, value)
    if (one := key(body)) is None:
        return
    said = json.loads(body)
    for indent, ascii_ in ((None, True), (None, False), (3, True)):
        assert key(json.dumps(said, indent=indent, ensure_ascii=ascii_).encode()) == one
