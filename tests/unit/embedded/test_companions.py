"""Commands, variables and addresses of the companions; and the leash that ends them with their parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.embedded import Companion, script_argv, sealed_environment
from proxy.embedded.engine import engine, threads_each
from proxy.embedded.phoenix import phoenix, project_url, trace_url

PYTHON = Path("/env/bin/python")
ENGINE = engine("engine-0", PYTHON, port=8101, threads=2)
PHOENIX = phoenix(PYTHON, Path("/state"), port=6006, grpc_port=4317)


@pytest.mark.parametrize("companion", [ENGINE, PHOENIX], ids=lambda companion: companion.name)
def test_scripts_exist_and_see_nothing_of_this_folder(companion: Companion) -> None:
    python, *flags, leash, script = companion.argv[:5]
    assert (python, flags) == ("/env/bin/python", ["-I", "-u"])
    assert Path(leash).is_file()
    assert Path(script).is_file()


@pytest.mark.parametrize("companion", [ENGINE, PHOENIX], ids=lambda companion: companion.name)
def test_everything_is_on_loopback(companion: Companion) -> None:
    assert companion.ready_url.startswith("http://127.0.0.1:")
    assert "127.0.0.1" in companion.notice
    assert "loopback only" in companion.notice


def test_an_engine_is_told_its_port_and_its_share_of_the_machine() -> None:
    assert {"--host=127.0.0.1", "--port=8101", "--threads=2", "--model-name=smollm2-135m"} <= set(ENGINE.argv)
    assert ENGINE.ready_url == "http://127.0.0.1:8101/health"


@pytest.mark.parametrize(("engines", "cpus", "threads"), [(2, 1, 1), (2, 2, 1), (2, 4, 2), (2, 64, 4), (1, 2, 2)])
def test_engines_share_the_cores(engines: int, cpus: int, threads: int) -> None:
    assert threads_each(engines, cpus) == threads


def test_phoenix_keeps_to_itself() -> None:
    assert PHOENIX.env["PHOENIX_HOST"] == "127.0.0.1"
    assert (PHOENIX.env["PHOENIX_PORT"], PHOENIX.env["PHOENIX_GRPC_PORT"]) == ("6006", "4317")
    assert PHOENIX.env["PHOENIX_WORKING_DIR"] == "/state/phoenix"
    assert PHOENIX.env["PHOENIX_TELEMETRY_ENABLED"] == PHOENIX.env["PHOENIX_ALLOW_EXTERNAL_RESOURCES"] == "false"
    assert PHOENIX.env["PHOENIX_DISABLE_AGENT_ASSISTANT"] == "true"


def test_a_companion_sees_no_secret_and_no_setting_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("PHOENIX_SQL_DATABASE_URL", "postgresql://elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("TZ", "UTC")
    environment = sealed_environment(MINE="1")
    assert not {"OPENAI_API_KEY", "PHOENIX_SQL_DATABASE_URL", "PYTHONPATH"} & environment.keys()
    assert (environment["TZ"], environment["MINE"]) == ("UTC", "1")


def test_links_into_phoenix() -> None:
    assert project_url("http://127.0.0.1:6006/", "my project/1") == "http://127.0.0.1:6006/redirects/projects/my%20project%2F1"
    assert trace_url("http://127.0.0.1:6006", "ab" * 16) == f"http://127.0.0.1:6006/redirects/traces/{'ab' * 16}"


def test_a_leashed_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    reader, writer = os.pipe()  # the leashed script holds the last writing end: EOF says that it is gone
    script = tmp_path / "companion.py"
    script.write_text(f"import os, signal\nos.write({writer}, b'up')\nwhile True: signal.pause()\n")
    argv = script_argv(Path(sys.executable), str(script))
    parent = f"import subprocess, time; subprocess.Popen({argv!r}, pass_fds=[{writer}], start_new_session=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", parent], pass_fds=[writer]) as supervisor:
        os.close(writer)
        assert os.read(reader, 2) == b"up"
        supervisor.kill()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_leashed_script_has_its_own_arguments(tmp_path: Path) -> None:
    script = tmp_path / "companion.py"
    script.write_text("import sys; print(__name__, sys.argv)")
    argv = script_argv(Path(sys.executable), str(script), "--port=1", "serve")
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert printed == f"__main__ {[str(script), '--port=1', 'serve']}\n"
