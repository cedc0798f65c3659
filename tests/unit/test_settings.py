"""Settings: what is allowed, and what the refusal of anything else says."""

from __future__ import annotations

import json
import re
from datetime import date, datetime
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from proxy.nouns import OperationName
from proxy.pricelist import pricelist
from proxy.settings import Settings, SettingsError, address
from proxy.wire.operation import EngineOperation
from proxy.wire.operations import OPERATIONS


def refusal(mapping: object) -> str:
    with pytest.raises(SettingsError) as raised:
        Settings.of(mapping)
    return str(raised.value)


def nested(path: str, value: object) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def test_nothing_is_needed() -> None:
    assert Settings.of(None) == Settings.of({}) == Settings()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("listen", "0.0.0.0:80"),
        ("listen", "[::1]:0"),
        ("currency", "EUR"),
        ("timeouts.connect", 0.001),
        ("timeouts.upstream_idle", 4.999),
        ("timeouts.drain", 86400),
        ("limits.body_bytes", 1),
        ("journal.segment_bytes", 65536),
        ("journal.on_full", "refuse"),
        ("phoenix.url", None),
        ("capture.content", True),
        ("backends", [{"url": "http://gpu:8000"}, {"url": "http://[::1]/v1", "name": "b", "kind": "openai"}]),
        ("backends", [{"url": "https://gpu/v1", "ca_file": "ca.pem"}, {"url": "https://[::1]:8443"}]),
        ("models", {"m": {"price": {"input": "0.1", "output": 2}}}),
        ("tls", {"certificate": "c.pem", "key": "k.pem"}),
        ("tls", None),
        ("cors.origins", []),
        ("cors.origins", ["https://chat.example", "http://localhost:3000"]),
        ("trusted_proxies", ["10.0.0.0/8", "::1", "192.0.2.7"]),
        ("limits.decompressed_body_bytes", None),
        ("everyone", {"requests_per_minute": 1, "models": [], "operations": ["chat", "rerank"]}),
        ("teams.research.budgets", [{"money": "0.5", "per": "total"}, {"tokens": 1, "per": "week", "time_zone": "Asia/Tokyo"}]),
        ("keys.alice.expires", "2026-12-31T18:00:00+01:00"),
        ("keys", {"Älice & Bob": {"concurrent_requests": 1}}),
        ("redis.url", "redis://redis"),
        ("redis.url", "rediss://user:p%40ss@redis.internal:6380/2?ssl_ca_certs=/ca.pem"),
        ("redis.url", "unix:///run/redis.sock"),
    ],
)
def test_what_is_allowed(path: str, value: object) -> None:
    Settings.of(nested(path, value))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        # a value of the wrong type or out of range: the field, the value, what is allowed
        ("timeouts.connect", 0, ["timeouts.connect", "0", "> 0"]),
        ("timeouts.connect", -1.5, ["timeouts.connect", "-1.5", "> 0"]),
        ("timeouts.connect", float("nan"), ["timeouts.connect", "nan", "> 0"]),
        ("timeouts.connect", float("inf"), ["timeouts.connect", "inf", "<= 86400"]),
        ("timeouts.connect", "5s", ["timeouts.connect", "'5s'", "float"]),
        ("timeouts.upstream_idle", 5, ["timeouts.upstream_idle", "5", "< 5"]),
        ("limits.body_bytes", 0, ["limits.body_bytes", "0", ">= 1"]),
        ("limits.body_bytes", 1.5, ["limits.body_bytes", "1.5", "int"]),
        ("journal.segment_bytes", 1000, ["journal.segment_bytes", "1000", ">= 65536"]),
        ("journal.on_full", "wait", ["journal.on_full", "'wait'"]),
        ("currency", "euro", ["currency", "'euro'", "[A-Z]{3}"]),
        ("workers", 0, ["workers", "0", ">= 1"]),
        ("workers", 2, ["workers", "2", "without Redis", "allowed: 1, or set redis.url"]),
        ("capture.content", "yes", ["capture.content", "'yes'", "bool"]),
        ("phoenix.url", 7, ["phoenix.url", "7", "str"]),
        ("state_dir", 7, ["state_dir", "7", "str"]),
        # addresses
        ("listen", "8400", ["listen", "'8400'", "HOST:PORT"]),
        ("listen", ":8400", ["listen", "':8400'", "HOST:PORT"]),
        ("listen", "host:port", ["listen", "'host:port'", "HOST:PORT"]),
        ("control.listen", "host:70000", ["control.listen", "'host:70000'", "0 to 65535"]),
        ("metrics.listen", "", ["metrics.listen", "HOST:PORT"]),
        # the edge
        ("tls", {"certificate": "c.pem"}, ["tls", "key"]),
        ("tls", {"certificate": "", "key": "k.pem"}, ["tls.certificate", ">= 1"]),
        ("cors.origins", "*", ["cors.origins", "'*'", "array"]),
        ("cors.origins", ["chat.example"], ["cors", "'chat.example'", "SCHEME://HOST[:PORT]"]),
        ("cors.origins", ["https://a\r\nset-cookie: b"], ["cors", "SCHEME://HOST[:PORT]"]),
        ("trusted_proxies", ["10.0.0.300"], ["trusted_proxies", "'10.0.0.300'", "10.0.0.0/8"]),
        ("trusted_proxies", ["10.0.0.1/8"], ["trusted_proxies", "'10.0.0.1/8'", "host bits"]),
        ("limits.connections", 0, ["limits.connections", "0", ">= 1"]),
        # unknown names
        ("lisen", "x", ["lisen", "allowed: ", "listen"]),
        ("timeouts.conect", 1, ["timeouts", "'conect'", "allowed: ", "connect"]),
        ("timeouts", 5, ["timeouts", "5", "object"]),
        # backends
        ("backends", "http://x", ["backends", "array"]),
        ("backends", [{}], ["backends[0]", "url"]),
        ("backends", [{"url": "gpu:8000"}], ["backends[0]", "'gpu:8000'", "http[s]://HOST[:PORT]"]),
        ("backends", [{"url": "ftp://gpu"}], ["backends[0]", "http[s]://HOST[:PORT]"]),
        ("backends", [{"url": "http://gpu", "ca_file": "ca.pem"}], ["backends[0]", "ca_file", "'ca.pem'", "https://"]),
        ("backends", [{"url": "http://"}], ["backends[0]", "http[s]://HOST[:PORT]"]),
        ("backends", [{"url": "http://user:pw@gpu"}], ["backends[0]", "http[s]://HOST[:PORT]"]),
        ("backends", [{"url": "http://gpu/?x"}], ["backends[0]", "http[s]://HOST[:PORT]"]),
        ("backends", [{"url": "http://gpu:70000"}], ["backends[0]", "port", "65535"]),
        ("backends", [{"url": "http://a"}, {"url": "http://b", "name": "b c"}], ["backends[1].name", "'b c'"]),
        ("backends", [{"url": "http://a", "kind": "tgi"}], ["backends[0].kind", "'tgi'"]),
        ("backends", [{"url": "http://a", "key": "x"}], ["backends[0]", "'key'", "api_key_env"]),
        ("backends", [{"url": "http://a", "name": "x"}, {"url": "http://b", "name": "x"}], ["backends", "'x'", "differ"]),
        ("backends", [{"url": "http://a"}, {"url": "http://b", "name": "backend-0"}], ["backends", "'backend-0'", "differ"]),
        # limits and budgets
        ("everyone.requests_per_minute", 0, ["everyone.requests_per_minute", "0", ">= 1"]),
        ("everyone.request_per_minute", 1, ["everyone", "'request_per_minute'", "allowed: ", "requests_per_minute"]),
        ("everyone.models", "qwen", ["everyone.models", "'qwen'", "array"]),
        ("everyone.models", ["qwen", ""], ["everyone.models[1]", "''", ">= 1"]),
        ("everyone.operations", ["chat", "chatt"], ["everyone.operations[1]", "'chatt'", "allowed: chat, completions"]),
        ("teams", {"ok": {}, "no good": {}}, ["teams", "'no good'", "allowed"]),
        (
            "teams",
            {"ok": {}, "r": {"budgets": [{"per": "day"}]}},
            ["teams.r.budgets[0]", "nothing", "money, tokens"],
        ),
        ("teams.r.budgets", [{"money": 1, "tokens": 1, "per": "day"}], ["teams.r.budgets[0]", "money and tokens", "one of"]),
        ("teams.r.budgets", [{"money": 0, "per": "day"}], ["teams.r.budgets[0]", "money: 0", "more than 0"]),
        ("teams.r.budgets", [{"money": 1, "per": "year"}], ["budgets[0].per", "'year'", "allowed: day, week, month, total"]),
        ("teams.r.budgets", [{"money": 1}], ["teams.r.budgets[0]", "per"]),
        ("teams.r.budgets", [{"tokens": 1, "per": "day", "time_zone": "Vienna"}], ["time_zone", "'Vienna'", "Europe/Vienna"]),
        ("keys", {"alice": {"team": "r"}}, ["keys.alice.team", "'r'", "none is declared"]),
        ("keys", {"a": {}, "alice": {"max_input_tokens": -1}}, ["keys.alice.max_input_tokens", "-1", ">= 1"]),
        ("keys.a.expires", "2026-12-31", ["keys.a.expires", "'2026-12-31'", "allowed: a time with its zone"]),
        ("keys.a.expires", date(2026, 12, 31), ["keys.a.expires", "2026, 12, 31", "allowed: a time with its zone"]),
        ("keys.a.expires", datetime(2026, 12, 31), ["keys.a.expires", "2026, 12, 31", "allowed: a time with its zone"]),
        ("redis.url", "redis.internal:6379", ["redis", "url", "redis[s]://"]),
        ("redis.url", "redis://redis:70000", ["redis", "url", "redis[s]://"]),
        ("redis.url", "redis://redis/first", ["redis", "url", "redis[s]://"]),
        ("redis.url", "redis://redis?host=elsewhere", ["redis", "url", "redis[s]://"]),
        ("redis.url", "unix://", ["redis", "url", "unix://PATH"]),
        ("redis", {"url": "redis://redis", "timeout": 1}, ["redis.timeout", "<= 0.1"]),
        # prices
        ("models", {"m": {"price": {"input": -1}}}, ["input", "-1", "0 to 1000000"]),
        ("models", {"m": {"price": {"output": "NaN"}}}, ["output", "NaN", "0 to 1000000"]),
        ("models", {"m": {"price": {"input": 10**7}}}, ["input", "10000000", "0 to 1000000"]),
        ("keys.system", {"team": None}, ["keys", "'system'", "the proxy's own requests", "allowed: any other name"]),
        ("models", {"m": {"cost": 1}}, ["models", "'cost'", "allowed: ", "price"]),
        ("models", {"m": {"price": {"form": "gpt-4o"}}}, ["price", "'form'", "cached_input, from, input, output"]),
        ("models", {"m": {"price": {"from": 7}}}, ["price.from", "str", "int"]),
        ("models", {"m": {"price": {"from": "gpt-4o", "output": -1}}}, ["output", "-1", "0 to 1000000"]),
        ("models", {"m": {"price": {"from": "gpt4o-mini"}}}, ["models.m.price.from", "'gpt4o-mini'", "litellm", "gpt-4o-mini"]),
        ("models", {"m": {"price": {"from": "zzzzqqqq"}}}, ["models.m.price.from", "'zzzzqqqq'", "models of litellm"]),
        ("models", {"m": {"price": {"from": ""}}}, ["models.m.price.from", "''", "models of litellm"]),
    ],
)
def test_a_refusal_says_which_field_what_it_holds_and_what_it_may_hold(path: str, value: object, words: list[str]) -> None:
    said = refusal(nested(path, value))
    assert [word for word in words if word not in said] == [], said
    assert "`$" not in said, "a path of the library's"
    assert "\n" not in said


