"""Environments, built for real from a wheel of one line: no network, but the real uv and pip."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from proxy.embedded import installers
from proxy.embedded.environments import COMPLETE, ENGINE, PHOENIX, Cancelled, InstallFailed, Recipe, find, prepare

METADATA = "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
RECORD = "demo.py,,\ndemo-1.0.dist-info/METADATA,,\ndemo-1.0.dist-info/WHEEL,,\ndemo-1.0.dist-info/RECORD,,\n"


def make_recipe(folder: Path, digest: str | None = None, module: str = "demo") -> Recipe:
    wheel = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo.py", "ANSWER = 42\n")
        for name, text in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", RECORD)):
            archive.writestr(f"demo-1.0.dist-info/{name}", text)
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements = folder / "requirements-demo.txt"
    requirements.write_text(f"demo @ {wheel.as_uri()} --hash=sha256:{digest}\n")
    return Recipe("demo", requirements, (module,), fetch_mb=0, disk_mb=1)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "env"


def answer(python: Path) -> str:
    return subprocess.run(
        [python, "-I", "-c", "import demo; print(demo.ANSWER)"], capture_output=True, text=True, check=True
    ).stdout


def fake_uv(folder: Path, says: str) -> str:
    script = folder / "uv"
    script.write_text(f"#!/bin/sh\necho '{says}'\nexit 2\n")
    script.chmod(0o755)
    return str(script)


def test_built_once_and_found_again(recipe: Recipe, directory: Path) -> None:
    said: list[str] = []
    assert find(recipe, directory) is None
    python = prepare(recipe, directory, said.append)
    assert answer(python) == "42\n"
    assert python.parent.parent.name == f"demo-{hashlib.sha256(recipe.requirements.read_bytes()).hexdigest()[:12]}"
    assert said[0].startswith("demo: building its environment, once: 1 packages, 0 MB to fetch")
    assert said[-1].startswith("demo: environment ready after")
    said.clear()
    assert prepare(recipe, directory, said.append) == find(recipe, directory) == python
    assert said == []


def test_pip_takes_over_where_uv_is_not_configured(recipe: Recipe, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = fake_uv(recipe.requirements.parent, "invalid peer certificate: UnknownIssuer")
    monkeypatch.setattr(installers, "find_uv", lambda: uv)
    said: list[str] = []
    assert answer(prepare(recipe, directory, said.append)) == "42\n"
    assert "trying again with pip" in said[1]


def test_a_file_that_is_not_the_locked_one_ends_it(tmp_path: Path, directory: Path) -> None:
    recipe = make_recipe(tmp_path, digest="0" * 64)
    said: list[str] = []
    with pytest.raises(InstallFailed, match="its hash differs") as failed:
        prepare(recipe, directory, said.append)
    assert "0" * 64 in failed.value.output
    assert not any("trying again" in line for line in said)
    assert find(recipe, directory) is None


def test_an_interrupted_build_is_built_again(recipe: Recipe, directory: Path) -> None:
    location = recipe.location(directory)
    (location / "bin").mkdir(parents=True)
    (location / "bin" / "python").write_text("half a file")
    assert find(recipe, directory) is None
    assert answer(prepare(recipe, directory, lambda _: None)) == "42\n"
    assert not (location / "bin" / "python").read_bytes().startswith(b"half")


def test_an_environment_whose_interpreter_is_gone_is_built_again(recipe: Recipe, directory: Path) -> None:
    python = prepare(recipe, directory, lambda _: None)
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    assert find(recipe, directory) is None
    assert answer(prepare(recipe, directory, lambda _: None)) == "42\n"


def test_an_environment_without_its_modules_does_not_count(tmp_path: Path, directory: Path) -> None:
    recipe = make_recipe(tmp_path, module="absent")
    with pytest.raises(InstallFailed, match="lacks one of absent"):
        prepare(recipe, directory, lambda _: None)
    assert not (recipe.location(directory) / COMPLETE).exists()


def test_a_list_that_changed_makes_another_environment_and_names_the_old_one(recipe: Recipe, directory: Path) -> None:
    old = prepare(recipe, directory, lambda _: None)
    recipe.requirements.write_text(recipe.requirements.read_text() + "# changed\n")
    said: list[str] = []
    assert prepare(recipe, directory, said.append) != old
    assert f"{old.parent.parent} is from another version" in said[-1]
    assert answer(old) == "42\n"


def test_two_at_once_build_one(recipe: Recipe, directory: Path) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=prepare, args=(recipe, directory, said.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("ready" in line for line in said) == 1
    assert find(recipe, directory)


def test_waiting_for_another_builder_can_be_called_off(recipe: Recipe, directory: Path) -> None:
    directory.mkdir(parents=True)
    cancelled = threading.Event()

    def call_off(text: str) -> None:
        assert text == "demo: another process is building its environment; waiting for it"
        cancelled.set()

    with (directory / "demo.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Cancelled):
            prepare(recipe, directory, call_off, cancelled)


def test_a_build_can_be_called_off(recipe: Recipe, directory: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        prepare(recipe, directory, lambda _: None, cancelled)
    assert find(recipe, directory) is None


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(tmp_path: Path, directory: Path) -> None:
    small = make_recipe(tmp_path)
    free_mb = shutil.disk_usage(tmp_path).free // 1_000_000
    recipe = Recipe(small.name, small.requirements, small.modules, fetch_mb=1, disk_mb=2 * free_mb + 1)
    with pytest.raises(InstallFailed, match=r"it takes \d+ MB, and .* has \d+ MB left"):
        prepare(recipe, directory, lambda _: None)


def test_a_directory_that_cannot_be_made_is_an_install_failure(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallFailed, match=r"Not a directory|File exists"):
        prepare(recipe, tmp_path / "file" / "env", lambda _: None)


@pytest.mark.parametrize("recipe", [ENGINE, PHOENIX], ids=lambda recipe: recipe.name)
def test_the_recipes_have_their_lists(recipe: Recipe) -> None:
    assert "--hash=sha256:" in recipe.requirements.read_text()
