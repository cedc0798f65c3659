"""Whom a token is about, and which tokens say nothing. The time is passed in."""

from __future__ import annotations

import hashlib
import hmac
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.auth.tokens import REMEMBERED, TOKEN_BYTES, Identity, Tokens, principal_of
from proxy.errors import Forbidden, Unauthenticated
from proxy.snapshot import Allowance, Model, Principal, Snapshot, SnapshotFile
from tests.support.issuer import Issuer, as_jwk, as_pem, part, private_key

ISSUER = Issuer()
RSA = Issuer("https://rsa.example", "RS256")


def verify(token: bytes, *issuers: Any, now: float | None = None, **fields: Any) -> Identity:
    """`now`: seconds since 1970."""
    trusted = issuers or (ISSUER.published(**fields),)
    return Tokens(tuple(trusted)).verify(token, int((time.time() if now is None else now) * 1e9))


def refused(token: bytes, *issuers: Any, code: str = "invalid_token", now: float | None = None, **fields: Any) -> str:
    """It is; why."""
    with pytest.raises(Unauthenticated) as raised:
        verify(token, *issuers, now=now, **fields)
    error = raised.value
    assert (error.status, error.error_code) == (401, code)
    shown = error.body().decode()
    assert not any(each in shown for each in token.decode("latin-1").split(".") if len(each) > 3), "a token is never repeated"
    return error.message


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"])
def test_a_right_token(algorithm: str) -> None:
    issuer = Issuer("https://id.example", algorithm)
    now = int(time.time())
    found = verify(issuer.token(sub="u1", exp=now + 60), issuer.published(leeway_s=5.0))
    assert found == Identity("https://id.example", "u1", "u1", (), (), None, None, (now + 65) * 1_000_000_000)


# --- algorithms and keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "", None, 5, ["ES256"]])
@pytest.mark.parametrize("signature", [b"", b"AAAA"])
def test_a_token_without_a_signature(alg: object, signature: bytes) -> None:
    # failure 81
    refused(part({"alg": alg, "kid": "k1"}) + b"." + part(ISSUER.claims()) + b"." + signature)
    unheard_of: dict[str, Any] = {"algorithms": ("none", "None", "NONE", "nOnE", "", "ES256")}
    refused(part({"alg": alg, "kid": "k1"}) + b"." + part(ISSUER.claims()) + b"." + signature, **unheard_of)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize("form", ["pem", "jwk", "modulus"])
def test_a_public_key_is_no_secret_of_both_sides(algorithm: str, form: str) -> None:
    """The published key as the secret of an HMAC: whoever believes the token's `alg` accepts it."""
    # failure 81
    forms = {"pem": as_pem(RSA.key), "jwk": json.dumps(RSA.jwk()).encode(), "modulus": RSA.jwk()["n"].encode()}
    content = part({"alg": algorithm, "kid": "k1"}) + b"." + part(RSA.claims())
    digest = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}[algorithm]
    token = content + b"." + part(hmac.digest(forms[form], content, digest))
    refused(token, RSA.published())
    refused(token, RSA.published(algorithms=(algorithm, "RS256")))
    secret = {"kty": "oct", "k": part(forms[form]).decode(), "kid": "k1", "alg": algorithm}
    refused(token, RSA.published(secret, RSA.jwk(), algorithms=(algorithm, "RS256")))


def test_an_algorithm_that_the_issuer_does_not_use() -> None:
    # failure 81
    for claimed in ("RS256", "PS256", "RS512"):
        signer = Issuer("https://rsa.example", claimed)
        for allowed in {"RS256", "PS256", "RS512"} - {claimed}:
            refused(signer.token(), signer.published(algorithms=(allowed,)))


@pytest.mark.parametrize("bound", [{"alg": "RS512"}, {"use": "enc"}, {"key_ops": ["sign"]}, {"key_ops": []}])
def test_a_key_that_was_not_published_for_this(bound: dict[str, Any]) -> None:
    # failure 81
    refused(RSA.token(), RSA.published(RSA.jwk(**bound)))
    assert verify(RSA.token(), RSA.published(RSA.jwk(alg="RS256", use="sig", key_ops=["verify"])))


