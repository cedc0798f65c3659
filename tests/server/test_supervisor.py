"""The supervisor with stand-in children: real processes, real sockets, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.last_reload import LastReload
from proxy.settings import Settings, address
from proxy.supervisor import LOG_BYTES, Child, Listeners, Stage, Supervisor, SupervisorError, children_of

PATIENCE = 30.0

STAND_IN = r"""
import os, signal, socket, subprocess, sys

name, trace, fd, *manners = sys.argv[1:]
ready = int(manners[manners.index("--ready-fd") + 1]) if "--ready-fd" in manners else None


def note(what):
    with open(trace, "a") as stream:
        stream.write(f"{name} {what} {os.getpid()}\n")


def end(*_):
    note("ended")
    os._exit(0)


def leave(*_):
    note("replaced")
    listener.close()


if "stillborn" in manners:
    sys.exit("no such model")
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in manners else end)
signal.signal(signal.SIGUSR1, leave)
if "parent" in manners:
    note(f"bore {subprocess.Popen(['sleep', '1000']).pid}")
if fd.isdecimal():
    listener = socket.socket(fileno=int(fd))
    listener.listen(4096)
else:
    host, _, port = fd.rpartition(":")
    listener = socket.create_server((host, int(port)))
status = "503 Not Yet" if "unready" in manners else "200 OK"
print(name, "runs", flush=True)
note("started")
if "mute" in manners:
    listener.close()
    signal.pause()
if ready is not None:
    os.write(ready, b"ready")
    os.close(ready)