@pytest.mark.parametrize(
    "said",
    [
        {"redis": "redis://:canary@redis"},
        {"redis": {"url": "redis://:canary@redis:70000"}},
        {"redis": {"url": "canary@redis"}},
        {"redis": {"url": ["redis://:canary@redis"]}},
        {"redis": {"url": "redis://:canary@redis", "canary": 1}, "database": ["postgresql://me:canary@db"]},
        {"redis": {"url": "redis://:canary@redis", "timeout": 5}},
    ],
)
def test_a_refusal_repeats_no_password(said: dict[str, Any]) -> None:  # failure 76
    assert "canary" not in refusal(said).replace("setting 'canary'", "")


def test_redis_is_shown_without_its_password() -> None:  # failure 76
    settings = Settings.of({"redis": {"url": "rediss://me:canary@redis.internal:6380/2?ssl_password=canary"}})
    assert settings.redis is not None
    assert settings.redis.shown == "rediss://redis.internal:6380/2"


def test_operations_are_those_that_engines_are_asked_for() -> None:
    assert list(get_args(OperationName)) == list(
        dict.fromkeys(operation.name for operation in OPERATIONS if isinstance(operation, EngineOperation))
    )


def test_several_workers_need_redis() -> None:
    assert Settings.of({"workers": 4, "redis": {"url": "redis://redis"}}).workers == 4