def test_a_key_of_another_curve_or_type() -> None:
    # failure 81
    longer = Issuer(algorithm="ES384")
    refused(ISSUER.token(), ISSUER.published(longer.jwk()))
    refused(longer.token(headers={"alg": "ES256"}), longer.published(algorithms=("ES256", "ES384")))
    refused(ISSUER.token(headers={"alg": "RS256"}), ISSUER.published(algorithms=("RS256", "ES256")))


def test_a_short_key_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    weak = Issuer(algorithm="RS256", bits=1024)
    refused(weak.token(), weak.published())
    assert "of no use" in caplog.text


def test_keys_that_make_no_sense_do_not_spoil_the_others(caplog: pytest.LogCaptureFixture) -> None:
    broken = {"kty": "EC", "crv": "P-256", "kid": "k1"}
    odd: Any = [5, "key", {}, {"kty": "EC", "crv": "P-256", "x": 5}, broken, {**broken, "x": "AAAA", "y": "AAAA"}]
    assert verify(ISSUER.token(), ISSUER.published(*odd, ISSUER.jwk()))
    assert len(caplog.records) == len(odd)


def test_what_was_published_of_a_private_key_is_not_read() -> None:
    key = private_key("ES256")
    assert isinstance(key, EllipticCurvePrivateKey)
    d = part(key.private_numbers().private_value.to_bytes(32, "big")).decode()
    tokens = Tokens((ISSUER.published(ISSUER.jwk(d=d)),))
    [(_, usable)] = tokens._keys[0]["ES256"]
    assert not hasattr(usable.key, "private_numbers")


# --- which key ---------------------------------------------------------------------------------------------------------


def test_the_key_id_chooses() -> None:
    keys = [Issuer(kid=f"k{number}", number=number) for number in range(3)]
    trusted = ISSUER.published(*(each.jwk() for each in keys))
    assert all(verify(each.token(), trusted) for each in keys)
    refused(keys[1].token(headers={"kid": "k2"}), trusted)
    assert verify(Issuer(kid=None, number=1).token(), trusted), "a token that names none may be from any of them"
    assert verify(ISSUER.token(), ISSUER.published(as_jwk(ISSUER.key))), "a key that has no name may be any"


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/dev/null",
        "/etc/passwd",
        "file:///dev/null",
        "https://attacker.example/jwks.json",
        "' UNION SELECT 'secret' --",
        "k1' OR '1'='1",
        "k1; DROP TABLE keys",
        "$(id)",
        "k1\u0000",
        "",
        "K1",
    ],
)
def test_a_key_id_is_nothing_but_a_name(kid: str) -> None:
    """It opens no file, asks no database and fetches nothing; the content of what it points to isn't the key."""
    # failure 81
    refused(ISSUER.token(headers={"kid": kid}))
    empty = part({"alg": "HS256", "kid": kid}) + b"." + part(ISSUER.claims())
    for secret in (b"", b"secret"):
        refused(empty + b"." + part(hmac.digest(secret, empty, "sha256")))


@pytest.mark.parametrize("kid", [5, None, ["k1"], {"k1": 1}, True])
def test_a_key_id_that_is_no_text(kid: object) -> None:
    # failure 81
    token = ISSUER.signed({"alg": "ES256", "kid": kid}, ISSUER.claims())
    if kid is None:
        assert verify(token)
    else:
        refused(token)


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c"])
def test_a_key_that_comes_with_the_token(name: str) -> None:
    # failure 81
    attacker = Issuer(number=9)
    brought = {
        "jwk": attacker.jwk(),
        "jku": "http://127.0.0.1:9/jwks.json",
        "x5u": "http://127.0.0.1:9/cert.pem",
        "x5c": ["MIIB"],
    }[name]
    refused(attacker.token(headers={name: brought}))
    assert verify(ISSUER.token(headers={name: brought})), "it isn't looked at"


