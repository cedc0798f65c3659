"""Answers captured from a real vLLM 0.32.0 and a real llama.cpp server: the files below `tests/fixtures`."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Final, NamedTuple

FIXTURES: Final = Path(__file__).resolve().parents[2] / "fixtures"
_VLLM: Final = FIXTURES / "vllm-0.32.0"
_LLAMA: Final = FIXTURES / "llamacpp"
_NAME: Final = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)?")
_EVENT_END: Final = re.compile(rb"(?<=\n\n)")


class Captured(NamedTuple):
    status: int
    reason: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    request: bytes
    """Empty where none was kept."""

    @property
    def streamed(self) -> bool:
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)

    @property
    def chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers)

    def blocks(self) -> list[bytes]:
        """The body's SSE events, each with the blank line that ends it."""
        return [block for block in _EVENT_END.split(self.body) if block]


@functools.cache
def load(name: str) -> Captured:
    """Raises KeyError for a name that isn't there."""
    folder, _, rest = name.rpartition("/")
    place = _LLAMA / rest if folder == "llamacpp" else _VLLM / name
    if not _NAME.fullmatch(name) or not place.with_suffix(".headers").exists():
        raise KeyError(name)
    first, *lines = place.with_suffix(".headers").read_bytes().splitlines()
    _, status, reason = first.decode().split(" ", 2)
    headers = [(key.lower(), value.strip()) for key, _, value in (line.partition(b":") for line in lines if line)]
    request = place.with_suffix(".request.json")
    body = place.with_suffix(".body")
    return Captured(
        int(status),
        reason,
        headers,
        body.read_bytes() if body.exists() else b"",
        request.read_bytes() if request.exists() else b"",
    )


def names(*, streamed: bool) -> list[str]:
    """Every captured answer of this kind."""
    found = [path.relative_to(_VLLM).with_suffix("").as_posix() for path in sorted(_VLLM.rglob("*.headers"))]
    found += [f"llamacpp/{path.stem}" for path in sorted(_LLAMA.glob("*.headers"))]
    return [name for name in found if load(name).streamed is streamed]
