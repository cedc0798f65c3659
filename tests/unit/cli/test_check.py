"""`glasshouse check` against a scripted vLLM: what it says, and its status."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.check import Finding, kept, perhaps_sold, without_effect
from proxy.control.discovery import Answer, Kind
from proxy.nouns import KeySettings
from proxy.settings import Settings
from proxy.store import create_key, hash_key, open_database
from tests.support.redis import Redis, redis_server
from tests.support.scripted_vllm import ScriptedVLLM
from tests.unit.cli.conftest import Command


@pytest.fixture
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM(models=["smollm2", "other"]) as vllm:
        yield vllm


@pytest.fixture
def nobody() -> Iterator[str]:
    """A URL where nobody listens, and nobody else can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def config(here: Path, **settings: Any) -> None:
    (here / "glasshouse.yaml").write_text(json.dumps(settings))  # JSON is YAML


def test_all_is_well(command: Command, vllm: ScriptedVLLM) -> None:
    result = command("check", "--backend", vllm.url)
    _, first, second, *rest = result.stdout.splitlines()
    assert first.split()[:4] == ["backend-0", vllm.url, "yes", "vllm"]
    assert first.split()[-2:] == ["smollm2", "1024"]
    assert second.split() == ["other", "1024"]
    assert [line.split() for line in rest[:5]] == [
        [],
        ["Prices", "in", "USD", "per", "million", "tokens:"],
        ["MODEL", "INPUT", "CACHED", "INPUT", "OUTPUT", "SAID", "BY"],
        ["smollm2", "0", "0", "0", "nobody"],
        ["other", "0", "0", "0", "nobody"],
    ]
    assert rest[5:] == ["", "The settings are good, and every backend answers."]


