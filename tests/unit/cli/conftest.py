"""The command as it is typed, in a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main

Command = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: empty, with a name that has a space in it."""
    directory = tmp_path / "a directory"
    directory.mkdir()
    monkeypatch.chdir(directory)
    for name in ("GLASSHOUSE_CONFIG", "GLASSHOUSE_URL", "GLASSHOUSE_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    return directory


@pytest.fixture
def command(here: Path) -> Command:
    """`command("keys", "list")` is `glasshouse keys list` → what it printed. Only errors meant for people may come out."""

    def run(*arguments: str, status: int = 0) -> Result:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result

    return run
