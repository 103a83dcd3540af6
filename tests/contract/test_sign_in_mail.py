"""Logging in by a real Dovecot (IMAP) and by a mail server that speaks SMTP AUTH; cases C05, C08, C09 and C10."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from support.bus_harness import TickingClock
from support.consoles import Authority
from support.eavesdropper import Eavesdropper
from support.mailbox_server import Dovecot
from support.portals import PASSWORD, Browser, World, settings, signed_in

from deskfleet.portal.app import create_app
from deskfleet.portal.auth import Chain, Identity, Realm, Unavailable, WrongPassword
from deskfleet.portal.auth_mail import Imap, Smtp

PEOPLE = {
    "alice": PASSWORD,
    "gutiérrez": PASSWORD,
    "a+b": PASSWORD,
    "-rf": PASSWORD,
    "经济": "пароль с пробелами",
    "quote": 'a "quoted" \\ word {5}',
    "alice@example.org": "the password of the address",
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def dovecot(authority: Authority) -> Iterator[Dovecot]:
    with tempfile.TemporaryDirectory(prefix="dfdc", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = Dovecot(Path(folder) / "d", authority.issue("localhost", "serverAuth"), PEOPLE)
        server.start()
        yield server
        server.stop()


class Submission(Controller):
    """A mail server for submission: STARTTLS and AUTH PLAIN, on a port that the system chooses."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.code = ""
        super().__init__(
            self, hostname="127.0.0.1", port=0, tls_context=tls, require_starttls=True, authenticator=self._check,
            auth_exclude_mechanism=["LOGIN"],
        )  # fmt: skip
        self.start()

    def _trigger_server(self) -> None:
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    def _check(self, _server: object, _session: object, _envelope: object, _how: str, data: Any) -> AuthResult:
        if self.code:
            return AuthResult(success=False, handled=False, message=self.code)
        known = {name.encode(): word.encode() for name, word in PEOPLE.items()}
        return AuthResult(success=known.get(data.login) == data.password, handled=False)


@pytest.fixture(scope="module")
def submission(authority: Authority) -> Iterator[Submission]:
    pair = authority.issue("localhost", "serverAuth")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    server = Submission(context)
    yield server
    server.stop()


@pytest.fixture
def clock() -> TickingClock:
    return TickingClock()


def method(kind: str, server: str, authority: Authority, clock: TickingClock, **changes: Any) -> Imap | Smtp:
    loaded = settings(auth=[kind], **{kind: {"servers": [server], "ca": authority.ca, "realm": "", **changes}})
    section = loaded.imap or loaded.smtp
    assert section
    return {"imap": Imap, "smtp": Smtp}[kind](section, Realm(section.realm, frozenset({"ldap.example"})), clock)


@pytest.fixture(params=["imap", "imaps", "smtp"])
def ask(request: pytest.FixtureRequest, authority: Authority, clock: TickingClock) -> Any:
    """Makes a method over the server of this round."""
    kind = request.param[:4]
    if kind == "imap":
        dovecot: Dovecot = request.getfixturevalue("dovecot")
        port = dovecot.tls_port if request.param == "imaps" else dovecot.port
    else:
        port = request.getfixturevalue("submission").port
    return lambda **changes: method(kind, f"{request.param}://localhost:{port}", authority, clock, **changes)


def test_a_mail_server_proves_a_person(ask: Any) -> None:
    found = ask()
    for name, password in PEOPLE.items():
        assert found.check(name, password) == Identity(name, found.name)
    assert found.check("alice", PASSWORD + "x") == WrongPassword()
    assert found.check("nobody", PASSWORD) == WrongPassword()


def test_c09_one_mailbox_is_one_id_however_it_is_typed(ask: Any) -> None:
    found = ask(realm="example.org")
    for typed in ("alice", "ALICE", "alice@example.org", "Alice@EXAMPLE.org"):
        assert found.check(typed, PASSWORD) == Identity("alice@example.org", found.name)
    assert found.check("gutie\u0301rrez", PASSWORD) == Identity("gutiérrez@example.org", found.name)
    for other in ("alice@elsewhere.org", "alice@example.org@example.org", "@example.org", "alice@"):
        assert found.check(other, PASSWORD) == WrongPassword()
    address = ask(realm="example.org", send_address=True)
    assert address.check("Alice", "the password of the address") == Identity("alice@example.org", found.name)


def test_a_name_in_another_methods_realm_is_nobody(ask: Any) -> None:
    assert ask().check("alice@ldap.example", PASSWORD) == WrongPassword()


