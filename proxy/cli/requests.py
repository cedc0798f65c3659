"""`glasshouse requests`: single requests, and where their milliseconds went. Prompts and answers aren't in it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from proxy.cli.catalogue import day
from proxy.cli.client import Api, Json, api_command, path_of
from proxy.cli.complete import names
from proxy.cli.report import Columns, Form, Row, exact, facts, form_option, json_option, json_text, listed, picture
from proxy.cli.values import When

_COLUMNS: Columns = {
    "RECEIVED": lambda row: day(row["received_at"]),
    "ID": lambda row: row["id"],
    "KEY": lambda row: row["key_name"],
    "MODEL": lambda row: row["model"],
    "BACKEND": lambda row: row["backend"],
    "OUTCOME": lambda row: row["outcome"],
    "CACHE": lambda row: row["cache"],
    "STATUS": lambda row: row["status"],
    "INPUT": lambda row: row["input_tokens"],
    "OUTPUT": lambda row: row["output_tokens"],
    "MS": lambda row: f"{row['total_ms']:.1f}",
    "WAIT": lambda row: "" if row["wait_ms"] is None else f"{row['wait_ms']:.1f}",
    "FIRST TOKEN": lambda row: "" if row["first_token_ms"] is None else f"{row['first_token_ms']:.1f}",
    "COST": lambda row: f"{exact(row['cost'])} {row['currency']}",
}
_ENGINE = {
    "engine_queue_ms": "waited",
    "engine_prefill_ms": "read the prompt",
    "engine_decode_ms": "wrote the answer",
    "engine_mean_inter_token_ms": "a token each",
}


@click.group()
def requests() -> None:
    """Single requests, and where their time went."""


@requests.command("list")
@click.option("--key", metavar="NAME", help="Name or id.", shell_complete=names("keys"))
@click.option("--team", metavar="TEAM", shell_complete=names("teams"))
@click.option("--user", metavar="USER", shell_complete=names("users"))
@click.option("--project", metavar="PROJECT", shell_complete=names("projects"))
@click.option("--model", metavar="MODEL", shell_complete=names("models"))
@click.option("--backend", metavar="BACKEND", shell_complete=names("backends"))
@click.option("--operation", metavar="OPERATION", help="chat, embeddings, ...")
@click.option("--outcome", metavar="OUTCOME", help="ok, cached, rejected, client_gone, upstream_error, ...")
@click.option("--cache", metavar="RESULT", help="hit, miss, coalesced or bypass.")
@click.option("--since", type=When(), metavar="WHEN", help="24h, 7d, 2026-11-01 or 2026-11-01T12:30 (UTC).")
@click.option("--until", type=When(), metavar="WHEN", help="The same; not included.")
@click.option("--slowest", is_flag=True, help="Those that took longest first; otherwise the newest.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="So many at most.")
@form_option
@api_command
def list_command(
    api: Api,
    key: str | None,
    since: datetime | None,
    until: datetime | None,
    slowest: bool,
    limit: int,
    form: Form,
    **filters: str | None,
) -> None:
    """Requests of the ledger, the newest first; of the last week, if --since isn't said."""
    query = {
        **filters,
        "key" if key and key.startswith("key_") else "key_name": key,
        "key" if key and key.startswith("key_") else "key_name": key,
        "since": None if since is None else since.isoformat(),
        "until": None if until is None else until.isoformat(),
        "order": "slowest" if slowest else "newest",
    }
    listed(api.pages("/requests", query, limit), _COLUMNS, form, "There were no such requests.")


@requests.command("show")
@click.argument("request_id", metavar="ID")
@json_option
@api_command
def show_command(api: Api, request_id: str, as_json: bool) -> None:
    """One request: what it was, what came of it, and where its milliseconds went.

    ID is what the answer had as X-Request-Id, and the trace's.
    """
    request = api.get(path_of("requests", request_id))
    click.echo(json_text(request) if as_json else _told(request))


def _told(request: dict[str, Json]) -> str:
    spans = [(each["name"], each["from_ms"], each["ms"]) for each in request["time"]]
    parts = [facts(_facts(request)), picture(spans)]
    attempts = [_attempt(number, each) for number, each in enumerate(request["attempts"], 1)]
    if len(attempts) > 1 or any(each["error"] for each in request["attempts"]):
        parts.append(facts(attempts))
    if engine := [f"{name} {request[field]:.1f} ms" for field, name in _ENGINE.items() if request[field] is not None]:
        parts.append(facts([("the engine says", ", ".join(engine))]))
    return "\n\n".join(filter(None, parts))


def _facts(request: Row) -> list[tuple[str, object]]:
    alias = f" (asked for as {request['requested_model']})" if request["requested_model"] else ""
    instead = f", instead of {request['fallback_of']}" if request["fallback_of"] else ""
    error = " ".join(filter(None, (request["error_code"], request["error"])))
    tokens = f"{request['input_tokens']} in ({request['cached_tokens']} cached), {request['output_tokens']} out"
    return [
        ("request", request["id"]),
        ("received", day(request["received_at"])),
        ("from", request["client_address"]),
        ("key", f"{request['key_name']} ({request['key_id']})"),
        *((name, request[name]) for name in ("team", "user", "project", "end_user")),
        ("operation", f"{request['operation']}{', streamed' if request['stream'] else ''}"),
        ("model", f"{request['model']}{alias}{instead}"),
        ("backend", request["backend"]),
        ("chosen by", _choice(request)),
        ("outcome", f"{request['outcome']}, status {request['status']}"),
        ("cache", _cache(request)),
        ("saved", _saved(request)),
        ("error", error),
        ("refused by", request["refused_by"]),
        ("over budget", request["over_budget"]),
        ("tokens", f"{tokens}, said by: {request['usage_source']}"),
        ("cost", f"{exact(request['cost'])} {request['currency']}"),
        ("took", f"{request['total_ms']:.1f} ms, of which the proxy {request['proxy_added_ms']:.2f} ms"),
    ]


def _cache(request: Row) -> str:
    """What it did for the request, and whose answer it was then."""
    result: str = request["cache"]
    source = f"request {request['source_id']} (trace {request['source_trace_id']})"
    if result == "hit":
        alike = f", whose prompt is similar ({request['similarity']:.3f})" if request["similarity"] else ""
        return f"answered from the cache: the answer of {source}{alike}, {(request['age_ms'] or 0) / 1000:.1f} s old"
    if result == "coalesced":
        return f"shared the answer of {source}, which was under way" if request["source_id"] else "waited for another's answer"
    return result


def _saved(request: Row) -> str:
    if request["cache"] not in ("hit", "coalesced"):
        return ""
    tokens = f"{request['saved_input_tokens']} tokens in, {request['saved_output_tokens']} out"
    return f"{tokens}, {exact(request['saved_cost'])} {request['currency']}, {(request['saved_ms'] or 0):.1f} ms"


def _choice(request: Row) -> str:
    """The policy and its reason, and between which backends: the lowest score has it."""
    policy, _, why = request["routed_by"].partition(".")
    scores = ", ".join(f"{each['backend']} {each['score']}" for each in request["scores"])
    if policy == "only":
        return "nothing: there was no other"
    return f"{policy}{f', {why}' if why else ''}{f' ({scores})' if scores else ''}"


def _attempt(number: int, attempt: dict[str, Any]) -> tuple[str, str]:
    status = f"status {attempt['status']}" if attempt["status"] else "no answer"
    return f"attempt {number}", ", ".join(filter(None, (f"{attempt['backend']}: {status}", attempt["error"])))
