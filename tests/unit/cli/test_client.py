"""The control API by whichever way there is, and what is said when there is none."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from proxy.cli.client import connected, path_of, reachable
from proxy.store import audit_rows, open_database
from tests.unit.cli.conftest import Command
from tests.unit.cli.scripted_control import Answer, Asked, nothing_there, problem, scripted_control

SECRET = "gha-" + "canary" * 8


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GLASSHOUSE_ADMIN_KEY", SECRET)
    return SECRET


# -- elsewhere --


def test_elsewhere_with_the_key_of_the_environment(command: Command, secret: str, here: Path) -> None:
    with scripted_control(nothing_there) as control:
        command("keys", "list", "--url", control.url)
    [asked] = control.asked
    assert (asked.method, asked.path.partition("?")[0]) == ("GET", "/keys")
    assert asked.headers["authorization"] == f"Bearer {secret}"
    assert not (here / ".glasshouse").exists(), "nothing is made here for what is elsewhere"


def test_elsewhere_by_the_environment_alone_and_below_a_path(
    command: Command, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted_control(nothing_there) as control:
        monkeypatch.setenv("GLASSHOUSE_URL", f"{control.url}/admin/")
        command("teams", "list")
    assert control.asked[0].path.startswith("/admin/teams?")


def test_no_command_takes_the_key_as_an_option() -> None:  # it would be in the list of processes and in the history
    from proxy.cli import COMMANDS, main

    context = click.Context(main)
    seen = 0
    todo = [main.get_command(context, name) for name in COMMANDS]
    while todo:
        each = todo.pop()
        assert each is not None
        todo += each.commands.values() if isinstance(each, click.Group) else []
        for parameter in each.params:
            seen += 1
            assert "KEY" not in str(getattr(parameter, "envvar", "")), (each.name, parameter.name)
            assert not {"--admin-key", "--token", "--secret", "--password"} & set(parameter.opts)
    assert seen > 100


def test_elsewhere_without_a_key(command: Command) -> None:
    with scripted_control(nothing_there) as control:
        said = command("keys", "list", "--url", control.url, status=1).stderr
    assert said == f"Error: GLASSHOUSE_ADMIN_KEY is not set: the admin key for {control.url}\n"
    assert control.asked == []


@pytest.mark.parametrize("key", ["gha-ümlaut", "gha-a\nx-evil: 1"])
def test_a_key_that_no_header_can_hold(command: Command, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("GLASSHOUSE_ADMIN_KEY", key)
    said = command("keys", "list", "--url", "http://127.0.0.1:1", status=1).stderr
    assert "GLASSHOUSE_ADMIN_KEY holds no admin key" in said
    assert "evil" not in said


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8401", "ftp://h", "http://", "http://user:canary@h", "http://h?x=1", "http://h:99999", "http://[::1"]
)
def test_what_is_no_address(command: Command, secret: str, url: str) -> None:
    said = command("keys", "list", "--url", url, status=1).stderr
    assert "--url: not usable as control's address; allowed: http[s]://HOST[:PORT][/PATH]" in said
    assert "canary" not in said  # failure 76


def test_nobody_is_there(command: Command, secret: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = command("keys", "list", "--url", url, status=1).stderr
    assert said.startswith(f"Error: {url} can't be asked: ")
    assert "refused" in said
    assert SECRET not in said


def test_nobody_answers(secret: str) -> None:
    with scripted_control(lambda _: control.release.wait() and Answer()) as control:  # type: ignore[arg-type, return-value]
        with (
            pytest.raises(click.ClickException, match=rf"^{control.url} doesn't answer$"),
            connected(control.url, None, 0.2) as api,
        ):
            api.get("/keys")
        control.release.set()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            problem(401, "The key isn't known here."),
            "The key isn't known here; GLASSHOUSE_ADMIN_KEY must hold an admin key in use",
        ),
        (problem(403, "you may not do this"), "Error: you may not do this\n"),
        (problem(400, "team: there is no team 'x'; allowed: a\x1b[31m"), "team: there is no team 'x'; allowed: a\\x1b[31m"),
        (Answer(302, b"", {"location": "https://elsewhere.example/keys"}), "sends elsewhere (https://elsewhere.example/keys)"),
        (Answer(502, b"<html>bad gateway</html>"), "answered 502"),
        (Answer(500, {"detail": [1]}), "answered 500"),
        (Answer(200, b"<html>"), "isn't Glasshouse's control: its answer is no JSON"),
        (Answer(200, b"\xff"), "isn't Glasshouse's control: its answer is no JSON"),
        (Answer(200, {"data": "x"}), "isn't Glasshouse's control: its answer is no list"),
        (Answer(200, [1]), "isn't Glasshouse's control: its answer is no list"),
    ],
)
def test_what_it_says_is_passed_on(command: Command, secret: str, answer: Answer, said: str) -> None:  # failure 78
    with scripted_control(lambda _: answer) as control:
        result = command("keys", "list", "--url", control.url, status=1)
    assert said in result.stderr
    assert len(control.asked) == 1, "a key goes nowhere else"
    assert "\x1b" not in result.output
    assert SECRET not in result.output


def test_all_parts_of_a_list(command: Command, secret: str) -> None:
    def script(asked: Asked) -> Answer:
        number = int(asked.path.partition("after=")[2] or 0)
        key = {"id": f"key_{number}", "name": f"{number}"}
        return Answer(200, {"data": [key], "has_more": number < 3, "next": str(number + 1) if number < 3 else None})

    with scripted_control(script) as control:
        rows = json.loads(command("keys", "list", "--json", "--url", control.url).stdout)
        assert [row["name"] for row in rows] == ["0", "1", "2", "3"]
        found = json.loads(command("audit", "list", "--limit", "2", "--json", "--url", control.url).stdout)
        assert len(found) == 2


# -- here --


def listening(here: Path, answered: Any = nothing_there) -> Any:
    (here / ".glasshouse").mkdir(mode=0o700)
    return scripted_control(answered, here / ".glasshouse" / "control.sock")


def test_the_running_control_is_asked_through_its_socket_and_needs_no_key(command: Command, secret: str, here: Path) -> None:
    with listening(here) as control:
        command("keys", "list")
    assert [each.path.partition("?")[0] for each in control.asked] == ["/keys"]
    assert "authorization" not in control.asked[0].headers, "the key is for elsewhere"
    assert not (here / ".glasshouse/glasshouse.db").exists(), "the database is control's to open"


def test_a_socket_with_a_long_way_to_it(here: Path, command: Command) -> None:
    state = here / ("d" * 100) / ("e" * 100)
    state.mkdir(parents=True)
    (here / "glasshouse.yaml").write_text(f"state_dir: {state}\n")
    with scripted_control(nothing_there, state / "control.sock") as control:
        command("keys", "list")
    assert len(control.asked) == 1
    with reachable(state / "control.sock") as short:
        assert len(short) < 108


def test_the_state_directory_of_a_file_that_can_not_be_used(here: Path, command: Command) -> None:
    state = here / "state"
    state.mkdir()
    (here / "glasshouse.yaml").write_text(f"state_dir: {state}\nworkers: none\n")
    with scripted_control(nothing_there, state / "control.sock") as control:
        command("keys", "list")  # what runs, runs on other settings than these
    assert len(control.asked) == 1
    assert "workers: 'none' is not allowed" in command("keys", "list", status=1).stderr


def test_a_socket_that_somebody_left_behind(command: Command, here: Path) -> None:
    with listening(here):
        pass
    assert (here / ".glasshouse/control.sock").exists()
    assert command("keys", "create", "alice").stdout.startswith("gh-")


def test_where_nothing_runs_it_is_done_here(command: Command, here: Path) -> None:
    command("keys", "create", "alice")
    assert stat.S_IMODE((here / ".glasshouse").stat().st_mode) == 0o700
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").connect() as connection:
        [row] = audit_rows(connection)
    assert (row.author, row.role, row.action, row.noun, row.name) == ("local", "admin", "create", "keys", "alice")


def test_a_database_that_can_not_be_used(command: Command, here: Path) -> None:
    (here / "glasshouse.yaml").write_text("database: mysql://nobody\n")
    assert "Error: database: not a usable database URL" in command("keys", "list", status=1).stderr


@pytest.mark.parametrize("name", ["", "..", "a/../b", "a//b", "/a", "."])
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(click.ClickException, match="is no name"):
        path_of("models", name)


def test_names_in_paths() -> None:
    assert path_of("models", "org/some model?#%") == "/models/org/some%20model%3F%23%25"


def test_a_command_loads_no_more_than_it_needs() -> None:
    """Half a second that who asks a running control doesn't wait."""
    look = "import sys, proxy.cli; proxy.cli.main.get_command(None, 'keys'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "proxy.cli.keys" in loaded
    assert not loaded & {"sqlalchemy", "fastapi", "pydantic", "httpx2", "yaml", "uvicorn", "proxy.supervisor"}
