"""Who may do what: every route, every method, everybody who could ask; and what is refused before anybody looks who asks.

`EXPECTED` is written by hand, and complete: a route that isn't in it fails, and so does one that somebody opened or closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from proxy.auth.guesses import GUESSES
from proxy.control.access import Caller, KnownHosts, allow, allowed, host_name, is_open, is_plain
from proxy.errors import InvalidRequest
from proxy.nouns import ModelSettings, PriceSettings, ProjectSettings, UserSettings
from proxy.store import GLASSHOUSE, MODELS, PROJECTS, USERS, hash_key, put
from tests.support.control import Answer, ControlApi
from tests.support.issuer import Issuer

ISSUER = Issuer()
ALL = {"admin", "viewer", "manager", "team_viewer"}
OVERSEERS = {"admin", "viewer"}
MANAGERS = {"admin", "manager"}
ADMIN = {"admin"}

EXPECTED: dict[str, set[str] | None] = {
    "GET /health": None,
    "GET /openapi.json": ALL | {"holder"},
    "GET /v1/usage": {"holder"},
    **dict.fromkeys(("GET /teams", "GET /teams/{name}"), ALL),
    **dict.fromkeys(("PUT /teams/{name}", "PATCH /teams/{name}", "DELETE /teams/{name}"), ADMIN),
    **dict.fromkeys(("GET /users", "GET /users/{name}", "GET /projects", "GET /projects/{name}"), ALL),
    **dict.fromkeys(("PUT /users/{name}", "PATCH /users/{name}", "DELETE /users/{name}"), MANAGERS),
    **dict.fromkeys(("PUT /projects/{name}", "PATCH /projects/{name}", "DELETE /projects/{name}"), MANAGERS),
    **dict.fromkeys(("GET /keys", "GET /keys/{key}"), ALL),
    **dict.fromkeys(("POST /keys", "PUT /keys/{key}", "PATCH /keys/{key}", "DELETE /keys/{key}"), MANAGERS),
    **dict.fromkeys(("POST /keys/{key}/rotate", "POST /keys/{key}/block", "POST /keys/{key}/unblock"), MANAGERS),
    **dict.fromkeys(("GET /models", "GET /models/{name}", "GET /prices"), ALL),
    **dict.fromkeys(("PUT /models/{name}", "PATCH /models/{name}", "DELETE /models/{name}"), ADMIN),
    **dict.fromkeys(("PUT /prices/{model}/{valid_from}", "DELETE /prices/{model}/{valid_from}"), ADMIN),
    **dict.fromkeys(("GET /backends", "GET /backends/{name}"), OVERSEERS),
    **dict.fromkeys(("PUT /backends/{name}", "PATCH /backends/{name}", "DELETE /backends/{name}"), ADMIN),
    **dict.fromkeys(("POST /backends/{name}/drain", "POST /backends/{name}/undrain", "PUT /backends/{name}/weight"), ADMIN),
    "GET /budgets": ALL,
    **dict.fromkeys((f"{method} /budgets/{{level}}/{{subject}}/{{unit}}/{{per}}" for method in ("PUT", "DELETE")), MANAGERS),
    "GET /cache": ALL,
    "POST /cache/purge": MANAGERS,
    "GET /everyone": OVERSEERS,
    **dict.fromkeys(("PUT /everyone", "PATCH /everyone"), ADMIN),
    **dict.fromkeys(("GET /admins", "GET /admins/{key}", "POST /admins", "DELETE /admins/{key}"), ADMIN),
    "GET /export": ADMIN,
    "DELETE /users/{name}/content": MANAGERS,
    **dict.fromkeys(("GET /usage", "GET /requests", "GET /requests/{request_id}", "GET /audit"), ALL),
}
"""Method and path → who may; None: everybody, without a word on who he is."""

VALUES = {
    "{name}": "mine",
    "{key}": "mine",
    "{model}": "m",
    "{valid_from}": "always",
    "{level}": "key",
    "{subject}": "mine",
    "{unit}": "tokens",
    "{per}": "day",
    "{request_id}": "0" * 32,
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ControlApi]:
    yield from furnished(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlApi]:
    """For those who leave it as it is."""
    yield from furnished(tmp_path_factory.mktemp("shared"))


def furnished(state_dir: Path) -> Iterator[ControlApi]:
    """With things of team `a` called `mine`, and an issuer whose tokens may have roles."""
    claims = {"team": "team", "role": "role"}
    issuer = {"issuer": ISSUER.name, "audience": ["glasshouse"], "algorithms": ["ES256"], "claims": claims}
    roles = {"chief": "admin", "lead": "manager", "eye": "viewer"}
    with ControlApi(state_dir, issuers=[{**issuer, "roles": roles}]) as api:
        with api.engine.begin() as connection:
            put(connection, USERS, "mine", UserSettings(team="a"), GLASSHOUSE)
            put(connection, PROJECTS, "mine", ProjectSettings(team="a"), GLASSHOUSE)
            put(connection, MODELS, "m", ModelSettings(price=PriceSettings()), GLASSHOUSE)
        assert api.post("/keys", {"name": "mine", "team": "a"}, local=True).status_code == 201
        api.state.issuers.known[0].keys = ISSUER.published().keys
        api.state.feed.poll()
        yield api


def routes(api: ControlApi) -> list[tuple[str, str, object]]:
    """(method, path, endpoint) of the app as it is, not as it is meant to be."""
    found: list[tuple[str, str, object]] = []
    for route in api.app.routes:
        assert isinstance(route, APIRoute), f"{route} is no ordinary route"
        found += [(method, route.path_format, route.endpoint) for method in sorted(route.methods or ())]
    return found


def token(**claims: Any) -> str:
    return ISSUER.token(**claims).decode()


def callers(api: ControlApi) -> dict[str, tuple[str, dict[str, Any]]]:
    """Everybody → (what he counts as, how he asks)."""
    return {
        "nobody": ("nobody", {}),
        "a wrong key": ("nobody", {"key": "gha-" + "x" * 43}),
        "an empty key": ("nobody", {"headers": {"authorization": "Bearer "}}),
        "the hash of an admin's key": ("nobody", {"key": hash_key(api.admin).hex()}),  # failure 69
        "the hash of a key": ("nobody", {"key": f"sha256:{hash_key(api.holder).hex()}"}),
        "a token of nobody's": ("nobody", {"key": Issuer("https://elsewhere.example", number=1).token(role="chief").decode()}),
        "an expired token": ("nobody", {"key": token(role="chief", exp=1)}),
        "a key's holder": ("holder", {"key": api.holder}),
        "a token without a role": ("holder", {"key": token()}),
        "a token with a role that means nothing": ("holder", {"key": token(role="emperor")}),
        "a manager's token without a team": ("holder", {"key": token(role="lead")}),
        "a viewer": ("viewer", {"key": api.viewer}),
        "a viewer's token": ("viewer", {"key": token(role="eye")}),
        "a team's viewer": ("team_viewer", {"key": api.team_viewer}),
        "a team's viewer's token": ("team_viewer", {"key": token(role="eye", team="a")}),
        "a manager": ("manager", {"key": api.manager}),
        "a manager's token": ("manager", {"key": token(role="lead", team="a")}),
        "another team's manager": ("manager", {"key": api.other_manager}),
        "an admin": ("admin", {"key": api.admin}),
        "an admin, by x-api-key": ("admin", {"headers": {"x-api-key": api.admin}}),
        "an admin's token": ("admin", {"key": token(role="chief")}),
        "the socket": ("admin", {"local": True}),
        "the socket, with a holder's key": ("holder", {"local": True, "key": api.holder}),
        "the socket, with a wrong key": ("nobody", {"local": True, "key": "gha-" + "x" * 43}),
    }


def test_the_routes_are_the_expected_ones(shared: ControlApi) -> None:  # failure 74
    declared = {
        f"{method} {path}": None if is_open(endpoint) else set(allowed(endpoint)) for method, path, endpoint in routes(shared)
    }
    assert declared == EXPECTED


def test_everybody_on_every_route(api: ControlApi) -> None:  # failure 74
    """Deletions come last: what others are to be refused must be there."""
    wrong = []
    everybody = callers(api)
    for method, path, _ in sorted(routes(api), key=lambda each: (each[0] == "DELETE", each[1])):
        may = EXPECTED[f"{method} {path}"]
        concrete = path
        for placeholder, value in VALUES.items():
            concrete = concrete.replace(placeholder, value)
        for number, (who, (standing, how)) in enumerate(everybody.items()):
            body = {"name": "new"} if method == "POST" and path == "/keys" else {} if method != "GET" else None
            answer = api.ask(method, concrete, body, address=f"10.0.0.{number}", **how)
            if standing == "nobody" and may is not None:
                right = answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            elif may is None or standing in may:
                right = answer.status_code not in (401, 403, 405, 429) and answer.status_code < 500
            else:
                right = answer.status_code == 403
            if not right:
                wrong.append((method, concrete, who, answer.status_code, answer.text[:120]))
    assert not wrong


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/", "/teams", "/nothing", "/docs", "/redoc", "/openapi.json", "/v1/models", "/health"])
def test_nobody_learns_what_there_is(shared: ControlApi, method: str, path: str) -> None:  # failure 83
    """401 on whatever path and method, but for the one that is open."""
    answer = shared.ask(method, path)
    assert answer.status_code == (200 if (method, path) == ("GET", "/health") else 401)


def test_methods_that_are_not_there(shared: ControlApi) -> None:
    answer = shared.delete("/teams", key=shared.admin)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert shared.ask("HEAD", "/teams", key=shared.admin).status_code == 405


# -- default deny --


def forgotten_route(api: ControlApi) -> None:
    @api.app.get("/forgotten")
    async def endpoint() -> str:
        return "canary"


def forgotten_router(api: ControlApi) -> None:
    router = APIRouter()

    @router.get("/forgotten")
    @allow("admin")  # a router that is included is not looked into: whoever includes one learns of it
    async def endpoint() -> str:
        return "canary"

    api.app.include_router(router)


def raw_route(api: ControlApi) -> None:
    async def endpoint(_: object) -> PlainTextResponse:
        return PlainTextResponse("canary")

    api.app.router.routes.append(Route("/forgotten", endpoint))


def class_of_a_route(api: ControlApi) -> None:
    api.app.router.routes.append(Route("/forgotten", PlainTextResponse("canary")))


def mounted_app(api: ControlApi) -> None:
    api.app.router.routes.append(Mount("/forgotten", PlainTextResponse("canary")))


def mounted_over_everything(api: ControlApi) -> None:
    api.app.router.routes.insert(0, Mount("", PlainTextResponse("canary")))


@pytest.mark.parametrize(
    "forget",
    [forgotten_route, forgotten_router, raw_route, class_of_a_route, mounted_app, mounted_over_everything],
)
def test_a_route_that_nobody_declared_is_for_nobody(api: ControlApi, forget: Callable[[ControlApi], None]) -> None:  # failure 74
    forget(api)
    for who, (standing, how) in callers(api).items():
        answer = api.get("/forgotten/too" if forget is mounted_app else "/forgotten", **how)
        assert answer.status_code == (401 if standing == "nobody" else 403), who
        assert "canary" not in answer.text


def test_what_the_router_would_find_besides_is_not_there(api: ControlApi, tmp_path: Path) -> None:
    """Of what isn't in the list of routes the guard knows nothing, so it isn't reached."""
    (tmp_path / "page.html").write_text("canary")
    api.app.frontend("/", directory=tmp_path)
    assert api.get("/page.html", key=api.admin).status_code in (403, 404)


# -- what is presented --


def test_two_different_secrets(shared: ControlApi) -> None:
    headers = {"x-api-key": shared.viewer}
    answer = shared.get("/teams", key=shared.admin, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "conflicting_api_keys"
    assert shared.get("/teams", key=shared.admin, headers={"x-api-key": shared.admin}).status_code == 200


def test_a_header_that_stands_twice(shared: ControlApi) -> None:
    headers = [("authorization", f"Bearer {shared.viewer}"), ("authorization", f"Bearer {shared.admin}")]
    assert shared.client.get("/teams", headers=headers).status_code == 400


@pytest.mark.parametrize("header", ["Basic cm9vdDpyb290", "Bearer", "gha-x", "Bearer a b", "Bearer \xff\xfe", "' OR 1=1 --"])
def test_what_is_no_key(shared: ControlApi, header: str) -> None:  # failure 70
    assert shared.get("/teams", headers={"authorization": header.encode("latin-1")}).status_code == 401


def test_no_cookie_opens_anything(shared: ControlApi) -> None:  # failure 75
    """Nothing that a browser sends by itself counts, and no page may read an answer."""
    headers = {"cookie": f"authorization=Bearer {shared.admin}; session={shared.admin}", "origin": "https://evil.example"}
    answer = shared.get("/teams", headers=headers)
    assert answer.status_code == 401
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    before = shared.ask("OPTIONS", "/keys", headers=asked)
    for each in (answer, before, shared.get("/teams", key=shared.admin, headers=headers)):
        assert not [name for name in each.headers if name.startswith("access-control") or name == "set-cookie"]
        assert each.headers["cache-control"] == "no-store"
        assert each.headers["x-content-type-options"] == "nosniff"


def test_no_secret_is_there_from_the_beginning(tmp_path: Path) -> None:  # failure 75
    with ControlApi(tmp_path) as api:
        for guess in ("", "admin", "sk-1234", "gha-", "glasshouse", "changeme", "null"):
            assert api.get("/teams", headers={"authorization": f"Bearer {guess}"}).status_code == 401


def test_wrong_keys_are_counted_right_ones_are_not(api: ControlApi) -> None:  # failure 82
    statuses = [api.get("/teams", key=f"gha-{number}", address="10.1.0.1").status_code for number in range(GUESSES + 2)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
    refused = api.get("/teams", key="gha-again", address="10.1.0.1")
    assert int(refused.headers["retry-after"]) >= 1
    assert api.get("/teams", key="gha-again", address="10.1.0.2").status_code == 401
    assert api.get("/teams", key=api.admin, address="10.1.0.1").status_code == 200


def test_a_revoked_and_an_expired_admin_key(api: ControlApi) -> None:
    made = api.post("/admins", {"name": "brief", "role": "viewer", "expires_at": "2001-01-01T00:00:00Z"}, key=api.admin)
    assert api.get("/teams", key=made.json()["secret"]).status_code == 401
    made = api.post("/admins", {"name": "other", "role": "viewer"}, key=api.admin)
    assert api.get("/teams", key=made.json()["secret"]).status_code == 200
    assert api.delete("/admins/other", key=api.admin).status_code == 200
    assert api.get("/teams", key=made.json()["secret"]).status_code == 401


def test_a_key_that_only_the_file_has(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"gh-from-the-file").hexdigest()
    with ControlApi(tmp_path, keys={"ci": {"hash": f"sha256:{digest}"}}) as api:
        answer = api.get("/v1/usage", key="gh-from-the-file")
        assert (answer.status_code, answer.json()["key_name"]) == (200, "ci")
        assert answer.json()["key_id"] == f"key_{digest[:16]}"
        assert api.get("/keys", key="gh-from-the-file").status_code == 403


def test_tokens_of_a_team_that_is_not_there(shared: ControlApi) -> None:
    answer = shared.get("/keys", key=token(role="lead", team="nowhere"))
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "unknown_team"


def test_who_changes_something_by_a_token_is_named_with_his_issuer(api: ControlApi) -> None:
    assert api.put("/users/new", {}, key=token(role="lead", team="a", sub="root")).status_code == 201
    [change] = api.get("/audit", key=api.admin, name="new").json()["data"]
    assert (change["author"], change["role"], change["team"]) == ("root (https://id.example)", "manager", "a")


def test_an_admin_key_that_is_the_same_as_one_for_the_models_is_an_admin_key() -> None:
    assert Caller("x", "admin").sees("a")
    assert Caller("x", "admin").sees(None)
    assert not Caller("x", "manager", "a").sees(None)
    assert not Caller("x", "manager", "a").sees("b")


# -- Host --

OURS = ["127.0.0.1", "127.0.0.1:8401", "localhost:8401", "LOCALHOST", "localhost.", "[::1]:8401", "[::1]", "localhost:"]
OTHERS = [
    *("evil.example", "evil.example:8401", "127.0.0.1.evil.example", "", "10.0.0.1", "localhost.evil.example", "[::1].evil"),
    *("localhost/", "localhost?", "localhost#", "localhost/@evil.example", "localhost:8401/x", "localhost:8401#", "localhost:x"),
    *("evil.example#localhost", "localhost@evil.example", "user@localhost", "localhost:80:80", "[::1", "::1", " localhost"),
    *("[::1]]", "[::1]:8401/", "localhost,evil.example", "localhost\\evil.example", "localhost%00"),
]


@pytest.mark.parametrize("host", OURS)
def test_loopback_names_are_ours(shared: ControlApi, host: str) -> None:
    assert shared.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", OTHERS)
def test_other_names_are_not(shared: ControlApi, host: str) -> None:  # failure 34
    """A page that pointed its own name at 127.0.0.1 (DNS rebinding) reads nothing, and no path is read out of a Host."""
    for path in ("/health", "/teams", "/nothing"):
        answer = shared.get(path, headers={"host": host}, key=shared.admin)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "host_not_allowed"


def test_two_hosts_are_none(shared: ControlApi) -> None:  # failure 31
    assert shared.client.get("/health", headers=[("host", "localhost"), ("host", "evil.example")]).status_code == 400


@pytest.mark.parametrize(
    ("listen", "host", "ours"),
    [
        ("0.0.0.0", "10.0.0.1:8401", True),
        ("::", "[2001:db8::1]:8401", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", "10.0.0.1/evil", False),
        ("10.0.0.1", "10.0.0.1:8401", True),
        ("10.0.0.1", "10.0.0.2:8401", False),
        ("control.internal", "Control.Internal:8401", True),
    ],
)
def test_the_host_that_is_listened_on(listen: str, host: str, ours: bool) -> None:
    if ours:
        KnownHosts(listen).check([host])
    else:
        with pytest.raises(InvalidRequest):
            KnownHosts(listen).check([host])


def test_a_host_is_cut_in_one_way() -> None:
    assert host_name("Name.example.:80") == "name.example"
    assert host_name("[2001:DB8::1]:80") == "2001:db8::1"
    assert host_name("name/x:80") == "name/x"
    assert host_name("::1") == host_name("[::1") == host_name("name:80:80") == ""


# -- paths --

PLAIN = [
    *("/", "/teams", "/teams/a.b-c_d~e", "/keys/John%20Doe", "/keys/%C3%A9", "/keys/%c3%a9", "/keys/%3B"),
    *("/models/org/name:7b@x", "/models/org/name%3A7b"),
]
TRICKS = [
    *("//", "//teams", "/teams/", "/teams//a", "/./teams", "/teams/..", "/x/../teams", "/../teams", "/teams/.", "/..", "/."),
    *("/%2e%2e/teams", "/%2E/teams", "/x/%2e%2e/teams", "/.%2e/teams", "/%74eams", "/team%73", "/keys/%7e"),
    *("/teams%2fa", "/teams%2Fa", "/%2Fteams", "/teams%5Ca", "/teams\\a", "/teams%00", "/teams%0a", "/teams%0D%0A", "/teams%7F"),
    *("/teams;x=1", "/teams;", ";/teams", "/teams/a;b", "teams", "", "http://localhost/teams", "*", "/teams#x"),
    *("/teams/%", "/teams/%1", "/teams/%zz", "/keys/%ff", "/keys/%C3", "/keys/%ED%A0%80", "/keys/a b", "/keys/\u00e9"),
    *("/keys/<b>", '/keys/"'),
]


@pytest.mark.parametrize("path", PLAIN)
def test_a_plain_path(path: str) -> None:
    assert is_plain(path.encode(), unquote(path))


@pytest.mark.parametrize("path", TRICKS)
def test_a_path_that_says_something_in_another_way(path: str) -> None:  # failure 35
    assert not is_plain(path.encode("utf-8"), unquote(path))


def test_a_path_that_the_server_read_otherwise() -> None:
    assert not is_plain(b"/teams", "/admins")


@pytest.mark.parametrize("path", ["/Teams", "/TEAMS", "/teams/", "//teams", "/x/%2e%2e/teams", "/teams;x", "/%74eams"])
def raw(api: ControlApi, raw_path: str, key: str) -> Answer:
    """Without a client that makes it better."""

    async def ask() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8401),
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await api.app(scope, receive, send)
        return sent

    return api.client.portal.call(ask)[0]["status"]


@pytest.mark.parametrize("path", ["/Teams", "/TEAMS", *(each for each in TRICKS if each.startswith("/"))])
def test_only_one_way_leads_to_a_route(shared: ControlApi, path: str) -> None:  # failure 35
    assert raw(shared, "/teams", shared.admin) == 200
    assert raw(shared, path, shared.admin) == 404
    assert raw(shared, path, "nobody's") in (401, 404)
