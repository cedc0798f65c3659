"""`glasshouse up` as a person meets it: what it runs, what it says, how it ends."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import pytest

from proxy.cli.up import (
    DEMO_PRICE,
    FIRST_ENGINE_PORT,
    PHOENIX_PORT,
    Banner,
    Console,
    Keyring,
    Plan,
    Traces,
    _has_backends,
    without_model,
)
from proxy.embedded.engine import MODEL_NAME
from proxy.nouns import BackendSettings
from proxy.settings import ControlSettings, Settings
from proxy.snapshot import Backend, Model, SnapshotFile
from proxy.store import (
    BACKENDS,
    GLASSHOUSE,
    create_key,
    hash_key,
    list_admin_keys,
    list_keys,
    live_keys,
    open_database,
    put,
    revoke_admin_key,
    revoke_key,
)
from proxy.supervisor import SupervisorError
from tests.conftest import Start
from tests.support.glasshouse import DEFAULTS, LAST_WORDS, ROOT
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import ask, request

CHAT: Final = "/v1/chat/completions"
HELLO: Final[dict[str, Any]] = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello."}]}


class TestRunning:
    def test_it_serves_says_so_and_ends(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        assert ask(running.url, CHAT, HELLO, key=running.key).status == 200
        said = running.logs()["up"]
        for fact in (
            f"proxy     {running.url}/v1\n",
            "models    smollm2\n",
            f"backends  backend-0  {vllm.url}  (vllm)\n",
            "traces    sent nowhere",
            f"metrics   {running.metrics_url}\n",
            f"control   {running.control_url}\n",
            f"state     {running.state_dir}  (logs in log/)\n",
            f"export OPENAI_BASE_URL={running.url}/v1 OPENAI_API_KEY={running.key}\n",
        ):
            assert fact in said
        assert "\x1b" not in said  # this is no terminal
        assert "demo" not in said
        running.stop()
        assert "stopped; every request is in the ledger" in running.logs()["up"]
        assert [row["outcome"] for row in running.rows()] == ["ok"]

    def test_the_command_that_it_prints_streams_an_answer(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        command = re.search(r"^  (curl -N .*?)\n\n", running.logs()["up"], re.DOTALL | re.MULTILINE)
        assert command is not None
        done = subprocess.run(["sh", "-c", command[1]], capture_output=True, timeout=60, check=True)
        assert done.stdout.endswith(b"data: [DONE]\n\n")

    def test_the_commands_that_it_prints_for_administrators_work(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        said = running.logs()["up"]
        command = re.search(r"^  (export GLASSHOUSE_URL=.*)\n  (curl .*)\n", said, re.MULTILINE)
        assert command is not None
        done = subprocess.run(["sh", "-c", f"{command[1]}\n{command[2]}"], capture_output=True, timeout=60, check=True)
        assert [key["name"] for key in json.loads(done.stdout)["data"]] == ["default"]
        assert said.count(running.admin_key) == 2, "when it is made, and in the command"

    def test_the_first_key_is_shown_once(self, glasshouse: Start, vllm: ScriptedVLLM, tmp_path: Path) -> None:
        first = glasshouse([vllm.url], state_dir=tmp_path / "state")
        assert f"created the key 'default', shown only now: {first.key}" in first.logs()["up"]
        first.stop()
        (tmp_path / "state" / "up.out").unlink()
        again = glasshouse([vllm.url], state_dir=tmp_path / "state", key=first.key)
        assert "gh-" not in again.logs()["up"]
        assert "gha-" not in again.logs()["up"]
        assert "GLASSHOUSE_ADMIN_KEY" not in again.logs()["up"]
        assert "glasshouse keys create" in again.logs()["up"]
        assert '"Authorization: Bearer $OPENAI_API_KEY"' in again.logs()["up"]
        assert ask(again.url, CHAT, HELLO, key=first.key).status == 200
        assert not (tmp_path / "state" / "demo-key").exists()
        files = [file for file in (tmp_path / "state").rglob("*") if file.is_file() and file.name != "up.out"]
        for secret in (first.key, first.admin_key):
            assert [file.name for file in files if secret[8:].encode() in file.read_bytes()] == []  # failure 76

    def test_an_admin_key_may_be_given_and_is_nobody_elses(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        given = base64.b64encode(secrets.token_bytes(32)).decode()
        running = glasshouse([vllm.url], env={"GLASSHOUSE_ADMIN_KEY": f"{given}\n"})  # as a file of a secret store has it
        assert [row["name"] for row in json.loads(running.command("admins", "list", "--json").stdout)] == ["environment"]
        elsewhere = {"GLASSHOUSE_URL": running.control_url, "GLASSHOUSE_ADMIN_KEY": given}
        assert "default" in running.command("keys", "list", env=elsewhere, within=Path("/")).stdout
        running.command("keys", "list", env={**elsewhere, "GLASSHOUSE_ADMIN_KEY": f"{given}x"}, within=Path("/"), status=1)
        assert not [name for name, text in running.logs().items() if "gha-" in text or given[4:] in text]
        pids = running.pids()
        children = [pid for role, each in pids.items() if role != "supervisor" for pid in each]
        assert len(children) == 3
        for pid in children:
            assert given.encode() not in Path(f"/proc/{pid}/environ").read_bytes()

    def test_a_backend_that_does_not_answer_is_named_and_holds_nothing_up(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            running = glasshouse([vllm.url, {"url": dead, "name": "dead"}], models=False)
            running.until_said(LAST_WORDS)
            assert f"dead  {dead}  no model known" in running.logs()["up"]
            assert ask(running.url, CHAT, HELLO, key=running.key).status == 200

    @pytest.mark.parametrize("role", ["worker", "collector", "control"])
    def test_what_dies_is_replaced_and_spoken_of(self, glasshouse: Start, vllm: ScriptedVLLM, role: str) -> None:
        running = glasshouse([vllm.url])
        running.wait_replaced(role, running.kill(role))
        running.wait_ready()
        running.until_said(" is back")
        assert re.search(rf"{role}\S* was ended by SIGKILL; starting it again", running.logs()["up"])
        assert ask(running.url, CHAT, HELLO, key=running.key).status == 200

    def test_nobody_outlives_a_killed_command(self, glasshouse: Start, vllm: ScriptedVLLM, tmp_path: Path) -> None:
        running = glasshouse([vllm.url], state_dir=tmp_path / "state")
        running.kill("supervisor")
        assert running.wait_exit() == -signal.SIGKILL
        running.wait_nobody()
        again = glasshouse([vllm.url], {"listen": running.settings.listen}, state_dir=tmp_path / "state", key=running.key)
        assert ask(again.url, CHAT, HELLO, key=running.key).status == 200

    def test_ctrl_c_says_how_many_requests_it_waits_for(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        with socket.create_connection(("127.0.0.1", int(running.settings.listen.rpartition(":")[2]))) as client:
            client.sendall(request(CHAT, {**HELLO, "stream": True, "script": {"hang_after_events": 2}}, key=running.key))
            vllm.wait(lambda: vllm.in_flight == 1)
            running.until_in_flight(1)
            running.signal(signal.SIGINT)
            running.until_said("stopping: 1 request in flight, up to 30 s to finish (Ctrl-C again: at once)")
            vllm.release()
        assert running.wait_exit() == 0

    def test_a_second_ctrl_c_waits_for_nothing(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        with socket.create_connection(("127.0.0.1", int(running.settings.listen.rpartition(":")[2]))) as client:
            client.sendall(request(CHAT, {**HELLO, "script": {"hang": True}}, key=running.key))
            vllm.wait(lambda: vllm.in_flight == 1)
            running.signal(signal.SIGINT)
            running.until_said("stopping: ")
            assert running.insist(signal.SIGINT) == 1
        running.wait_nobody()


class TestRefusing:
    """A start that can't succeed ends at once, with a text that says what to do."""

    def refused(self, backend: str, config: dict[str, Any], state_dir: Path, **env: str) -> str:
        file = state_dir.parent / "refused.yaml"
        file.write_text(json.dumps({**DEFAULTS, "backends": [{"url": backend}], "state_dir": str(state_dir), **config}))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "proxy.cli", "up", "--config", str(file)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            timeout=60,
            check=False,
            text=True,
        )
        assert done.returncode == 1, done
        return done.stderr

    def test_an_address_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            listen = f"127.0.0.1:{other.getsockname()[1]}"
            said = self.refused("http://127.0.0.1:1", {"listen": listen}, tmp_path / "state")
        assert said.startswith(f"Error: listen: {listen} is in use by another process. Stop that one, or set `listen`")

    def test_a_state_directory_in_use(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        said = self.refused(vllm.url, {}, running.state_dir)
        holder = f"another `glasshouse up` (process {running.pid('supervisor')})"
        assert said.startswith(f"Error: state_dir: {running.state_dir} is in use by {holder}")
        assert ask(running.url, CHAT, HELLO, key=running.key).status == 200

    def test_a_database_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "broken.db").write_bytes(b"this is no database, whatever its name says" * 100)
        said = self.refused("http://127.0.0.1:1", {"database": f"sqlite:///{tmp_path}/broken.db"}, tmp_path / "state")
        assert said.startswith("Error: the database sqlite:///")
        assert "Traceback" not in said

    @pytest.mark.parametrize("key", ["sk-1234", "changeme" * 6, "0123456789" * 4, "a b" * 20])  # failure 75
    def test_an_admin_key_that_somebody_could_guess(self, tmp_path: Path, key: str) -> None:
        said = self.refused("http://127.0.0.1:1", {}, tmp_path / "state", GLASSHOUSE_ADMIN_KEY=key)
        assert "Error: GLASSHOUSE_ADMIN_KEY: not usable as the secret of an admin key: " in said
        assert "such as the output of: openssl rand -base64 32" in said
        assert key not in said
        database = open_database(f"sqlite:///{tmp_path}/state/glasshouse.db")
        with database.connect() as connection:
            assert list_admin_keys(connection) == []
            assert list_keys(connection) == [], "nothing is made by a start that is refused"
        database.dispose()

    def test_a_process_that_cannot_start(self, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "journal").symlink_to("/proc/self/fd")  # a folder where not even root can make a file
        said = self.refused("http://127.0.0.1:1", {}, tmp_path / "state")
        assert re.match(r"Error: worker-0: ended with status 1 \d times\. The end of \S+worker-0\.log:\n", said)


