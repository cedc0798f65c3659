"""`glasshouse requests`: which there were, and where the milliseconds of one went."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import Outcome
from proxy.exchange import Attempt, Record
from proxy.store import insert_records, open_database
from tests.unit.cli.conftest import Command

MS = 1_000_000


def identity(number: int, received_ns: int) -> bytes:
    """A UUIDv7, which begins with the milliseconds in which the request came."""
    return (received_ns // MS).to_bytes(6, "big") + bytes([0x70]) + number.to_bytes(9, "big")


def record(number: int, received_ns: int, **fields: Any) -> Record:
    made = Record(identity(number, received_ns), bytes(16), 1, received_ns, currency="USD")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.fixture(autouse=True)
def ids(here: Path) -> list[str]:
    """Three requests, the last of which failed in a way that says something to the terminal."""
    (here / ".glasshouse").mkdir()
    now = time.time_ns() - 60 * 10**9
    alice = {"key_id": "key_1", "key_name": "alice", "model": "small", "operation": "chat", "status": 200}
    times = {
        "read_ns": MS,
        "authenticated_ns": 2 * MS,
        "admitted_ns": 3 * MS,
        "queued_ns": 4 * MS,
        "sent_ns": 25 * MS,
        "first_byte_ns": 30 * MS,
        "first_token_ns": 40 * MS,
        "first_content_ns": 40 * MS,
        "last_token_ns": 140 * MS,
        "upstream_ended_ns": 141 * MS,
        "ended_ns": 142 * MS,
    }
    attempts = [
        Attempt("gpu1", started_ns=20 * MS, ended_ns=24 * MS, error="refused"),
        Attempt("gpu0", started_ns=24 * MS, status=200, reused=True),
    ]
    routing = {"routed_by": "auto.prefix", "scores": [("gpu0", -32), ("gpu1", 900)], "fallback_of": "large"}
    records = [
        record(
            1,
            now,
            **alice,
            routed_by="only",
            ended_ns=7 * MS,
            input_tokens=600,
            output_tokens=20,
            cost_nano=132_000,
            team="research",
        ),
        record(
            2,
            now + MS,
            **alice,
            **times,
            **routing,
            stream=True,
            requested_model="s",
            attempts=attempts,
            client_address="10.0.0.9",
        ),
        record(
            3,
            now + 2 * MS,
            key_id="key_2",
            key_name="\x1b[31mred",
            model="=cmd()",
            outcome=Outcome.UPSTREAM_ERROR,
            status=502,
            error="\x1b]0;title\x07 broke",
            ended_ns=3 * MS,
        ),
    ]
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").begin() as connection:
        insert_records(connection, records)
    return [each.id.hex() for each in records]


def listed(command: Command, *options: str) -> list[str]:
    return [row["id"] for row in json.loads(command("requests", "list", "--json", *options).stdout)]


def test_the_newest_first(command: Command, ids: list[str]) -> None:
    assert listed(command) == ids[::-1]
    head, broken, second, first = command("requests", "list").stdout.splitlines()
    assert head.split()[:4] == ["RECEIVED", "ID", "KEY", "MODEL"]
    assert re.search(r"upstream_error +502 +0 +0 +3\.0 +0\.00 USD$", broken)
    assert re.search(r" alice +small +gpu0 +ok +200 +0 +0 +142\.0 +16\.0 +40\.0 +0\.00 USD$", second)
    assert first.endswith("0.000132 USD")


def test_filters(command: Command, ids: list[str]) -> None:
    assert listed(command, "--slowest", "--limit", "2") == [ids[1], ids[0]]
    assert listed(command, "--key", "alice") == listed(command, "--key", "key_1") == [ids[1], ids[0]]
    assert listed(command, "--outcome", "upstream_error") == [ids[2]]
    assert listed(command, "--model", "small", "--team", "research") == [ids[0]]
    assert listed(command, "--since", "1m", "--until", "30s") == []
    assert listed(command, "--since", "5m") == ids[::-1]
    assert command("requests", "list", "--user", "nobody").stderr == "There were no such requests.\n"


def test_where_its_milliseconds_went(command: Command, ids: list[str]) -> None:
    shown = command("requests", "show", ids[1]).stdout
    assert re.search(r"^model +small \(asked for as s\), instead of large$", shown, re.MULTILINE)
    assert re.search(r"^chosen by +auto, prefix \(gpu0 -32, gpu1 900\)$", shown, re.MULTILINE)
    assert re.search(r"^from +10\.0\.0\.9$", shown, re.MULTILINE)
    assert re.search(r"^attempt 1 +gpu1: no answer, refused\nattempt 2 +gpu0: status 200$", shown, re.MULTILINE)
    bars = re.findall(r"^(\w+) +(█+|▏) +([0-9.]+) ms$", shown, re.MULTILINE)
    said = json.loads(command("requests", "show", ids[1], "--json").stdout)
    assert [name for name, _, _ in bars] == [span["name"] for span in said["time"]]
    assert ("wait", "16.0") in [(name, ms) for name, _, ms in bars]
    assert sum(float(ms) for _, _, ms in bars) == pytest.approx(142.0, abs=0.1 * len(bars))
    assert max(bars, key=lambda bar: len(bar[1]))[0] == max(said["time"], key=lambda span: span["ms"])["name"]


def test_whose_answer_it_was_and_what_that_saved(here: Path, command: Command) -> None:
    now = time.time_ns() - 60 * 10**9
    saved = {"saved_input_tokens": 600, "saved_output_tokens": 20, "saved_cost_nano": 132_000, "saved_ns": 1250 * MS}
    source = {"source_id": bytes([2]) * 16, "source_trace_id": bytes([3]) * 16}
    hit = {**saved, **source, "cache": "hit", "outcome": Outcome.CACHED, "age_ns": 90 * 10**9, "looked_up_ns": 2 * MS}
    shared = {
        **saved,
        **source,
        "cache": "coalesced",
        "outcome": Outcome.COALESCED,
        "looked_up_ns": 2 * MS,
        "first_token_ns": 4 * MS,
    }
    ended = {"read_ns": MS, "ended_ns": 6 * MS}
    made = [
        record(11, now, **hit, **ended),
        record(12, now, **hit, similarity=0.9712, **ended),
        record(13, now, **shared, upstream_ended_ns=5 * MS, **ended),
        record(14, now, cache="coalesced", outcome=Outcome.CRASHED, **ended),
        record(15, now, cache="miss", **ended),
    ]
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").begin() as connection:
        insert_records(connection, made)
    assert set(listed(command, "--cache", "hit")) == {made[0].hex_id, made[1].hex_id}
    shown = [command("requests", "show", each.hex_id).stdout for each in made]
    whose = f"the answer of request {'02' * 16} (trace {'03' * 16})"
    assert f"answered from the cache: {whose}, 90.0 s old\n" in shown[0]
    assert f"answered from the cache: {whose}, whose prompt is similar (0.971), 90.0 s old\n" in shown[1]
    assert f"shared {whose}, which was under way\n" in shown[2]
    assert re.search(r"^cache +waited for another's answer$", shown[3], re.MULTILINE)
    assert re.search(r"^cache +miss$", shown[4], re.MULTILINE)
    for text in shown[:3]:
        assert re.search(r"^saved +600 tokens in, 20 out, 0\.000132 USD, 1250\.0 ms$", text, re.MULTILINE)
        assert re.search(r"^cost +0\.00 USD$", text, re.MULTILINE)
    assert "saved" not in shown[4]
    bars = [[name for name, _ in re.findall(r"^(\w+) +(?:█+|▏) +([0-9.]+) ms$", text, re.MULTILINE)] for text in shown[:3]]
    assert bars == [["read", "cache", "release"]] * 2 + [["read", "cache", "coalesce", "decode", "release"]]


def test_who_could_not_be_chosen_from_others_says_so(command: Command, ids: list[str]) -> None:
    assert re.search(r"^chosen by +nothing: there was no other$", command("requests", "show", ids[0]).stdout, re.MULTILINE)
    assert "chosen by" not in command("requests", "show", ids[2]).stdout, "it came to none"


def test_nothing_of_it_does_anything_to_the_terminal(command: Command, ids: list[str]) -> None:  # failure 78
    for arguments in (["list"], ["show", ids[2]], ["list", "--json"], ["list", "--format", "csv"], ["show", ids[2], "--json"]):
        output = command("requests", *arguments).output
        assert "\x1b" not in output
        assert "\x07" not in output
        assert "[31m" in output or "title" in output
    assert "'=cmd()" in command("requests", "list", "--format", "csv").stdout


def test_none_of_that_id(command: Command) -> None:
    assert "there is no request 'nothing'" in command("requests", "show", "nothing", status=1).stderr
