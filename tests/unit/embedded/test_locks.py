"""The lock files: complete, hashed, of one mind, and free of anything that belongs to the machine they were made on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOCKS = sorted([*ROOT.glob("requirements*.txt"), *(ROOT / "proxy" / "embedded").glob("requirements*.txt")])
REQUIREMENT = re.compile(r"^([a-z0-9.-]+)(?:\[[a-z0-9,. -]+\])?==(\S+)(?: ; .+)? \\$")


def pins(lock: Path) -> dict[str, set[str]]:
    """Name → versions: several where markers choose between them."""
    found: dict[str, set[str]] = {}
    for line in lock.read_text().splitlines():
        if match := REQUIREMENT.match(line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def test_there_are_five() -> None:
    assert [lock.name for lock in LOCKS] == [
        "requirements-engine.txt",
        "requirements-phoenix.txt",
        "requirements-build.txt",
        "requirements-dev.txt",
        "requirements.txt",
    ]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_line_is_a_pin_a_hash_or_a_comment(lock: Path) -> None:
    odd = [
        line
        for line in lock.read_text().splitlines()
        if not REQUIREMENT.match(line) and not re.match(r" {4}--hash=sha256:[0-9a-f]{64}(?: \\)?$| *#", line)
    ]
    assert odd == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_no_comment_names_a_place(lock: Path) -> None:
    comments = re.findall(r"#.*", lock.read_text())
    assert not [comment for comment in comments if re.search(r"://|\s/|--index|--find-links|\bfile:", comment)]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-build.txt"])
def test_development_takes_the_versions_that_are_shipped(name: str) -> None:
    developing, shipped = pins(ROOT / "requirements-dev.txt"), pins(ROOT / name)
    assert shipped.keys() <= developing.keys()
    assert {package: developing[package] for package in shipped} == shipped


@pytest.mark.parametrize("name", ["engine", "phoenix"])
def test_companions_are_pinned_to_what_their_source_says(name: str) -> None:
    source = ROOT / "proxy" / "embedded" / f"requirements-{name}.in"
    wanted = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", source.read_text(), re.MULTILINE))
    locked = pins(source.with_suffix(".txt"))
    assert wanted
    assert {package: locked[package] for package in wanted} == {package: {version} for package, version in wanted.items()}
