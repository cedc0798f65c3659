"""Logs: one JSON object a line, on standard error, from every process.

    {"time": "2026-11-20T12:00:00.123456Z", "level": "info", "process": "control", "logger": "proxy.control", "message": "..."}

and whatever was given as `extra`. Everything but printable ASCII is escaped, so that no text, wherever it came from, can begin
a line of its own or reach a terminal as a control sequence. Workers load this too: the standard library only.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

_OWN = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"))
"""What a LogRecord has anyway; the rest of its attributes came as `extra`."""


class JsonFormatter(logging.Formatter):
    """A LogRecord → one line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        extra = {name: value for name, value in record.__dict__.items() if name not in _OWN and name not in fields}
        try:
            return json.dumps(fields | extra, default=str, allow_nan=False)
        except Exception:  # whatever a value's own code raises; a line that says less is better than none
            return json.dumps(fields | {name: _shown(value) for name, value in extra.items()})


def setup(process: str, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Log as `process` ("control", "worker-0", ...), warnings and what nobody caught included. Call it once, first of all."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False  # a log that can't be written is no reason to write somewhere else
    sys.excepthook = _uncaught


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger(__name__).critical("uncaught exception", exc_info=(kind, error, trace))


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"
