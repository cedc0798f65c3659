"""vLLM's metrics, 0.8 to 0.33: the few lines that tell its load, found by their names.

A whole parser would look at 760 lines for the sake of ten. Names that were given up stand behind those that came for them;
versions between the two have both, and they are not added up. Source: vLLM, `v1/metrics/loggers.py`; Prometheus' text format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from proxy.engines import EngineLoad

_RUNNING: Final = (b"vllm:num_requests_running",)
_WAITING: Final = (b"vllm:num_requests_waiting",)
_KV_USAGE: Final = (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc")
_PROMPT: Final = (b"vllm:prompt_tokens_total",)
_GENERATION: Final = (b"vllm:generation_tokens_total",)
_QUERIES: Final = (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total")
_HITS: Final = (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total")
_STARTED: Final = (b"process_start_time_seconds",)
"""Not told with `--api-server-count` above 1: then the numbers are put together from files, and those have no process."""

_MOST: Final = 2.0**53
"""Beyond it a float doesn't count one by one."""


def read(body: bytes) -> EngineLoad | None:
    """The load; None if there is none in it (another server's metrics, or `--disable-log-stats`).

    Of several engines behind one address (data parallel) what they have is added up. KV usage is their mean: their caches are
    equally large, so that is how full they are together, and vLLM itself sends a request to the one that has most room.
    """
    text = b"\n" + body
    running = _values(text, _RUNNING)
    if not running:
        return None
    usage = _values(text, _KV_USAGE)
    return EngineLoad(
        running=int(sum(running)),
        waiting=_total(text, _WAITING),
        kv_usage=min(1.0, sum(usage) / len(usage)) if usage else 0.0,
        prompt_tokens=_total(text, _PROMPT),
        generation_tokens=_total(text, _GENERATION),
        started_unix_s=max(_values(text, _STARTED), default=0.0),
        prefix_queries=_total(text, _QUERIES),
        prefix_hits=_total(text, _HITS),
    )


def _total(text: bytes, names: tuple[bytes, ...]) -> int:
    return int(sum(_values(text, names)))


def _values(text: bytes, names: tuple[bytes, ...]) -> list[float]:
    """All series of the first of these names that has any."""
    return next((found for name in names if (found := list(_series(text, name)))), [])


def _series(text: bytes, name: bytes) -> Iterator[float]:
    """The values of lines `name{labels} value` and `name value`; not those that count nothing (NaN), and no half line."""
    start = b"\n" + name
    at = text.find(start)
    while at >= 0:
        begin = at + len(start)
        end = text.find(b"\n", begin)
        if end < 0:
            return
        line = text[begin:end]
        if line[:1] in (b"{", b" ") and (value := _number(line.rpartition(b"}")[2])) is not None:
            yield value
        at = text.find(start, end)


def _number(text: bytes) -> float | None:
    """The first word of `text`; what follows it is a time."""
    try:
        value = float(text.split(None, 1)[0])
    except (ValueError, IndexError):
        return None
    return value if 0 <= value <= _MOST else None
