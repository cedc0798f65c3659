"""Keys, from the command line to the proxy's door: they work soon after they are made, soon no longer once revoked, and show only
what they may use."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest

from proxy.auth.guesses import GUESSES
from proxy.settings import address
from proxy.snapshot import Allowance, Principal
from proxy.snapshot.model import encode_principal
from proxy.store import hash_key
from tests.server.conftest import StartWorker
from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, request
from tests.support.worker import CHAT, KEY, Worker, chat

PATIENCE = 30.0


def command(proxy: Glasshouse, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`glasshouse ARGUMENTS`, for the settings that `proxy` runs on."""
    config = ["--config", str(proxy.state_dir / "config.yaml")]
    return subprocess.run([sys.executable, "-m", "proxy.cli", *arguments, *config], capture_output=True, text=True, check=True)


def status_with(proxy: Glasshouse, secret: str) -> int:
    """What a new connection with this key gets."""
    connection = HTTPConnection(*address(proxy.settings.listen), timeout=PATIENCE)
    body = json.dumps({"model": "smollm2", "messages": [{"role": "user", "content": "hello"}]})
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s in vain for {what}"
        time.sleep(0.02)


@pytest.fixture
def proxy(glasshouse: Callable[..., Glasshouse], vllm: ScriptedVLLM) -> Glasshouse:
    return glasshouse(backends=[vllm.url])


def test_a_keys_life(proxy: Glasshouse) -> None:
    made = command(proxy, "keys", "create", "alice")
    secret = made.stdout.removesuffix("\n")
    until(lambda: status_with(proxy, secret) == 200, "the key to work")
    [row] = [row for row in proxy.rows(1) if row["key_name"] == "alice"][:1]
    assert row["outcome"] == "ok"

    listed: list[dict[str, Any]] = json.loads(command(proxy, "keys", "list", "--format", "json").stdout)
    assert [key["id"] for key in listed if key["name"] == "alice"] == [row["key_id"]]
    [used] = [each for each in json.loads(command(proxy, "usage", "--format", "json").stdout) if each["label"] == "alice"]
    assert used["input_tokens"] == sum(each["input_tokens"] for each in proxy.rows(1) if each["key_name"] == "alice")

    command(proxy, "keys", "revoke", "alice")
    until(lambda: status_with(proxy, secret) == 401, "the key to be refused")


def test_a_revoked_key_is_refused_on_a_connection_that_it_opened(proxy: Glasshouse) -> None:
    """A connection remembers its caller only as long as the snapshot."""
    secret = command(proxy, "keys", "create", "alice").stdout.strip()
    until(lambda: status_with(proxy, secret) == 200, "the key to work")
    connection = HTTPConnection(*address(proxy.settings.listen), timeout=PATIENCE)

    def models() -> int:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {secret}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    assert models() == 200
    command(proxy, "keys", "revoke", "alice")
    until(lambda: models() == 401, "the key to be refused")
    connection.close()


def test_the_hash_opens_nothing(proxy: Glasshouse) -> None:  # failure 69
    digest = hash_key(proxy.key)
    assert digest in proxy.snapshot().keys
    assert status_with(proxy, proxy.key) == 200
    for presented in (digest.hex(), f"gh-{digest.hex()}", f"gh-{digest.hex()[:43]}"):
        assert status_with(proxy, presented) == 401


def test_a_secret_is_in_no_log_and_no_file(proxy: Glasshouse) -> None:  # failure 76
    secret = command(proxy, "keys", "create", "alice").stdout.strip()
    until(lambda: status_with(proxy, secret) == 200, "the key to work")
    command(proxy, "keys", "revoke", "alice")
    until(lambda: status_with(proxy, secret) == 401, "the key to be refused")
    files = [file for file in proxy.state_dir.rglob("*") if file.is_file()]
    assert files
    holding = [file.name for file in files if secret[7:].encode() in file.read_bytes()]
    assert holding == []


# -- what a key may use --


def publish(running: Worker, allowance: Allowance, team: Allowance | None = None) -> None:
    """`KEY` may use this."""
    principal = Principal("key_0", "name 0", "research", allowance)
    running.publish(keys={hash_key(KEY): encode_principal(principal)}, teams={"research": team or Allowance()})