@pytest.mark.parametrize("password", ["", " ", "\u200b", "\0"])
def test_c05_an_empty_password_is_no_password(ask: Any, password: str) -> None:
    assert Chain([ask()], frozenset()).check("alice", password) == WrongPassword()


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("alice\r\nA2 LOGOUT", PASSWORD),
        ("alice", f"{PASSWORD}\r\nA2 LOGOUT"),
        ("alice\n", PASSWORD),
        ("alice\r", PASSWORD),
        ("alice\0", PASSWORD),
        ("alice\0alice", PASSWORD),
        ("alice", f"\0{PASSWORD}"),
        ("alice\x85", PASSWORD),
    ],
)
def test_c10_line_breaks_and_nul_reach_no_mail_server(
    authority: Authority, clock: TickingClock, user: str, password: str
) -> None:
    for kind in ("imap", "smtp"):
        with Eavesdropper(lambda _: b"") as server:
            found = method(kind, f"{kind}://localhost:{server.port}", authority, clock)
            assert Chain([found], frozenset()).check(user, password) == WrongPassword()
            assert server.connections == 0


def test_a_mail_server_that_makes_guessers_wait_is_not_taken_for_one_that_is_away(
    authority: Authority, clock: TickingClock
) -> None:
    def answer(piece: bytes) -> bytes:
        return b"250-here\r\n250 AUTH PLAIN\r\n" if piece.upper().startswith(b"EHLO") else b""

    with Eavesdropper(answer, b"220 hello\r\n") as server:
        found = method("smtp", f"smtp://127.0.0.1:{server.port}", authority, clock, starttls=False, timeout_s=1)
        for tries in (1, 2):
            assert isinstance(found.check("alice", PASSWORD), Unavailable)
            assert server.connections == tries, "others are still asked about: one person's guesses shut nobody out"


@pytest.mark.parametrize("user", ['alice" "x', "alice {3}", "alice\\", "(alice)", "alice%", "*"])
def test_c10_what_means_something_to_a_server_is_a_name_like_others(ask: Any, user: str) -> None:
    assert ask().check(user, PASSWORD) == WrongPassword()


@pytest.mark.parametrize("code", ["454 4.7.0 not now", "535 5.7.8 no", "421 bye", "538 5.7.11 more TLS"])
def test_only_a_no_about_the_password_is_a_no(
    submission: Submission, authority: Authority, clock: TickingClock, code: str
) -> None:
    submission.code = code
    try:
        answer = method("smtp", f"smtp://localhost:{submission.port}", authority, clock).check("alice", PASSWORD)
    finally:
        submission.code = ""
    assert isinstance(answer, WrongPassword if code.startswith("535") else Unavailable)


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (b"NO [AUTHENTICATIONFAILED] wrong", True),
        (b"NO wrong", True),
        (b"NO [UNAVAILABLE] the directory is away", False),
        (b"BAD what", False),
    ],
)
def test_an_imap_server_that_is_in_trouble_says_nothing_about_the_password(
    authority: Authority, clock: TickingClock, reply: bytes, wrong: bool
) -> None:
    def answer(piece: bytes) -> bytes:
        tag = piece.split(b" ")[0]
        if b"CAPABILITY" in piece:
            return b"* CAPABILITY IMAP4rev1 AUTH=PLAIN\r\n" + tag + b" OK done\r\n"
        if b"AUTHENTICATE" in piece:
            tags.append(tag)
            return b"+ \r\n"
        return (tags.pop() if tags else tag) + b" " + reply + b"\r\n"

    tags: list[bytes] = []
    with Eavesdropper(answer, b"* OK hello\r\n") as server:
        found = method("imap", f"imap://127.0.0.1:{server.port}", authority, clock, starttls=False)
        assert isinstance(found.check("alice", PASSWORD), WrongPassword if wrong else Unavailable)


def test_a_server_that_greets_us_as_logged_in_logs_nobody_in(authority: Authority, clock: TickingClock) -> None:
    def answer(piece: bytes) -> bytes:
        return b"* CAPABILITY IMAP4rev1 STARTTLS AUTH=PLAIN\r\n" + piece.split(b" ")[0] + b" OK done\r\n"

    with Eavesdropper(answer, b"* PREAUTH hello\r\n") as server:
        for starttls in (True, False):
            found = method("imap", f"imap://127.0.0.1:{server.port}", authority, clock, starttls=starttls)
            assert isinstance(found.check("alice", PASSWORD), Unavailable)


def test_a_mailbox_is_not_the_local_account_of_its_name(tmp_path: Path, dovecot: Dovecot, authority: Authority) -> None:
    section = {"servers": [f"imaps://localhost:{dovecot.tls_port}"], "ca": authority.ca, "realm": "example.org"}
    world = World(tmp_path, auth=["local", "imap"], imap=section, admins=["alice"])
    world.portal.accounts.add("alice", "another password", admin=True)
    app = create_app(world.portal)
    mine, local = signed_in(app, "alice"), Browser(app)
    assert local.log_in("alice", "another password").status_code == 303
    assert mine.get("/admin/").status_code == 403 and local.get("/admin/").status_code == 200
    assert "alice@example.org" in mine.get("/desktops").text
    world.close()
