"""What is looked up in a snapshot: keys, levels, models."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
import pytest

from proxy.snapshot import (
    FIRST,
    LAST,
    NEVER_NS,
    UNLIMITED,
    USUAL,
    Allowance,
    KeyTable,
    Model,
    Principal,
    Snapshot,
    SnapshotFile,
    encode_principal,
)
from proxy.snapshot.model import MOST_COVERED


def file(revision: int = 1) -> SnapshotFile:
    return SnapshotFile(
        revision=revision,
        published_unix_ns=5,
        currency="EUR",
        keys={b"h" * 32: encode_principal(Principal("key_1", "Ärger"))},
        models={"m": Model("m", ("b",), 1, 2, 3, b'{"id":"m"}'), "n": Model("n", (), card=b'{"id":"n"}')},
    )


def test_a_snapshot_is_ready_for_look_ups() -> None:
    snapshot = Snapshot(file())
    assert (snapshot.revision, snapshot.published_unix_ns, snapshot.currency) == (1, 5, "EUR")
    assert snapshot.principal(b"h" * 32) == Principal("key_1", "Ärger")
    assert snapshot.principal(b"h" * 32) is snapshot.principal(b"h" * 32)
    assert snapshot.principal(b"x" * 32) is None
    assert snapshot.principal(b"") is None
    anybody = Principal("key_1", "Ärger")
    assert json.loads(snapshot.models_json(anybody)) == {"object": "list", "data": [{"id": "m"}, {"id": "n"}]}
    assert json.loads(Snapshot(SnapshotFile()).models_json(anybody)) == {"object": "list", "data": []}


# --- who may use which models ------------------------------------------------------------------------------------------

NAMES = ("qwen3-8b", "qwen3-32b", "Qwen/Qwen3-8B", "bge-m3", "a[1]")
Patterns = tuple[str, ...] | None


def models_of(key: Patterns, team: Patterns = None, everyone: Patterns = None) -> tuple[Snapshot, Principal]:
    models = {name: Model(name, card=b'{"id":"%b"}' % name.encode()) for name in NAMES}
    teams, all_of_us = {"research": Allowance(models=team)}, Allowance(models=everyone)
    return Snapshot(SnapshotFile(models=models, teams=teams, everyone=all_of_us)), Principal(
        "key_1", "alice", "research", Allowance(models=key)
    )


@pytest.mark.parametrize(
    ("key", "team", "everyone", "allowed"),
    [
        (None, None, None, NAMES),
        (("*",), None, None, NAMES),
        (("qwen3-8b",), None, None, ("qwen3-8b",)),
        (("qwen*",), None, None, ("qwen3-8b", "qwen3-32b")),
        (("Qwen*",), None, None, ("Qwen/Qwen3-8B",)),
        (("*8[bB]",), None, None, ("qwen3-8b", "Qwen/Qwen3-8B")),
        (("qwen3-?b", "bge*"), None, None, ("qwen3-8b", "bge-m3")),
        (("a[[]1]",), None, None, ("a[1]",)),
        (("qwen",), None, None, ()),
        ((), None, None, ()),
        (None, ("qwen*",), None, ("qwen3-8b", "qwen3-32b")),
        (None, None, ("bge*",), ("bge-m3",)),
        (("qwen*",), ("*8b",), None, ("qwen3-8b",)),
        (("qwen*",), ("*8b",), ("*32b",), ()),
    ],
)
def test_a_key_may_use_what_all_its_levels_allow(
    key: Patterns, team: Patterns, everyone: Patterns, allowed: tuple[str, ...]
) -> None:
    snapshot, alice = models_of(key, team, everyone)
    assert tuple(snapshot.allowed_models(alice)) == allowed
    assert [each["id"] for each in json.loads(snapshot.models_json(alice))["data"]] == list(allowed)


def test_who_may_use_everything_costs_nothing() -> None:
    snapshot, alice = models_of(None)
    assert snapshot.allowed_models(alice) is snapshot.models
    assert snapshot.models_json(alice) is snapshot.models_json(Principal("key_2", "bob"))


def test_it_is_found_out_once_for_all_keys_of_the_same_patterns() -> None:
    snapshot, alice = models_of(("qwen*",))
    allowed = snapshot.allowed_models(alice)
    assert snapshot.allowed_models(alice) is allowed
    bob = Principal("key_2", "bob", "", Allowance(models=("qwen*",)))
    assert snapshot.allowed_models(bob) is allowed


def test_what_is_known_of_a_key_may_be_of_a_release_that_knew_no_limits() -> None:
    earlier = msgspec.Raw(msgspec.msgpack.encode(["key_1", "alice"]))
    assert Snapshot(SnapshotFile(keys={b"h" * 32: earlier})).principal(b"h" * 32) == Principal("key_1", "alice")


def test_the_secrets_of_a_key_lead_to_one_principal_and_end_by_themselves() -> None:
    alice, bob = Principal("key_1", "alice", allowance=Allowance(models=("m",))), Principal("key_2", "bob")
    secrets = [(b"a" * 32, 7, alice), (b"b" * 32, 0, alice), (b"c" * 32, 0, bob)]
    snapshot = Snapshot(SnapshotFile(keys=KeyTable.build((digest, end, encode_principal(who)) for digest, end, who in secrets)))
    former, newer = snapshot.find(b"a" * 32), snapshot.find(b"b" * 32)
    assert former == (alice, 7)
    assert newer == (alice, NEVER_NS)
    assert former is not None
    assert newer is not None
    assert former[0] is newer[0]
    assert snapshot.find(b"a" * 32) is former
    assert snapshot.principal(b"c" * 32) == bob


def test_a_snapshot_of_before_there_were_patterns() -> None:
    earlier = msgspec.msgpack.decode(msgspec.msgpack.encode(SnapshotFile(models={"m": Model("m")})))[:-1]
    snapshot = Snapshot(msgspec.convert(earlier, SnapshotFile))
    assert snapshot.model(Principal("key_1", "alice"), "gpt-5") is None


def test_a_snapshot_that_was_replaced_knows_nobody() -> None:
    snapshot = Snapshot(file())
    assert snapshot.principal(b"h" * 32) is not None
    snapshot.retire()
    assert snapshot.principal(b"h" * 32) is None
    assert snapshot.models


# --- models by pattern -------------------------------------------------------------------------------------------------


def covered_by(patterns: dict[str, Model], allowed: Patterns = None) -> tuple[Snapshot, Principal]:
    models = {"gpt-4o": Model("gpt-4o", ("named",)), "best": Model("gpt-5", ("a",))}
    return Snapshot(SnapshotFile(models=models, patterns=patterns)), Principal(
        "key_1", "alice", allowance=Allowance(models=allowed)
    )


GPT = {"gpt-*": Model("gpt-*", ("a", "b"), 7, policy="session"), "gpt-4*": Model("gpt-4*", ("c",), 9), "?": Model("?", ("d",))}


@pytest.mark.parametrize(
    ("name", "is_called", "backends"),
    [
        ("gpt-4o", "gpt-4o", ("named",)),  # a name comes before a pattern
        ("best", "gpt-5", ("a",)),
        ("gpt-5", "gpt-5", ("a", "b")),
        ("gpt-4.1", "gpt-4.1", ("c",)),  # the longest pattern
        ("gpt-", "gpt-", ("a", "b")),
        ("x", "x", ("d",)),
    ],
)
def test_what_a_name_stands_for(name: str, is_called: str, backends: tuple[str, ...]) -> None:
    snapshot, alice = covered_by(GPT)
    model = snapshot.model(alice, name)
    assert model is not None
    assert (model.name, model.backends) == (is_called, backends)
    assert snapshot.model(alice, name) is model


@pytest.mark.parametrize("name", ["GPT-5", "xgpt-5", "xx", "", "gpt-\n", "gpt- 5", "gpt-" + "5" * 300])
def test_what_no_pattern_covers(name: str) -> None:
    snapshot, alice = covered_by(GPT)
    assert snapshot.model(alice, name) is None


def test_a_covered_model_is_what_is_known_of_its_pattern() -> None:
    snapshot, alice = covered_by(GPT)
    model = snapshot.model(alice, "gpt-5")
    assert model is not None
    assert msgspec.structs.replace(model, name="gpt-*", card=b"null") == GPT["gpt-*"]
    assert json.loads(model.card) == {"id": "gpt-5", "object": "model", "created": 0, "owned_by": "glasshouse"}


def test_patterns_are_not_listed() -> None:
    snapshot, alice = covered_by(GPT)
    snapshot.model(alice, "gpt-5")
    assert list(snapshot.allowed_models(alice)) == ["gpt-4o", "best"]


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (("*",), ["gpt-4o", "gpt-5", "gpt-4.1"]),
        (("gpt-4*",), ["gpt-4o", "gpt-4.1"]),
        (("gpt-5",), ["gpt-5"]),
        (("gpt-4.1",), ["gpt-4.1"]),
        ((), []),
    ],
)
def test_a_key_gets_of_a_pattern_what_it_may_use(allowed: tuple[str, ...], names: list[str]) -> None:
    snapshot, alice = covered_by(GPT, allowed)
    anybody = Principal("key_2", "bob")
    for _ in range(2):
        assert [name for name in ("gpt-4o", "gpt-5", "gpt-4.1") if snapshot.model(alice, name)] == names
        assert snapshot.model(anybody, "gpt-5") is not None


def test_what_is_there_by_name_and_not_allowed_is_not_there_by_pattern() -> None:
    snapshot = Snapshot(SnapshotFile(models={"gpt-4o": Model("gpt-4o", ("named",))}, patterns=GPT))
    assert snapshot.model(Principal("key_1", "alice", allowance=Allowance(models=("gpt-4.1",))), "gpt-4o") is None


def test_so_many_made_up_names_are_remembered() -> None:
    snapshot, alice = covered_by(GPT)
    first = snapshot.model(alice, "gpt-0")
    for number in range(1, MOST_COVERED):
        snapshot.model(alice, f"gpt-{number}")
    assert snapshot.model(alice, "gpt-0") is first
    snapshot.model(alice, f"gpt-{MOST_COVERED}")
    assert len(snapshot._covered) == MOST_COVERED
    again = snapshot.model(alice, "gpt-0")
    assert again == first
    assert again is not first


# --- levels ------------------------------------------------------------------------------------------------------------

WHO = Principal("key_1", "alice's", "research", Allowance(requests_per_minute=1), "alice", "atlas")
LEVELS = ("key", "user", "project", "team", "everyone")


def with_levels(allowances: Mapping[str, Allowance]) -> tuple[Snapshot, Principal]:
    """A snapshot in which the levels of `WHO` have these allowances, and others' another."""
    other = Allowance(expires_unix_ns=1, blocked=True, models=())
    said = {level: allowances.get(level, UNLIMITED) for level in LEVELS}
    file = SnapshotFile(
        everyone=said["everyone"],
        models={"m": Model("m"), "n": Model("n")},
        users={"alice": said["user"], "other": other},
        projects={"atlas": said["project"], "other": other},
        teams={"research": said["team"], "other": other},
    )
    return Snapshot(file), msgspec.structs.replace(WHO, allowance=said["key"])


