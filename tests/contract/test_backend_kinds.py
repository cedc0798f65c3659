"""Every kind of server judges answers by the same rules, whatever is particular about it; and what real servers said is
understood. Bytes: `tests/fixtures`, as they came."""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec
import pytest

from proxy.nouns import BackendSettings
from proxy.relay.backends import KINDS, Kind, Verdict
from tests.support.scripted_vllm import captured

HARMLESS: Final = (Verdict.FINE, Verdict.BUSY, Verdict.ELSEWHERE, Verdict.STRANGER)
"""They say nothing bad of the server."""
WORDS: Final = [("", ""), ("BadRequestError", "No."), ("NotFoundError", "Nothing here."), ("x" * 10_000, "\x00\ud800")]


def judged(kind: Kind, name: str) -> Verdict:
    """A captured answer, by its status and what its error says."""
    answer = captured.load(name)
    error: Any = msgspec.json.decode(answer.body).get("error")
    error = error if isinstance(error, dict) else {}
    return kind.judge(answer.status, error.get("type") or "", error.get("message") or "")


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def test_every_kind_that_can_be_declared_is_there_and_no_other() -> None:
    field = next(each for each in msgspec.structs.fields(BackendSettings) if each.name == "kind")
    assert set(get_args(field.type)) - {"auto"} == set(KINDS)


def test_each_goes_by_its_name(kind: Kind) -> None:
    assert KINDS[kind.name] is kind


def test_where_it_says_that_it_is_well_is_a_path(kind: Kind) -> None:
    assert kind.health_path == b"" or kind.health_path.startswith(b"/")
    assert b" " not in kind.health_path


@pytest.mark.parametrize("words", WORDS, ids=["nothing", "an error", "a name", "nonsense"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 415, 422, 426, 431, 451, 499])
def test_a_request_that_is_refused_hurts_nobody_and_goes_nowhere_else(kind: Kind, status: int, words: tuple[str, str]) -> None:
    # failure 9
    assert kind.judge(status, *words) is Verdict.FINE


@pytest.mark.parametrize("words", WORDS, ids=["nothing", "an error", "a name", "nonsense"])
def test_who_has_no_room_is_well(kind: Kind, words: tuple[str, str]) -> None:
    # failure 8
    assert kind.judge(429, *words) is Verdict.BUSY


@pytest.mark.parametrize("status", [502, 503, 504])
def test_who_cannot_answer_now_is_not_the_last_one_asked(kind: Kind, status: int) -> None:
    # failures 7, 8
    for words in WORDS:
        assert kind.judge(status, *words) in (Verdict.BUSY, Verdict.FAILING)


@pytest.mark.parametrize("status", [500, 501, 505, 507, 529, 599])
def test_what_may_be_the_requests_own_fault_is_not_begun_elsewhere(kind: Kind, status: int) -> None:
    # failure 7
    for words in WORDS:
        assert kind.judge(status, *words) is Verdict.BROKEN


@pytest.mark.parametrize("status", [200, 201, 204, 206])
def test_who_answers_is_well(kind: Kind, status: int) -> None:
    assert kind.judge(status, "", "") is Verdict.FINE


REFUSALS: Final = [
    "err_404",
    "err_405",
    "err_empty_messages",
    "err_image",
    "err_maxtokens_big",
    "err_messages",
    "err_nojson",
    "err_nomessages",
    "err_responses",
    "err_temp",
    "err_toolong",
    "err_toolong_stream",
    "tools_auto",
    "render",
    "model_one",
    "llamacpp/err_nojson",
    "llamacpp/err_toolong",
]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_real_servers_refuse_hurts_none_of_them(kind: Kind, name: str) -> None:
    # failure 9
    assert judged(kind, name) is Verdict.FINE


@pytest.mark.parametrize("name", ["err_model", "err_model_stream", "llamacpp/err_model", "two/queue_full_503"])
def test_a_missing_model_and_a_full_queue_are_no_fault(kind: Kind, name: str) -> None:
    # failures 8, 54
    verdict = judged(kind, name)
    assert verdict in (*HARMLESS, Verdict.FAILING)
    assert verdict is not Verdict.FAILING or kind.name == "openai"


@pytest.mark.parametrize("name", ["err_model", "err_model_stream"])
def test_vllm_says_that_it_does_not_have_a_model(name: str) -> None:
    # failure 54
    assert judged(KINDS["vllm"], name) is Verdict.ELSEWHERE


@pytest.mark.parametrize("name", ["two/queue_full_503", "two/queue_full_503_stream"])
def test_vllm_says_that_its_queue_is_full(name: str) -> None:
    # failure 8: `--max-num-queued-reqs`
    assert judged(KINDS["vllm"], name) is Verdict.BUSY


def test_vllm_says_that_it_is_dead() -> None:
    # failures 6, 7
    assert judged(KINDS["vllm"], "two/killed_nonstream") is Verdict.DEAD
    [error] = [block for block in captured.load("two/killed_midstream").blocks() if b'"error"' in block]
    said = msgspec.json.decode(error.removeprefix(b"data: "))["error"]
    assert KINDS["vllm"].judge(said["code"], said["type"], said["message"]) is Verdict.DEAD


@pytest.mark.parametrize(
    ("status", "message", "verdict"),
    [
        (500, "cannot schedule new futures after shutdown", Verdict.DEAD),
        (500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", Verdict.DEAD),
        (400, "EngineCore", Verdict.FINE),
        (404, "Response with id 'resp_1' not found.", Verdict.STRANGER),
        (400, "Response with id 'resp_1' not found.", Verdict.FINE),
    ],
)
def test_vllms_other_words(status: int, message: str, verdict: Verdict) -> None:
    assert KINDS["vllm"].judge(status, "InternalServerError", message) is verdict
