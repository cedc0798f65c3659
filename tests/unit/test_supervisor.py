"""What the supervisor decides: back-off, the table of children, addresses, the tail of a log."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from proxy.settings import Settings
from proxy.supervisor import (
    FIRST_DELAY,
    LONGEST_DELAY,
    Backoff,
    Listeners,
    Stage,
    Supervisor,
    SupervisorError,
    children_of,
    refuse_changes,
    tail,
)


def settings(state_dir: Path, **more: object) -> Settings:
    ports = {"listen": "127.0.0.1:0", "control": {"listen": "127.0.0.1:0"}, "metrics": {"listen": "127.0.0.1:0"}}
    return Settings.of({**ports, "state_dir": str(state_dir), **more})


class TestBackoff:
    def test_it_doubles_up_to_the_longest_while_nothing_comes_up(self) -> None:
        backoff = Backoff()
        delays = [backoff.after(False) for _ in range(8)]
        assert delays[:6] == [FIRST_DELAY * 2**n for n in range(6)]
        assert delays[-1] == LONGEST_DELAY

    def test_having_been_up_starts_it_again(self) -> None:
        backoff = Backoff()
        for _ in range(5):
            backoff.after(False)
        assert backoff.after(True) == FIRST_DELAY
        assert backoff.after(True) == FIRST_DELAY
        assert backoff.after(False) == FIRST_DELAY * 2


class TestTable:
    def test_children_stop_in_the_order_in_which_nothing_is_lost(self, tmp_path: Path) -> None:
        children = children_of(settings(tmp_path), tmp_path / "settings.json", Listeners((7,), 8))
        assert [(child.name, child.stage) for child in children] == [
            ("worker-0", Stage.WORKER),
            ("collector", Stage.COLLECTOR),
            ("control", Stage.CONTROL),
        ]

    def test_a_worker_gets_its_socket_and_longer_than_its_drain(self, tmp_path: Path) -> None:
        worker = children_of(settings(tmp_path, timeouts={"drain": 7}), tmp_path / "s.json", Listeners((7,), 8))[0]
        assert worker.argv[-7:] == ("proxy.worker", "--place", "0", "--settings", str(tmp_path / "s.json"), "--fd", "7")
        assert worker.fd == 7
        assert worker.stop_timeout > 7

    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_workers_that_share_an_address_are_not_asked_there(self, tmp_path: Path, workers: int) -> None:
        children = children_of(settings(tmp_path), tmp_path / "settings.json", Listeners(tuple(range(7, 7 + workers)), 20))
        assert [child.fd for child in children[:workers]] == list(range(7, 7 + workers))
        assert [child.shared for child in children] == [workers > 1] * workers + [False, False]

    @pytest.mark.parametrize(
        ("listen", "url"),
        [
            ("127.0.0.1:80", "http://127.0.0.1:80/ready"),
            ("0.0.0.0:80", "http://127.0.0.1:80/ready"),
            ("[::]:80", "http://[::1]:80/ready"),
            ("localhost:80", "http://localhost:80/ready"),
        ],
    )
    def test_readiness_is_asked_where_this_host_can_ask(self, tmp_path: Path, listen: str, url: str) -> None:
        children = children_of(settings(tmp_path, listen=listen), tmp_path / "settings.json", Listeners((7,), 8))
        assert children[0].ready_url == url


class TestRefusing:
    """What a reload can't change, in the words of the settings file."""

    @pytest.mark.parametrize(
        ("more", "field"),
        [
            ({"listen": "127.0.0.1:1"}, "listen"),
            ({"control": {"listen": "127.0.0.1:1"}}, "control.listen"),
            ({"metrics": {"listen": "127.0.0.1:1"}}, "metrics.listen"),
            ({"state_dir": "elsewhere"}, "state_dir"),
            ({"database": "sqlite:///elsewhere"}, "database"),
            ({"workers": 2, "redis": {"url": "redis://redis"}}, "workers"),
            ({"phoenix": {"start": True}}, "phoenix.start"),
        ],
    )
    def test_it_is_named(self, more: dict[str, Any], field: str) -> None:
        with pytest.raises(SupervisorError, match=rf"^{field}: a reload can't change it"):
            refuse_changes(Settings(), Settings.of(more))

    def test_all_of_it_is(self) -> None:
        with pytest.raises(SupervisorError, match=r"^listen: .*\ndatabase: "):
            refuse_changes(Settings(), Settings.of({"listen": "127.0.0.1:1", "database": "sqlite:///elsewhere"}))

    def test_where_traces_go_can_be_changed_unless_it_is_a_phoenix_of_our_own(self) -> None:
        there, here = ({"url": f"http://127.0.0.1:{port}"} for port in (1, 2))
        refuse_changes(Settings.of({"phoenix": there}), Settings.of({"phoenix": here}))
        with pytest.raises(SupervisorError, match=r"^phoenix\.url: "):
            refuse_changes(Settings.of({"phoenix": {**there, "start": True}}), Settings.of({"phoenix": {**here, "start": True}}))

    def test_the_rest_can_be_changed(self) -> None:
        more = {"currency": "EUR", "backends": [{"url": "http://h:1"}], "timeouts": {"drain": 1}, "capture": {"content": True}}
        limits = {"everyone": {"concurrent_requests": 1}, "teams": {"r": {}}, "keys": {"alice": {"team": "r"}}}
        refuse_changes(Settings(), Settings.of({**more, **limits, "redis": {"url": "redis://redis"}}))