@pytest.mark.parametrize("mapping", [[], "text", 7, True])
def test_a_file_that_holds_something_else(mapping: object) -> None:
    assert refusal(mapping).startswith("the file: ")


def test_settings_that_were_written_are_read_the_same(tmp_path: Path) -> None:
    said = {
        "backends": [{"url": "http://gpu:8000", "models": ["a"], "api_key_env": "KEY"}],
        "models": {"m": {"price": {"input": "0.123456", "cached_input": "0.01", "output": 1}}},
        "phoenix": {"url": None},
        "timeouts": {"first_byte": 1.5},
        "teams": {"r": {"budgets": [{"money": "0.123456789", "per": "month", "time_zone": "Europe/Vienna", "soft": True}]}},
        "keys": {"alice": {"team": "r", "models": ["a*"], "expires": "2026-12-31T18:00:00+01:00"}},
        "redis": {"url": "redis://:secret@redis/0"},
    }
    settings = Settings.of(said)
    file = tmp_path / "settings.json"
    settings.write(file)
    assert Settings.read(file) == settings
    assert list(tmp_path.iterdir()) == [file], "no scratch file is left"


# -- prices from the price list --


def test_a_row_is_filled_in() -> None:
    price = Settings.of({"models": {"m": {"price": {"from": "gpt-4o-mini"}}}}).models["m"].price
    row = pricelist().rows["gpt-4o-mini"]
    assert price is not None
    assert (price.from_, price.input, price.cached_input, price.output) == ("gpt-4o-mini", *row[1:4])


