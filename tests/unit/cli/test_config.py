"""Which settings a command gets, and what is said of bad ones."""

from __future__ import annotations

import stat
from pathlib import Path

import click
import pytest

from proxy.cli.config import load_settings, read_yaml, running_settings
from proxy.cli.local import local_transport
from proxy.settings import Settings
from tests.unit.cli.conftest import Command

pytestmark = pytest.mark.usefixtures("here")


def written(text: str, name: str = "glasshouse.yaml") -> Path:
    file = Path(name)
    file.write_text(text)
    return file


def refused(text: str) -> str:
    with pytest.raises(click.ClickException) as caught:
        load_settings(written(text), {})
    return caught.value.message


# -- which --


def test_nothing_is_the_defaults() -> None:
    assert load_settings(None, {}) == Settings()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null"])
def test_an_empty_file_too(text: str) -> None:
    written(text)
    assert load_settings(None, {}) == Settings()


def test_which_file_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    written("currency: AAA")
    written("currency: BBB", "env.yaml")
    written("currency: CCC", "option.yaml")
    assert load_settings(None, {}).currency == "AAA"
    monkeypatch.setenv("GLASSHOUSE_CONFIG", "env.yaml")
    assert load_settings(None, {}).currency == "BBB"
    assert load_settings(Path("option.yaml"), {}).currency == "CCC"


def test_overrides_lie_over_the_file_section_by_section() -> None:
    file = written("control: {listen: '127.0.0.1:1', discover_every: 9}\nbackends: [{url: 'http://a'}, {url: 'http://b'}]")
    settings = load_settings(file, {"control": {"listen": "127.0.0.1:2"}, "backends": [{"url": "http://c"}]})
    assert (settings.control.listen, settings.control.discover_every) == ("127.0.0.1:2", 9)
    assert [backend.url for backend in settings.backends] == ["http://c"]


def test_what_runs_here_tells_its_settings() -> None:
    state = Path(".glasshouse")
    state.mkdir()
    Settings(currency="RUN").write(state / "settings.json")
    assert running_settings(None).currency == "RUN"
    assert load_settings(None, {}).currency == "USD", "`up` starts afresh"
    written("currency: FIL")
    assert running_settings(None).currency == "FIL"


def test_what_runs_here_left_rubbish() -> None:
    state = Path(".glasshouse")
    state.mkdir()
    (state / "settings.json").write_text("{")
    with pytest.raises(click.ClickException, match=r"settings\.json: "):
        running_settings(None)


def test_exact_prices() -> None:
    file = written("models: {m: {price: {input: 0.1, cached_input: '0.000001', output: 3}}}")
    price = load_settings(file, {}).models["m"].price
    assert price is not None
    assert [str(each) for each in (price.input, price.cached_input, price.output)] == ["0.1", "0.000001", "3"]


# -- what is said --


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen: 8400", "glasshouse.yaml: listen: 8400 is not allowed"),
        ("listn: x", "glasshouse.yaml: the file: there is no setting 'listn' here; allowed: backends,"),
        ("journal: {on_full: explode}", "journal.on_full: 'explode' is not allowed"),
        ("backends: [{url: ftp://x}]", "allowed: http[s]://HOST[:PORT][/PATH]"),
        ("- a\n- b", "glasshouse.yaml: list at the top; allowed: a mapping of settings"),
        ("just text", "glasshouse.yaml: str at the top"),
    ],
)
def test_field_value_and_what_is_allowed(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "listen: '127.0.0.1:1'\nlisten: '127.0.0.1:2'",
        "control:\n  listen: '127.0.0.1:1'\n  listen: '127.0.0.1:2'",
        "backends:\n  - url: http://a\n    url: http://b",
    ],
)
def test_a_key_that_stands_twice(text: str) -> None:
    said = refused(text)
    assert "stands twice" in said
    assert "glasshouse.yaml" in said
    assert "line " in said


def test_a_merged_mapping_may_be_overridden() -> None:
    text = "models:\n  a: &a\n    price: {input: 1}\n  b:\n    <<: *a\n    price: {input: 2}\n"
    price = load_settings(written(text), {}).models["b"].price
    assert price is not None
    assert price.input == 2


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: *nowhere",
        "a: !!python/object/apply:os.system [true]",
        "1: 2",
        "? [a]\n: b",
        "a\0b: 1",
        "a: 1\n---\nb: 2",
        "a: " + "[" * 5000,
    ],
)
def test_what_is_no_yaml_for_us(text: str) -> None:
    assert refused(text).startswith("glasshouse.yaml: not usable as YAML: ")


def test_bytes_that_are_no_text() -> None:
    Path("glasshouse.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(click.ClickException, match="not usable as YAML"):
        read_yaml(Path("glasshouse.yaml"))


def test_a_file_that_is_not_there(command: Command) -> None:
    assert (
        "Error: nowhere.yaml: No such file or directory" in command("keys", "list", "--config", "nowhere.yaml", status=1).stderr
    )


# -- the state directory --


def test_the_state_directory_is_its_owners_alone() -> None:
    with local_transport(Settings()):
        pass
    assert stat.S_IMODE(Path(".glasshouse").stat().st_mode) == 0o700
    assert Path(".glasshouse/glasshouse.db").exists()


def test_a_database_elsewhere_needs_none() -> None:
    with local_transport(Settings(database="sqlite:///elsewhere.db")):
        pass
    assert not Path(".glasshouse").exists()


def test_a_state_directory_that_can_not_be_made(command: Command) -> None:
    Path(".glasshouse").write_text("in the way")
    assert "Error: " in command("keys", "list", status=1).stderr
