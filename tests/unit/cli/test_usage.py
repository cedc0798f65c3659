"""`glasshouse usage`: the ledger's sums, for people, spreadsheets and programs."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from proxy.cli.values import When
from proxy.errors import Outcome
from proxy.exchange import Record
from proxy.store import insert_records, open_database
from tests.unit.cli.conftest import Command

NOON = int(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()) * 10**9


def record(number: int, **fields: Any) -> Record:
    made = Record(number.to_bytes(16, "big"), bytes(16), 1, NOON, currency="USD")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.fixture(autouse=True)
def ledger(here: Path) -> None:
    (here / ".glasshouse").mkdir()
    alice = {
        "key_id": "key_1",
        "key_name": "alice",
        "model": "small",
        "input_tokens": 600,
        "cached_tokens": 500,
        "output_tokens": 200,
        "team": "research",
    }
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").begin() as connection:
        records = [
            record(1, **alice, cost_nano=132_000, first_token_ns=250_000_000),
            record(2, **alice, cost_nano=2**60, outcome=Outcome.CLIENT_GONE),
            record(
                3, **alice, cost_nano=5, currency="EUR", outcome=Outcome.UPSTREAM_ERROR, received_unix_ns=NOON + 86_400 * 10**9
            ),
            record(4, key_id="key_2", key_name="=cmd()", model="\x1b[31m", outcome=Outcome.CRASHED),
        ]
        insert_records(connection, records)


def test_a_table(command: Command) -> None:
    head, alice, other, total = command("usage").stdout.splitlines()
    assert head.split()[:5] == ["KEY", "REQUESTS", "OK", "ERRORS", "GONE"]
    cost = "0.000000005 EUR + 1152921504.606978976 USD"
    assert alice.split(maxsplit=10) == [
        "alice",
        "3",
        "1",
        "1",
        "1",
        "0",
        "1800",
        "1500",
        "600",
        "0",
        f"{cost}  0.250 s          0.250 s",
    ]
    assert other.split()[:6] == ["=cmd()", "1", "0", "0", "0", "1"]
    assert total.split(maxsplit=10) == ["total", "4", "1", "1", "1", "1", "1800", "1500", "600", "0", cost]


def test_names_do_nothing_to_the_terminal(command: Command) -> None:  # failure 78
    output = command("usage", "--by", "model").stdout
    assert r"\x1b[31m" in output
    assert "\x1b" not in output


def test_csv(command: Command) -> None:  # failure 78
    rows = list(csv.DictReader(io.StringIO(command("usage", "--format", "csv").stdout, newline="")))
    assert [row["label"] for row in rows] == ["alice", "'=cmd()"]
    assert (rows[0]["cost_usd"], rows[0]["cost_eur"], rows[1]["cost_usd"]) == ("1152921504.606978976", "0.000000005", "0.00")
    assert (rows[0]["key"], rows[0]["requests"], rows[0]["first_token_p50_ns"]) == ("key_1", "3", "250000000")


def test_json(command: Command) -> None:
    first, second = json.loads(command("usage", "--format", "json").stdout)
    assert first == {
        "group": "key_1",
        "label": "alice",
        "requests": 3,
        "ok": 1,
        "errors": 1,
        "client_gone": 1,
        "crashed": 0,
        "input_tokens": 1800,
        "cached_tokens": 1500,
        "output_tokens": 600,
        "reasoning_tokens": 0,
        "audio_seconds": 0,
        "cache_hits": 0,
        "cache_misses": 0,
        "coalesced": 0,
        "saved_input_tokens": 0,
        "saved_output_tokens": 0,
        "saved_ns": 0,
        "saved_cost_nano": {},
        "saved_cost": {},
        "cost_nano": {"EUR": 5, "USD": 2**60 + 132_000},
        "first_token_p50_ns": 250_000_000,
        "first_token_p95_ns": 250_000_000,
        "cost": {"EUR": "0.000000005", "USD": "1152921504.606978976"},
    }
    assert (second["group"], second["crashed"], second["cost"]) == ("key_2", 1, {})


def test_teams_and_who_is_in_none(command: Command) -> None:
    head, nobody, research, total = (line.split() for line in command("usage", "--by", "team").stdout.splitlines())
    assert head[:2] == ["TEAM", "REQUESTS"]
    assert (nobody[:2], research[:2], total[:2]) == (["-", "1"], ["research", "3"], ["total", "4"])
    rows = list(csv.DictReader(io.StringIO(command("usage", "--by", "team", "--format", "csv").stdout, newline="")))
    assert [(row["team"], row["label"], row["requests"], row["cost_eur"]) for row in rows] == [
        ("", "", "1", "0.00"),
        ("research", "research", "3", "0.000000005"),
    ]


def test_audio_has_a_column_where_there_is_any(here: Path, command: Command) -> None:
    assert "AUDIO" not in command("usage").stdout
    assert "audio" not in command("usage", "--format", "csv").stdout
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").begin() as connection:
        heard = {"key_id": "key_1", "key_name": "alice", "model": "whisper"}
        insert_records(connection, [record(5, **heard, audio_seconds=3), record(6, **heard, audio_seconds=40)])
    head, alice, other, total = command("usage").stdout.splitlines()
    at = head.index("AUDIO SECONDS") + len("AUDIO SECONDS")
    assert [line[:at].split()[-1] for line in (alice, other, total)] == ["43", "0", "43"]
    rows = list(csv.DictReader(io.StringIO(command("usage", "--format", "csv").stdout, newline="")))
    assert [row["audio_seconds"] for row in rows] == ["43", "0"]
    assert [row["audio_seconds"] for row in json.loads(command("usage", "--format", "json").stdout)] == [43, 0]


def test_what_the_cache_saved_has_columns_where_there_is_one(here: Path, command: Command) -> None:
    for form in ("table", "csv"):
        assert not {"hits", "saved", "misses"} & set(re.findall(r"[a-z]+", command("usage", "--format", form).stdout.lower()))
    saved = {"saved_input_tokens": 600, "saved_output_tokens": 20, "saved_cost_nano": 132_000, "saved_ns": 1_250_000_000}
    alice, bob = {"key_id": "key_1", "key_name": "alice"}, {"key_id": "key_3", "key_name": "bob", "cache": "miss"}
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").begin() as connection:
        hits = [record(number, **alice, **saved, cache="hit", outcome=Outcome.CACHED) for number in (5, 6)]
        shared = record(7, **alice, **{**saved, "currency": "EUR"}, cache="coalesced", outcome=Outcome.COALESCED)
        insert_records(connection, [*hits, shared, record(8, **bob)])
    head, *lines = command("usage").stdout.splitlines()
    columns = ["HITS", "COALESCED", "MISSES", "SAVED INPUT", "SAVED OUTPUT"]
    assert re.search(" +".join([*columns, "COST +SAVED COST +SAVED TIME"]), head)
    shown = {line.split()[0]: line[head.index("REASONING") + len("REASONING") :].split()[:5] for line in lines}
    assert (shown["alice"], shown["bob"]) == (["2", "1", "0", "1800", "60"], ["0", "0", "1", "0", "0"])
    assert shown["total"] == ["2", "1", "1", "1800", "60"]
    [first, *_, total] = lines
    assert "0.000132 EUR + 0.000264 USD  3.750 s" in first
    assert "0.000132 EUR + 0.000264 USD  3.750 s" in total
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO(command("usage", "--format", "csv").stdout, newline=""))}
    assert [rows["alice"][name] for name in ("cache_hits", "coalesced", "saved_cost_eur", "saved_cost_usd", "saved_ns")] == [
        *("2", "1", "0.000132", "0.000264", "3750000000"),
    ]
    assert (rows["bob"]["cache_misses"], rows["bob"]["saved_cost_usd"]) == ("1", "0.00")
    said = {row["label"]: row for row in json.loads(command("usage", "--json").stdout)}["alice"]
    assert (said["saved_ns"], said["saved_cost_nano"]) == (3_750_000_000, {"EUR": 132_000, "USD": 264_000})
    assert [row["group"] for row in json.loads(command("usage", "--by", "cache", "--json").stdout)] == [
        "",
        "coalesced",
        "hit",
        "miss",
    ]


@pytest.mark.parametrize(
    ("options", "days"),
    [
        ([], ["2026-11-20", "2026-11-21"]),
        (["--since", "2026-11-21"], ["2026-11-21"]),
        (["--until", "2026-11-21"], ["2026-11-20"]),
        (["--since", "2026-11-20T12:00", "--until", "2026-11-20T12:01"], ["2026-11-20"]),
        (["--since", "2026-11-20T12:00:01", "--until", "2026-11-21T11:59"], []),
        (["--since", "2026-11-20T14:00+02:00", "--until", "2026-11-20T12:01Z"], ["2026-11-20"]),
    ],
)
def test_some_time(command: Command, options: list[str], days: list[str]) -> None:
    rows = json.loads(command("usage", "--by", "day", "--format", "json", *options).stdout)
    assert [row["group"] for row in rows] == days


def test_nothing(command: Command) -> None:
    result = command("usage", "--since", "2030-01-01")
    assert result.stdout == ""
    assert "Nothing was used" in result.stderr


@pytest.mark.parametrize(
    ("text", "ago"),
    [("90m", timedelta(minutes=90)), ("24h", timedelta(days=1)), ("7d", timedelta(days=7)), ("2w", timedelta(days=14))],
)
def test_some_time_ago(text: str, ago: timedelta) -> None:
    before = datetime.now(UTC)
    when = When().convert(text, None, None)
    assert before <= when + ago <= datetime.now(UTC)


@pytest.mark.parametrize("text", ["", "yesterday", "24", "24x", "-24h", "999999w", "2026-13-01", "1e3h", "٣h"])
def test_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter, match="allowed: 24h, 7d, 2026-11-01"):
        When().convert(text, None, None)
