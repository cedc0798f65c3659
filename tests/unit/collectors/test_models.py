"""What models cost, as the file says, over what the database has."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from collectors.records import models as module
from collectors.records.models import Models
from proxy.nouns import ModelSettings, PriceSettings
from proxy.settings import Settings
from proxy.store import GLASSHOUSE, MODELS, open_database, put


def priced(price: int) -> ModelSettings:
    return ModelSettings(price=PriceSettings(input=Decimal(price)))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    return Settings(state_dir=str(tmp_path), models={"declared": priced(1)})


def store(settings: Settings, name: str, value: ModelSettings) -> None:
    database = open_database(settings.database_url)
    with database.begin() as connection:
        put(connection, MODELS, name, value, GLASSHOUSE)
    database.dispose()


def test_the_file_lies_over_the_database(settings: Settings) -> None:
    store(settings, "stored", priced(2))
    store(settings, "declared", priced(3))
    assert Models(settings)() == {"declared": priced(1), "stored": priced(2)}


def test_a_change_is_seen_and_nothing_else_is_one(settings: Settings) -> None:
    models = Models(settings)
    before = models()
    assert models() is before
    store(settings, "stored", priced(2))
    assert models() == {"declared": priced(1), "stored": priced(2)}


def test_without_a_database_the_last_that_was_known_stays(settings: Settings, tmp_path: Path) -> None:
    models = Models(settings)
    store(settings, "stored", priced(2))
    known = models()
    (tmp_path / "glasshouse.db").write_bytes(b"no database" * 1000)
    for more in ("glasshouse.db-wal", "glasshouse.db-shm"):
        (tmp_path / more).unlink(missing_ok=True)
    assert models() is known
    assert Models(settings)() == {"declared": priced(1)}, "nobody has asked it before"