@pytest.mark.parametrize("crit", [["b64"], ["exp"], [], None, "exp"])
def test_what_a_token_demands_is_refused(crit: object) -> None:
    # failure 81
    refused(ISSUER.token(headers={"crit": crit, "b64": True}))


# --- claims ------------------------------------------------------------------------------------------------------------

NOW = 1_800_000_000
AROUND: dict[str, Any] = {"iat": NOW, "exp": NOW + 60}


@pytest.mark.parametrize(("late", "right"), [(0, True), (59, True), (89.9, True), (90, False), (1000, False)])
def test_a_token_that_expires(late: float, right: bool) -> None:
    # failure 81
    token = ISSUER.token(**AROUND)
    if right:
        assert verify(token, now=NOW + late).expires_unix_ns == (NOW + 90) * 1_000_000_000
    else:
        refused(token, code="expired_token", now=NOW + late)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize(("ahead", "right"), [(0, True), (30, True), (30.1, False), (1000, False)])
def test_a_token_that_is_not_valid_yet(claim: str, ahead: float, right: bool) -> None:
    # failure 81
    token = ISSUER.token(**{**AROUND, claim: NOW + ahead})
    if right:
        assert verify(token, now=NOW)
    else:
        assert "yet" in refused(token, now=NOW)


@pytest.mark.parametrize("exp", [None, "1900000000", True, [], {}, -1, 1e300, "never"])
def test_an_end_that_is_none(exp: object) -> None:
    # failure 81
    refused(ISSUER.token(exp=exp))


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("moment", ["0", True, [], 1e300])
def test_a_moment_that_is_none(claim: str, moment: Any) -> None:
    # failure 81
    refused(ISSUER.token(**{claim: moment}))


def test_an_end_in_the_far_future_is_one() -> None:
    assert verify(ISSUER.token(exp=int(1e12))).expires_unix_ns == 2**63 - 1


@pytest.mark.parametrize(
    "aud", ["other", "Glasshouse", "glasshouse ", "", [], ["other"], None, 5, {"glasshouse": 1}, ["glasshouse", 5]]
)
def test_a_token_for_somebody_else(aud: object) -> None:
    # failure 81
    refused(ISSUER.token(aud=aud))


def test_a_token_for_us_among_others() -> None:
    assert verify(ISSUER.token(aud=["other", "glasshouse"]))
    assert verify(ISSUER.token(aud="second"), audience=("glasshouse", "second"))


NAMES: list[Any] = [
    "https://id.example/",
    "https://ID.example",
    "http://id.example",
    "https://id.example.attacker",
    "",
    None,
    5,
    [],
]


@pytest.mark.parametrize("iss", NAMES)
def test_a_token_of_somebody_else(iss: object) -> None:
    # failure 81
    refused(ISSUER.token(iss=iss))


def test_each_issuer_has_its_own_keys() -> None:
    """One that is trusted can't speak for another."""
    # failure 81
    other = Issuer("https://other.example", number=1)
    both = (ISSUER.published(), other.published())
    assert [verify(each.token(), *both).issuer for each in (ISSUER, other)] == [ISSUER.name, other.name]
    refused(other.token(iss=ISSUER.name), *both)
    refused(ISSUER.token(iss=other.name), *both)


def test_one_issuer_may_stand_twice_with_different_audiences() -> None:
    both = (ISSUER.published(audience=("a",)), ISSUER.published(audience=("b",), user_claim=("email",)))
    assert verify(ISSUER.token(aud="a"), *both).user == "u1"
    assert verify(ISSUER.token(aud="b", email="me@example.com"), *both).user == "me@example.com"
    refused(ISSUER.token(aud="c"), *both)


# --- form --------------------------------------------------------------------------------------------------------------


