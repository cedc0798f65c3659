"""From litellm's wheel to the price list: exact, and rather not at all than wrong."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from proxy.pricelist import PriceList, Row, parse
from proxy.pricelist.refresh import MEMBER, Refused, extract, main

CHAT = {"mode": "chat", "litellm_provider": "p"}


def wheel(directory: Path, content: bytes | None, version: str = "9.9.9") -> Path:
    """A wheel that pip accepts."""
    file = directory / f"litellm-{version}-py3-none-any.whl"
    info = f"litellm-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("litellm/__init__.py", "raise AssertionError('nothing of it may run')")
        if content is not None:
            archive.writestr(MEMBER, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: litellm\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


def table(**models: Mapping[str, Any]) -> bytes:
    return json.dumps({name: {**CHAT, **entry} for name, entry in models.items()}).encode()


def one(numbers: str) -> tuple[Row, list[str]]:
    """The row of a model with these fields, as JSON text."""
    rows, rounded = extract(f'{{"m": {{"mode": "chat", "litellm_provider": "p", {numbers}}}}}'.encode())
    return rows["m"], rounded


# -- figures --


@pytest.mark.parametrize(
    ("per_token", "per_million"),
    [
        ("1.5e-07", "0.15"),
        ("0.00000015", "0.15"),
        ("1e-12", "0.000001"),
        ("0.0032", "3200"),
        ("4.0000000000000003e-07", "0.4"),  # what a float left behind
        ("9.499999999999999e-07", "0.95"),
        ("1", "1000000"),
    ],
)
def test_a_price_per_token_is_one_per_million(per_token: str, per_million: str) -> None:
    row, rounded = one(f'"input_cost_per_token": {per_token}, "output_cost_per_token": 0')
    assert row == Row("p", Decimal(per_million), None, Decimal(0))
    assert rounded == []


def test_what_is_finer_than_a_pico_unit_is_rounded_and_said() -> None:
    row, rounded = one('"input_cost_per_token": 1.41953125e-07, "output_cost_per_token": 2.5e-12')
    assert (row.input, row.output) == (Decimal("0.141953"), Decimal("0.000002"))  # half to even
    assert rounded == [
        "m input_cost_per_token: 0.141953125 to 0.141953 per million tokens",
        "m output_cost_per_token: 0.0000025 to 0.000002 per million tokens",
    ]


def test_cached_input() -> None:
    assert one('"input_cost_per_token": 3e-6, "cache_read_input_token_cost": 3e-7')[0].cached_input == Decimal("0.3")
    assert one('"input_cost_per_token": 3e-6, "cache_read_input_token_cost": 0.0')[0].cached_input == 0
    assert one('"input_cost_per_token": 3e-6, "cache_read_input_token_cost": null')[0].cached_input is None


def test_which_models_are_taken() -> None:
    price = {"input_cost_per_token": 1e-6}
    rows, _ = extract(
        table(
            chat=price,
            embedding=price | {"mode": "embedding"},
            answers={"output_cost_per_token": 1e-6},
            local={"input_cost_per_token": 0, "output_cost_per_token": 0},
            unknown={},
            pages={"ocr_cost_per_page": 1},
            seconds=price | {"mode": "audio_transcription"},
            pictures=price | {"mode": "image_generation"},
            sample_spec={"mode": "one of: chat, embedding", "input_cost_per_token": "0.0"},
        )
    )
    assert [*rows] == ["chat", "embedding", "answers"]


@pytest.mark.parametrize(
    ("entry", "besides"),
    [
        ({"output_cost_per_token": 2e-6}, ()),
        ({"input_cost_per_token_above_272k_tokens": 1, "input_cost_per_token_above_128k_tokens": 1}, ("above-128k",)),
        ({"tiered_pricing": []}, ("above-some-length",)),
        ({"input_cost_per_token_priority": 1, "input_cost_per_token_above_200k_tokens_priority": 1}, ()),
        ({"cache_creation_input_token_cost": 1.25e-6}, ("cache-write",)),
        ({"cache_creation_input_token_cost": 1e-6}, ()),
        ({"cache_creation_input_token_cost": None}, ()),
        ({"output_cost_per_token": 1e-6, "output_cost_per_reasoning_token": 2e-6}, ("reasoning",)),
        ({"output_cost_per_token": 2e-6, "output_cost_per_reasoning_token": 2e-6}, ()),
        ({"input_cost_per_audio_token": 2e-6, "input_cost_per_image": 1e-3}, ("audio", "images")),
    ],
)
def test_what_a_row_does_not_cover_is_in_it(entry: dict[str, Any], besides: tuple[str, ...]) -> None:
    rows, _ = extract(table(m={"input_cost_per_token": 1e-6, **entry}))
    assert rows["m"].besides == besides


# -- no --


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"m": 5}',
        b'{"m": {"mode": "chat", "input_cost_per_token": -1e-6}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": 1.1}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": "1e-6"}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": true}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": NaN}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": 1e999999999}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": 1e99999999999999999999}}',
        b'{"m": {"mode": "chat", "input_cost_per_token": 1e-6, "cache_read_input_token_cost": []}}',
        b'{"m\\nn": {"mode": "chat", "input_cost_per_token": 1e-6}}',
        b'{"m": {"mode": [], "input_cost_per_token": 1e-6}}',
        b"\xff",
    ],
)
def test_a_table_that_makes_no_sense(content: bytes) -> None:
    with pytest.raises(Refused):
        extract(content)


# -- the command --


def listed(file: Path) -> PriceList:
    return parse(file.read_text())


PRICES = {name: {"input_cost_per_token": 1e-6} for name in ("a", "b", "c")}


def test_it_writes_the_list_and_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "list.csv"
    assert main([str(wheel(tmp_path, table(**PRICES)))], file) == 0
    assert capsys.readouterr().out == "nothing -> litellm 9.9.9: 3 added, 0 removed, 0 changed, 3 in all\n"
    assert file.read_text().splitlines() == [
        "# litellm 9.9.9: USD per million tokens, from litellm's table (MIT); written by `make prices`",
        "model,provider,input,cached_input,output,besides",
        "a,p,1,,0,",
        "b,p,1,,0,",
        "c,p,1,,0,",
    ]
    later = {"b": {"input_cost_per_token": 2e-6}, "c": PRICES["c"], "d": {"input_cost_per_token": 1.41953125e-07}}
    assert main([str(wheel(tmp_path, table(**later), "9.9.10"))], file) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rounded: d input_cost_per_token: 0.141953125 to 0.141953 per million tokens",
        "litellm 9.9.9 -> litellm 9.9.10: 1 added, 1 removed, 1 changed, 3 in all",
    ]
    assert [*listed(file).rows] == ["b", "c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".whl") == ["list.csv"]


def test_a_list_that_loses_more_than_half_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "list.csv"
    main([str(wheel(tmp_path, table(**PRICES, d=PRICES["a"])))], file)
    before = file.read_bytes()
    assert main([str(wheel(tmp_path, table(a=PRICES["a"]), "10.0.0"))], file) == 1
    assert "of 4 models 1 would be left; if that is right, delete" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert main([str(wheel(tmp_path, table(a=PRICES["a"], b=PRICES["b"]), "10.0.0"))], file) == 0, "half of it may go"
    file.unlink()
    assert main([str(wheel(tmp_path, table(a=PRICES["a"]), "10.0.0"))], file) == 0


def test_what_is_no_wheel_of_litellm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "list.csv"
    other, empty = tmp_path / "other-1.0-py3-none-any.whl", tmp_path / "litellm-1.0-py3-none-any.whl"
    other.write_bytes(wheel(tmp_path, b"{}").read_bytes())
    empty.write_bytes(b"")
    for source in (other, empty, tmp_path / "litellm-2-none.whl", wheel(tmp_path, None)):
        assert main([str(source)], file) == 1
        assert capsys.readouterr().err.startswith("list.csv stays as it is: ")
    assert not file.exists()


def test_a_list_that_can_not_be_read_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "list.csv"
    file.write_text("mine")
    assert main([str(wheel(tmp_path, table(**PRICES)))], file) == 1
    assert file.read_text() == "mine"


def test_pip_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real pip, on an index that is a folder."""
    for name, value in (("PIP_CONFIG_FILE", "/dev/null"), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    wheel(tmp_path, table(a=PRICES["a"]), "1.0.0")
    wheel(tmp_path, table(a=PRICES["a"], b=PRICES["b"]), "2.0.0")
    file = tmp_path / "list.csv"
    assert main([], file) == 0
    assert listed(file).source == "litellm 2.0.0", "the newest"
    assert main(["1.0.0"], file) == 0
    assert listed(file).source == "litellm 1.0.0"
    capsys.readouterr()
    assert main(["3.0.0"], file) == 1
    assert "pip could not fetch litellm==3.0.0" in capsys.readouterr().err
    assert listed(file).source == "litellm 1.0.0"