while True:
    try:
        peer, _ = listener.accept()
    except OSError:  # closed: another has taken our place
        while "stays" in manners:
            signal.pause()
        end()
    line = peer.makefile("rb").readline()
    if b"/die" in line:
        note("died")
        os._exit(3)
    peer.sendall(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{os.getpid()}".encode())
    peer.close()
"""


class Scene:
    """A supervisor whose children are stand-ins, and what they noted."""

    def __init__(self, state: Path, workers: int = 1, /, **manners: list[str]) -> None:
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
        redis = {"url": "redis://127.0.0.1:1"}  # nobody: stand-ins have nothing to share
        self.settings = Settings.of({**ports, "state_dir": str(state), "workers": workers, "redis": redis})

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
            replace(
                self.child(real.name, real.stage, settings.metrics.listen if real.fd is None else real.fd, real.ready_url),
                handover=real.handover,
                shared=real.shared,
            )
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


class TestSeveralWorkers:
    """They share an address: what answers there is any of them."""

    def test_each_says_for_itself_that_it_is_ready(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, 3, **{"worker-1": ["mute"]})
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE, names=["worker-0", "worker-2", "collector", "control"])
            await eventually(lambda: "worker-1" in dict(scene.trace("started")))
            with pytest.raises(SupervisorError, match=r"^worker-1: not ready after 1 s"):
                await supervisor.ready(1.0)
            assert supervisor.waiting() == ["worker-1"]
            assert await supervisor.stop()

        run(scenario())

    def test_connections_are_spread_over_them(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, 2)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            served = Counter([int(await scene.get(scene.settings.listen)) for _ in range(200)])
            assert set(served) == {scene.pid("worker-0"), scene.pid("worker-1")}
            assert min(served.values()) >= 50, served  # each by a fair coin: one of 10^13 runs has fewer
            assert await supervisor.stop()

        run(scenario())

    def test_one_that_is_killed_is_restarted_alone_while_the_others_serve(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, 3)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            first = dict(scene.trace("started"))
            os.kill(first["worker-1"], signal.SIGKILL)
            await eventually(lambda: gone(first["worker-1"]))  # a dying process still takes a connection, and resets it
            answers = [int(await scene.get(scene.settings.listen)) for _ in range(100)]
            assert first["worker-1"] not in answers
            assert {first["worker-0"], first["worker-2"]} <= set(answers)
            await eventually(lambda: "worker-1 is back" in scene.told)
            now = dict(scene.trace("started"))
            assert now.pop("worker-1") != first.pop("worker-1")
            assert now == first
            await supervisor.ready(PATIENCE)
            assert await supervisor.stop()

        run(scenario())

    def test_one_that_is_restarted_is_not_ready_because_the_others_are(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, 2)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            scene.script.write_text("import time\ntime.sleep(1000)\n")
            os.kill(scene.pid("worker-0"), signal.SIGKILL)
            await eventually(lambda: supervisor.waiting() == ["worker-0"])
            with pytest.raises(SupervisorError, match=r"^worker-0: not ready after 1 s"):
                await supervisor.ready(1.0)
            supervisor.kill()
            await supervisor.stop()

        run(scenario())

    def test_one_that_cannot_come_up_again_leaves_the_address_to_the_others(self, state: Path) -> None:
        """Else the kernel would go on giving it its part of the connections, and each would wait for ever."""

        async def scenario() -> None:
            scene = Scene(state, 2)
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            working = scene.script.read_text()
            scene.script.write_text("import sys; sys.exit(7)")
            os.kill(scene.pid("worker-0"), signal.SIGKILL)
            await eventually(lambda: any("worker-0 ended with status 7" in line for line in scene.told))
            async with asyncio.timeout(PATIENCE):
                served = {int(await scene.get(scene.settings.listen)) for _ in range(50)}
            assert served == {scene.pid("worker-1")}
            scene.script.write_text(working)
            await eventually(lambda: "worker-0 is back" in scene.told)
            served = {int(await scene.get(scene.settings.listen)) for _ in range(100)}
            assert served == {scene.pid("worker-0"), scene.pid("worker-1")}
            assert await supervisor.stop()

        run(scenario())

    def test_a_reload_replaces_all_of_them_on_their_sockets(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, 3)
            given = scene.settings
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            first = dict(scene.trace("started"))
            done = await supervisor.reload(given)
            assert [each.partition(" after")[0] for each in done[:3]] == [f"worker-{n} replaced" for n in range(3)]
            workers = {name: pid for name, pid in scene.trace("started") if name.startswith("worker")}
            await eventually(lambda: len(scene.trace("replaced")) == 3)
            served = {int(await scene.get(scene.settings.listen)) for _ in range(100)}
            assert served == set(workers.values())
            assert not served & set(first.values())
            assert await supervisor.stop()

        run(scenario())

    def test_a_reload_with_one_that_does_not_come_up_replaces_none(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, 3)
            given = scene.settings
            supervisor = scene.supervisor()
            await supervisor.start()
            await supervisor.ready(PATIENCE)
            first = dict(scene.trace("started"))
            scene.manners["worker-2"] = ["stillborn"]
            with pytest.raises(SupervisorError, match=r"the new worker-2: ended with status 1"):
                await supervisor.reload(given)
            await eventually(lambda: {name for name, _ in scene.trace("ended")} == {"worker-0", "worker-1"})
            assert not {pid for _, pid in scene.trace("replaced")} & set(first.values()), "only the new ones go again"
            assert not any(gone(pid) for pid in first.values())
            served = {int(await scene.get(scene.settings.listen)) for _ in range(100)}
            assert served == {first[f"worker-{n}"] for n in range(3)}
            assert await supervisor.stop()

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


@contextlib.asynccontextmanager
async def up(scene: Scene) -> AsyncIterator[Supervisor]:
    """All of it, until it is stopped, by whomever."""
    supervisor = scene.supervisor()
    await supervisor.start()
    await supervisor.ready(PATIENCE)
    yield supervisor
    await supervisor.stop()
    assert all(gone(pid) for _, pid in scene.trace("started"))


def changed(settings: Settings, **sections: Any) -> Settings:
    return msgspec.structs.replace(settings, **sections)


class TestReload:
    def test_workers_are_replaced_and_the_others_restarted(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            async with up(scene) as supervisor:
                first = dict(scene.trace("started"))
                done = await supervisor.reload(changed(given, currency="EUR"))
                assert [line.split(" after ")[0] for line in done] == [
                    "worker-0 replaced",
                    "collector restarted",
                    "control restarted",
                ]
                assert Settings.read(supervisor.settings_file) == changed(scene.settings, currency="EUR")
                assert supervisor.waiting() == []
                second = dict(scene.trace("started"))
                for name, listen in (("worker-0", scene.settings.listen), ("collector", scene.settings.metrics.listen)):
                    assert int(await scene.get(listen)) == second[name] != first[name]
                await eventually(lambda: gone(first["worker-0"]))
            lines = [line.split()[:2] for line in scene.trace_file.read_text().splitlines()]
            assert (
                lines.index(["worker-0", "replaced"]) > [n for n, line in enumerate(lines) if line == ["worker-0", "started"]][1]
            )
            for name in ("collector", "control"):
                assert [what for who, what in lines if who == name] == ["started", "ended", "started", "ended"]

        run(scenario())

    def test_nobody_is_refused_or_cut_off_meanwhile(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            async with up(scene) as supervisor:
                for _ in range(3):
                    reloading = asyncio.create_task(supervisor.reload(given))
                    while not reloading.done():
                        assert await scene.get(scene.settings.listen)
                    await reloading
            assert len([name for name, _ in scene.trace("replaced")]) == 3

        run(scenario())

    @pytest.mark.parametrize("manner", ["stillborn", "mute"])
    def test_where_the_new_one_does_not_come_up_the_old_one_stays(
        self, state: Path, monkeypatch: pytest.MonkeyPatch, manner: str
    ) -> None:
        """The old one goes on answering probes of the address: that says nothing of the new one."""
        monkeypatch.setattr("proxy.supervisor.RELOAD_TIMEOUT", 2.0 if manner == "mute" else PATIENCE)

        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            async with up(scene) as supervisor:
                before = scene.trace("started")
                scene.manners["worker-0"] = [manner]
                with pytest.raises(SupervisorError, match=r"^the new worker-0: (ended with status 1|not ready after 2 s)"):
                    await supervisor.reload(changed(given, currency="EUR"))
                await eventually(lambda: any(line.startswith("the new worker-0 ") and "again" not in line for line in scene.told))
                assert Settings.read(supervisor.settings_file) == supervisor.settings == scene.settings
                assert int(await scene.get(scene.settings.listen)) == dict(before)["worker-0"]
                assert scene.trace("replaced") == []
                assert dict(scene.trace("started"))["collector"] == dict(before)["collector"]
                scene.manners["worker-0"] = []
                await supervisor.reload(given)

        run(scenario())

    def test_a_collector_that_does_not_come_up_is_spoken_of_and_tried_on(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            async with up(scene) as supervisor:
                scene.manners["collector"] = ["stillborn"]
                with pytest.raises(SupervisorError, match=r"^the workers are new; collector: ended with status 1"):
                    await supervisor.reload(given)
                scene.manners["collector"] = []
                assert supervisor.waiting() == ["collector"]
                await supervisor.reload(given)
                assert supervisor.waiting() == []

        run(scenario())

    def test_what_cannot_be_changed_is_refused(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            async with up(scene) as supervisor:
                wanted = changed(given, listen="127.0.0.1:1", database="postgresql://u:secret@db/x")
                with pytest.raises(SupervisorError) as refusal:
                    await supervisor.reload(wanted)
                lines = str(refusal.value).splitlines()
                assert [line.partition(":")[0] for line in lines] == ["listen", "database"]
                assert "'127.0.0.1:0' to '127.0.0.1:1'" in lines[0]
                assert "secret" not in lines[1]
                assert len(scene.trace("started")) == 3

        run(scenario())

    def test_a_new_worker_that_dies_later_is_started_as_any_other(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            async with up(scene) as supervisor:
                await supervisor.reload(given)
                second = scene.pid("worker-0")
                os.kill(second, signal.SIGKILL)
                await eventually(lambda: "worker-0 is back" in scene.told)
                assert int(await scene.get(scene.settings.listen)) == scene.pid("worker-0") != second

        run(scenario())

    def test_wishes_that_come_meanwhile_are_one(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            loads: list[int] = []
            async with up(scene) as supervisor:
                supervisor.handle_signals()

                def load() -> Settings:
                    loads.append(len(scene.trace("started")))
                    if len(loads) == 1:
                        for _ in range(3):
                            os.kill(os.getpid(), signal.SIGHUP)
                    return given

                serving = asyncio.create_task(supervisor.serve(load))
                os.kill(os.getpid(), signal.SIGHUP)
                await eventually(lambda: sum(line.startswith("reloaded: ") for line in scene.told) == 2)
                await asyncio.sleep(0.2)
                assert loads == [3, 6], "the second begins when the first is over, and there is no third"
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(serving, PATIENCE)

        run(scenario())

    def test_how_it_went_is_written_down(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state)
            given = scene.settings
            answers: list[Settings | Exception] = [SupervisorError("listen: what\nis this"), given]
            async with up(scene) as supervisor:
                file = scene.settings.last_reload_path
                started = LastReload.read(file)
                assert (started.successful, started.lines) == (True, [])

                def load() -> Settings:
                    answer = answers.pop(0)
                    if isinstance(answer, Exception):
                        raise answer
                    return answer

                serving = asyncio.create_task(supervisor.serve(load))
                supervisor.asked_to_reload.set()
                await eventually(lambda: LastReload.read(file) != started)
                failed = LastReload.read(file)
                assert failed == LastReload(failed.began_ns, False, started.success_unix_ns, ["listen: what", "is this"])
                supervisor.asked_to_reload.set()
                await eventually(lambda: LastReload.read(file) != failed)
                done = LastReload.read(file)
                assert done.successful
                assert done.began_ns > failed.began_ns > started.began_ns
                assert done.success_unix_ns > started.success_unix_ns
                assert [line.split()[0] for line in done.lines] == ["worker-0", "collector", "control"]
                answers.append(KeyError("a bug"))
                supervisor.asked_to_reload.set()
                await eventually(lambda: LastReload.read(file) != done)
                assert "KeyError('a bug')" in LastReload.read(file).lines[0]
                assert not serving.done()
                supervisor.asked_to_stop.set()
                await asyncio.wait_for(serving, PATIENCE)

        run(scenario())

    @pytest.mark.parametrize("moment", ["before the new worker is ready", "while the old one leaves"])
    def test_a_stop_ends_everybody(self, state: Path, moment: str) -> None:
        async def scenario() -> None:
            scene = Scene(state, **{"worker-0": ["stays"]})
            given = scene.settings
            async with up(scene) as supervisor:
                scene.manners["worker-0"] = ["mute"] if moment.startswith("before") else []
                serving = asyncio.create_task(supervisor.serve(lambda: given))
                supervisor.asked_to_reload.set()
                await eventually(lambda: len(scene.trace("started")) >= 4)
                if moment.startswith("while"):
                    await eventually(lambda: scene.trace("replaced"))
                supervisor.asked_to_stop.set()
                await asyncio.wait_for(serving, PATIENCE)
                last = LastReload.read(scene.settings.last_reload_path)
                assert not last.successful
                assert "it was asked to stop meanwhile" in last.lines[0]
                assert await asyncio.wait_for(supervisor.stop(), PATIENCE)
                assert {name for name, _ in scene.trace("ended")} == {"worker-0", "collector", "control"}

        run(scenario())

    def test_who_is_impatient_kills_those_who_leave_too(self, state: Path) -> None:
        async def scenario() -> None:
            scene = Scene(state, **{"worker-0": ["stays", "deaf"]})
            scene.stop_timeout = 10 * PATIENCE
            given = scene.settings
            async with up(scene) as supervisor:
                old = scene.pid("worker-0")
                await supervisor.reload(given)
                await eventually(lambda: scene.trace("replaced"))
                assert not gone(old)
                supervisor.kill()
                await eventually(lambda: gone(old))

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
            supervisor.handle_signals(hung_up=lambda: True)
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
