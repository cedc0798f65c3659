"""One JSON object a line, whatever is logged."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from proxy.logs import JsonFormatter


def logged(message: str, *arguments: object, **extra: object) -> dict[str, Any]:
    """What a line holds. There is exactly one, in printable ASCII."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("test"))
    log = logging.Logger("proxy.somewhere")
    log.addHandler(handler)
    log.warning(message, *arguments, extra=extra)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text[:-1].isascii()
    assert text[:-1].isprintable()
    fields: dict[str, Any] = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    return fields


def test_the_fields() -> None:
    fields = logged("%d of %s", 3, "them", backend="a", count=7)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "warning",
        "process": "test",
        "logger": "proxy.somewhere",
        "message": "3 of them",
        "backend": "a",
        "count": 7,
    }


@pytest.mark.parametrize(
    "text", ["a\r\nb", "\x1b[31mred", "\x9b31m", "\u2028\u2029\u202e", "\x7f\x00", "\ud800", 'quote " and \\', "Zoë"]
)
def test_text_from_elsewhere_stays_inside(text: str) -> None:  # failure 78
    fields = logged("%s", text, extra_text=text)
    assert fields["message"] == fields["extra_text"] == text


class Silent:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {b"bytes": 1}, object(), Silent(), b"\xff", {1, 2}])
def test_values_that_are_no_json(value: object) -> None:
    assert isinstance(logged("text", value=value)["value"], str)


def test_a_value_that_holds_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert logged("text", value=loop)["value"] == "[[...]]"


def test_our_own_fields_can_not_be_replaced() -> None:
    fields = logged("text", level="fine", time="never", logger="mine")
    assert (fields["level"], fields["logger"]) == ("warning", "proxy.somewhere")
    assert fields["time"] != "never"


def test_exceptions_warnings_and_what_nobody_caught() -> None:
    program = """
import logging, warnings
from proxy import logs
logs.setup("worker-0")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("a").exception("caught")
warnings.warn("careful")
logging.getLogger("a").debug("too small")
raise SystemError("uncaught\\nwith two lines")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert ran.returncode == 1
    assert [(line["level"], line["process"]) for line in lines] == [
        ("error", "worker-0"),
        ("warning", "worker-0"),
        ("critical", "worker-0"),
    ]
    assert "ZeroDivisionError" in lines[0]["exception"]
    assert "careful" in lines[1]["message"]
    assert "with two lines" in lines[2]["exception"]
