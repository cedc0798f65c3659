"""Keys, from the command line to the proxy's door: they work soon after they are made, soon no longer once revoked, and show only
what they may use."""

from __future__ import annotations

import hmac
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine, insert

from proxy.auth.guesses import GUESSES
from proxy.journal import read_heartbeats
from proxy.settings import Settings, address
from proxy.snapshot import UNLIMITED, Allowance, KeyTable, Principal, encode_principal
from proxy.store import create_key, hash_key, open_database, revoke_key, tables
from tests.server.conftest import StartWorker
from tests.support.glasshouse import Glasshouse
from tests.support.issuer import Issuer, as_pem, part
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, ask, request
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


# -- very many --

MANY: Final = 100_000
CONNECTIONS: Final = 24
"""Spread over two workers by chance: one run of eight million has all of them on one."""


def with_many(state_dir: Path) -> tuple[Engine, str]:
    """A database of so many keys, and the secret of one of them."""
    state_dir.mkdir(mode=0o700)
    database = open_database(Settings.of({"state_dir": str(state_dir)}).database_url)
    ids, now_ns = [f"key_{number:016x}" for number in range(MANY)], time.time_ns()
    made = {"created_at": now_ns, "changed_at": now_ns}
    hashes = [{"hash": hash_key(each), "key_id": each, "prefix": "gh-none", "created_at": now_ns} for each in ids]
    with database.begin() as connection:
        connection.execute(insert(tables.keys), [{"id": each, "name": f"of {each}", **made} for each in ids])
        connection.execute(insert(tables.key_secrets), hashes)
        return database, create_key(connection, "default")[0]


def told_by_all(clients: list[WireClient], secret: str, *, works: bool) -> float:
    """Until this key works on all connections, or on none of them; how long that took, s. (Who asks too often with a wrong one is
    told 429.)"""
    begun = time.monotonic()
    for client in clients:
        until(lambda client=client: (client.ask("/v1/models", key=secret).status == 200) is works, "the key")  # type: ignore[misc]
    return time.monotonic() - begun


def test_of_very_many_keys_a_new_and_a_revoked_one_count_soon_on_every_worker(
    glasshouse: Callable[..., Glasshouse], vllm: ScriptedVLLM, tmp_path: Path
) -> None:
    database, key = with_many(tmp_path / "many")
    nobody = {"url": "redis://127.0.0.1:1"}
    running = glasshouse([vllm.url], {"workers": 2, "redis": nobody}, state_dir=tmp_path / "many", key=key)
    assert len(running.snapshot().keys) == MANY + 1
    with ExitStack() as stack:
        stack.callback(database.dispose)
        clients = [stack.enter_context(WireClient(running.url)) for _ in range(CONNECTIONS)]

        def make(name: str) -> str:
            with database.begin() as connection:
                return create_key(connection, name)[0]

        def revoke(name: str) -> None:
            with database.begin() as connection:
                revoke_key(connection, name)

        took = []
        for turn in range(3):
            secret = make(f"turn {turn}")
            made = told_by_all(clients, secret, works=True)
            revoke(f"turn {turn}")
            took.append((made, told_by_all(clients, secret, works=False)))
        shown = ", ".join(f"{worked:.1f} and {ended:.1f} s" for worked, ended in took)
        print(f"{MANY} keys, two workers: a new key worked, and a revoked one didn't, after {shown}")
        assert min(map(max, took)) < 10, "two seconds are promised, on a machine that has nothing else to do"
        assert len({beat.worker for beat in read_heartbeats(running.settings.journal_path) if beat.requests}) == 2


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


def publish_secrets(running: Worker, *secrets: tuple[str, int], allowance: Allowance = UNLIMITED, **more: Any) -> None:
    """These secrets of one key, each with its end."""
    principal = encode_principal(Principal("key_0", "name 0", "research", allowance, "alice", "atlas"))
    running.publish(keys=KeyTable.build((hash_key(secret), ends_ns, principal) for secret, ends_ns in secrets), **more)


def test_of_a_rotated_keys_secrets_the_former_one_ends(worker: StartWorker) -> None:
    running = worker("http://127.0.0.1:1")
    ends_ns = time.time_ns() + 2_000_000_000
    publish_secrets(running, (KEY, ends_ns), ("gh-newer", 0))
    with WireClient(running.url) as former, WireClient(running.url) as newer:
        assert former.ask("/v1/models", key=KEY).status == 200
        until(lambda: former.ask("/v1/models", key=KEY).status != 200, "the former secret to end")
        assert time.time_ns() >= ends_ns
        assert former.ask("/v1/models", key=KEY).json()["error"]["code"] == "expired_api_key"
        assert newer.ask("/v1/models", key="gh-newer").status == 200
    assert {record.key_id for record in running.records()} == {"key_0"}


