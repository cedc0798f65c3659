"""The listener's certificate, and the files that settings name."""

from __future__ import annotations

import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from proxy.listener.certificate import Certificate
from proxy.settings import Settings, SettingsError, TlsSettings
from proxy.tls import check_files, expiry_unix_s, upstream_context
from tests.support.tls import CA, OTHER_CA, certificate, key


@pytest.fixture
def files(tmp_path: Path) -> TlsSettings:
    settings = TlsSettings(certificate=str(tmp_path / "c.pem"), key=str(tmp_path / "k.pem"))
    install(settings, "server")
    return settings


def install(settings: TlsSettings, name: str) -> None:
    for source, target in ((certificate(name), settings.certificate), (key(name), settings.key)):
        shutil.copy(source, f"{target}.new")
        Path(f"{target}.new").rename(target)


@pytest.mark.parametrize(
    ("name", "expiry"),
    [("server", (2126, 1, 1)), ("renewed", (2049, 12, 31, 23, 59, 59)), ("expired", (2021, 1, 1))],
)
def test_when_it_expires(name: str, expiry: tuple[int, ...]) -> None:
    assert expiry_unix_s(certificate(name)) == datetime(*expiry, tzinfo=UTC).timestamp()  # type: ignore[misc,arg-type]


def test_it_is_followed(files: TlsSettings) -> None:
    followed = Certificate(files)
    first = followed.context
    followed.poll()
    assert followed.context is first
    install(files, "renewed")
    followed.poll()
    assert followed.context is not first
    assert followed.expires_unix_s == expiry_unix_s(certificate("renewed"))


@pytest.mark.parametrize("damage", ["garbage", "another key", "nothing"])
def test_what_cannot_be_used_changes_nothing(files: TlsSettings, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    followed = Certificate(files)
    first, expiry = followed.context, followed.expires_unix_s
    target = Path(files.certificate)
    if damage == "nothing":
        target.unlink()
    else:
        target.write_bytes(b"garbage" if damage == "garbage" else certificate("renewed").read_bytes())
    with caplog.at_level(logging.ERROR):
        followed.poll()
        followed.poll()
    assert (followed.context, followed.expires_unix_s) == (first, expiry)
    assert len(caplog.records) == 1, "once, not at every look"
    install(files, "renewed")
    followed.poll()
    assert followed.context is not first


def test_at_the_beginning_it_must_be_usable(files: TlsSettings) -> None:
    Path(files.key).write_bytes(key("renewed").read_bytes())
    with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
        Certificate(files)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tls": {"certificate": "/nowhere.pem", "key": str(key("server"))}}, ["tls", "'/nowhere.pem'", "No such file"]),
        ({"tls": {"certificate": str(CA), "key": str(key("server"))}}, ["tls", "ca.pem", "mismatch", "allowed: PEM"]),
        (
            {"tls": {"certificate": str(certificate("server")), "key": str(key("encrypted"))}},
            ["tls", "encrypted.key", "passphrase"],
        ),
        ({"backends": [{"url": "https://gpu", "ca_file": "/nowhere.pem"}]}, ["backends[0].ca_file", "'/nowhere.pem'", "No such"]),
        ({"backends": [{"url": "https://gpu", "ca_file": str(key("server"))}]}, ["backends[0].ca_file", "server.key", "PEM"]),
        (
            {"issuers": [{"issuer": "https://id", "audience": ["us"], "ca_file": "/nowhere.pem"}]},
            ["issuers[0].ca_file", "'/nowhere.pem'", "No such"],
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(config: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        check_files(Settings.of(config))
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


def test_files_that_can_be_used() -> None:
    tls = {"certificate": str(certificate("server")), "key": str(key("server"))}
    check_files(Settings.of({"tls": tls, "backends": [{"url": "https://gpu", "ca_file": str(CA)}, {"url": "https://gpu1"}]}))


def test_authorities_are_read_anew_when_their_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    shutil.copyfile(CA, file)
    first = upstream_context(str(file))
    assert upstream_context(str(file)) is first
    (tmp_path / "new").write_bytes(OTHER_CA.read_bytes())
    (tmp_path / "new").rename(file)
    second = upstream_context(str(file))
    assert [ca["subject"] for ca in second.get_ca_certs()] != [ca["subject"] for ca in first.get_ca_certs()]
    assert len(second.get_ca_certs()) == 1