def test_the_file_is_checked_too(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    config(here, backends=[{"url": vllm.url}], currency="dollars")
    assert "glasshouse.yaml: currency: 'dollars' is not allowed" in command("check", status=1).stderr
    config(here, currency="dollars")
    assert "currency" in command("check", "--backend", vllm.url, status=1).stderr


def test_one_of_two_is_down(command: Command, vllm: ScriptedVLLM, nobody: str, here: Path) -> None:
    config(here, backends=[{"url": vllm.url, "name": "up"}, {"url": nobody, "name": "down"}])
    output = command("check", status=1).stdout
    assert f"down     {nobody}  no" in output
    assert "problem  down: /v1/models: " in output
    assert "every backend answers" not in output


def test_no_backend(command: Command) -> None:
    assert "there are no backends" in command("check", status=1).stderr


def test_a_key_is_wanted(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedVLLM(api_key="canary") as vllm:
        config(here, backends=[{"url": vllm.url, "api_key_env": "ENGINE_KEY"}])
        monkeypatch.delenv("ENGINE_KEY", raising=False)
        output = command("check", status=1).stdout
        assert "problem  backend-0: api_key_env: the environment variable ENGINE_KEY is empty" in output
        assert "HTTP 401" in output
        monkeypatch.setenv("ENGINE_KEY", "canary")
        assert "canary" not in command("check").output


def test_what_is_declared_and_what_is_there(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    config(
        here,
        backends=[{"url": vllm.url, "kind": "openai", "models": ["smollm2", "missing"]}],
        models={"smolm2": {"price": {"input": 1}}, "missing": {}},
    )
    output = command("check", status=1).stdout
    assert "problem  backend-0: models: it doesn't serve 'missing', only smollm2, other" in output
    assert "remark   backend-0: kind: declared as 'openai', and it looks like 'vllm'" in output
    assert "remark   models.smolm2: no backend serves a model of this name" in output


def test_what_the_models_cost(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    vllm.models = ("mine", "sold", "gpt-4o-mini")
    prices = {
        "mine": {"price": {"input": 0.1, "cached_input": 0.02, "output": 1}},
        "sold": {"price": {"from": "claude-haiku-4-5"}},
    }
    config(here, backends=[{"url": vllm.url}], models=prices)
    output = command("check").stdout
    lines = [line.split() for line in output.splitlines()]
    assert ["mine", "0.1", "0.02", "1", "the", "settings"] in lines
    assert ["sold", "1", "0.1", "5", "price", "list:", "claude-haiku-4-5"] in lines
    assert ["gpt-4o-mini", "0", "0", "0", "nobody"] in lines
    assert "remark   models.sold: 'claude-haiku-4-5' has further prices, which aren't in the costs here: cache-write" in output
    assert "models.gpt-4o-mini" not in output, "vLLM is nobody's cloud"


def test_nothing_is_served_and_nothing_has_a_price(command: Command, vllm: ScriptedVLLM) -> None:
    vllm.models = ()
    assert "Prices" not in command("check", "--backend", vllm.url, status=1).stdout


@pytest.mark.parametrize(
    ("settings", "kind", "remarked"),
    [
        ({}, "openai", True),
        ({}, "vllm", False),
        ({"currency": "EUR"}, "openai", False),
        ({"models": {"gpt-4o-mini": {"price": {}}}}, "openai", False),
        ({"models": {"gpt-4o-mini": {}}}, "openai", True),
    ],
)
def test_a_bill_that_may_come_is_remarked(settings: dict[str, Any], kind: Kind, remarked: bool) -> None:
    answer = Answer(kind, {"gpt-4o-mini": b"{}", "nobody-knows-this": b"{}"})
    findings = [Finding("a", "http://a", answer), Finding("b", "http://b", answer), Finding("down", "http://c")]
    remark = "models.gpt-4o-mini: costs nothing here; if a provider bills you for it, set price: {from: gpt-4o-mini}"
    assert perhaps_sold(Settings.of(settings), findings) == ([remark] if remarked else [])


def test_it_serves_nothing(command: Command, vllm: ScriptedVLLM) -> None:
    vllm.models = ()
    assert "problem  backend-0: it serves no model" in command("check", "--backend", vllm.url, status=1).stdout


def test_names_do_nothing_to_the_terminal(command: Command, vllm: ScriptedVLLM) -> None:  # failure 78
    vllm.models = ("\x1b[31mred",)
    output = command("check", "--backend", vllm.url).stdout
    assert r"\x1b[31mred" in output
    assert "\x1b" not in output


# -- limits and budgets --


def test_for_whom_and_for_what_the_limits_are(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    settings = {
        "backends": [{"url": vllm.url}],
        "everyone": {"models": ["smol*", "Smol*"]},
        "teams": {"research": {"budgets": [{"tokens": 1, "per": "day"}, {"gpu_seconds": 1, "per": "day"}]}, "sales": {}},
        "keys": {"alice": {"team": "research"}, "alcie": {"team": "research", "models": ["oter"]}},
    }
    config(here, **settings)
    expected = [
        "remark   keys.alcie: no key in use has this name",
        "remark   teams.sales: no key is in this team",
        "remark   everyone.models: no backend serves a model called 'Smol*'",
        "remark   keys.alcie.models: no backend serves a model called 'oter'",
        "remark   teams.research.budgets[1].gpu_seconds: nothing is counted against it yet, so it limits nothing",
    ]
    output = command("check").stdout
    assert [line for line in output.splitlines() if line.startswith("remark")] == expected[1:], "there is no database yet"
    assert not (here / ".glasshouse").exists(), "and none is made"

    (here / ".glasshouse").mkdir()
    engine = open_database(Settings().database_url)
    with engine.begin() as connection:
        create_key(connection, "alice")
    engine.dispose()
    output = command("check").stdout
    assert [line for line in output.splitlines() if line.startswith("remark")] == expected


def remarks(command: Command, status: int = 0) -> list[str]:
    return [line.partition("   ")[2] for line in command("check", status=status).stdout.splitlines() if line.startswith("remark")]


def test_who_is_of_nobody(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    whole = "sha256:" + "ab" * 32
    settings: dict[str, Any] = {
        "backends": [{"url": vllm.url}],
        "teams": {"research": {}, "sales": {}},
        "users": {"zoe": {"team": "sales"}},
        "projects": {"bot": {"models": ["nothing*"]}},
        "keys": {"alice": {"team": "research", "hash": whole}},
    }
    config(here, **settings)
    (here / ".glasshouse").mkdir()
    engine = open_database(Settings().database_url)
    expected = [
        "teams.sales: no key is in this team",
        "users.zoe: no key is this user's",
        "projects.bot: no key is for this project",
        "projects.bot.models: no backend serves a model called 'nothing*'",
    ]
    assert remarks(command) == expected, "a key with its hash needs no other"
    with engine.begin() as connection:
        create_key(connection, "bob", KeySettings(user="zoe", project="bot"), known={"users": ["zoe"], "projects": ["bot"]})
        create_key(connection, "alice")
    engine.dispose()
    assert remarks(command) == [
        "teams.sales: no key is in this team",
        "keys.alice: the database has another key of this name, and both work",
        expected[-1],
    ]


def test_a_key_that_the_database_has_too(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    (here / ".glasshouse").mkdir()
    engine = open_database(Settings().database_url)
    with engine.begin() as connection:
        secret, _ = create_key(connection, "bob")
    engine.dispose()
    config(here, backends=[{"url": vllm.url}], keys={"alice": {"hash": f"sha256:{hash_key(secret).hex()}"}})
    assert remarks(command) == ["keys.alice.hash: the database has this key too, as 'bob'; what the file says holds"]


def test_models_in_detail(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    prices = [
        {"valid_from": "2020-01-01T00:00:00Z", "input": 1},
        {"valid_from": "2021-01-01T00:00:00Z", "input": 2},
        {"valid_from": "2099-01-01T00:00:00Z", "input": 3},
    ]
    model = {"aliases": ["other", "fine"], "defaults": {"max_tokens": 100, "n": 2, "temperature": 5}, "price": {"input": 0.5}}
    config(here, backends=[{"url": vllm.url}], models={"smollm2": {**model, "prices": prices, "bounds": {"max_tokens": 99}}})
    output = command("check").stdout
    lines = [line.split(maxsplit=4) for line in output.splitlines() if line.startswith("smollm2 ")]
    assert lines == [
        ["smollm2", "2", "2", "0", "the settings"],
        ["smollm2", "3", "3", "0", "the settings, from 2099-01-01T00:00:00+00:00"],
    ]
    assert remarks(command) == [
        "models.smollm2.aliases: 'other' is a model that a backend serves, and that comes first",
        "models.smollm2.defaults.max_tokens: 100 is over its bound of 99, so requests that don't say it are refused",
        "models.smollm2.prices[0]: another has taken its place since 2021-01-01T00:00:00+00:00",
    ]


def test_which_backend_and_which_model_instead(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    models = {
        "smollm2": {"fallbacks": ["other", "best", "gone"], "policy": "session"},
        "other": {"aliases": ["best"]},
        "mystery": {"aliases": ["riddle"]},
        "third": {"fallbacks": ["riddle"]},
    }
    config(
        here,
        backends=[{"url": vllm.url}, {"url": vllm.url}],
        models=models,
        everyone={"priority": "low"},
        keys={"alice": {"priority": "high", "hash": "sha256:" + "ab" * 32}, "bob": {"hash": "sha256:" + "cd" * 32}},
    )
    assert remarks(command) == [
        "models.mystery: no backend serves a model of this name",
        "models.third: no backend serves a model of this name",
        "models.smollm2.fallbacks: no backend serves a model called 'gone'",
        "models.third.fallbacks: no backend serves a model called 'riddle'",
        "keys.alice.priority: 'high' doesn't count beside the 'low' of its team or of everyone",
    ]


def test_what_is_kept(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    whole = {"hash": "sha256:" + "ab" * 32}
    said: dict[str, Any] = {
        "backends": [{"url": vllm.url}],
        "models": {
            "smollm2": {"cache": {"scope": "everyone", "semantic": {"model": "gone"}}},
            "other": {"cache": {"policy": "all", "semantic": {"model": "best"}}},
        },
        "teams": {"research": {"cache": "deterministic"}},
        "keys": {"alice": {"cache": "all", "team": "research", **whole}, "bob": {"cache": "off", "hash": "sha256:" + "cd" * 32}},
    }
    stricter = "keys.alice.cache: 'all' doesn't count beside the 'deterministic' of its team or of everyone"
    nobody = [
        "models.smollm2.cache.semantic.model: no backend serves a model called 'gone'",
        "models.other.cache.semantic.model: no backend serves a model called 'best'",
        stricter,
    ]
    config(here, **said)
    nothing = ": nothing is kept where there is no section `cache`"
    places = ["teams.research.cache", "keys.alice.cache", "models.other.cache"]
    places += ["models.smollm2.cache.semantic", "models.other.cache.semantic", "models.smollm2.cache.scope"]
    assert remarks(command) == nobody + [f"{place}{nothing}" for place in places]
    given = ["cache.scope", "models.smollm2.cache.scope"]
    shared = [f"{place}: what was answered to one team is given to others" for place in given]
    said["models"]["smollm2"]["aliases"] = ["best"]
    for cache, remarked in (
        ({"scope": "everyone"}, []),
        ({"scope": "everyone", "memory_bytes": 0}, ["cache.memory_bytes: 0, and there is no Redis: nothing is kept"]),
        (
            {"scope": "everyone", "memory_bytes": 5, "entry_bytes": 6},
            ["cache.entry_bytes: 6, and a worker has room for 5"],
        ),
    ):
        config(here, **said, cache=cache)
        assert remarks(command) == [nobody[0], stricter, *remarked, *shared]


def test_a_cache_in_redis_alone(redis: Redis) -> None:
    said = Settings.of({"cache": {"memory_bytes": 0}, "redis": {"url": redis.url}})
    assert kept(said) == []
    assert kept(Settings.of({"cache": {}})) == []
    assert kept(Settings.of({"everyone": {"cache": False}})) == [], "what isn't to be, and isn't"


def test_a_depth_that_workers_cannot_share() -> None:
    backends = [{"url": "http://gpu0", "depth": 3}, {"url": "http://gpu1", "depth": 4}]
    settings = Settings.of({"workers": 4, "redis": {"url": "redis://127.0.0.1"}, "backends": backends})
    assert without_effect(settings) == [
        "backends.backend-0.depth: each of the 4 workers may have one request there, so 4 at a time instead of 3"
    ]


def test_patterns(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    models: dict[str, Any] = {
        "smol*": {"price": {"input": 3}, "aliases": ["small"]},
        "smollm9": {"price": {"input": 5}, "fallbacks": ["smollm8", "gpt-5"]},
        "gpt-5": {},
    }
    backends = [{"url": vllm.url, "models": ["smol*", "other"]}, {"url": vllm.url, "models": ["none-*"]}]
    config(here, backends=backends, models=models, everyone={"models": ["smollm7", "smol*9", "x-*", "gpt-5", "oth*"]})
    output = command("check").stdout
    prices = {line.split()[0]: line.split()[1] for line in output.partition("Prices")[2].partition("\n\n")[0].splitlines()[2:]}
    assert prices == {"smollm2": "3", "other": "0", "smol*": "3", "none-*": "0"}
    assert remarks(command) == [
        "backend-1: models: nothing that it lists is called 'none-*'; what is asked for so is sent to it",
        "models.gpt-5: no backend serves a model of this name",
        "everyone.models: no backend serves a model called 'x-*'",
        "everyone.models: no backend serves a model called 'gpt-5'",
        "models.smollm9.fallbacks: no backend serves a model called 'gpt-5'",
        "models.smol*.aliases: 'small' can't stand for a pattern",
    ]


def test_where_engines_may_be_sent_to(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    hosts = ["images.example.com", "*.example.com", "10.0.0.5", "8.8.8.8", "db.internal", "localhost", "*.lan"]
    config(here, backends=[{"url": vllm.url}], media={"hosts": hosts})
    inside = [line.split("'")[1] for line in remarks(command)]
    assert inside == ["10.0.0.5", "db.internal", "localhost", "*.lan"]


def test_issuers(command: Command, vllm: ScriptedVLLM, nobody: str, here: Path) -> None:
    (here / "keys.json").write_text(json.dumps({"keys": []}))
    good = {"issuer": "https://good.example", "audience": ["x"], "jwks_file": str(here / "keys.json"), "claims": {"team": "team"}}
    config(here, backends=[{"url": vllm.url}], issuers=[good], teams={"research": {}}, users={"zoe": {}})
    assert remarks(command) == [], "tokens may say whose they are"
    config(here, backends=[{"url": vllm.url}], issuers=[good, {"issuer": nobody, "audience": ["x"]}])
    output = command("check", status=1).stdout
    assert f"problem  issuers[1] {nobody}: " in output
    assert "issuers[0]" not in output


def test_keys_that_cannot_be_read(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    (here / ".glasshouse").mkdir()
    (here / ".glasshouse" / "glasshouse.db").write_text("no database " * 100)
    config(here, backends=[{"url": vllm.url}], keys={"alice": {}})
    assert "problem  database: its keys can't be read: file is not a database" in command("check", status=1).stdout


def test_several_workers_without_redis(command: Command, vllm: ScriptedVLLM, here: Path) -> None:
    config(here, backends=[{"url": vllm.url}], workers=4)
    assert "workers: 4 is not allowed without Redis" in command("check", status=1).stderr


@pytest.fixture
def redis() -> Iterator[Redis]:
    """One that wants a password."""
    with redis_server(password="canary") as server:
        yield server


def with_password(redis: Redis, password: str) -> str:
    return redis.unix_url.replace("://", f"://:{password}@")


def test_redis(command: Command, vllm: ScriptedVLLM, here: Path, redis: Redis) -> None:
    config(here, backends=[{"url": vllm.url}], workers=2, redis={"url": with_password(redis, "canary")})
    output = command("check").output
    assert f"Redis: {redis.unix_url}, version " in output
    assert "The settings are good, and every backend and Redis answer." in output
    assert "redis:" not in output
    assert "canary" not in output


def test_a_redis_that_forgets(command: Command, vllm: ScriptedVLLM, here: Path, redis: Redis) -> None:
    redis.client.config_set("maxmemory-policy", "allkeys-lru")
    config(here, backends=[{"url": vllm.url}], redis={"url": with_password(redis, "canary")})
    assert "remark   redis: maxmemory-policy is 'allkeys-lru'" in command("check").stdout


def test_a_redis_that_runs_no_scripts(command: Command, vllm: ScriptedVLLM, here: Path, redis: Redis) -> None:
    redis.client.acl_setuser("default", enabled=True, commands=["-eval"])
    config(here, backends=[{"url": vllm.url}], redis={"url": with_password(redis, "canary")})
    output = command("check", status=1).stdout
    assert "problem  redis: " in output
    assert "runs no scripts that use cmsgpack" in output


@pytest.mark.parametrize("password", ["wrong-secret", ""])
def test_a_redis_that_wants_another_password(
    command: Command, vllm: ScriptedVLLM, here: Path, redis: Redis, password: str
) -> None:
    config(here, backends=[{"url": vllm.url}], redis={"url": with_password(redis, password)})
    output = command("check", status=1).stdout
    assert f"problem  redis: {redis.unix_url} can't be used: " in output
    assert "-secret" not in output


def test_no_redis(command: Command, vllm: ScriptedVLLM, nobody: str, here: Path) -> None:
    url = nobody.replace("http://", "redis://:canary@")
    config(here, backends=[{"url": vllm.url}], redis={"url": url})
    output = command("check", status=1).stdout
    assert f"problem  redis: {nobody.replace('http', 'redis')} can't be used: " in output
    assert "canary" not in output


def test_options_that_the_client_does_not_have(command: Command, vllm: ScriptedVLLM, here: Path, redis: Redis) -> None:
    config(here, backends=[{"url": vllm.url}], redis={"url": f"{with_password(redis, 'canary')}?ssl_no_such_option=canary"})
    output = command("check", status=1).output
    assert "options are none of the client's" in output
    assert "canary" not in output