@pytest.mark.parametrize("level", ["key", "user", "project", "team", "everyone"])
def test_whose_level_is_blocked_is_refused_on_the_connection_that_he_has(worker: StartWorker, level: str) -> None:
    running = worker("http://127.0.0.1:1")
    blocked = Allowance(blocked=True)
    places: dict[str, dict[str, Any]] = {
        "key": {"allowance": blocked},
        "user": {"users": {"alice": blocked}},
        "project": {"projects": {"atlas": blocked}},
        "team": {"teams": {"research": blocked}},
        "everyone": {"everyone": blocked},
    }
    with WireClient(running.url) as client:
        publish_secrets(running, (KEY, 0))
        assert client.ask("/v1/models", key=KEY).status == 200
        publish_secrets(running, (KEY, 0), **places[level])
        refused = client.ask("/v1/models", key=KEY)
        assert (refused.status, refused.json()["error"]["code"]) == (401, "key_blocked")
        publish_secrets(running, (KEY, 0))
        assert client.ask("/v1/models", key=KEY).status == 200
    running.until(lambda: running.heartbeat().unaccepted == {"key_blocked": 1} or None, "it to be counted")


# -- tokens --


def test_a_bearer_of_a_token_is_a_caller_with_a_name(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url)
    issuer = Issuer()
    trusted = issuer.published(team_claim=("team",), models_claim=("models",))
    running.publish(issuers=(trusted,), teams={"research": Allowance()})
    token = issuer.token(team="research", models=["smol*"]).decode()
    reply = running.ask(chat(), key=token)
    assert reply.status == 200
    record = running.record_of(reply)
    assert (record.key_name, record.user_name, record.team) == ("u1", "u1", "research")
    assert record.key_id.startswith("jwt:")
    received = vllm.requests[-1]
    assert token not in str(vars(received) if hasattr(received, "__dict__") else received), "the engine never sees it"
    nothing = running.ask(chat(), key=issuer.token(team="research", models=["other"]).decode())
    assert (nothing.status, nothing.json()["error"]["code"]) == (404, "model_not_found")
    elsewhere = running.ask(chat(), key=issuer.token(team="other", models=["smol*"]).decode())
    assert (elsewhere.status, elsewhere.json()["error"]["code"]) == (403, "unknown_team")
    assert running.ask(chat(), key=KEY).status == 200


@pytest.mark.parametrize("wrong", ["none", "hmac", "kid", "audience", "issuer", "late", "early", "cut", "huge", "stranger"])
def test_a_wrong_token_opens_nothing_and_is_told_of_nowhere(worker: StartWorker, wrong: str) -> None:
    # failure 81
    issuer, stranger = Issuer("https://id.example", "RS256"), Issuer("https://other.example", "RS256", number=1)
    running = worker("http://127.0.0.1:1")
    running.publish(issuers=(issuer.published(), stranger.published()))
    content = part({"alg": "HS256", "kid": "k1"}) + b"." + part(issuer.claims())
    token = {
        "none": part({"alg": "none", "kid": "k1"}) + b"." + part(issuer.claims()) + b".AA",
        "hmac": content + b"." + part(hmac.digest(as_pem(issuer.key), content, "sha256")),
        "kid": issuer.token(headers={"kid": "../../../dev/null"}),
        "audience": issuer.token(aud="other"),
        "issuer": issuer.token(iss="https://id.example/"),
        "late": issuer.token(exp=1),
        "early": issuer.token(nbf=time.time() + 3600),
        "cut": issuer.token()[:-40],
        "huge": issuer.token(padding="x" * 7000),
        "stranger": stranger.token(iss=issuer.name),
    }[wrong]
    for headers in ({"Authorization": f"Bearer {token.decode()}"}, {"x-api-key": token.decode()}):
        reply = ask(running.url, "/v1/models", headers=headers)
        error = reply.json()["error"]
        assert (reply.status, error["code"]) == (401, "expired_token" if wrong == "late" else "invalid_token")
        assert token.rpartition(b".")[2][:20].decode() not in error["message"]
    assert ask(running.url, "/v1/models", key=issuer.token().decode()).status == 200
    assert len(running.records(1)) == 1
    assert not any(token.split(b".")[1][:40].decode() in str(line) for line in running.log())


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
