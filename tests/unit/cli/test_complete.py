"""Completion in a shell: what the tab key finds, and that it never shows an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Command
from tests.unit.cli.scripted_control import Answer, Asked, problem, scripted_control

Complete = Callable[..., list[str]]


@pytest.fixture
def complete(here: Path) -> Complete:
    """`complete("keys", "show", "al")` → what there is for the last word, in a process of its own, as a shell has it asked."""

    def run(*words: str, **environment: str) -> list[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GLASSHOUSE_")}
        done = subprocess.run(
            [sys.executable, "-c", "from proxy.cli import main; main(prog_name='glasshouse')"],
            env={
                **clean,
                **environment,
                "_GLASSHOUSE_COMPLETE": "bash_complete",
                "COMP_WORDS": "\n".join(["glasshouse", *words]),
                "COMP_CWORD": str(len(words)),
            },
            cwd=here,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stderr == ""
        return [line.partition(",")[2] for line in done.stdout.splitlines() if line]

    return run


def names(*listed: str) -> Callable[[Asked], Answer]:
    return lambda asked: Answer(200, {"data": [{"id": f"id_{name}", "name": name} for name in listed], "next": None})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script(command: Command, shell: str) -> None:
    script = command("completion", shell).stdout
    assert f"_GLASSHOUSE_COMPLETE={shell}_complete" in script
    assert "glasshouse" in script
    if (program := shutil.which(shell)) is not None:
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


def test_commands_and_options(complete: Complete) -> None:
    assert complete("ke") == ["keys"]
    assert complete("keys", "re") == ["revoke"]
    assert "--requests-per-minute" in complete("keys", "create", "--req")


def test_names_from_the_running_control(complete: Complete, here: Path) -> None:
    (here / ".glasshouse").mkdir()
    with scripted_control(names("alice", "alina", "bob"), here / ".glasshouse/control.sock") as control:
        assert complete("keys", "show", "al") == ["alice", "alina"]
        assert complete("keys", "create", "x", "--team", "b") == ["bob"]
        assert complete("keys", "create", "x", "--models", "a,ali") == ["a,alice", "a,alina"]
    assert [asked.path.partition("?")[0] for asked in control.asked] == ["/keys", "/teams", "/models"]
    assert "containing=al" in control.asked[0].path


def test_names_from_elsewhere(complete: Complete) -> None:
    with scripted_control(names("alice")) as control:
        assert complete("keys", "show", "a", GLASSHOUSE_URL=control.url, GLASSHOUSE_ADMIN_KEY="k" * 40) == ["alice"]
        assert complete("keys", "show", "--url", control.url, "a", GLASSHOUSE_ADMIN_KEY="k" * 40) == ["alice"]


def test_what_a_shell_would_run_is_no_name(complete: Complete, here: Path) -> None:  # failure 78
    (here / ".glasshouse").mkdir()
    evil = ("a$(touch${IFS}pwned)", "a;b", "a b", "a`b`", "a\x1b[31m", "a\nplain,b", "a'b", "a|b", "a>b")
    with scripted_control(names("alice", *evil), here / ".glasshouse/control.sock"):
        assert complete("keys", "show", "a") == ["alice"]


@pytest.mark.parametrize(
    "script", [lambda _: problem(401, "no"), lambda _: Answer(200, b"<html>"), lambda _: Answer(200, {"data": 5})]
)
def test_no_error_is_shown(complete: Complete, script: Any) -> None:
    with scripted_control(script) as control:
        assert complete("keys", "show", "a", GLASSHOUSE_URL=control.url, GLASSHOUSE_ADMIN_KEY="k" * 40) == []


def test_nor_for_nobody_and_for_whoever_does_not_answer(complete: Complete, here: Path) -> None:
    assert complete("keys", "show", "a") == []
    assert not (here / ".glasshouse").exists(), "and nothing is made"
    assert complete("keys", "show", "a", GLASSHOUSE_URL="http://127.0.0.1:1", GLASSHOUSE_ADMIN_KEY="k" * 40) == []
    assert complete("keys", "show", "a", GLASSHOUSE_URL="http://127.0.0.1:1") == []
    with scripted_control(lambda _: control.release.wait() and Answer()) as control:  # type: ignore[arg-type, return-value]
        assert complete("keys", "show", "a", GLASSHOUSE_URL=control.url, GLASSHOUSE_ADMIN_KEY="k" * 40) == []
        control.release.set()
