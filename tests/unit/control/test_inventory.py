"""What is known of backends and models, told as a sequence of answers."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest

from proxy.control.discovery import Answer, Kind
from proxy.control.inventory import Inventory
from proxy.nouns import BackendSettings, ModelSettings, PriceSettings
from proxy.settings import Settings
from proxy.snapshot import Model, SnapshotFile

NOW = 1_795_000_000_000_000_000


def card(name: str, **fields: object) -> bytes:
    return msgspec.json.encode({"id": name, "owned_by": "vllm", **fields})


def answer(*names: str, kind: Kind = "vllm", **fields: object) -> Answer:
    return Answer(kind, {name: card(name, **fields) for name in names})


def backend(name: str, models: list[str] | None = None, **fields: object) -> BackendSettings:
    return msgspec.convert({"url": f"http://{name}:8000", "name": name, "models": models or [], **fields}, BackendSettings)


def inventory(*backends: BackendSettings, previous: SnapshotFile | None = None, **settings: object) -> Inventory:
    return Inventory(Settings(backends=list(backends), **settings), previous, NOW)  # type: ignore[arg-type]


def published(of: Inventory) -> SnapshotFile:
    """As it comes back from the file."""
    file = SnapshotFile(models=of.models(), backends=of.backends())
    return msgspec.msgpack.decode(msgspec.msgpack.encode(file), type=SnapshotFile)


def served(of: Inventory) -> dict[str, tuple[str, ...]]:
    return {name: model.backends for name, model in of.models().items()}


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
    assert stock.models()["small"].card == card("small")
    assert stock.backends()["a"].kind == "vllm"
    assert stock.known["a"].reachable
    assert stock.complete


def test_one_model_on_several_backends_has_the_first_ones_card() -> None:
    stock = inventory(backend("a"), backend("b"))
    stock.known["b"].answered(answer("m", root="b"), NOW)
    assert stock.models()["m"] == Model("m", ("b",), card=card("m", root="b"))
    stock.known["a"].answered(answer("m", root="a"), NOW)
    assert stock.models()["m"] == Model("m", ("a", "b"), card=card("m", root="a"))


def test_the_same_again_is_no_change() -> None:
    """vLLM makes up `created` and `permission` anew for every answer."""
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m", created=1, permission=[{"id": "x"}]), NOW)
    before = stock.models()
    assert not stock.known["a"].answered(answer("m", created=2, permission=[{"id": "y"}]), NOW + 1)
    assert stock.models() == before
    assert stock.known["a"].answered_unix_ns == NOW + 1


def test_another_context_length_is_one() -> None:  # failure 54
    stock = inventory(backend("a"))
    stock.known["a"].answered(answer("m", created=1, max_model_len=1024), NOW)
    assert stock.known["a"].answered(answer("m", created=2, max_model_len=2048), NOW)
    assert stock.models()["m"].card == card("m", created=2, max_model_len=2048)


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
    assert msgspec.json.decode(stock.models()["m"].card) == own
    stock.known["a"].answered(answer("m"), NOW)
    assert stock.models()["m"].card == card("m")


@pytest.mark.parametrize(("declared", "kind"), [("auto", "vllm"), ("openai", "openai"), ("vllm", "vllm")])
def test_a_declared_kind_is_believed(declared: str, kind: str) -> None:
    stock = inventory(backend("a", kind=declared))
    stock.known["a"].answered(answer("m"), NOW)
    assert stock.backends()["a"].kind == kind


# -- prices --


def test_prices() -> None:
    price = PriceSettings(input=Decimal("0.05"), cached_input=Decimal("0.01"), output=Decimal("0.2"))
    stock = inventory(backend("a", ["m", "free"]), models={"m": ModelSettings(price=price)})
    made = stock.models()
    assert (made["m"].input_pico, made["m"].cached_input_pico, made["m"].output_pico) == (50_000, 10_000, 200_000)
    assert (made["free"].input_pico, made["free"].cached_input_pico, made["free"].output_pico) == (0, 0, 0)


def test_cached_input_costs_what_input_costs_unless_it_is_said() -> None:
    prices = {
        "m": ModelSettings(price=PriceSettings(input=Decimal(3))),
        "n": ModelSettings(price=PriceSettings(input=Decimal(3), cached_input=Decimal(0))),
    }
    made = inventory(backend("a", ["m", "n"]), models=prices).models()
    assert made["m"].cached_input_pico == 3_000_000
    assert made["n"].cached_input_pico == 0


# -- from one process to the next --


def test_a_new_process_begins_with_what_the_last_one_knew() -> None:
    before = inventory(backend("a"), backend("b"))
    before.known["a"].answered(answer("m", "n"), NOW)
    before.known["b"].answered(answer("m", kind="openai"), NOW)
    after = inventory(backend("a"), backend("b"), previous=published(before))
    assert after.models() == before.models()
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
    later = Inventory(Settings(backends=[backend("a", ["m"])]), published(before), NOW + 10**12)
    assert later.models() == before.models()
