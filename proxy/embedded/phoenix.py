"""The embedded Phoenix: where a request's spans can be looked at.

Bound to loopback, the OTLP/gRPC port included (`phoenix_server` sees to that: Phoenix itself binds it to every interface). No
authentication: whoever has an account on this machine can read it. It sends nothing anywhere: telemetry, web fonts,
sandboxes, the assistant and the MCP endpoint are off. It is handed no provider's API key, so its playground reaches none.

Spans go to `<base>/v1/traces` as OTLP over HTTP, protobuf only; the project is the resource attribute
`openinference.project.name`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import quote

from proxy.embedded import HOST, Companion, script_argv, sealed_environment

_SETTINGS: Final = {
    "PHOENIX_HOST": HOST,
    "PHOENIX_TELEMETRY_ENABLED": "false",
    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
    "PHOENIX_AGENTS_DISABLE_BASH": "true",
    "PHOENIX_ALLOWED_SANDBOX_PROVIDERS": "NONE",
    "PHOENIX_ENABLE_MCP_SERVER": "false",
    "PHOENIX_LOGGING_LEVEL": "warning",
    "PHOENIX_LOG_MIGRATIONS": "false",
}


def phoenix(python: Path, state_dir: Path, port: int, grpc_port: int) -> Companion:
    """Phoenix with its database under `state_dir`; `python` is the interpreter of the environment `environments.PHOENIX`."""
    return Companion(
        name="phoenix",
        argv=script_argv(python, "phoenix_server.py", "serve"),
        env=sealed_environment(
            **_SETTINGS,
            PHOENIX_WORKING_DIR=str(state_dir.resolve() / "phoenix"),
            PHOENIX_PORT=str(port),
            PHOENIX_GRPC_PORT=str(grpc_port),
        ),
        ready_url=f"http://{HOST}:{port}/healthz",
        stop_timeout=10.0,
        notice=(
            f"phoenix: http://{HOST}:{port} (OTLP/gRPC on {HOST}:{grpc_port}), loopback only, without a password: "
            "everyone with an account on this machine can read the traces"
        ),
    )


def project_url(base_url: str, project: str) -> str:
    """The page of a project by its name. It exists once a span has arrived under that name."""
    return f"{base_url.rstrip('/')}/redirects/projects/{quote(project, safe='')}"


def trace_url(base_url: str, trace_id: str) -> str:
    """The page of one trace, by its OpenTelemetry id (32 hex digits)."""
    return f"{base_url.rstrip('/')}/redirects/traces/{quote(trace_id, safe='')}"
