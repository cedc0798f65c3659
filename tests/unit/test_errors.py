"""The tree of errors: whose fault, which answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from proxy import errors
from proxy.errors import ClientFault, InvalidRequest, Outcome, ProxyError, ProxyFault, UpstreamFault


def tree(kind: type[ProxyError] = ProxyError) -> Iterator[type[ProxyError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from tree(below)


KINDS = [kind for kind in tree() if kind.__module__ == "proxy.errors"]


_OF_LIMITS = ("requests", "tokens", "insufficient_quota")
"""What OpenAI's 429 have for a type."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_an_answer(kind: type[ProxyError]) -> None:
    assert 400 <= kind.status <= 599
    assert kind.type in {*("invalid_request_error", "internal_error", "service_unavailable", "upstream_error"), *_OF_LIMITS}
    assert kind.code is None or re.fullmatch(r"[a-z_]+", kind.code)
    assert kind.retry_after_s is None or kind.status == 503


@pytest.mark.parametrize("kind", KINDS)
def test_fault_and_outcome_agree(kind: type[ProxyError]) -> None:
    if issubclass(kind, ClientFault):
        assert kind.outcome in (Outcome.CLIENT_ERROR, Outcome.CLIENT_GONE, Outcome.REJECTED)
        assert kind.status < 500
    elif issubclass(kind, UpstreamFault):
        assert kind.outcome in (Outcome.UPSTREAM_ERROR, Outcome.TIMEOUT)
        assert kind.status >= 500
    else:
        assert kind.outcome in (Outcome.INTERNAL_ERROR, Outcome.REJECTED)


def test_the_drawing_shows_the_tree() -> None:
    drawn = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    by_name = {match[0]: line for line in drawn if (match := re.search(r"[A-Z]\w+", line))}
    assert by_name.keys() == {kind.__name__ for kind in KINDS}
    for kind in KINDS:
        if status := re.search(r"  ([45]\d\d)\b", by_name[kind.__name__]):
            assert int(status[1]) == kind.status


def test_an_answer_is_in_openais_shape() -> None:
    body = InvalidRequest("No.", param="model", code="odd").body()
    assert body == b'{"error":{"message":"No.","type":"invalid_request_error","param":"model","code":"odd"}}'


def test_a_class_has_a_code_and_an_error_may_have_its_own() -> None:
    assert errors.UpstreamDisconnected("x").error_code == "upstream_disconnected"
    assert errors.UpstreamTimeout("x", code="idle_timeout").error_code == "idle_timeout"
    assert InvalidRequest("x").error_code is None


@pytest.mark.parametrize("text", ['"quotes" and \\', "new\nline\x00", "日本 👩‍👩‍👧‍👦", "lone \ud800 surrogate", "</script>"])
def test_any_text_makes_valid_json(text: str) -> None:
    said = json.loads(InvalidRequest(text).body())["error"]["message"]
    assert said == text


def test_outcomes_keep_their_numbers() -> None:
    """They are in every record that was ever written."""
    assert [(outcome.label, outcome.value) for outcome in Outcome] == [
        ("ok", 0),
        ("cached", 1),
        ("coalesced", 2),
        ("rejected", 3),
        ("client_error", 4),
        ("client_gone", 5),
        ("upstream_error", 6),
        ("timeout", 7),
        ("internal_error", 8),
        ("crashed", 9),
    ]


def test_somebody_is_at_fault_and_nobody_else() -> None:
    for kind in KINDS[1:]:
        assert sum(issubclass(kind, fault) for fault in (ClientFault, ProxyFault, UpstreamFault)) == 1