class TestOpening:
    def test_real_ports_reach_the_settings_that_children_read(self, tmp_path: Path) -> None:
        supervisor = Supervisor(settings(tmp_path / "state"))
        effective = supervisor.open()
        try:
            addresses = [effective.listen, effective.control.listen, effective.metrics.listen]
            assert all(not text.endswith(":0") for text in addresses)
            assert len(set(addresses)) == 3
            assert Settings.read(supervisor.settings_file) == effective
            with socket.create_connection(("127.0.0.1", int(effective.listen.rpartition(":")[2]))):
                pass  # it waits in the queue: nothing runs yet, and nobody is refused
        finally:
            supervisor.close()

    def test_the_state_directory_is_private(self, tmp_path: Path) -> None:
        supervisor = Supervisor(settings(tmp_path / "state"))
        supervisor.open()
        supervisor.close()
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "state").iterdir()} == {0}

    def test_somebody_elses_directory_stays_as_it_is_but_is_spoken_of(self, tmp_path: Path) -> None:
        told: list[str] = []
        tmp_path.chmod(0o755)
        supervisor = Supervisor(settings(tmp_path), tell=told.append)
        supervisor.open()
        supervisor.close()
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
        assert "mode 755" in told[0]

    @pytest.mark.parametrize("setting", ["listen", "control.listen", "metrics.listen"])
    def test_an_address_in_use_is_named(self, tmp_path: Path, setting: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            text = f"127.0.0.1:{other.getsockname()[1]}"
            section, _, name = setting.rpartition(".")
            more: dict[str, object] = {section: {name: text}} if section else {name: text}
            with pytest.raises(SupervisorError, match=rf"^{setting}: {text} is in use.*set `{setting}`"):
                Supervisor(settings(tmp_path, **more)).open()

    def test_an_address_of_another_supervisor_is_in_use(self, tmp_path: Path) -> None:
        first = Supervisor(settings(tmp_path / "a"))
        listen = first.open().listen
        with pytest.raises(SupervisorError, match="is in use"):
            Supervisor(settings(tmp_path / "b", listen=listen)).open()
        first.close()

    def test_workers_share_an_address_that_nobody_else_has(self, tmp_path: Path) -> None:
        supervisor = Supervisor(settings(tmp_path))
        sockets = supervisor._bind("listen", "127.0.0.1:0", 3)
        assert len({each.getsockname() for each in sockets}) == 1
        taken = "127.0.0.1:{1}".format(*sockets[0].getsockname())
        with pytest.raises(SupervisorError, match="is in use"):
            supervisor._bind("listen", taken, 3)
        supervisor.close()

    def test_an_address_of_no_host_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SupervisorError, match=r"^listen: 203\.0\.113\.1:8400 can't be used: "):
            Supervisor(settings(tmp_path, listen="203.0.113.1:8400")).open()

    def test_one_state_directory_has_one_supervisor(self, tmp_path: Path) -> None:
        first = Supervisor(settings(tmp_path))
        first.open()
        with pytest.raises(SupervisorError, match=r"in use by another `glasshouse up` \(process \d+\)"):
            Supervisor(settings(tmp_path)).open()
        first.close()
        second = Supervisor(settings(tmp_path))
        second.open()
        second.close()

    def test_a_failed_opening_lets_go_of_everything(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SupervisorError):
            Supervisor(settings(tmp_path, metrics={"listen": f"127.0.0.1:{other.getsockname()[1]}"})).open()
        again = Supervisor(settings(tmp_path))
        again.open()
        again.close()

    def test_a_state_directory_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("")
        with pytest.raises(SupervisorError, match=r"state_dir: .* can't be used"):
            Supervisor(settings(tmp_path / "state")).open()


class TestTail:
    def test_the_last_lines(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_text("".join(f"line {n}\n" for n in range(5000)))
        assert tail(tmp_path / "log", 2) == "    line 4998\n    line 4999"

    def test_no_log_says_so(self, tmp_path: Path) -> None:
        assert tail(tmp_path / "none") == "    (nothing)"
