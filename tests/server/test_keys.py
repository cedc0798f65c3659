"""Keys, from the command line to the proxy's door: they work soon after they are made, and soon no longer once revoked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest

from proxy.settings import address
from proxy.store import hash_key
from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM

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
