"""What models cost, as the file says, over what the database has."""

from __future__ import annotations

import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Never

import pytest

from collectors.records import models as module
from collectors.records.models import Models
from proxy.nouns import ModelSettings, PriceSettings
from proxy.settings import Settings
from proxy.store import GLASSHOUSE, MODELS, StoreError, open_database, put


def priced(price: int) -> ModelSettings:
    return ModelSettings(price=PriceSettings(input=Decimal(price)))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    return Settings(state_dir=str(tmp_path), models={"declared": priced(1)})


def store(settings: Settings, name: str, value: ModelSettings) -> None:
    database = open_database(settings.database_url)
    with database.begin() as connection:
        put(connection, MODELS, name, value, GLASSHOUSE)
    database.dispose()


def until(models: Models, wanted: dict[str, ModelSettings]) -> None:
    deadline = time.monotonic() + 30
    while models() != wanted:
        assert time.monotonic() < deadline, models()
        time.sleep(0.01)


def test_the_file_lies_over_the_database(settings: Settings) -> None:
    store(settings, "stored", priced(2))
    store(settings, "declared", priced(3))
    assert Models(settings)() == {"declared": priced(1), "stored": priced(2)}, "at the first call"


def test_a_change_is_seen_and_nothing_else_is_one(settings: Settings) -> None:
    models = Models(settings)
    before = models()
    time.sleep(0.2)
    assert models() is before
    store(settings, "stored", priced(2))
    until(models, {"declared": priced(1), "stored": priced(2)})


def test_without_a_database_the_last_that_was_known_stays(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models(settings)
    store(settings, "stored", priced(2))
    until(models, {"declared": priced(1), "stored": priced(2)})
    for name in ("glasshouse.db", "glasshouse.db-wal", "glasshouse.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "glasshouse.db").write_bytes(b"no database" * 1000)
    assert Models(settings)() == {"declared": priced(1)}, "nobody has asked it before"
    assert "can't be read" in caplog.text
    assert models() == {"declared": priced(1), "stored": priced(2)}


def test_who_waits_for_a_database_holds_up_nobody(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 47
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.1)
    asked, let_go = threading.Event(), threading.Event()

    def hang(url: str) -> Never:
        asked.set()
        let_go.wait()
        raise StoreError("it has hung for long enough")

    monkeypatch.setattr(module, "open_database", hang)
    models = Models(settings)
    assert [models() for _ in range(3)] == [{"declared": priced(1)}] * 3
    assert asked.is_set()
    let_go.set()
