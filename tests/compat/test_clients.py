"""The official OpenAI and Anthropic clients, for Python and for Node: the same through the proxy and straight.

Ids and times of creation may differ, nothing else. Each case runs both ways; straight against straight shows that the comparison
itself holds. What the proxy says where an engine would say it otherwise (a key, a model, a stream that was cut) is told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.compat.cases import BROKEN, CUT, ERRORS, STREAMS, UNKNOWN_MODEL, WHOLE
from tests.compat.clients import RUNS, Outcome, Run
from tests.support.endpoints import Endpoint

GROUPS = {"whole": WHOLE, "streams": STREAMS, "errors": ERRORS, "broken": BROKEN, "cut": CUT, "unknown": UNKNOWN_MODEL}

Outcomes = Callable[[str, str], Outcome]


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


@pytest.fixture(scope="module")
def ours(run: Run, endpoint: Endpoint) -> Outcomes:
    return _outcomes(run, endpoint)


@pytest.fixture(scope="module")
def theirs(run: Run, straight: Endpoint) -> Outcomes:
    return _outcomes(run, straight)


def _outcomes(run: Run, endpoint: Endpoint) -> Outcomes:
    """What became of a case of a group; a group runs as one, when it is first asked for."""
    found: dict[str, dict[str, Outcome]] = {}

    def outcome(group: str, name: str) -> Outcome:
        if group not in found:
            cases = GROUPS[group]
            found[group] = dict(zip(cases, run(endpoint, list(cases.values())), strict=True))
        return found[group][name]

    return outcome


@pytest.mark.parametrize("name", WHOLE)
def test_whole_answers(ours: Outcomes, theirs: Outcomes, name: str) -> None:
    assert ours("whole", name) == theirs("whole", name)
    assert theirs("whole", name)["result"]


@pytest.mark.parametrize("name", STREAMS)
def test_streams(ours: Outcomes, theirs: Outcomes, name: str) -> None:
    assert ours("streams", name) == theirs("streams", name)
    assert "error" not in theirs("streams", name)
    assert theirs("streams", name)["events"]


@pytest.mark.parametrize("name", ERRORS)
def test_errors(ours: Outcomes, theirs: Outcomes, name: str) -> None:
    assert ours("errors", name) == theirs("errors", name)
    error = theirs("errors", name)["error"]
    assert error["status"] >= 400
    assert error["retryAfter"] == ("7" if "tried again" in name else None)


@pytest.mark.parametrize("name", BROKEN)
def test_errors_inside_a_stream(ours: Outcomes, theirs: Outcomes, name: str) -> None:
    assert ours("broken", name) == theirs("broken", name)
    assert len(theirs("broken", name)["events"]) >= BROKEN[name].script["error_event_after"]


@pytest.mark.parametrize("name", CUT)
def test_a_stream_that_was_cut_is_not_taken_for_a_whole_one(  # failures 4, 5
    ours: Outcomes, theirs: Outcomes, endpoint: Endpoint, straight: Endpoint, name: str
) -> None:
    events = theirs("cut", name)["events"]
    assert len(events) == 5
    assert ours("cut", name)["events"][:5] == events
    assert endpoint == straight or ours("cut", name)["error"]


@pytest.mark.parametrize("name", UNKNOWN_MODEL)
def test_an_unknown_model_is_not_found(ours: Outcomes, theirs: Outcomes, name: str) -> None:
    def told(outcome: Outcome) -> list[Any]:
        return [outcome["error"][field] for field in ("class", "status")]

    assert told(ours("unknown", name)) == told(theirs("unknown", name)) == ["NotFoundError", 404]
