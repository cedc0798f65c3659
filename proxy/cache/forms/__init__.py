"""An answer that was made in one form, given in another: in one piece, or as a stream, with its usage or without.

Theory of operation
-------------------
A client can't tell a converted answer from one that its engine made in that form, but by ids, times, and how the text is cut.
That is only so where all of it is understood: each API's file declares every member that vLLM writes, in its order, and whatever
else is there, and whatever the other form can't say, makes the answer Odd. Then there is no other form of it: a miss, which costs
a request; a field that went missing would cost somebody's afternoon.

Members that are null in one piece and that a stream leaves out are put there and left out again. Where a version of vLLM says
more than another, a stream that has the one member stands for an answer that has the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from proxy.cache.entry import Entry, Form
from proxy.cache.forms import chat, completions, messages, responses
from proxy.cache.forms.strict import UNREADABLE, Made, Odd, check, split

__all__ = ["as_form", "split"]

Convert = Callable[[bytes, bytes, Form, Form, bytes], Made]
"""(body, usage that was told apart from it, its form, the form that is wanted, the request)"""

_CONVERT: Final[dict[str, Convert]] = {
    "chat": chat.convert,
    "completions": completions.convert,
    "messages": messages.convert,
    "responses": responses.convert,
}
_STREAM: Final = b"text/event-stream; charset=utf-8"
_JSON: Final = b"application/json"
_DONE: Final = b"data: [DONE]\n\n"


def as_form(entry: Entry, form: Form, request: bytes = b"") -> Entry | None:
    """The same answer in that form; None where there is no way to be faithful.

    `request`: the body of one that it answers, whatever form that asks for; what the two forms don't say alike hangs on it, so
    without one less can be made. Takes time in proportion to the answer's size.
    """
    convert = _CONVERT.get(entry.operation)
    if entry.form == form:
        return entry
    if convert is None:
        return None
    try:
        entry.body.decode()  # what is taken over as it is, isn't looked into
        body, usage = convert(entry.body, entry.usage, Form(entry.form), form, request)
        head = _head(entry, form, len(body))
    except UNREADABLE:
        return None
    streaming = form != Form.WHOLE
    chunks = body.count(b"\n\n") - body.endswith(_DONE) if streaming else 0
    return msgspec.structs.replace(entry, form=form, head=head, sized=not streaming, body=body, chunks=chunks, usage=usage)


def _head(entry: Entry, form: Form, length: int) -> bytes:
    """Status line and header lines for a body of that length, in the order in which uvicorn writes them. Raises Odd."""
    if entry.streaming and form != Form.WHOLE:
        return entry.head
    old, new = (_STREAM, _JSON) if entry.streaming else (_JSON, _STREAM)
    lines, types = [], 0
    for line in entry.head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        match name.strip().lower():
            case b"content-encoding":
                raise Odd("a body that can't be read")
            case b"content-length":
                continue
            case b"content-type":
                check(value.strip() == old, "a body of another type")
                types += 1
                if form == Form.WHOLE:
                    lines.append(b"content-length: %d" % length)
                lines.append(name + b": " + new)
            case _:
                lines.append(line)
    check(types == 1, "a body of no type")
    return b"\r\n".join(lines)
