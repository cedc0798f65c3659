"""The official clients, behind one function: cases in, what became of each out.

An outcome is JSON: {"result": ...} of a whole answer, {"events": [...]} of a stream, and of what went wrong the events before it
and {"error": {"class", "status", "message", "body", "retryAfter", ...}}. Ids and times of creation are taken out.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import anthropic
import openai
import pydantic
import pytest

from tests.compat.cases import Case
from tests.support.endpoints import Endpoint
from tests.support.scripted_vllm.audio import tone
from tests.support.wire_client import anonymous

NODE: Final = Path(__file__).parent / "node"
LIMIT_S: Final = 240.0

Outcome = dict[str, Any]


class Run(Protocol):
    """What became of each of the cases, in their order."""

    __name__: str

    def __call__(self, endpoint: Endpoint, cases: Sequence[Case], /) -> list[Outcome]: ...


_SOUND: Final = tone(1.2)


def python(endpoint: Endpoint, cases: Sequence[Case]) -> list[Outcome]:
    """The clients for Python."""
    with (
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0, timeout=30) as one,
        anthropic.Anthropic(base_url=endpoint.url, api_key=endpoint.key, max_retries=0, timeout=30) as other,
        warnings.catch_warnings(),
    ):
        clients = {"openai": one, "anthropic": other}
        warnings.simplefilter("ignore", DeprecationWarning)  # what a client advises against has to work, too
        return [_anonymous(_python(clients[case.client], case)) for case in cases]


def _python(client: Any, case: Case) -> Outcome:
    *path, name = re.sub("([A-Z])", r"_\1", case.call).lower().split(".")
    method = getattr(functools.reduce(getattr, path, client), name)
    script: Any = json.dumps(case.script) if case.sound else case.script  # a form's fields are texts
    sound = {"file": ("sound.wav", _SOUND)} if case.sound else {}
    events: list[Any] = []
    try:
        result = method(**case.params, **sound, extra_body={"script": script}, extra_headers=dict(case.headers))
        if isinstance(result, str | pydantic.BaseModel):
            return {"result": _plain(result)}
        for event in result:
            events.append(_plain(event))
    except Exception as error:  # whatever a caller would see is the outcome
        return {"events": events, "error": _described(error)}
    return {"events": events}


def _plain(value: str | pydantic.BaseModel) -> Any:
    return value if isinstance(value, str) else json.loads(value.model_dump_json())


def _described(error: Exception) -> dict[str, Any]:
    named = ("status_code", "body", "code", "param", "type")
    response = getattr(error, "response", None)
    told = {name: getattr(error, name, None) for name in named}
    told |= {"class": type(error).__name__, "message": str(error), "status": told.pop("status_code")}
    return told | {"retryAfter": None if response is None else response.headers.get("retry-after")}


def node(endpoint: Endpoint, cases: Sequence[Case]) -> list[Outcome]:
    """The clients for Node, all cases in one process. Skips the test where they aren't installed."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node isn't installed")
    if not (NODE / "node_modules").exists():
        pytest.skip("the clients for Node aren't installed: `make test` does it")
    asked = json.dumps([_for_node(case) for case in cases])
    command = [program, "ask.mjs", endpoint.url, endpoint.key]
    done = subprocess.run(command, cwd=NODE, input=asked, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    outcomes: list[Outcome] = json.loads(done.stdout)
    return [_anonymous(outcome) for outcome in outcomes]


def _for_node(case: Case) -> dict[str, Any]:
    script = json.dumps(case.script) if case.sound else case.script
    asked = {"client": case.client, "call": case.call, "params": {**case.params, "script": script}, "headers": dict(case.headers)}
    return asked | ({"sound": base64.b64encode(_SOUND).decode()} if case.sound else {})


def _anonymous(outcome: Outcome) -> Outcome:
    told: Outcome = json.loads(anonymous(json.dumps(outcome).encode()).replace(b":*", b":null"))
    return told


RUNS: Final[dict[str, Run]] = {"python": python, "node": node}