def test_a_model_that_the_list_knows_has_no_price_unless_it_is_said() -> None:
    assert "gpt-4o-mini" in pricelist().rows
    assert Settings.of({"models": {"gpt-4o-mini": {}}}).models["gpt-4o-mini"].price is None


def test_what_is_in_dollars_is_not_taken_for_euros() -> None:
    said = refusal({"currency": "EUR", "models": {"m": {"price": {"from": "gpt-4o-mini"}}}})
    expected = (
        "models.m.price.from: 'gpt-4o-mini' has its price in USD, and currency is 'EUR'; allowed: input, cached_input and output"
    )
    assert said == f"{expected} in EUR"


def test_what_was_checked_is_numbers_for_all_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They don't open the list; and another version of it, meanwhile installed, changes nothing under them."""
    settings = Settings.of({"models": {"m": {"price": {"from": "gpt-4o-mini"}}, "n": {"price": {"from": "gpt-4o", "input": 7}}}})
    file = tmp_path / "settings.json"
    settings.write(file)

    def opened() -> None:
        raise AssertionError

    monkeypatch.setattr("proxy.settings.pricelist", opened)
    assert Settings.read(file) == settings


def test_what_a_person_wrote_stays_as_it_was() -> None:
    written = {"models": {"m": {"price": {"from": "gpt-4o-mini"}}}}
    Settings.of(written)
    assert written == {"models": {"m": {"price": {"from": "gpt-4o-mini"}}}}


def test_backends_without_a_name_are_numbered() -> None:
    settings = Settings.of({"backends": [{"url": "http://a"}, {"url": "http://b", "name": "mine"}, {"url": "http://c"}]})
    assert [settings.backend_name(index) for index in range(3)] == ["backend-0", "mine", "backend-2"]