class TestPlan:
    def test_with_backends_nothing_comes_along(self) -> None:
        settings = Settings.of({"backends": [{"url": "http://127.0.0.1:8000"}]})
        assert Plan.of(settings) == Plan(settings, False, {}, None)

    def test_nor_with_backends_in_the_database(self, tmp_path: Path) -> None:
        settings = Settings.of({"state_dir": str(tmp_path)})
        assert not _has_backends(settings)
        assert not settings.database_path.exists(), "and none is made"
        database = open_database(settings.database_url)
        assert not _has_backends(settings)
        with database.begin() as connection:
            put(connection, BACKENDS, "gpu0", BackendSettings(url="http://127.0.0.1:8000"), GLASSHOUSE)
        database.dispose()
        assert _has_backends(settings)
        plan = Plan.of(settings, stored=True)
        assert (plan.demo, plan.engines) == (False, {})
        assert not plan.with_settings(settings).demo
        assert not _has_backends(Settings.of({"database": "postgresql://127.0.0.1:1/nobody?connect_timeout=1"}))

    def test_without_backends_the_demo_comes_along(self) -> None:
        plan = Plan.of(Settings())
        settings = plan.settings
        assert [settings.backend_name(index) for index in range(2)] == ["engine-0", "engine-1"] == list(plan.engines)
        assert [each.url for each in settings.backends] == [f"http://127.0.0.1:{port}" for port in plan.engines.values()]
        assert all(port >= FIRST_ENGINE_PORT for port in plan.engines.values())
        assert settings.models[MODEL_NAME].price == DEMO_PRICE
        assert settings.capture.content
        assert plan.phoenix_ports is not None
        assert settings.phoenix.url == f"http://127.0.0.1:{plan.phoenix_ports[0]}"

    def test_a_price_of_ones_own_stays(self) -> None:
        plan = Plan.of(Settings.of({"models": {MODEL_NAME: {"price": {"output": 7}}}}))
        price = plan.settings.models[MODEL_NAME].price
        assert price is not None
        assert price.output == 7

    def test_ports_in_use_are_stepped_over(self) -> None:
        taken = Plan.of(Settings())
        assert taken.phoenix_ports is not None
        with (
            socket.create_server(("127.0.0.1", taken.phoenix_ports[0])),
            socket.create_server(("127.0.0.1", taken.engines["engine-0"])),
        ):
            plan = Plan.of(Settings())
        assert plan.phoenix_ports is not None
        assert plan.phoenix_ports[0] > taken.phoenix_ports[0] >= PHOENIX_PORT
        assert next(iter(plan.engines.values())) >= taken.engines["engine-1"]

    def test_a_phoenix_of_our_own_beside_backends(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            settings = Settings.of(
                {"backends": [{"url": "http://127.0.0.1:1"}], "phoenix": {"start": True, "url": f"http://127.0.0.1:{port}"}}
            )
            with pytest.raises(SupervisorError, match=f"port {port} is in use"):
                Plan.of(settings)
        plan = Plan.of(settings)
        assert not plan.demo
        assert plan.phoenix_ports is not None
        assert plan.phoenix_ports[0] == port

    def test_a_reload_keeps_what_the_demo_runs(self) -> None:
        plan = Plan.of(Settings())
        again = plan.with_settings(
            Settings.of({"timeouts": {"drain": 7}, "models": {MODEL_NAME: {"price": {"output": 7}}}})
        ).settings
        assert (again.backends, again.phoenix, again.capture) == (
            plan.settings.backends,
            plan.settings.phoenix,
            plan.settings.capture,
        )
        assert (again.timeouts.drain, again.models[MODEL_NAME].price) != (plan.settings.timeouts.drain, DEMO_PRICE)
        assert plan.without_phoenix().with_settings(Settings()).settings.phoenix.url is None
        assert plan.without_phoenix().settings.phoenix.url is None

    @pytest.mark.parametrize(
        ("running", "wanted"), [({}, {"backends": [{"url": "http://h:1"}]}), ({"backends": [{"url": "http://h:1"}]}, {})]
    )
    def test_a_reload_makes_no_demo_of_it_and_ends_none(self, running: dict[str, Any], wanted: dict[str, Any]) -> None:
        with pytest.raises(SupervisorError, match=r"^backends: .* are running; stop `glasshouse up` and start it again"):
            Plan.of(Settings.of(running)).with_settings(Settings.of(wanted))

    def test_a_phoenix_elsewhere_is_not_ours_to_start(self) -> None:
        phoenix = {"start": True, "url": "http://phoenix.example:6006"}
        with pytest.raises(SupervisorError, match="nowhere to start a Phoenix"):
            Plan.of(Settings.of({"backends": [{"url": "http://127.0.0.1:1"}], "phoenix": phoenix}))


class TestKeyring:
    def settings(self, directory: Path) -> Settings:
        return Settings.of({"state_dir": str(directory)})

    def made(self, directory: Path, *, demo: bool, given: str = "") -> Keyring:
        keyring = Keyring(demo, Console(io.StringIO()), given)
        keyring.prepare(self.settings(directory))
        return keyring

    def admins(self, directory: Path) -> list[tuple[str, bool]]:
        """Name, in use."""
        database = open_database(self.settings(directory).database_url)
        with database.begin() as connection:
            found = [(row.name, row.revoked_at is None) for row in list_admin_keys(connection)]
        database.dispose()
        return found

    def living(self, directory: Path) -> dict[str, bytes]:
        database = open_database(self.settings(directory).database_url)
        with database.begin() as connection:
            keys = {key.name: key.hash for key in live_keys(connection)}
        database.dispose()
        return keys

    def test_the_demo_keeps_its_key(self, tmp_path: Path) -> None:
        first = self.made(tmp_path, demo=True)
        again = self.made(tmp_path, demo=True)
        assert first.secret == again.secret is not None
        assert stat.S_IMODE((tmp_path / "demo-key").stat().st_mode) == 0o600
        assert self.living(tmp_path) == {"default": first.digest}

    def test_a_lost_demo_key_is_replaced(self, tmp_path: Path) -> None:
        secrets = [self.made(tmp_path, demo=True)]
        for _ in range(2):
            (tmp_path / "demo-key").unlink()
            secrets.append(self.made(tmp_path, demo=True))
        assert len({keyring.secret for keyring in secrets}) == 3
        assert self.living(tmp_path) == {"default": secrets[0].digest, "demo": secrets[2].digest}

    def test_a_revoked_demo_key_is_replaced(self, tmp_path: Path) -> None:
        first = self.made(tmp_path, demo=True)
        database = open_database(self.settings(tmp_path).database_url)
        with database.begin() as connection:
            revoke_key(connection, "default")
        database.dispose()
        assert self.made(tmp_path, demo=True).secret != first.secret

    def test_otherwise_one_is_made_only_where_none_ever_was(self, tmp_path: Path) -> None:
        assert self.made(tmp_path, demo=False).secret is not None
        database = open_database(self.settings(tmp_path).database_url)
        with database.begin() as connection:
            revoke_key(connection, "default")
            assert len(list_keys(connection)) == 1
        database.dispose()
        assert self.made(tmp_path, demo=False).secret is None

    def test_none_is_made_where_the_file_has_some(self, tmp_path: Path) -> None:
        keyring = Keyring(False, Console(io.StringIO()))
        whole = {"hash": f"sha256:{hash_key('gh-something').hex()}"}
        keyring.prepare(Settings.of({"state_dir": str(tmp_path), "keys": {"alice": whole}}))
        assert (keyring.secret, keyring.admin_secret is None) == (None, False)

    def test_the_first_admin_key_is_made_only_where_none_ever_was(self, tmp_path: Path) -> None:
        first = self.made(tmp_path, demo=True)
        assert first.admin_secret is not None
        assert first.admin_secret.startswith("gha-")
        assert self.admins(tmp_path) == [("first", True)]
        assert self.made(tmp_path, demo=True).admin_secret is None
        database = open_database(self.settings(tmp_path).database_url)
        with database.begin() as connection:
            revoke_admin_key(connection, "first")
        database.dispose()
        assert self.made(tmp_path, demo=True).admin_secret is None, "what was revoked doesn't come back by a restart"

    def test_a_given_admin_key_takes_the_place_of_the_one_before(self, tmp_path: Path) -> None:
        given, other = ("gha-" + secrets.token_urlsafe(32) for _ in range(2))
        for _ in range(2):
            assert self.made(tmp_path, demo=False, given=given).admin_secret is None
            assert self.admins(tmp_path) == [("environment", True)]
        self.made(tmp_path, demo=False, given=other)
        assert sorted(self.admins(tmp_path)) == [("environment", False), ("environment", True)]
        with pytest.raises(SupervisorError, match=r"^GLASSHOUSE_ADMIN_KEY: this secret is or was that of the admin key"):
            self.made(tmp_path, demo=False, given=given)
        assert sorted(self.admins(tmp_path)) == [("environment", False), ("environment", True)], "the other one still works"

    def test_keys_that_people_made_are_left_alone(self, tmp_path: Path) -> None:
        database = open_database(self.settings(tmp_path).database_url)
        with database.begin() as connection:
            create_key(connection, "default")
        database.dispose()
        before = self.living(tmp_path)
        demo = self.made(tmp_path, demo=True)
        assert self.living(tmp_path) == {**before, "demo": demo.digest}


class TestBanner:
    settings: Final = Settings.of({"listen": "0.0.0.0:8400", "backends": [{"url": "http://10.0.0.1:8000", "name": "gpu-0"}]})

    def text(self, settings: Settings = settings, **more: Any) -> str:
        shown: dict[str, Any] = {"demo": False, "secret": "gh-key", "snapshot": SnapshotFile(), "seconds": 1.0}
        shown["admin_secret"] = None
        shown["traces"] = Traces("t", True)
        return "\n".join(Banner(settings, **{**shown, **more}).lines())

    def test_it_says_who_shares_limits_and_through_what(self) -> None:
        shared = Settings.of({"workers": 4, "redis": {"url": "redis://:canary@redis:6379/1"}})
        assert "of 4 workers, shared through redis://redis:6379/1\n" in self.text(shared)
        assert "canary" not in self.text(shared)  # failure 76
        assert "shared through" not in self.text()

    def test_all_interfaces_are_asked_on_loopback(self) -> None:
        assert "http://127.0.0.1:8400/v1  (port 8400 of every interface)" in self.text()

    def test_without_a_model_the_command_says_what_to_fill_in(self) -> None:
        assert '"model":"MODEL"' in self.text()
        assert "gpu-0  http://10.0.0.1:8000  no model known" in self.text()

    def test_with_a_model_it_is_in_the_command(self) -> None:
        snapshot = SnapshotFile(models={"m": Model("m", ("gpu-0",))}, backends={"gpu-0": Backend("gpu-0", "10.0.0.1", 8000)})
        assert without_model(snapshot, self.settings) == []
        assert '"model":"m"' in self.text(snapshot=snapshot)
        assert "gpu-0  http://10.0.0.1:8000  (vllm)" in self.text(snapshot=snapshot)

    def test_an_admin_key_is_shown_with_what_it_is_for(self) -> None:
        settings = msgspec.structs.replace(self.settings, control=ControlSettings(listen="0.0.0.0:8401"))
        said = self.text(settings, admin_secret="gha-key")
        assert "export GLASSHOUSE_URL=http://127.0.0.1:8401 GLASSHOUSE_ADMIN_KEY=gha-key\n" in said
        assert "ADMIN_KEY" not in self.text(settings)

    def test_the_demo_says_that_it_keeps_prompts(self) -> None:
        assert "prompts and answers are kept" in self.text(demo=True)
        assert "prompts and answers" not in self.text()

    def test_it_points_at_the_trace_where_there_is_one(self) -> None:
        assert "at the trace" in self.text()
        assert "at the trace" not in self.text(traces=Traces("nowhere", False))

    def test_more_lines_of_a_fact_are_indented(self) -> None:
        assert "Phoenix isn't up\n            its log" in self.text(traces=Traces("Phoenix isn't up\nits log", False))


class TestConsole:
    def test_on_a_terminal_a_passing_line_is_overwritten(self) -> None:
        ours, theirs = os.openpty()
        with open(theirs, "w") as stream:  # noqa: PTH123  a descriptor, not a path
            console = Console(stream)
            console.passing("waiting")
            console.line("done")
            assert os.read(ours, 1000) == b"\r\x1b[Kwaiting\r\x1b[Kdone\r\n"
        os.close(ours)

    def test_it_knows_when_the_terminal_has_gone(self) -> None:
        ours, theirs = os.openpty()
        with open(theirs, "w") as stream:  # noqa: PTH123  a descriptor, not a path
            console = Console(stream)
            assert not console.hung_up()
            os.close(ours)
            assert console.hung_up()
        assert not Console(io.StringIO()).hung_up()

    def test_elsewhere_it_is_kept_short(self) -> None:
        stream = io.StringIO()
        console = Console(stream)
        for _ in range(100):
            console.passing("waiting")
        console.line(click.style("done", bold=True))
        assert stream.getvalue() == "done\n"

    def test_nobody_has_to_read_on(self) -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        stream = os.fdopen(theirs, "w", buffering=1)
        Console(stream).line("said to nobody")
        with contextlib.suppress(BrokenPipeError):
            stream.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_demo(glasshouse: Start, tmp_path: Path) -> None:
    """The real thing: two engines and Phoenix. Environments are taken from the checkout's state directory if they are there."""
    state = tmp_path / "state"
    state.mkdir()
    if (built := ROOT / ".glasshouse" / "env").is_dir():
        (state / "env").symlink_to(built)
    running = glasshouse(config={"phoenix": {"url": "http://127.0.0.1:6006"}}, state_dir=state, patience=800)
    body = {"model": MODEL_NAME, "max_tokens": 8, "messages": [{"role": "user", "content": "Name a thing that floats."}]}
    said = ask(running.url, CHAT, body, key=running.key).json()["usage"]  # a real model may stop early
    [row] = running.rows(1)
    assert row["outcome"] == "ok"
    assert (row["input_tokens"], row["output_tokens"]) == (said["prompt_tokens"], said["completion_tokens"])
    fresh = row["input_tokens"] - row["cached_tokens"]
    assert row["cost_nano"] == fresh * 50 + row["cached_tokens"] * 10 + row["output_tokens"] * 200 > 0
    assert running.key == (state / "demo-key").read_text().strip()
