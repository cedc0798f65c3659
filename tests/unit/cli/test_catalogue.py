"""Teams, users, projects, models, backends, prices, budgets, everyone and admin keys as they are typed. The API that is asked is
the real one, in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import click
import msgspec
import pytest

from proxy.cli import main
from proxy.cli.fields import ALLOWANCE, FIELDS
from proxy.nouns import AllowanceSettings, BackendSettings, KeySettings, ModelSettings, TeamSettings
from tests.unit.cli.conftest import Command

Row = dict[str, Any]
Shown = Callable[..., Row]


@pytest.fixture
def shown(command: Command) -> Shown:
    """`shown("teams", "research")` → what `glasshouse teams show research --json` has."""

    def show(*arguments: str) -> Row:
        noun, *name = arguments
        row: Row = json.loads(command(noun, "show", *name, "--json").stdout)
        return row

    return show


def config(here: Path, **settings: Any) -> None:
    (here / "glasshouse.yaml").write_text(json.dumps(settings))


# -- what they have in common --


@pytest.mark.parametrize(("noun", "one"), [("teams", "team"), ("users", "user"), ("projects", "project")])
def test_the_life_of_one(command: Command, shown: Shown, noun: str, one: str) -> None:
    assert command(noun, "list").stderr == f"There are no {noun}.\n"
    made = command(noun, "create", "research", "--requests-per-minute", "600", "--budget", "5M tokens/day")
    assert (made.stdout, made.stderr) == ("", f"The {one} 'research' was created.\n")
    assert "there is a" in command(noun, "create", "research", status=1).stderr, "and it isn't replaced"

    head, line = command(noun, "list").stdout.splitlines()
    assert head.split()[0] == "NAME"
    assert "600 requests/min" in line
    assert "5000000 tokens/day" in line

    command(noun, "set", "research", "--priority", "low")
    assert shown(noun, "research")["settings"]["priority"] == "low"
    assert "low priority" in command(noun, "list").stdout
    command(noun, "set", "research", "--priority", "normal")
    assert "priority" not in command(noun, "list").stdout
    changed = command(noun, "set", "research", "--concurrent-requests", "4", "--unset", "requests_per_minute", "--json")
    assert json.loads(changed.stdout)["settings"]["concurrent_requests"] == 4
    settings = shown(noun, "research")["settings"]
    assert (settings["requests_per_minute"], settings["concurrent_requests"]) == (None, 4)
    assert settings["budgets"][0]["tokens"] == 5_000_000, "what wasn't said stays"
    assert re.search(r"concurrent_requests +4\nbudgets +5000000 tokens/day\n", command(noun, "show", "research").stdout)

    command(noun, "block", "research")
    assert shown(noun, "research")["settings"]["blocked"] is True
    assert "blocked" in command(noun, "list").stdout
    command(noun, "unblock", "research")
    assert shown(noun, "research")["settings"]["blocked"] is False

    assert "nothing is said of it" in command(noun, "set", "research", status=2).stderr
    assert command(noun, "remove", "research").stderr == f"The {one} 'research' was removed.\n"
    assert f"there is no {one} 'research'" in command(noun, "show", "research", status=1).stderr
    assert f"there is no {one} 'research'" in command(noun, "set", "research", "--set", "blocked=true", status=1).stderr


def test_only_those_whose_name_has_it(command: Command) -> None:
    for name in ("red", "green", "blue"):
        command("teams", "create", name)
    assert [row["name"] for row in json.loads(command("teams", "list", "--containing", "re", "--json").stdout)] == [
        "green",
        "red",
    ]
    assert json.loads(command("teams", "list", "--containing", "%", "--json").stdout) == []  # failure 71


def test_as_csv(command: Command) -> None:
    command("teams", "create", "research", "--models", "a,b")
    assert command("teams", "list", "--format", "csv").stdout.splitlines() == [
        "name,limits,budgets,state,declared_in",
        'research,"only a, b",,,',
    ]


def test_a_member_is_of_a_team(command: Command, shown: Shown) -> None:
    command("teams", "create", "research")
    command("users", "create", "zoe", "--team", "research")
    command("keys", "create", "laptop", "--user", "zoe", "--team", "research")
    assert shown("users", "zoe")["settings"]["team"] == "research"
    said = command("teams", "remove", "research", status=1).stderr
    assert "in use" in said
    assert "zoe" in said or "laptop" in said
    assert "there is no team 'sales'" in command("users", "set", "zoe", "--team", "sales", status=1).stderr


def test_what_is_wrong_is_said_with_field_and_what_is_allowed(command: Command) -> None:
    said = command("teams", "create", "x", "--set", "requests_per_minute=0", status=1).stderr
    assert said == "Error: requests_per_minute: 0 is not allowed: Expected `int` >= 1\n"
    said = command("teams", "create", "x", "--set", "nothing=1", status=1).stderr
    assert "there is no setting 'nothing' here; allowed: blocked, budgets, cache, concurrent_requests" in said
    assert "allowed: chat, completions" in command("teams", "create", "x", "--operations", "chatt", status=1).stderr
    said = command("teams", "create", "x", "--budget", "5 tokens/decade", status=1).stderr
    assert "per" in said
    assert "day, week, month, total" in said
    assert "teams" not in said.partition("Error")[0]


def test_what_the_file_declares_is_changed_there(command: Command, here: Path) -> None:
    config(here, teams={"research": {"requests_per_minute": 5}})
    assert re.search(r"research +5 requests/min +file$", command("teams", "list").stdout, re.MULTILINE)
    assert re.search(r"declared in +file", command("teams", "show", "research").stdout)
    for arguments in (["set", "research", "--set", "blocked=true"], ["remove", "research"], ["block", "research"]):
        said = command("teams", *arguments, status=1).stderr
        assert "is declared in the configuration file, and changed there" in said


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        (AllowanceSettings, set()),
        (KeySettings, {"blocked", "hash"}),
        (TeamSettings, {"blocked"}),
        (ModelSettings, {"price", "prices"}),
        (BackendSettings, {"url", "name"}),
    ],
)
def test_every_field_has_an_option_or_a_command_of_its_own(kind: type[msgspec.Struct], without: set[str]) -> None:
    fields = {field.encode_name for field in msgspec.structs.fields(kind)}
    assert fields - FIELDS.keys() == without
    assert not issubclass(kind, AllowanceSettings) or fields >= set(ALLOWANCE)


# -- everyone --


def test_everyone(command: Command, shown: Shown) -> None:
    assert command("everyone", "show").stdout.split() == ["name", "everyone", "priority", "normal"]
    done = command("everyone", "set", "--concurrent-requests", "256", "--budget", "100 money/month Europe/Vienna soft")
    assert done.stderr == "What everyone may use was changed.\n"
    budget = shown("everyone")["settings"]["budgets"]
    assert [(each["money"], each["per"], each["time_zone"], each["soft"]) for each in budget] == [
        ("100", "month", "Europe/Vienna", True)
    ]
    assert "100 money/month Europe/Vienna soft" in command("everyone", "show").stdout


# -- models and prices --


def test_models(command: Command, shown: Shown) -> None:
    assert command("models", "list").stderr == "There are no models.\n"
    command("models", "set", "org/small", "--alias", "s,small", "--default", "temperature=0.2", "--bound", "n=4")
    command("models", "set", "org/small", "--default", 'stop=["x"]', "--assumed-output-tokens", "64")
    command("models", "set", "org/small", "--policy", "session", "--fallback", "a,b", "--fallback", "org/c")
    settings = shown("models", "org/small")["settings"]
    assert (settings["policy"], settings["fallbacks"]) == ("session", ["a", "b", "org/c"])
    assert "is the model itself" in command("models", "set", "org/small", "--fallback", "small", status=1).stderr
    assert settings["aliases"] == ["s", "small"]
    assert settings["defaults"] == {"temperature": 0.2, "stop": ["x"]}, "those that weren't said stay"
    assert (settings["bounds"]["n"], settings["assumed_output_tokens"]) == (4, 64)
    _, line = command("models", "list").stdout.splitlines()
    assert "org/small" in line
    assert "s, small" in line
    assert "temperature=0.2" in line
    assert "'messages' is for callers to say" in command("models", "set", "x", "--default", "messages=1", status=1).stderr
    assert "small' stands" in command("models", "set", "other", "--alias", "small", status=1).stderr
    command("models", "remove", "org/small")
    assert "there is no model" in command("models", "show", "org/small", status=1).stderr


def test_prices(command: Command, shown: Shown) -> None:
    assert "No model has a price" in command("prices", "list").stderr
    done = command("prices", "set", "org/small", "--input", "0.10", "--cached-input", "0.02", "--output", "0.40")
    assert done.stderr == "'org/small' costs 0.10 / 0.40 USD per million tokens in / out.\n"
    done = command("prices", "set", "org/small", "--input", "0.123456789123456789", "--from", "2099-01-01T01:00+01:00")
    assert "from 2099-01-01T00:00:00Z on" in done.stderr
    rows = json.loads(command("prices", "list", "org/small", "--json").stdout)
    assert [(row["valid_from"], row["input"], row["valid"]) for row in rows] == [
        (None, "0.10", True),
        ("2099-01-01T00:00:00Z", "0.123456789123456789", False),
    ]
    _, first, second = command("prices", "list").stdout.splitlines()
    assert first.split() == ["org/small", "0.10", "0.02", "0.40", "USD", "now"]
    assert second.split()[:2] == ["org/small", "2099-01-01T00:00:00Z"]
    assert re.search(r"INPUT +CACHED INPUT", command("models", "list").stdout)

    assert "was removed" in command("prices", "remove", "org/small", "--from", "2099-01-01").stderr
    assert [row["valid_from"] for row in json.loads(command("prices", "list", "--json").stdout)] == [None]
    assert "there is no price" in command("prices", "remove", "org/small", "--from", "2098-01-01", status=1).stderr


def test_a_price_from_the_price_list(command: Command) -> None:
    command("prices", "set", "gpt-4o-mini", "--row", "gpt-4o-mini", "--output", "7")
    [row] = json.loads(command("prices", "list", "--json").stdout)
    assert (row["row"], row["output"]) == ("gpt-4o-mini", "7")
    assert float(row["input"]) > 0
    assert "is not in the price list" in command("prices", "set", "x", "--row", "nobody-sells-this", status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is said of what it costs"),
        (["--input", "free"], "'free' is no number"),
        (["--input", "nan"], "'nan' is no number"),
        (["--input", "1", "--from", "soon"], "'soon' is no time"),
    ],
)
def test_no_price(command: Command, arguments: list[str], said: str) -> None:
    assert said in command("prices", "set", "small", *arguments, status=2).stderr


def test_a_price_below_nothing(command: Command) -> None:
    assert "input: -1 is not a price" in command("prices", "set", "small", "--input", "-1", status=1).stderr


# -- backends --


def test_backends(command: Command, shown: Shown, here: Path) -> None:
    config(here, backends=[{"url": "http://127.0.0.1:1", "name": "gpu0"}])
    done = command("backends", "add", "gpu1", "http://127.0.0.1:2/v1", "--kind", "vllm", "--api-key-env", "ENGINE_KEY")
    assert done.stderr == "The backend 'gpu1' was added.\n"
    settings = shown("backends", "gpu1")["settings"]
    assert (settings["url"], settings["kind"], settings["api_key_env"]) == ("http://127.0.0.1:2/v1", "vllm", "ENGINE_KEY")
    _, first, second = command("backends", "list").stdout.splitlines()
    assert first.split()[0] == "gpu0"
    assert first.endswith("file")
    assert second.split()[0] == "gpu1"
    assert "there is a backend named 'gpu1' already" in command("backends", "add", "gpu1", "http://h", status=1).stderr
    assert "not usable as a backend URL" in command("backends", "add", "gpu2", "gpu2:8000", status=1).stderr
    command("backends", "set", "gpu1", "--weight", "0.5", "--depth", "8", "--prefill-tokens", "100", "--models", "gpt-*,m")
    settings = shown("backends", "gpu1")["settings"]
    assert [settings[field] for field in ("weight", "depth", "prefill_tokens", "models")] == [0.5, 8, 100, ["gpt-*", "m"]]
    command("backends", "set", "gpu1", "--set", "url=http://127.0.0.1:3", "--unset", "api_key_env")
    assert shown("backends", "gpu1")["settings"]["api_key_env"] is None
    command("backends", "remove", "gpu1")
    assert "declared in the configuration file" in command("backends", "remove", "gpu0", status=1).stderr


def test_a_backend_is_drained(command: Command, shown: Shown, here: Path) -> None:
    """Also one that the file declares; and who drains the last one of a model is told."""
    gpu0 = {"url": "http://127.0.0.1:1", "name": "gpu0", "models": ["m", "own"]}
    config(here, backends=[gpu0, {"url": "http://127.0.0.1:2", "name": "gpu1", "models": ["m"]}])
    assert command("backends", "drain", "gpu1").stderr == "The backend 'gpu1' is drained.\n"
    done = command("backends", "drain", "gpu0")
    assert done.stderr == "The backend 'gpu0' is drained.\nNobody else serves m, own.\n"
    assert [row["drained"] for row in json.loads(command("backends", "list", "--json").stdout)] == [True, True]
    head, first, _ = command("backends", "list").stdout.splitlines()
    assert first[head.index("STATE") :].startswith("drained")
    assert command("backends", "undrain", "gpu1").stderr == "The backend 'gpu1' gets requests.\n"
    assert command("backends", "drain", "gpu0").stderr.endswith("Nobody else serves own.\n")
    assert shown("backends", "gpu1")["drained"] is False
    assert "there is no backend 'gpu2'" in command("backends", "drain", "gpu2", status=1).stderr
    changes = command("audit", "list", "--noun", "backends").stdout.splitlines()[1:]
    assert [re.split(r"  +", line)[3:] for line in changes] == [
        ["undrain", "backends/gpu1", "drained: yes → no"],
        ["drain", "backends/gpu0", "drained: no → yes"],
        ["drain", "backends/gpu1", "drained: no → yes"],
    ]
    left_out = command("export").stderr.splitlines()
    assert left_out == ["left out: backends.gpu0: it is drained"]


def test_a_backend_is_weighed(command: Command, shown: Shown, here: Path) -> None:
    config(here, backends=[{"url": "http://127.0.0.1:1", "name": "gpu0", "weight": 2}])
    assert command("backends", "weight", "gpu0", "0.25").stderr == "The backend 'gpu0' has the weight 0.25.\n"
    assert (shown("backends", "gpu0")["weight"], shown("backends", "gpu0")["settings"]["weight"]) == (0.25, 2)
    assert "0.25 (declared: 2)" in command("backends", "list").stdout
    assert re.search(r"weight +2.0\n(.*\n)*weight now +0.25\n", command("backends", "show", "gpu0").stdout)
    assert "weight: 0.25, said at run time" in command("export").stderr
    assert "weight: default → 0.25" in command("audit", "list").stdout
    assert command("backends", "weight", "gpu0", "default").stderr == "The backend 'gpu0' has the weight 2.\n"
    assert shown("backends", "gpu0")["weight"] == 2
    for number in ("nan", "inf", "much", ""):
        assert "is no number; allowed: such as 0.5" in command("backends", "weight", "gpu0", number, status=2).stderr
    assert "weight: 0.0 is not allowed" in command("backends", "weight", "gpu0", "0", status=1).stderr


# -- budgets --


def test_budgets(command: Command) -> None:
    command("teams", "create", "research")
    command("keys", "create", "alice")
    assert command("budgets", "list").stderr == "There are no budgets.\n"
    done = command("budgets", "set", "500 money/month Europe/Vienna", "--team", "research")
    assert done.stderr == "The budget of the team 'research' is 500 money/month Europe/Vienna.\n"
    command("budgets", "set", "400 money/month soft", "--team", "research")
    command("budgets", "set", "5k tokens/day", "--key", "alice")
    command("budgets", "set", "1.5k gpu_seconds/total", "--everyone")
    rows = json.loads(command("budgets", "list", "--json").stdout)
    found = {(row["level"], row["subject"], row["unit"], row["per"], row["soft"]): str(row["amount"]) for row in rows}
    assert {(level, unit, soft): amount for (level, _, unit, _, soft), amount in found.items()} == {
        ("everyone", "gpu_seconds", False): "1500",
        ("team", "money", False): "500",
        ("team", "money", True): "400",
        ("key", "tokens", False): "5000",
    }
    table = command("budgets", "list", "--team", "research").stdout
    assert re.search(r"team +research +500 +0\S* +500\S* +USD +month +\S+Z +\S+Z$", table, re.MULTILINE)
    command("budgets", "set", "600 money/month", "--team", "research")
    command("budgets", "remove", "money/month", "--team", "research", "--soft")
    [row] = json.loads(command("budgets", "list", "--team", "research", "--json").stdout)
    assert (str(row["amount"]), row["soft"]) == ("600", False)


def test_money_is_counted_in_one_currency(command: Command) -> None:
    command("teams", "create", "research")
    said = command("budgets", "set", "500 EUR/month", "--team", "research", status=1).stderr
    assert "money is counted in USD here, and not in EUR" in said
    assert "and not in EUR" in command("teams", "set", "research", "--budget", "500 EUR/month", status=1).stderr
    command("budgets", "set", "500 USD/month", "--team", "research")
    command("teams", "set", "research", "--budget", "7 USD/day")
    [row] = json.loads(command("budgets", "list", "--json").stdout)
    assert (str(row["amount"]), row["currency"], row["per"]) == ("7", "USD", "day")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["set", "5 tokens/day"], "whose budget is it? allowed: --team NAME"),
        (["set", "5 tokens/day", "--team", "a", "--user", "b"], "--team and --user; allowed: one of them"),
        (["set", "5 bananas/day", "--team", "a"], "'bananas' is nothing to count"),
        (["set", "lots", "--team", "a"], "'lots' is no budget; allowed: '500 EUR/month'"),
        (["remove", "money", "--team", "a"], "is no budget; allowed: such as money/month"),
        (["remove", "../x/y", "--team", "a"], "is no budget; allowed: such as money/month"),
    ],
)
def test_no_budget(command: Command, arguments: list[str], said: str) -> None:
    assert said in command("budgets", *arguments, status=2).stderr


# -- admin keys --


def test_admin_keys(command: Command) -> None:
    command("teams", "create", "research")
    made = command("admins", "create", "boss", "--role", "manager", "--team", "research", "--expires", "2099-01-01")
    assert re.fullmatch(r"gha-[A-Za-z0-9_-]{43}\n", made.stdout)
    assert "shown only now, for GLASSHOUSE_ADMIN_KEY" in made.stderr
    assert made.stdout.strip() not in made.stderr
    [row] = json.loads(command("admins", "list", "--json").stdout)
    assert (row["name"], row["role"], row["team"], row["expires_at"]) == ("boss", "manager", "research", "2099-01-01T00:00:00Z")
    assert made.stdout.strip() not in json.dumps(row)
    assert re.search(r"boss +gha-....… +manager +research", command("admins", "list").stdout)
    assert "a manager is one of a team" in command("admins", "create", "x", "--role", "manager", status=1).stderr
    assert "was revoked" in command("admins", "revoke", "boss").stderr
    assert json.loads(command("admins", "list", "--json").stdout)[0]["revoked_at"] is not None


# -- the audit log --


def test_who_changed_what(command: Command) -> None:
    assert command("audit", "list").stderr == "Nothing was changed.\n"
    command("teams", "create", "research", "--requests-per-minute", "5")
    command("teams", "set", "research", "--requests-per-minute", "6", "--models", "a,b")
    command("teams", "remove", "research")
    command("keys", "create", "alice")
    head, *_ = command("audit", "list").stdout.splitlines()
    assert head.split() == ["WHEN", "WHO", "ROLE", "FROM", "DID", "TO", "WHAT"]
    said = command("audit", "list", "--noun", "teams", "--name", "research").stdout.splitlines()[1:]
    assert [re.split(r"  +", line)[3] for line in said][1:] == ["change", "create"]
    assert "requests_per_minute: 5 → 6; models: a, b" in said[1]
    assert len(json.loads(command("audit", "list", "--limit", "2", "--json").stdout)) == 2
    assert json.loads(command("audit", "list", "--until", "2026-01-01", "--json").stdout) == []
    assert json.loads(command("audit", "list", "--author", "nobody", "--json").stdout) == []


# -- forgetting --


def test_forgetting_asks_first(command: Command, here: Path) -> None:
    config(here, phoenix={"url": None})
    command("users", "create", "zoe")
    said = command("users", "forget", "zoe", status=1)
    assert "It can't be had back." in said.output
    assert "Aborted" in said.output
    done = command("users", "forget", "zoe", "--yes", "--json")
    assert done.stderr == "0 requests and 0 traces of 'zoe' say nothing any more.\n"
    assert json.loads(done.stdout)["pending"] == 0


# -- all of them --


def leaves(command: click.Command, *path: str) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    context = click.Context(command)
    names = command.list_commands(context)
    return [leaf for name in names if (each := command.get_command(context, name)) for leaf in leaves(each, *path, name)]


ALONE = {("up",), ("reload",), ("check",), ("completion",)}
"""What has to do with no API."""


def test_every_command_speaks_to_programs_and_has_help(command: Command) -> None:
    found = leaves(main)
    assert len(found) > 55
    for path in found:
        text = command(*path, "--help").stdout
        assert len(text.splitlines()) > 3
        assert path in ALONE or ("--json" in text and "--url" in text), path


Form = Literal["table", "csv", "json"]


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("noun", ["keys", "teams", "users", "projects", "models", "backends", "prices", "budgets", "admins"])
def test_lists_of_nothing(command: Command, noun: str, form: Form) -> None:
    result = command(noun, "list", "--format", form)
    assert (result.stdout == "") == (form == "table")
    assert form != "json" or json.loads(result.stdout) == []


# -- the cache --


def test_whose_answers_are_given_again(command: Command, shown: Shown) -> None:
    command("keys", "create", "laptop", "--cache", "off", "--engine-parameters", "priority,cache_salt")
    settings = shown("keys", "laptop")["settings"]
    assert (settings["cache"], settings["engine_parameters"]) == ("off", ["priority", "cache_salt"])
    assert "cache off; may set priority, cache_salt" in command("keys", "list").stdout
    command("keys", "set", "laptop", "--unset", "cache", "--unset", "engine_parameters")
    assert "cache" not in command("keys", "list").stdout
    command("everyone", "set", "--cache", "deterministic")
    assert re.search(r"cache +deterministic", command("everyone", "show").stdout)
    command("models", "set", "m", "--cache", "all", "--prefix-isolation", "team", "--set", "cache.ttl=60")
    command("models", "set", "m", "--cache", "off")
    settings = shown("models", "m")["settings"]
    assert (settings["cache"]["policy"], settings["cache"]["ttl"], settings["prefix_isolation"]) == ("off", 60.0, "team")
    assert "policy=off, ttl=60.0" in command("models", "list").stdout
    command("models", "set", "m", "--unset", "cache.policy")
    assert shown("models", "m")["settings"]["cache"]["policy"] is None


def test_answers_are_withdrawn(command: Command) -> None:
    assert command("cache", "list").stderr == "Nothing was purged.\n"
    command("teams", "create", "research")
    command("keys", "create", "laptop", "--team", "research")
    command("models", "set", "org/large", "--alias", "best")
    arguments = ["--model", "best", "--key", "laptop", "--team", "research", "--user", "zoe", "--older-than", "1h"]
    made = command("cache", "purge", *arguments, "--json")
    purged = json.loads(made.stdout)
    assert (purged["model"], purged["team"], purged["user"], purged["deleted"]) == ("org/large", "research", "zoe", None)
    said = f"What was kept of model 'org/large', key '{purged['key']}', team 'research', user 'zoe' before "
    assert made.stderr.startswith(said)
    assert made.stderr.endswith(" is given no more.\n")
    [row] = json.loads(command("cache", "list", "--json").stdout)
    assert row == purged
    head, line = command("cache", "list").stdout.splitlines()
    assert head.split() == ["BEFORE", "MODEL", "KEY", "TEAM", "USER", "MADE", "BY", "DELETED"]
    assert line.split()[1:5] == ["org/large", purged["key"], "research", "zoe"]
    assert line.split()[0] < line.split()[5]
    assert command("cache", "purge", "--all").stderr.startswith("What was kept before ")
    assert command("cache", "purge", "--older-than", "0").stderr.startswith("What was kept before ")
    [_] = json.loads(command("cache", "list", "--json").stdout)
    assert "purge" in command("audit", "list", "--noun", "cache").stdout


def test_nothing_is_withdrawn_by_mistake(command: Command) -> None:
    assert "--all for everything" in command("cache", "purge", status=2).stderr
    assert "--all is everything; allowed: alone" in command("cache", "purge", "--all", "--user", "zoe", status=2).stderr
    assert "allowed: alone" in command("cache", "purge", "--all", "--older-than", "0", status=2).stderr
    for option in ("model", "key", "team"):
        said = command("cache", "purge", f"--{option}", "nobody", status=1).stderr
        assert said == f"Error: {option}: there is no {option} 'nobody'\n"
    assert command("cache", "list").stderr == "Nothing was purged.\n"
