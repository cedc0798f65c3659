"""The command line beside a running Glasshouse: over the network, through control's socket, and with nothing running."""

from __future__ import annotations

import csv
import io
import json
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import ask

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello."}]}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def running() -> Iterator[Glasshouse]:
    with ScriptedVLLM() as vllm, Glasshouse([vllm.url], {"models": {"smollm2": {"price": {"input": 1, "output": 2}}}}) as proxy:
        yield proxy


@pytest.fixture(params=["elsewhere", "beside"])
def run(request: pytest.FixtureRequest, running: Glasshouse, tmp_path: Path) -> Run:
    """`run("keys", "list")` → standard output; by the admin key over the network, and by the socket."""
    elsewhere = {"GLASSHOUSE_URL": running.control_url, "GLASSHOUSE_ADMIN_KEY": running.admin_key}

    def run(*arguments: str, status: int = 0, env: Mapping[str, str] | None = None) -> str:
        where: dict[str, Any] = {}
        if request.param == "elsewhere":
            where = {"env": {**elsewhere, **(env or {})}, "within": tmp_path}
        done = running.command(*arguments, status=status, **where)
        assert "Traceback" not in done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def test_a_key_from_its_making_to_its_end(run: Run, running: Glasshouse) -> None:
    secret = run("keys", "create", "alice", "--requests-per-minute", "1000", "--tag", "x").strip()
    running._until(lambda: ask(running.url, CHAT, HELLO, key=secret).status == 200, "the key to work")
    assert json.loads(run("keys", "show", "alice", "--json"))["settings"]["tags"] == ["x"]
    run("keys", "block", "alice")
    running._until(lambda: ask(running.url, CHAT, HELLO, key=secret).status in (401, 403), "the key to be refused")
    run("keys", "unblock", "alice")
    other = run("keys", "rotate", "alice", "--overlap", "0").strip()
    running._until(lambda: ask(running.url, CHAT, HELLO, key=other).status == 200, "the new secret to work")
    running._until(lambda: ask(running.url, CHAT, HELLO, key=secret).status == 401, "the former one to be refused")
    run("keys", "revoke", "alice")
    running._until(lambda: ask(running.url, CHAT, HELLO, key=other).status == 401, "the key to be refused")
    assert "alice" not in run("keys", "list", "--in-use")


def test_reports_say_what_the_ledger_says(run: Run, running: Glasshouse) -> None:
    before = len(running.rows())
    for stream in (False, True):
        assert ask(running.url, CHAT, {**HELLO, "stream": stream}, key=running.key).status == 200
    rows = [row for row in running.rows(before + 2) if row["key_name"] == "default"]
    [used] = [row for row in json.loads(run("usage", "--json")) if row["label"] == "default"]
    assert used["requests"] == len(rows)
    assert used["cost_nano"] == {"USD": sum(row["cost_nano"] for row in rows)}
    assert used["output_tokens"] == sum(row["output_tokens"] for row in rows)
    [line] = [row for row in csv.DictReader(io.StringIO(run("usage", "--format", "csv"))) if row["label"] == "default"]
    assert (line["requests"], line["first_token_p50_ns"]) == (str(used["requests"]), str(used["first_token_p50_ns"]))
    for by in ("team", "user", "project", "model", "backend", "operation", "outcome", "day"):
        assert sum(row["requests"] for row in json.loads(run("usage", "--by", by, "--json"))) == len(running.rows())

    newest = json.loads(run("requests", "list", "--key", "default", "--limit", "1", "--json"))[0]
    assert newest["id"] == max(row["id"] for row in rows)
    shown = run("requests", "show", newest["id"])
    assert "decode" in shown
    assert "█" in shown
    assert json.loads(run("requests", "show", newest["id"], "--json"))["output_tokens"] == rows[-1]["output_tokens"]


def test_what_runs_and_what_it_costs(run: Run) -> None:
    [model] = json.loads(run("models", "list", "--json"))
    assert (model["id"], model["backends"], model["price"]["input"]) == ("smollm2", ["backend-0"], "1")
    [backend] = json.loads(run("backends", "list", "--json"))
    assert (backend["kind"], backend["reachable"]) == ("vllm", True)
    assert "is declared in the configuration file" in run("prices", "set", "smollm2", "--input", "3", status=1)


def test_a_managers_key_and_what_it_may_not(running: Glasshouse, tmp_path: Path) -> None:
    running.command("teams", "create", "research")
    running.command("keys", "create", "ours", "--team", "research")
    manager = running.command("admins", "create", "boss", "--role", "manager", "--team", "research").stdout.strip()
    where: dict[str, Any] = {
        "env": {"GLASSHOUSE_URL": running.control_url, "GLASSHOUSE_ADMIN_KEY": manager},
        "within": tmp_path,
    }
    listed = json.loads(running.command("keys", "list", "--json", **where).stdout)
    assert [key["name"] for key in listed] == ["ours"]
    assert "you may not do this" in running.command("export", status=1, **where).stderr
    assert "you may not do this" in running.command("teams", "set", "research", "--set", "blocked=true", status=1, **where).stderr
    assert "there is no key 'default'" in running.command("keys", "show", "default", status=1, **where).stderr
    running.command("keys", "create", "another", **where)
    [row] = json.loads(running.command("audit", "list", "--author", "boss", "--json").stdout)
    assert (row["role"], row["noun"], row["name"], row["team"]) == ("manager", "keys", "another", "research")
    running.command("admins", "revoke", "boss")
    assert "GLASSHOUSE_ADMIN_KEY must hold an admin key in use" in running.command("keys", "list", status=1, **where).stderr


def test_the_socket_is_its_owners_alone(running: Glasshouse) -> None:
    path = running.settings.control_socket_path
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_with_control_dead_and_with_nothing_running(vllm: ScriptedVLLM, tmp_path: Path) -> None:
    proxy = Glasshouse([vllm.url], state_dir=tmp_path / "state")
    with proxy:
        secret = proxy.command("keys", "create", "before").stdout.strip()
        assert proxy.kill("control", signal.SIGKILL)
        again = proxy.command("keys", "create", "meanwhile").stdout.strip()
        proxy._until(lambda: ask(proxy.url, CHAT, HELLO, key=secret).status == 200, "the first to work")
        proxy._until(lambda: ask(proxy.url, CHAT, HELLO, key=again).status == 200, "the second to work")
    proxy.command("keys", "create", "after")
    names = [key["name"] for key in json.loads(proxy.command("keys", "list", "--json").stdout)]
    assert names == ["after", "before", "default", "meanwhile"]
    changes = json.loads(proxy.command("audit", "list", "--noun", "keys", "--json").stdout)
    assert [(row["author"], row["name"]) for row in changes] == [
        ("local", "after"),
        ("local", "meanwhile"),
        ("local", "before"),
        ("glasshouse", "default"),
    ]
