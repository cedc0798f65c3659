"""HTTP to one Phoenix."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from proxy.settings import PhoenixSettings

log = logging.getLogger(__name__)


class NotNow(requests.RequestException):
    """No answer, or one that says: later."""


class NotATarget(requests.RequestException):
    """What answers there is a web page or a redirect, nothing that takes spans."""


class Wire(requests.Session):
    """Remembers how the last request went, which an exporter's yes or no doesn't tell.

    It doesn't wait and try again, and its errors keep the exporter from doing so: how often Phoenix is asked is one place's
    business (phoenix.py). A connection that was kept alive and turns out to be dead is replaced at once.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__()
        self.trust_env = False  # no .netrc, which would replace our Authorization, and no proxy between this host's processes
        self.headers.update(headers)
        self.said = ""
        self.status: int | None = None
        """None: nothing was sent. 0: no answer."""
        self._answer: requests.Response | None = None

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Raises NotNow, NotATarget."""
        self.said, self.status, self._answer = "", 0, None
        try:
            response = self._send(request, **kwargs)
        except requests.RequestException as error:
            self.said = type(error).__name__
            raise NotNow(self.said) from error
        self.status, self.said, self._answer = response.status_code, f"status {response.status_code}", response
        if response.status_code == 429 or response.status_code >= 500:
            raise NotNow(self.said)
        if 300 <= response.status_code < 400 or response.headers.get("content-type", "").startswith("text/html"):
            self.said += ", and no answer to what was asked"
            raise NotATarget(self.said)
        return response

    def _send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        try:
            return super().send(request, **kwargs)
        except requests.Timeout:
            raise
        except requests.ConnectionError:
            return super().send(request, **kwargs)

    def rejected_spans(self) -> int | None:
        """How many of the spans that were sent last will not be kept, as the receiver says; None if what it said is no answer to
        spans, whatever its status. Source: OTLP 1.9, "OTLP/HTTP Response"."""
        answer = self._answer
        if answer is None or not answer.content:
            return 0
        try:
            if answer.headers.get("content-type", "").startswith("application/json"):
                msgspec.json.decode(answer.content, type=dict)  # not by the book, and not uncommon
                return 0
            return int(ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans)
        except (DecodeError, msgspec.MsgspecError):
            self.said += ", and no answer to what was asked"
            return None

    def forget(self) -> None:
        self.said, self.status, self._answer = "", None, None


def base_url(settings: PhoenixSettings) -> str:
    return (settings.url or "").rstrip("/")


def authorization(settings: PhoenixSettings) -> dict[str, str]:
    """Phoenix takes its API key as a bearer token."""
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env, "")
    if not key:
        log.warning("no API key for Phoenix", extra={"variable": settings.api_key_env})
        return {}
    return {"Authorization": f"Bearer {key}"}
