"""What is known of backends and models, told as a sequence of answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from proxy.control.catalogue import Catalogue, holding
from proxy.control.discovery import Answer, Kind
from proxy.control.inventory import KEPT_NS, Inventory
from proxy.nouns import (
    BackendSettings,
    BoundsSettings,
    DatedPriceSettings,
    ModelCacheSettings,
    ModelSettings,
    PriceSettings,
    RunTimeSettings,
    SemanticCacheSettings,
)
from proxy.settings import Settings
from proxy.snapshot import LaterPrice, Model, ModelCache, Principal, Snapshot, SnapshotFile

NOW = 1_795_000_000_000_000_000


def card(name: str, **fields: object) -> bytes:
    return msgspec.json.encode({"id": name, "owned_by": "vllm", **fields})


def answer(*names: str, kind: Kind = "vllm", **fields: object) -> Answer:
    return Answer(kind, {name: card(name, **fields) for name in names})


def backend(name: str, models: list[str] | None = None, **fields: object) -> BackendSettings:
    return msgspec.convert({"url": f"http://{name}:8000", "name": name, "models": models or [], **fields}, BackendSettings)


def inventory(*backends: BackendSettings, previous: SnapshotFile | None = None, **settings: object) -> Inventory:
    held = holding(Settings(backends=list(backends), **settings), Catalogue())  # type: ignore[arg-type]
    return Inventory(BoundsSettings(), held, previous, NOW)


def published(of: Inventory) -> SnapshotFile:
    """As it comes back from the file."""
    models, patterns = of.serving(NOW)
    file = SnapshotFile(models=models, backends=of.backends(), patterns=patterns)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(file), type=SnapshotFile)


def served(of: Inventory) -> dict[str, tuple[str, ...]]:
    return {name: model.backends for name, model in of.models(NOW).items()}


def test_nothing_is_known_before_an_answer() -> None:
    stock = inventory(backend("a"))
    assert served(stock) == {}
    assert stock.backends()["a"].kind == "openai", "the careful choice while it isn't known"
    assert stock.known["a"].reachable is None
    assert not stock.complete


def test_an_answer_is_taken_over() -> None:
    stock = inventory(backend("a"))
    assert stock.known["a"].answered(answer("small", "large"), NOW)
    assert served(stock) == {"small": ("a",), "large": ("a",)}
    assert stock.models(NOW)["small"].card == card("small")
    assert stock.backends()["a"].kind == "vllm"
    assert stock.known["a"].reachable
    assert stock.complete


def test_one_model_on_several_backends_has_the_first_ones_card() -> None:
    stock = inventory(backend("a"), backend("b"))
    stock.known["b"].answered(answer("m", root="b"), NOW)
    told = stock.models(NOW)["m"]
    assert told == Model("m", ("b",), card=card("m", root="b"), revision=told.revision)
    stock.known["a"].answered(answer("m", root="a"), NOW)
    told = stock.models(NOW)["m"]
    assert told == Model("m", ("a", "b"), card=card("m", root="a"), revision=told.revision)


def test_the_same_again_is_no_change() -> None:
    """vLLM makes up `created` and `permission` anew for every answer."""
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m", created=1, permission=[{"id": "x"}]), NOW)
    before = stock.models(NOW)
    assert not stock.known["a"].answered(answer("m", created=2, permission=[{"id": "y"}]), NOW + 1)
    assert stock.models(NOW) == before
    assert stock.known["a"].answered_unix_ns == NOW + 1


def test_another_context_length_is_one() -> None:  # failure 54
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m", created=1, max_model_len=1024), NOW)
    assert stock.known["a"].answered(answer("m", created=2, max_model_len=2048), NOW)
    assert stock.models(NOW)["m"].card == card("m", created=2, max_model_len=2048)


@pytest.mark.parametrize(
    ("lengths", "context"),
    [
        ((1024, 2048), 1024),
        ((2048, 1024), 1024),
        ((None, 2048), 2048),
        ((None, None), 0),
        ((True, -1), 0),
        (("1024", 10**30), 0),
    ],
)
def test_the_smallest_context_of_a_models_backends_counts(lengths: tuple[object, object], context: int) -> None:
    stock = inventory(backend("a"), backend("b"), models={"m": ModelSettings(assumed_output_tokens=77)})
    for name, length in zip("ab", lengths, strict=True):
        stock.known[name].answered(answer("m", max_model_len=length), NOW)
    model = published(stock).models["m"]
    assert (model.context_tokens, model.assumed_output_tokens) == (context, 77)


def test_a_backend_that_fails_keeps_what_was_known() -> None:
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m"), NOW)
    stock.known["a"].failed("refused", NOW + 5)
    assert served(stock) == {"m": ("a",)}
    assert stock.known["a"].reachable is False
    assert (stock.known["a"].error, stock.known["a"].asked_unix_ns, stock.known["a"].answered_unix_ns) == (
        "refused",
        NOW + 5,
        NOW,
    )
    stock.known["a"].answered(answer("m"), NOW + 9)
    assert stock.known["a"].error == ""


def test_a_backend_that_answers_with_another_model_lost_the_first() -> None:  # failure 54
    stock = inventory(backend("a"), backend("b"))
    stock.known["a"].answered(answer("m"), NOW)
    stock.known["b"].answered(answer("m"), NOW)
    assert stock.known["a"].answered(answer("other"), NOW)
    assert served(stock) == {"other": ("a",), "m": ("b",)}
    assert stock.known["b"].answered(answer(), NOW)
    assert served(stock) == {"other": ("a",)}


def test_a_declaration_restricts() -> None:
    stock = inventory(backend("a", ["m"]))
    stock.known["a"].answered(answer("m", "secret"), NOW)
    assert served(stock) == {"m": ("a",)}


def test_a_declared_model_is_there_before_anybody_answers() -> None:
    stock = inventory(backend("a", ["m"]))
    assert served(stock) == {"m": ("a",)}
    own = {"id": "m", "object": "model", "created": NOW // 10**9, "owned_by": "glasshouse"}
    assert msgspec.json.decode(stock.models(NOW)["m"].card) == own
    stock.known["a"].answered(answer("m"), NOW)
    assert stock.models(NOW)["m"].card == card("m")


@pytest.mark.parametrize(("declared", "kind"), [("auto", "vllm"), ("openai", "openai"), ("vllm", "vllm")])
def test_a_declared_kind_is_believed(declared: str, kind: str) -> None:
    stock = inventory(backend("a", kind=declared))
    stock.known["a"].answered(answer("m"), NOW)
    assert stock.backends()["a"].kind == kind


# -- prices --


def test_prices() -> None:
    price = PriceSettings(input=Decimal("0.05"), cached_input=Decimal("0.01"), output=Decimal("0.2"))
    stock = inventory(backend("a", ["m", "free"]), models={"m": ModelSettings(price=price)})
    made = stock.models(NOW)
    assert (made["m"].input_pico, made["m"].cached_input_pico, made["m"].output_pico) == (50_000, 10_000, 200_000)
    assert (made["free"].input_pico, made["free"].cached_input_pico, made["free"].output_pico) == (0, 0, 0)


def test_cached_input_costs_what_input_costs_unless_it_is_said() -> None:
    prices = {
        "m": ModelSettings(price=PriceSettings(input=Decimal(3))),
        "n": ModelSettings(price=PriceSettings(input=Decimal(3), cached_input=Decimal(0))),
    }
    made = inventory(backend("a", ["m", "n"]), models=prices).models(NOW)
    assert made["m"].cached_input_pico == 3_000_000
    assert made["n"].cached_input_pico == 0


# -- from one process to the next --


def test_a_new_process_begins_with_what_the_last_one_knew() -> None:
    before = inventory(backend("a"), backend("b"))
    before.known["a"].answered(answer("m", "n"), NOW)
    before.known["b"].answered(answer("m", kind="openai"), NOW)
    after = inventory(backend("a"), backend("b"), previous=published(before))
    assert after.models(NOW) == before.models(NOW)
    assert after.backends() == before.backends()
    assert after.known["a"].reachable is None
    assert not after.known["a"].answered(answer("m", "n"), NOW), "which is why an answer that says the same is no change"


def test_what_belongs_to_another_address_is_forgotten() -> None:
    before = inventory(backend("a"), backend("gone"))
    before.known["a"].answered(answer("m"), NOW)
    before.known["gone"].answered(answer("m"), NOW)
    after = inventory(backend("a", url="http://elsewhere:8000"), backend("new"), previous=published(before))
    assert served(after) == {}
    assert after.backends()["a"].kind == "openai"


def test_settings_that_changed_since_count() -> None:
    before = inventory(backend("a", ["m", "n"]))
    before.known["a"].answered(answer("m"), NOW)
    after = inventory(backend("a", kind="openai"), previous=published(before))
    assert served(after) == {"m": ("a",)}, "n was only ever declared"
    assert after.backends()["a"].kind == "openai"


def test_a_card_of_our_own_stays_the_same() -> None:
    before = inventory(backend("a", ["m"]))
    held = holding(Settings(backends=[backend("a", ["m"])]), Catalogue())
    later = Inventory(BoundsSettings(), held, published(before), NOW + 10**12)
    assert later.models(NOW) == before.models(NOW)


# -- what comes and goes --


def following(stock: Inventory, *backends: BackendSettings, **settings: object) -> None:
    stock.follow(holding(Settings(backends=list(backends), **settings), Catalogue()))  # type: ignore[arg-type]


def test_backends_come_and_go() -> None:
    stock = inventory(backend("a"), backend("b"))
    for name in "ab":
        stock.known[name].answered(answer("m"), NOW)
    kept = stock.known["b"]
    following(stock, backend("b"), backend("c", ["n"]))
    assert served(stock) == {"m": ("b",), "n": ("c",)}
    assert stock.known["b"] is kept, "it is asked as before"
    assert stock.known["c"].reachable is None


def test_another_address_is_another_backend() -> None:
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m"), NOW)
    former = stock.known["a"]
    following(stock, backend("a", url="http://elsewhere:8000"))
    assert stock.known["a"] is not former
    assert served(stock) == {}


def test_the_same_server_declared_otherwise_keeps_what_is_known_of_it() -> None:
    """It is asked anew, with what is declared now."""
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m", "n"), NOW)
    former = stock.known["a"]
    following(stock, backend("a", ["m"], api_key_env="KEY"))
    assert stock.known["a"] is not former
    assert served(stock) == {"m": ("a",)}
    assert (stock.backends()["a"].kind, stock.backends()["a"].api_key_env) == ("vllm", "KEY")
    assert stock.models(NOW)["m"].card == card("m")


def test_https_is_another_server_than_http() -> None:
    stock = inventory(backend("a", url="http://a:443"))
    stock.known["a"].answered(answer("m"), NOW)
    following(stock, backend("a", url="https://a:443"))
    assert served(stock) == {}


# -- what is said of a model --


def test_an_alias_stands_for_its_model() -> None:
    stock = inventory(backend("a"), models={"org/large": ModelSettings(aliases=("gpt-4", "default"), assumed_output_tokens=7)})
    assert served(stock) == {}, "what nobody serves has no alias either"
    stock.known["a"].answered(answer("org/large", root="/weights", parent=None, max_model_len=99), NOW)
    models = published(stock).models
    assert list(models) == ["org/large", "gpt-4", "default"]
    alias = models["gpt-4"]
    assert alias == msgspec.structs.replace(models["org/large"], card=alias.card)
    said = {"id": "gpt-4", "owned_by": "vllm", "root": "/weights", "parent": "org/large", "max_model_len": 99}
    assert msgspec.json.decode(alias.card) == said


def test_an_alias_of_an_engine_that_says_little() -> None:
    stock = inventory(backend("a"), models={"m": ModelSettings(aliases=("n",))})
    stock.known["a"].answered(Answer("openai", {"m": b'{"id":"m"}'}), NOW)
    assert msgspec.json.decode(stock.models(NOW)["n"].card) == {"id": "n", "root": "m", "parent": "m"}


def test_a_model_that_is_served_comes_before_an_alias() -> None:
    stock = inventory(backend("a"), backend("b"), models={"m": ModelSettings(aliases=("n",))})
    stock.known["a"].answered(answer("m"), NOW)
    assert stock.models(NOW)["n"].name == "m"
    stock.known["b"].answered(answer("n"), NOW)
    assert (stock.models(NOW)["n"].name, served(stock)["n"]) == ("n", ("b",))


def test_an_alias_is_no_model_of_the_next_process() -> None:
    settings = {"m": ModelSettings(aliases=("n",))}
    before = inventory(backend("a"), models=settings)
    before.known["a"].answered(answer("m"), NOW)
    after = inventory(backend("a"), models=settings, previous=published(before))
    assert after.models(NOW) == before.models(NOW)
    assert after.known["a"].models() == ["m"]


def test_defaults_are_json() -> None:
    stock = inventory(backend("a", ["m"]), models={"m": ModelSettings(defaults={"temperature": 0.5, "stop": ["\n", "ü"]})})
    assert published(stock).models["m"].defaults == (("temperature", b"0.5"), ("stop", b'["\\n","\xc3\xbc"]'))


def dated(*prices: tuple[str, int]) -> ModelSettings:
    """A first price of 1, then others, each so many seconds after NOW."""
    at = datetime.fromtimestamp(NOW // 10**9, UTC)
    later = [DatedPriceSettings(input=Decimal(price), valid_from=at + timedelta(seconds=after)) for price, after in prices]
    return ModelSettings(price=PriceSettings(input=Decimal(1)), prices=tuple(later))


def test_prices_that_come_later() -> None:
    stock = inventory(backend("a", ["m"]), models={"m": dated(("4", 20), ("2", -10), ("3", 10))})

    def valid(after_s: int) -> tuple[int, list[tuple[int, int]]]:
        model = stock.models(NOW + after_s * 10**9 + KEPT_NS)["m"]
        return model.input_pico, [((each.from_unix_ns - NOW) // 10**9, each.input_pico) for each in model.later_prices]

    assert valid(-11) == (1_000_000, [(-10, 2_000_000), (10, 3_000_000), (20, 4_000_000)])
    assert valid(-10) == (2_000_000, [(10, 3_000_000), (20, 4_000_000)])
    assert valid(10) == (3_000_000, [(20, 4_000_000)])
    assert valid(20) == (4_000_000, [])


def test_a_later_price_of_cached_input_is_its_own() -> None:
    stock = inventory(backend("a", ["m"]), models={"m": dated(("4", 20))})
    [later] = stock.models(NOW)["m"].later_prices
    assert later == LaterPrice(NOW + 20 * 10**9, 4_000_000, 4_000_000, 0)


# -- how workers are to treat a backend --


@pytest.mark.parametrize(
    ("fields", "kind", "depth"),
    [
        ({}, "vllm", 256),
        ({}, "openai", 0),
        ({"depth": 8}, "vllm", 8),
        ({"depth": 8}, "openai", 8),
        ({"kind": "vllm"}, "openai", 256),
        ({"kind": "openai"}, "vllm", 0),
    ],
)
def test_how_many_requests_a_backend_gets_at_a_time(fields: dict[str, Any], kind: Kind, depth: int) -> None:
    stock = inventory(backend("a", **fields))
    stock.known["a"].answered(answer("m", kind=kind), NOW)
    assert published(stock).backends["a"].depth == depth


def test_what_is_said_at_run_time_lies_over_what_is_declared() -> None:
    settings = Settings(backends=[backend("a", weight=2.0, prefill_tokens=100), backend("b")])
    stock = Inventory(BoundsSettings(), holding(settings, Catalogue()), None, NOW)
    before = stock.backends()["a"]
    assert (before.weight, before.prefill_tokens, before.drained) == (2.0, 100, False)
    stock.known["a"].answered(answer("m"), NOW)
    said = {"a": RunTimeSettings(drained=True, weight=0.5), "nobody": RunTimeSettings(drained=True)}
    stock.follow(holding(settings, Catalogue(run_time=said)))
    after = published(stock).backends
    assert (after["a"].weight, after["a"].drained, after["a"].depth) == (0.5, True, 256)
    assert (after["b"].weight, after["b"].drained) == (1.0, False)
    assert served(stock) == {"m": ("a",)}, "it still serves it: what it has goes on"
    stock.follow(holding(settings, Catalogue()))
    assert (stock.backends()["a"].weight, stock.backends()["a"].drained) == (2.0, False)


def test_how_a_models_backends_are_chosen_and_what_comes_after_them() -> None:
    said = ModelSettings(policy="session", fallbacks=("small", "tiny"), aliases=("best",))
    stock = inventory(backend("a"), models={"m": said})
    stock.known["a"].answered(answer("m", "small"), NOW)
    models = published(stock).models
    for name in ("m", "best"):
        assert (models[name].policy, models[name].fallbacks) == ("session", ("small", "tiny"))
    assert (models["small"].policy, models["small"].fallbacks) == ("", ())


# -- patterns --

ANYBODY = Principal("key", "alice")


def asked(stock: Inventory, name: str) -> Model | None:
    """As a worker knows it."""
    return Snapshot(published(stock)).model(ANYBODY, name)


def backends_of(stock: Inventory, name: str) -> tuple[str, ...]:
    model = asked(stock, name)
    return () if model is None else model.backends


def test_a_pattern_is_for_all_that_matches_and_nobody_names() -> None:
    stock = inventory(backend("a", ["gpt-*"]), backend("b", ["gpt-*", "gpt-4o"]), backend("c", ["gpt-4*"]), backend("d"))
    stock.known["d"].answered(answer("own", "gpt-d"), NOW)
    assert served(stock) == {"gpt-4o": ("b",), "own": ("d",), "gpt-d": ("d",)}, "patterns aren't listed"
    assert backends_of(stock, "gpt-5") == ("a", "b")
    assert backends_of(stock, "gpt-4o") == ("b",), "a name comes first"
    assert backends_of(stock, "gpt-4.1") == ("c",), "then the longest pattern"
    assert backends_of(stock, "gpt-d") == ("d",)
    assert backends_of(stock, "tts-1") == ()


def test_what_a_backend_lists_of_its_pattern_is_a_model_like_others() -> None:
    stock = inventory(backend("a", ["gpt-*"]), backend("b", ["gpt-*"]))
    stock.known["a"].answered(answer("gpt-5", "tts-1", kind="openai", max_model_len=4096), NOW)
    assert served(stock) == {"gpt-5": ("a", "b")}
    model = stock.models(NOW)["gpt-5"]
    assert (model.card, model.context_tokens) == (card("gpt-5", max_model_len=4096), 4096)
    assert backends_of(stock, "gpt-6") == ("a", "b")
    assert backends_of(stock, "tts-1") == ()


def test_a_model_of_ones_own_that_looks_like_a_pattern() -> None:
    stock = inventory(backend("a"), backend("b", ["m[1]"]))
    for each in stock.known.values():
        each.answered(answer("m[1]"), NOW)
    assert served(stock) == {"m[1]": ("a", "b")}
    assert published(stock).patterns == {}


def test_what_is_said_of_a_pattern_holds_for_what_it_covers() -> None:
    priced = ModelSettings(price=PriceSettings(input=Decimal(1)), policy="session")
    exact = ModelSettings(price=PriceSettings(input=Decimal(9)), aliases=("best",))
    stock = inventory(backend("a", ["gpt-*"]), models={"gpt-*": priced, "gpt-4o": exact})
    stock.known["a"].answered(answer("gpt-5", kind="openai"), NOW)
    listed = published(stock).models
    assert list(listed) == ["gpt-4o", "gpt-5", "best"], "what has settings is known, as what is listed"
    for name in ("gpt-5", "gpt-6"):
        model = asked(stock, name)
        assert model is not None
        assert (model.name, model.input_pico, model.policy) == (name, 1_000_000, "session")
    for name in ("gpt-4o", "best"):
        model = asked(stock, name)
        assert model is not None
        assert (model.name, model.backends, model.input_pico, model.policy) == ("gpt-4o", ("a",), 9_000_000, "")


def test_settings_of_a_pattern_that_nobody_serves_make_no_model() -> None:
    stock = inventory(backend("a", ["gpt-*"]), models={"gpt-4*": ModelSettings(), "other-*": ModelSettings(aliases=("x",))})
    assert served(stock) == {}


def test_patterns_outlive_the_process() -> None:
    declared = [backend("a", ["gpt-*"]), backend("b")]
    stock = inventory(*declared)
    stock.known["a"].answered(answer("gpt-5"), NOW)
    stock.known["b"].answered(answer("m"), NOW)
    later = inventory(*declared, previous=published(stock))
    assert published(later) == published(stock)


# -- what may be given again, and until when --


def revision(stock: Inventory, name: str = "m") -> str:
    return published(stock).models[name].revision


def engine(version: str = "", **fields: object) -> Answer:
    return Answer("vllm", {"m": card("m", **fields)}, version)


def test_what_is_said_of_the_cache_is_published() -> None:
    semantic = SemanticCacheSettings(model="e", threshold=0.9)
    said = ModelCacheSettings(policy="all", scope="team", ttl=60, semantic=semantic)
    settings = {"m": ModelSettings(cache=said, prefix_isolation="team", aliases=("best",)), "n": ModelSettings()}
    models = published(inventory(backend("a", ["m", "n"]), models=settings)).models
    for name in ("m", "best"):
        assert (models[name].cache, models[name].prefix_isolation) == (ModelCache("all", "team", 60.0, "e", 0.9), "team")
    assert (models["n"].cache, models["n"].prefix_isolation) == (ModelCache(), "")


def test_a_revision_is_of_what_the_engines_say() -> None:
    """Everything else that may be said of a model leaves it as it is."""
    seen = {}
    for what, said in {
        "": engine("0.11.0"),
        "weights": engine("0.11.0", root="/weights/new"),
        "length": engine("0.11.0", max_model_len=99),
        "version": engine("0.12.0"),
        "no version": engine(),
    }.items():
        stock = inventory(backend("a"))
        assert stock.known["a"].answered(said, NOW)
        seen[what] = revision(stock)
    assert len({*seen.values(), ""}) == 6
    priced = inventory(backend("a", weight=2), models={"m": dated(("4", 20))})
    priced.known["a"].answered(engine("0.11.0", created=5, permission=[{"id": "new"}]), NOW)
    assert revision(priced) == seen[""]
    declared = inventory(backend("a"), models={"m": ModelSettings(cache=ModelCacheSettings(revision="2"), aliases=("best",))})
    declared.known["a"].answered(engine("0.11.0"), NOW)
    assert revision(declared) == revision(declared, "best") not in {*seen.values(), ""}


def test_a_revision_is_of_a_set() -> None:
    """The order, one more of the same, and one that says nothing yet change nothing."""
    seen = []
    for names in ("ab", "ba", "abc"):
        stock = inventory(*(backend(name, ["m"]) for name in names))
        for name, root in zip("abc", ("/x", "/y", "/x"), strict=True):
            if name in stock.known:
                stock.known[name].answered(engine("0.11.0", root=root), NOW)
        seen.append(revision(stock))
    silent = inventory(*(backend(name, ["m"]) for name in "abz"))
    for name, root in zip("ab", ("/x", "/y"), strict=True):
        silent.known[name].answered(engine("0.11.0", root=root), NOW)
    assert {*seen, revision(silent)} == {seen[0]}


def test_a_rollout_makes_a_revision_for_its_time() -> None:
    stock = inventory(backend("a"), backend("b"))
    seen = []
    for name, version in (("a", "1"), ("b", "1"), ("b", "2"), ("a", "2")):
        assert stock.known[name].answered(engine(version), NOW)
        seen.append(revision(stock))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_an_outage_is_no_revision_also_for_the_next_process() -> None:
    """Backends that say different things of one model each keep their own."""
    stock = inventory(backend("a"), backend("b"))
    stock.known["a"].answered(engine("1", root="/x"), NOW)
    stock.known["b"].answered(engine("2", root="/y"), NOW)
    before = revision(stock)
    stock.known["b"].failed("refused", NOW)
    assert revision(stock) == before
    assert not stock.known["a"].answered(engine(root="/x"), NOW), "it didn't say its version for once"
    assert revision(stock) == before
    following(stock, backend("a"), backend("b", depth=3))
    assert revision(stock) == before, "declared otherwise"
    later = inventory(backend("a"), backend("b"), previous=published(stock))
    assert revision(later) == before
    later.known["a"].answered(engine("1", root="/x"), NOW)
    later.known["b"].failed("refused", NOW)
    assert revision(later) == before
    assert published(later).backends["b"].version == "2"


def test_a_snapshot_of_before_there_were_revisions() -> None:
    """What is on its cards counts once the backend has said it again."""
    stock = inventory(backend("a"))
    stock.known["a"].answered(engine(root="/x"), NOW)
    old = published(stock)
    old.backends = {name: msgspec.structs.replace(each, essences={}) for name, each in old.backends.items()}
    later = inventory(backend("a"), previous=old)
    assert revision(later) != revision(stock)
    assert later.known["a"].answered(engine(root="/x"), NOW)
    assert revision(later) == revision(stock)


def test_another_server_is_another_revision() -> None:
    stock = inventory(backend("a", ["m"]))
    stock.known["a"].answered(engine("1"), NOW)
    before = revision(stock)
    following(stock, backend("a", ["m"], url="http://elsewhere:8000"))
    assert revision(stock) != before


def test_processes_agree_on_a_revision() -> None:
    """Also on the order of a set, which Python shuffles for each process anew."""
    stock = inventory(*(backend(name) for name in "abcdefgh"))
    for name in "abcdefgh":
        stock.known[name].answered(engine(name, root=name), NOW)
    assert revision(stock) == "bdd3c5c1814062b7"