def test_everything_is_in_the_state_directory() -> None:
    settings = Settings.of({"state_dir": "/var/lib/x"})
    paths = (settings.journal_path, settings.content_path, settings.snapshot_path, settings.log_path)
    assert [str(path) for path in paths] == [f"/var/lib/x/{name}" for name in ("journal", "content", "snapshot", "log")]
    assert settings.database_url == "sqlite:////var/lib/x/glasshouse.db"
    assert Settings.of({"database": "postgresql://db"}).database_url == "postgresql://db"


@pytest.mark.parametrize(
    ("text", "parts"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:8080", ("::1", 8080)), ("host:0", ("host", 0))]
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert address(text) == parts


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().workers = 2  # type: ignore[misc]


def test_every_default_is_allowed() -> None:
    written = json.loads(msgspec.json.encode(Settings()))
    assert Settings.of(written) == Settings()


def test_the_defaults_of_time_fit_one_another() -> None:
    timeouts = Settings().timeouts
    assert timeouts.upstream_idle < 5, "vLLM closes idle connections after 5 s"
    assert timeouts.client_idle >= 75, "longer than the pools of clients keep theirs"
    assert timeouts.connect < timeouts.first_byte
    assert re.fullmatch(r"127\.0\.0\.1:\d+", Settings().listen), "nobody is let in from outside unasked"


def test_off_is_a_word() -> None:
    """YAML takes it for false."""
    said = Settings.of(
        {
            "cache": {"policy": False},
            "everyone": {"cache": False},
            **{section: {"x": {"cache": False}} for section in ("teams", "users", "projects", "keys")},
            "models": {"m": {"cache": {"policy": False}, "defaults": {"cache": False, "policy": False}}},
        }
    )
    assert said.cache is not None
    assert said.cache.policy == said.models["m"].cache.policy == "off"
    assert {each.cache for each in said.allowances} == {"off"}
    assert said.models["m"].defaults == {"cache": False, "policy": False}, "the engine's, whatever they mean there"
    assert Settings.of({"cache": False}) == Settings()
    assert refusal({"cache": True}).startswith("cache: True is not allowed")
    assert refusal({"keys": {"x": {"cache": True}}}).startswith("keys.x.cache: True is not allowed")
    for section in ("everyone", "keys", "models"):
        assert refusal({section: False}).startswith(f"{section}: False is not allowed")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("cache.policy", "most", ["cache.policy: 'most'", "off, deterministic, all"]),
        ("cache.scope", "all", ["cache.scope: 'all'", "key, team, everyone"]),
        ("cache.ttl", 0.5, ["cache.ttl: 0.5", ">= 1"]),
        ("cache.ttl", 2_592_001, ["cache.ttl: 2592001", "<= 2592000"]),
        ("cache.memory_bytes", -1, ["cache.memory_bytes: -1"]),
        ("cache.pace", 0, ["cache.pace: 0", "> 0"]),
        ("cache.size", 1, ["cache: there is no setting 'size' here; allowed: entry_bytes, memory_bytes, pace"]),
        ("models", {"m": {"cache": {"ttl": 0}}}, ["models.m.cache.ttl: 0"]),
        ("models", {"m": {"cache": {"semantic": {"model": "m"}}}}, ["models.m.cache.semantic.model: 'm' is the model itself"]),
        ("models", {"m": {"aliases": ["n"], "cache": {"semantic": {"model": "n"}}}}, ["'n' is the model itself"]),
        ("models", {"m": {"cache": {"semantic": {"model": "e", "threshold": 1.01}}}}, ["threshold: 1.01"]),
        ("models", {"m": {"prefix_isolation": "user"}}, ["models.m.prefix_isolation: 'user'", "key, team"]),
        ("everyone.cache", "none", ["everyone.cache: 'none'", "off, deterministic, all"]),
        ("everyone.engine_parameters", ["n"], ["everyone.engine_parameters[0]: 'n'", "cache_salt, priority", "request_id"]),
    ],
)
def test_what_may_not_be_said_of_the_cache(path: str, value: object, words: list[str]) -> None:
    said = refusal(nested(path, value))
    for each in words:
        assert each in said