def test_all_levels_of_a_caller_from_the_narrowest_on() -> None:
    snapshot, who = with_levels({level: Allowance(at) for at, level in enumerate(LEVELS, 1)})
    assert snapshot.levels(who) == [
        ("key", "alice's", Allowance(1)),
        ("user", "alice", Allowance(2)),
        ("project", "atlas", Allowance(3)),
        ("team", "research", Allowance(4)),
        ("everyone", "", Allowance(5)),
    ]
    assert snapshot.levels(Principal("key_2", "bob")) == [("key", "bob", UNLIMITED), ("everyone", "", Allowance(5))]
    unknown = Principal("key_3", "eve", "nobody", UNLIMITED, "nobody", "nobody")
    assert [allowance for _, _, allowance in snapshot.levels(unknown)] == [UNLIMITED] * 4 + [Allowance(5)]


def test_two_callers_of_one_name_are_told_apart() -> None:
    """Two tokens of one person have the same id, so that they share their limits; what they may use can differ."""
    snapshot, _ = with_levels({})
    one, other = (Principal("jwt:1", "alice", allowance=Allowance(models=(name,))) for name in ("m", "n"))
    assert [list(snapshot.allowed_models(who)) for who in (one, other, one)] == [["m"], ["n"], ["m"]]


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_ends_and_blocks(level: str) -> None:
    snapshot, who = with_levels({level: Allowance(expires_unix_ns=5)})
    assert (snapshot.expires_unix_ns(who), snapshot.blocked(who)) == (5, False)
    snapshot, who = with_levels({level: Allowance(blocked=True)})
    assert (snapshot.expires_unix_ns(who), snapshot.blocked(who)) == (NEVER_NS, True)
    snapshot, who = with_levels({level: Allowance(models=("n*",))})
    assert list(snapshot.allowed_models(who)) == ["n"]


def test_the_first_end_counts() -> None:
    snapshot, who = with_levels({level: Allowance(expires_unix_ns=9 - at) for at, level in enumerate(LEVELS)})
    assert snapshot.expires_unix_ns(who) == 5


FAR = {"high": FIRST, "normal": USUAL, "low": LAST}


@pytest.mark.parametrize(
    ("said", "priority"),
    [
        ({}, "normal"),
        ({"key": "high"}, "high"),
        ({"everyone": "high"}, "high"),
        ({"team": "low"}, "low"),
        ({"everyone": "low", "key": "high"}, "low"),
        ({"key": "low", "team": "high"}, "low"),
        ({"user": "low"}, "low"),
        ({"project": "high"}, "high"),
    ],
)
def test_where_a_caller_waits(said: dict[str, str], priority: str) -> None:
    snapshot, who = with_levels({level: Allowance(priority=FAR[each]) for level, each in said.items()})
    assert snapshot.priority(who) == FAR[priority]
