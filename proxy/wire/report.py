"""`GET /v1/usage`: what was used with the caller's key. Control knows, and is asked with the caller's own key and query."""

from __future__ import annotations

import re

from proxy.errors import InvalidRequest
from proxy.wire.operation import RelayedOperation, as_it_came, nothing_to_estimate, nothing_to_observe

PATH = b"/v1/usage"
MAX_QUERY = 2048
_QUERY = re.compile(rb"(?:\?[A-Za-z0-9._~!$&'()*+,;=:@/?%%-]{0,%d})?" % MAX_QUERY)
"""RFC 3986 §3.4, or none."""

OPERATION = RelayedOperation(
    name="usage",
    method=b"GET",
    path=PATH,
    prepare=as_it_came,
    observe=nothing_to_observe,
    estimate=nothing_to_estimate,
)


def check_query(target: bytes) -> None:
    """Raises InvalidRequest."""
    if not _QUERY.fullmatch(target, len(PATH)):
        raise InvalidRequest(f"The query isn't one, or has more than {MAX_QUERY} bytes.")
