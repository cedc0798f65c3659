"""A spend file that is written whenever it may be: these tests don't wait for seconds to pass."""

from __future__ import annotations

import pytest

from collectors.records import ledger


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(ledger, "SHARE", 0)