def test_a_token_that_was_cut_off_or_changed() -> None:
    # failure 81
    token = ISSUER.token()
    for size in range(len(token)):
        refused(token[:size])
    trusted = Tokens((ISSUER.published(),))
    for at in range(len(token) - 1):  # of the last character only some bits count
        other = b"A" if token[at : at + 1] != b"A" else b"B"
        with pytest.raises(Unauthenticated):
            trusted.verify(token[:at] + other + token[at + 1 :], time.time_ns())


def test_a_token_that_is_huge() -> None:
    # failure 81
    token = ISSUER.token(padding="x" * 6000)
    assert len(token) > TOKEN_BYTES
    assert "longer" in refused(token)
    assert verify(ISSUER.token(padding="x" * 5000))


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"..",
        b"...",
        b"a.b.c",
        b"e30.e30.e30",
        b"e30.e30.",
        part([]) + b"." + part([]) + b".AAAA",
        part({"alg": "ES256"}) + b"." + part(b"[" * 4000) + b".AAAA",
        part({"alg": "ES256"}) + b"." + part(b'{"iss":' + b"[" * 4000) + b".AAAA",
        part(b'{"alg":"ES256","x":"\xff"}') + b"." + part({}) + b".AAAA",
        ISSUER.token() + b".AAAA",
        ISSUER.token() + b"=",
        b" " + ISSUER.token(),
        ISSUER.token() + b"\n",
        ISSUER.token().replace(b".", b"\xff.", 1),
    ],
)
def test_what_is_no_token(token: bytes) -> None:
    # failure 81
    refused(token)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
def test_nothing_but_a_refusal_comes_of_anything_else(header: bytes, claims: bytes, signature: bytes) -> None:
    with pytest.raises(Unauthenticated):
        verify(b".".join(map(part, (header, claims, signature))))


# --- who it is ---------------------------------------------------------------------------------------------------------


def test_claims_are_found_where_the_settings_say() -> None:
    claims: dict[str, Any] = {
        "user_claim": ("contact", "email"),
        "team_claim": ("groups",),
        "project_claim": ("project",),
        "models_claim": ("models",),
        "role_claim": ("realm_access", "roles"),
        "roles": {"platform": "admin", "lead": "manager"},
    }
    found = verify(
        ISSUER.token(
            contact={"email": "alice@example.com"},
            groups=["everybody", "research"],
            project="atlas",
            models="qwen* bge-m3",
            realm_access={"roles": ["user", "lead", "platform"]},
        ),
        **claims,
    )
    assert (found.user, found.subject) == ("alice@example.com", "u1")
    assert (found.teams, found.projects) == (("everybody", "research"), ("atlas",))
    assert (found.models, found.role) == (("qwen*", "bge-m3"), "manager")
    assert found.team({"research": 1}) == "research"
    bare = verify(ISSUER.token(contact={"email": "alice@example.com"}), **claims)
    assert (bare.teams, bare.projects, bare.role) == ((), (), None)
    assert bare.models == (), "what isn't allowed isn't"
    assert bare.team({}) == ""


@pytest.mark.parametrize("models", [["a", "b"], "a b", " a  b "])
def test_models_are_a_list_or_words(models: object) -> None:
    assert verify(ISSUER.token(models=models), models_claim=("models",)).models == ("a", "b")


@pytest.mark.parametrize("value", [5, True, {"a": 1}, ["a", 5], [[]], "", "a\u0000b", "a\nb", "x" * 257])
@pytest.mark.parametrize("claim", ["user_claim", "team_claim", "project_claim", "role_claim"])
def test_names_that_are_none(claim: str, value: object) -> None:
    of_it: dict[str, Any] = {claim: ("value",)}
    refused(ISSUER.token(value=value), **of_it)


@pytest.mark.parametrize("claim", [("email",), ("sub", "email"), ("a", "b", "c")])
def test_a_token_that_is_about_nobody(claim: tuple[str, ...]) -> None:
    assert ".".join(claim) in refused(ISSUER.token(a={"b": 5}), user_claim=claim)


