"""What is said of backends at run time: kept by name, counted, noted, and gone with the backend."""

from __future__ import annotations

import pytest

from proxy.nouns import BackendSettings, RunTimeSettings
from proxy.store import BACKENDS, GLASSHOUSE, Author, Repeated, audit_rows, put, put_run_time, remove, revision, run_time
from tests.unit.store.conftest import Store

ALICE = Author("alice", "admin", "192.0.2.1")


def test_it_is_said_and_taken_back(store: Store) -> None:
    assert store.read(run_time) == {}
    store.write(put_run_time, "a", RunTimeSettings(drained=True), "drain", ALICE)
    store.write(put_run_time, "b", RunTimeSettings(weight=0.25), "weigh", ALICE)
    assert store.read(run_time) == {"a": RunTimeSettings(drained=True), "b": RunTimeSettings(weight=0.25)}
    store.write(put_run_time, "a", RunTimeSettings(drained=True, weight=3), "weigh", ALICE)
    assert store.read(run_time)["a"] == RunTimeSettings(drained=True, weight=3)
    store.write(put_run_time, "a", RunTimeSettings(), "undrain", ALICE)
    assert list(store.read(run_time)) == ["b"]


def test_each_change_is_counted_and_noted(store: Store) -> None:
    before = store.read(revision)
    store.write(put_run_time, "a", RunTimeSettings(drained=True), "drain", ALICE)
    store.write(put_run_time, "a", RunTimeSettings(drained=True, weight=2), "weigh", ALICE)
    assert store.read(revision) == before + 2
    weighed, drained = store.read(audit_rows, noun="backends", name="a")
    assert (drained.author, drained.address, drained.action) == ("alice", "192.0.2.1", "drain")
    assert drained.before == {"drained": False, "weight": "default"}
    assert drained.after == weighed.before == {"drained": True, "weight": "default"}
    assert (weighed.action, weighed.after) == ("weigh", {"drained": True, "weight": 2})


def test_the_same_again_is_no_change(store: Store) -> None:
    store.write(put_run_time, "a", RunTimeSettings(), "undrain", ALICE)
    store.write(put_run_time, "a", RunTimeSettings(weight=2), "weigh", ALICE)
    before = store.read(revision)
    store.write(put_run_time, "a", RunTimeSettings(weight=2), "weigh", ALICE)
    assert store.read(revision) == before
    assert len(store.read(audit_rows)) == 1


def test_what_is_sent_twice_is_told(store: Store) -> None:
    once = ALICE._replace(idempotency_key="k")
    store.write(put_run_time, "a", RunTimeSettings(drained=True), "drain", once)
    with pytest.raises(Repeated):
        store.write(put_run_time, "a", RunTimeSettings(), "undrain", once)
    assert store.read(run_time) == {"a": RunTimeSettings(drained=True)}


def test_it_goes_with_the_backend(store: Store) -> None:
    for name in ("a", "b"):
        store.write(put, BACKENDS, name, BackendSettings(url="http://h"), GLASSHOUSE)
        store.write(put_run_time, name, RunTimeSettings(drained=True), "drain", GLASSHOUSE)
    store.write(remove, BACKENDS, "a", GLASSHOUSE)
    assert list(store.read(run_time)) == ["b"]
    store.write(put, BACKENDS, "a", BackendSettings(url="http://h"), GLASSHOUSE)
    assert list(store.read(run_time)) == ["b"]
