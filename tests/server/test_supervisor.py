"""The supervisor with stand-in children: real processes, real sockets, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from proxy.settings import Settings, address
from proxy.supervisor import LOG_BYTES, Child, Listeners, Stage, Supervisor, SupervisorError, children_of

PATIENCE = 30.0

STAND_IN = r"""
import os, signal, socket, subprocess, sys

name, trace, fd, *manners = sys.argv[1:]


def note(what):
    with open(trace, "a") as stream:
        stream.write(f"{name} {what} {os.getpid()}\n")


def end(*_):
    note("ended")
    os._exit(0)


if "stillborn" in manners:
    sys.exit("no such model")
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in manners else end)
if "parent" in manners:
    note(f"bore {subprocess.Popen(['sleep', '1000']).pid}")
if fd.isdecimal():
    listener = socket.socket(fileno=int(fd))
else:
    host, _, port = fd.rpartition(":")
    listener = socket.create_server((host, int(port)))
status = "503 Not Yet" if "unready" in manners else "200 OK"
print(name, "runs", flush=True)
note("started")
while True:
    peer, _ = listener.accept()
    line = peer.makefile("rb").readline()
    if b"/die" in line:
        note("died")
        os._exit(3)
    peer.sendall(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{os.getpid()}".encode())
    peer.close()
"""


class Scene:
    """A supervisor whose children are stand-ins, and what they noted."""

    def __init__(self, state: Path, **manners: list[str]) -> None:
        self.state = state
        self.trace_file = state.parent / "trace"
        self.trace_file.touch()
        self.script = state.parent / "stand_in.py"
        self.script.write_text(STAND_IN)
        self.manners = manners
        self.stop_timeout = PATIENCE
        self.told: list[str] = []
        self.prepared: list[Path] = []
        ports = {"listen": "127.0.0.1:0", "control": {"listen": "127.0.0.1:0"}, "metrics": {"listen": "127.0.0.1:0"}}
        self.settings = Settings.of({**ports, "state_dir": str(state)})

    def supervisor(self, prepare: Callable[[Settings], None] | None = None) -> Supervisor:
        supervisor = Supervisor(
            self.settings,
            tell=self.told.append,
            children=self.children,
            prepare=prepare or (lambda settings: self.prepared.append(settings.state_path)),
        )
        self.settings = supervisor.open()
        return supervisor

    def children(self, settings: Settings, file: Path, listeners: Listeners) -> list[Child]:
        """The real table with the commands replaced."""
        return [
            self.child(real.name, real.stage, settings.metrics.listen if real.fd is None else real.fd, real.ready_url)
            for real in children_of(settings, file, listeners)
        ]

    def child(self, name: str, stage: Stage, where: int | str, ready_url: str) -> Child:
        argv = (sys.executable, "-S", str(self.script), name, str(self.trace_file), str(where), *self.manners.get(name, []))
        fd = where if isinstance(where, int) else None
        return Child(name, stage, argv, ready_url, self.stop_timeout, fd=fd)

    def trace(self, what: str) -> list[tuple[str, int]]:
        """(name, pid) of those who noted `what`, in order."""
        lines = [line.split(" ", 1) for line in self.trace_file.read_text().splitlines()]
        return [(name, int(rest.split()[-1])) for name, rest in lines if rest.startswith(what)]

    def pid(self, name: str) -> int:
        return dict(self.trace("started"))[name]

    async def get(self, listen: str, path: str = "/") -> bytes:
        """The body; b"" if the other side dies over it."""
        reader, writer = await asyncio.open_connection(*address(listen))
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        try:
            return (await reader.read()).partition(b"\r\n\r\n")[2]
        finally:
            writer.close()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gone(pid: int) -> bool:
    """No such process, or nothing left of it but its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


class TestLife:
    def test_all_come_up_and_stop_in_order(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            where = f"127.0.0.1:{free_port()}"
            companion = scene.child("engine", Stage.COMPANION, where, f"http://{where}/")
            supervisor = scene.supervisor()
            await supervisor.start([companion])
            await supervisor.ready(PATIENCE)
            assert scene.prepared == [state]
            assert supervisor.waiting() == []
            assert await supervisor.stop()
            assert [name for name, _ in scene.trace("ended")] == ["worker-0", "collector", "control", "engine"]
            assert [line.split()[:2] for line in scene.told] == [
                [name, "ended"] for name in ("worker-0", "collector", "control", "engine")
            ]
            assert all(gone(pid) for _, pid in scene.trace("started"))

        run(scenario())

    def test_what_they_print_is_in_their_logs(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            (state / "log").mkdir(parents=True)
            (state / "log" / "control.log").write_bytes(b"x" * (LOG_BYTES + 1))
            (state / "log" / "collector.log").write_bytes(b"before\n")
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            await supervisor.stop()
            logs = {path.name: path.read_text() for path in (state / "log").iterdir()}
            assert logs["worker-0.log"] == "worker-0 runs\n"
            assert logs["collector.log"] == "before\ncollector runs\n"
            assert logs["control.log"] == "control runs\n"
            assert len(logs["control.log.1"]) == LOG_BYTES + 1

        run(scenario())

    def test_each_has_a_session_of_its_own(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            sessions = [os.getsid(pid) for _, pid in scene.trace("started")]
            assert sessions == [pid for _, pid in scene.trace("started")]
            await supervisor.stop()

        run(scenario())

    def test_progress_names_who_is_missing(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, control=["unready"])
            supervisor = scene.supervisor()
            await supervisor.start()
            seen: list[list[str]] = []
            with pytest.raises(SupervisorError, match=r"^control: not ready after 1 s\. The end of .*control\.log"):
                await supervisor.ready(1.0, progress=lambda waiting, elapsed: seen.append(waiting))
            assert seen[-1] == ["control"]
            await supervisor.ready(PATIENCE, names=["worker-0", "collector"])
            assert await supervisor.stop()

        run(scenario())

    def test_a_child_that_cannot_start_ends_the_waiting_with_its_last_words(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, collector=["stillborn"])
            supervisor = scene.supervisor()
            await supervisor.start()
            with pytest.raises(SupervisorError, match=r"collector: ended with status 1 \d times.*\n.*no such model"):
                await supervisor.ready(PATIENCE)
            supervisor.kill()
            assert not await supervisor.stop()

        run(scenario())

    def test_a_command_that_is_not_there_says_so(self, state: Path) -> None:
        async def scenario() -> None:
            supervisor = Scene(state).supervisor()
            await supervisor.start([Child("engine", Stage.COMPANION, ("/nowhere/engine",), "http://127.0.0.1:1/")])
            with pytest.raises(SupervisorError, match="/nowhere/engine: No such file"):
                await supervisor.ready(PATIENCE)
            await supervisor.stop()

        run(scenario())

    def test_a_database_that_cannot_be_prepared_ends_the_start(self, state: Path) -> None:
        def fail(settings: Settings) -> None:
            raise RuntimeError("the schema is newer than this version")

        async def scenario() -> None:
            scene = Scene(state)
            supervisor = scene.supervisor(prepare=fail)
            with pytest.raises(RuntimeError, match="newer"):
                await supervisor.start()
            await supervisor.stop()
            assert all(gone(pid) for _, pid in scene.trace("started"))

        run(scenario())


class TestDeath:
    def test_a_killed_worker_is_replaced_and_refuses_nobody(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            first = scene.pid("worker-0")
            for _ in range(3):
                before = scene.pid("worker-0")
                os.kill(before, signal.SIGKILL)
                await eventually(lambda pid=before: gone(pid))  # type: ignore[misc]
                answers = await asyncio.gather(*(scene.get(scene.settings.listen) for _ in range(20)))
                assert {int(answer) for answer in answers} == {scene.pid("worker-0")}
                assert scene.pid("worker-0") != before
            assert scene.told[0].startswith("worker-0 was ended by SIGKILL; starting it again in 0.1 s")
            await supervisor.ready(PATIENCE)
            await eventually(lambda: "worker-0 is back" in scene.told)
            assert await supervisor.stop()
            assert scene.pid("worker-0") != first

        run(scenario())

    def test_a_start_that_fails_for_want_of_something_is_tried_again(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            (state / "log").rename(state / "elsewhere")
            os.kill(scene.pid("control"), signal.SIGKILL)
            await eventually(lambda: any("control could not be started" in line for line in scene.told))
            (state / "elsewhere").rename(state / "log")
            await eventually(lambda: "control is back" in scene.told)
            assert await supervisor.stop()

        run(scenario())

    def test_what_a_dead_child_had_started_dies_too(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, control=["parent"])
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            grandchild = int(scene.trace_file.read_text().partition("bore ")[2].split()[0])
            assert not gone(grandchild)
            os.kill(scene.pid("control"), signal.SIGKILL)
            await eventually(lambda: gone(grandchild))
            await supervisor.stop()

        run(scenario())

    def test_a_supervisor_killed_with_sigkill_leaves_nobody(self, state: Path) -> None:
        scene = Scene(state)
        code = (
            "import asyncio, sys; from pathlib import Path; from tests.server.test_supervisor import Scene\n"
            "async def main():\n"
            "    supervisor = Scene(Path(sys.argv[1]), worker=[]).supervisor()\n"
            "    await supervisor.start()\n"
            "    await supervisor.ready(30)\n"
            "    print('ready', flush=True)\n"
            "    await asyncio.Event().wait()\n"
            "asyncio.run(main())\n"
        )
        root = Path(__file__).parents[2]
        with subprocess.Popen(
            [sys.executable, "-c", code, str(state)],
            cwd=root,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        ) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            pids = [pid for _, pid in scene.trace("started")]
            assert len(pids) == 3
            assert not any(gone(pid) for pid in pids)
            parent.kill()

        async def scenario() -> None:
            await eventually(lambda: all(gone(pid) for pid in pids))
            supervisor = Scene(state).supervisor()  # and the state directory is free again
            supervisor.close()

        run(scenario())


class TestStopping:
    def test_a_deaf_child_is_killed_after_its_time(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, control=["deaf", "parent"])
            scene.stop_timeout = 0.5
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            assert not await supervisor.stop()
            assert [name for name, _ in scene.trace("ended")] == ["worker-0", "collector"]
            assert "control did not end within 0 s and was killed" in scene.told
            assert gone(scene.pid("control"))
            grandchild = int(scene.trace_file.read_text().partition("bore ")[2].split()[0])
            await eventually(lambda: gone(grandchild))

        run(scenario())

    def test_a_signal_stops_and_a_second_one_stops_at_once(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, **{"worker-0": ["deaf"]})
            supervisor = scene.supervisor()
            supervisor.handle_signals()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            os.kill(os.getpid(), signal.SIGHUP)  # ignored
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(supervisor.asked_to_stop.wait(), PATIENCE)
            stopping = asyncio.create_task(supervisor.stop())
            while not stopping.done():
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.wait([stopping], timeout=0.1)
            assert not stopping.result()
            assert all(gone(pid) for _, pid in scene.trace("started"))

        run(scenario())

    def test_the_echo_of_a_signal_cuts_nothing_short(self, state: Path) -> None:
        async def scenario() -> None:
            supervisor = Scene(state).supervisor()
            supervisor.handle_signals()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does: once to the process, once to its group
            await asyncio.wait_for(supervisor.asked_to_stop.wait(), PATIENCE)
            stopping = asyncio.create_task(supervisor.stop())
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(stopping, PATIENCE)

        run(scenario())

    def test_a_closed_terminal_stops_it(self, state: Path) -> None:
        async def scenario() -> None:
            supervisor = Scene(state).supervisor()
            supervisor.handle_signals(terminal=True)
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.wait_for(supervisor.asked_to_stop.wait(), PATIENCE)
            assert await supervisor.stop()

        run(scenario())

    def test_a_collector_that_is_down_comes_up_once_more(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            for deaths in range(1, 4):  # until the next start is far enough away to stop before it
                await scene.get(scene.settings.metrics.listen, "/die")
                await eventually(lambda n=deaths: sum("starting it again" in line for line in scene.told) == n)  # type: ignore[misc]
                if deaths < 3:
                    await supervisor.ready(PATIENCE)
            assert await supervisor.stop()
            assert scene.trace("ended")[1] == ("collector", scene.pid("collector"))
            assert len([name for name, _ in scene.trace("started") if name == "collector"]) == 4

        run(scenario())

    def test_a_child_that_lies_dead_did_not_end_well(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, control=["stillborn"])
            supervisor = scene.supervisor()
            await supervisor.start()
            await eventually(lambda: sum("control ended" in line for line in scene.told) == 4)
            assert not await supervisor.stop()
            assert scene.told[-1] == "control was down: it ended with status 1"

        run(scenario())

    def test_nobody_is_accepted_any_more(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            assert await supervisor.stop()
            for listen in (scene.settings.listen, scene.settings.control.listen):
                with pytest.raises(ConnectionRefusedError):
                    await scene.get(listen)

        run(scenario())

    def test_work_is_dropped_when_a_stop_is_asked_for(self, state: Path) -> None:
        async def scenario() -> None:
            supervisor = Scene(state).supervisor()

            async def answer() -> int:
                return 42

            async def fail() -> int:
                raise RuntimeError("broken")

            assert await supervisor.unless_stopped(answer()) == 42
            with pytest.raises(RuntimeError, match="broken"):
                await supervisor.unless_stopped(fail())
            work = asyncio.create_task(supervisor.unless_stopped(asyncio.Event().wait()))
            await asyncio.sleep(0)
            supervisor.asked_to_stop.set()
            assert await asyncio.wait_for(work, PATIENCE) is None
            assert await supervisor.stop()

        run(scenario())