def test_a_person_has_one_id_over_all_tokens_and_shares_it_with_nobody() -> None:
    other = Issuer("https://other.example", number=1)
    first, second = ISSUER.token(), ISSUER.token(jti="another", email="b@example.com")
    ids = [verify(each).key_id for each in (first, second)]
    assert ids == ["jwt:" + hashlib.sha256(b"https://id.example\0u1").hexdigest()[:16]] * 2
    assert verify(ISSUER.token(sub="u2")).key_id != ids[0]
    assert verify(other.token(), other.published()).key_id != ids[0]
    renamed = [verify(ISSUER.token(email=name), user_claim=("email",)) for name in ("a@example.com", "b@example.com")]
    assert [each.key_id for each in renamed] == ids, "who is renamed stays who he is"


# --- on the data plane -------------------------------------------------------------------------------------------------

MINE = Identity("https://id.example", "u1", "alice", ("everybody", "research"), ("atlas",), ("m*",), None, 5)


def snapshot(**more: Any) -> Snapshot:
    models = {name: Model(name) for name in ("m1", "m2", "n")}
    file = SnapshotFile(models=models, teams={"research": Allowance()}, projects={"atlas": Allowance()})
    for name, value in more.items():
        setattr(file, name, value)
    return Snapshot(file)


def test_a_bearer_is_a_caller_like_others() -> None:
    known = snapshot(users={"alice": Allowance(models=("*2",))})
    caller = principal_of(MINE, known)
    assert caller == Principal(MINE.key_id, "alice", "research", Allowance(models=("m*",)), "alice", "atlas")
    assert list(known.allowed_models(caller)) == ["m2"], "what the token allows and what is declared for its user"
    assert principal_of(MINE._replace(expires_unix_ns=6), known) is caller, "a renewed token is the same caller"


def test_a_bearer_without_anything_is_limited_by_nothing_of_his_own() -> None:
    caller = principal_of(Identity("https://id.example", "u1", "alice", (), (), None, None, 5), snapshot())
    assert caller == Principal(MINE.key_id, "alice", user="alice")


@pytest.mark.parametrize(("missing", "code"), [("teams", "unknown_team"), ("projects", "unknown_project")])
def test_a_team_or_project_that_is_not_declared_is_refused(missing: str, code: str) -> None:
    with pytest.raises(Forbidden) as raised:
        principal_of(MINE, snapshot(**{missing: {"other": Allowance()}}))
    assert (raised.value.status, raised.value.error_code) == (403, code)


# --- what is remembered ------------------------------------------------------------------------------------------------


def test_a_token_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, token, now = Tokens((ISSUER.published(),)), ISSUER.token(), time.time_ns()
    first = tokens.verify(token, now)
    monkeypatch.setattr(tokens, "_verify", None)
    assert tokens.verify(token, now) is first
    with pytest.raises(Unauthenticated, match="expired"):
        tokens.verify(token, first.expires_unix_ns)
    assert not tokens._verified


def test_what_is_remembered_is_bounded_and_wrong_tokens_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # failure 82
    tokens, now = Tokens((ISSUER.published(),)), time.time_ns()
    for number in range(200):
        with pytest.raises(Unauthenticated):
            tokens.verify(ISSUER.token(aud=str(number)), now)
    assert not tokens._verified
    assert REMEMBERED <= 10_000
    monkeypatch.setattr("proxy.auth.tokens.REMEMBERED", 3)
    signed = [ISSUER.token(jti=str(number)) for number in range(5)]
    assert all(tokens.verify(token, now) for token in signed)
    assert list(tokens._verified) == [hashlib.sha256(token).digest() for token in signed[-3:]]


def test_a_worker_without_issuers_imports_no_cryptography() -> None:
    code = (
        "import sys, proxy.worker; print([name for name in ('jwt', 'cryptography', 'proxy.auth.tokens') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
