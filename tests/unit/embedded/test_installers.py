"""What uv and pip print, and what is made of it; and how an installer is run and stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from proxy.embedded import installers
from proxy.embedded.installers import CommandFailed, Progress, explain, run

UV = [
    ("Using Python 3.11.7 environment at: phx", "preparing"),
    ("Resolved 154 packages in 983ms", "fetching 154 packages"),
    ("Downloading grpcio (7.0MiB)", "fetching grpcio"),
    ("Downloading pyarrow (52.5MiB)", "fetching grpcio, pyarrow"),
    ("Downloading numpy (16.1MiB)", "fetching grpcio, pyarrow, numpy"),
    ("Downloading pandas (11.8MiB)", "fetching grpcio, pyarrow, numpy and 1 more"),
    (" Downloaded grpcio", "fetching pyarrow, numpy, pandas"),
    (" Downloaded numpy", "fetching pyarrow, pandas"),
    (" Downloaded pandas", "fetching pyarrow"),
    (" Downloaded pyarrow", "fetching the last small packages"),
    ("Prepared 154 packages in 1.82s", "installing 154 packages"),
    ("Installed 154 packages in 170ms", "compiling 154 packages"),
    ("Bytecode compiled 14000 files in 6.51s", "compiling 154 packages"),
    (" + zipp==4.1.2", "compiling 154 packages"),
]
PIP = [
    ("Ignoring colorama: markers 'sys_platform == \"win32\"' don't match your environment", "preparing"),
    ("Collecting aiofile==3.12.3 (from -r phx.txt (line 3))", "fetching package 1"),
    ("  Downloading aiofile-3.12.3-py3-none-any.whl (23 kB)", "fetching package 1"),
    ("Processing /wheels/urllib3-2.8.0-py3-none-any.whl (from -r phx.txt (line 2682))", "fetching package 2"),
    ("Installing collected packages: urllib3, aiofile", "installing 2 packages"),
    ("Successfully installed aiofile-3.12.3 urllib3-2.8.0", "installing 2 packages"),
]


@pytest.mark.parametrize("transcript", [UV, PIP], ids=["uv", "pip"])
def test_progress_follows_the_installer(transcript: list[tuple[str, str]]) -> None:
    progress = Progress()
    stages = []
    for line, _ in transcript:
        progress.feed(line)
        stages.append((line, progress.stage))
    assert stages == transcript


@pytest.mark.parametrize(
    ("output", "text", "another_may_do"),
    [
        ("error: failed to write\n  cause: No space left on device (os error 28)", "disk is full", False),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full", False),
        ("error: Failed to download `a==1`\n  cause: Hash mismatch for `a==1`", "hash differs", False),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "hash differs", False),
        (
            "  cause: error sending request for url (x)\n  cause: client error (Connect)\n"
            "  cause: invalid peer certificate: UnknownIssuer",
            "not trusted",
            True,
        ),
        ("  cause: error sending request for url (x)\n  cause: tcp connect error", "cannot be reached", True),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for aiofile==3.12.3",
            "cannot be reached",
            True,
        ),
        ("ERROR: No matching distribution found for aiofile==3.12.3", "lacks a package", True),
        ("Segmentation fault", "installer failed", True),
    ],
)
def test_an_installers_last_words_are_explained(output: str, text: str, another_may_do: bool) -> None:
    reason = explain(output)
    assert text in reason.text
    assert reason.another_may_do is another_may_do


def test_uv_is_preferred_and_pip_stays_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installers, "find_uv", lambda: "/bin/uv")
    assert [installer.name for installer in installers.installers(Path("env"), Path("list.txt"))] == ["uv", "pip"]
    monkeypatch.setattr(installers, "find_uv", lambda: None)
    assert [installer.name for installer in installers.installers(Path("env"), Path("list.txt"))] == ["pip"]


def test_whatever_installs_checks_hashes_and_compiles_nothing_from_source() -> None:
    for installer in installers.installers(Path("env"), Path("list.txt")):
        assert {"--require-hashes", "--only-binary=:all:", "--no-deps"} <= set(installer.commands[-1])


def test_uv_beside_the_interpreter_comes_before_the_one_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "uv").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setenv("PATH", str(there))
    assert installers.find_uv() == str(here / "uv")
    (here / "uv").unlink()
    assert installers.find_uv() == str(there / "uv")
    (there / "uv").unlink()
    assert installers.find_uv() is None


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-c", code)


def test_a_failure_carries_the_last_lines(tmp_path: Path) -> None:
    command = python("import sys; [print('line', n) for n in range(100)]; sys.exit('the end')")
    with (tmp_path / "lock").open("wb") as lock, pytest.raises(CommandFailed, match="ended with status 1") as failed:
        run(command, lambda _: None, lambda: None, lock.fileno())
    assert failed.value.output.splitlines() == [*(f"line {n}" for n in range(89, 100)), "the end"]


class CalledOff(Exception):
    pass


def test_calling_it_off_stops_the_installer_and_what_it_started() -> None:
    reader, writer = os.pipe()  # held open by the grandchild alone, in the end: EOF says that it is gone
    grandchild = f"import os, time; os.write({writer}, b'up'); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}], pass_fds=[{writer}])"

    def go_on() -> None:
        if os.read(reader, 2) == b"up":
            os.close(writer)
            raise CalledOff

    with pytest.raises(CalledOff):
        run(python(child), lambda _: None, go_on, writer)
    assert os.read(reader, 1) == b""
    os.close(reader)