def anonymous(reply: Reply) -> tuple[int, list[tuple[str, str]], bytes]:
    """All of an answer but its id."""
    return reply.status, [(name, value) for name, value in reply.headers if name != "x-request-id"], reply.body


def test_models_that_may_not_be_used_do_not_exist(worker: StartWorker) -> None:
    names = ["qwen3-8b", "qwen3-32b", "bge-m3"]
    running = worker("http://127.0.0.1:1", models=names)

    def listed() -> list[str]:
        return [model["id"] for model in running.ask(path="/v1/models").json()["data"]]

    assert listed() == names
    publish(running, Allowance(models=("qwen*",)), Allowance(models=("*-8b", "bge*")))
    assert listed() == ["qwen3-8b"]
    assert running.ask(path="/v1/models/qwen3-8b").json()["id"] == "qwen3-8b"

    publish(running, Allowance())
    running.models = ["qwen3-8b"]
    running.publish()
    unknown = [running.ask(path="/v1/models/bge-m3"), running.ask(chat(model="bge-m3"))]
    assert [reply.status for reply in unknown] == [404, 404]
    running.models = names
    publish(running, Allowance(models=("qwen*",)))
    hidden = [running.ask(path="/v1/models/bge-m3"), running.ask(chat(model="bge-m3"))]
    assert [anonymous(reply) for reply in hidden] == [anonymous(reply) for reply in unknown], "byte for byte"


def test_the_only_model_that_may_be_used_need_not_be_named(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, models=["smollm2", "other"])
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert running.ask(body).status == 400
    publish(running, Allowance(models=("smol*",)))
    assert running.ask(body).status == 200


# -- how long --


def test_a_key_that_expires_is_refused_on_the_connection_that_it_has(worker: StartWorker) -> None:
    running = worker("http://127.0.0.1:1")
    expires_ns = time.time_ns() + 2_000_000_000
    publish(running, Allowance(), Allowance(expires_unix_ns=expires_ns))
    with WireClient(running.url) as client:
        seen: list[Reply] = []

        def refused() -> bool:
            seen.append(client.ask("/v1/models", key=KEY))
            return seen[-1].status != 200

        until(refused, "the key to expire")
        assert time.time_ns() >= expires_ns
    assert (seen[0].status, seen[-1].status) == (200, 401)
    assert seen[-1].json()["error"]["code"] == "expired_api_key"
    running.until(lambda: running.heartbeat().unaccepted == {"expired_api_key": 1} or None, "it to be counted")
    assert len(running.records()) == len(seen) - 1, "it was accepted no more"


# -- guessing --


def test_who_guesses_keys_is_slowed_down_and_nobody_else(worker: StartWorker) -> None:
    # failure 82
    running = worker("http://127.0.0.1:1", config={"trusted_proxies": ["127.0.0.1"]})
    guessing, elsewhere = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
    seen: list[Reply] = []
    with WireClient(running.url) as client:

        def refused() -> bool:
            seen.append(client.ask("/v1/models", key="gh-wrong", headers=guessing))
            return seen[-1].status != 401

        until(refused, "a guess too many")
        assert len(seen) > GUESSES
        assert (seen[-1].status, seen[-1].json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(seen[-1].header("retry-after") or "") >= 1
        assert int(seen[-1].header("retry-after-ms") or "") >= 1
        assert client.ask("/v1/models", key=KEY, headers=guessing).status == 200, "a right key always passes"
        assert client.ask("/v1/models", key="gh-wrong", headers=elsewhere).status == 401, "another address"

    def refused_early() -> bool:
        """Before its body, which comes in several reads, is there."""
        with WireClient(running.url) as client:
            client.send(request(CHAT, b"x" * 300_000, key="gh-wrong", headers=guessing)[:-1])
            return client.read().status == 429

    until(refused_early, "a guess too many with a large body")
    running.until(lambda: running.heartbeat().unaccepted.get("rate_limit_exceeded", 0) >= 2 or None, "it to be counted")
    assert running.heartbeat().unaccepted["invalid_api_key"] > GUESSES
    assert len(running.records()) == 1, "guesses are no rows"
