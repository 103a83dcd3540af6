"""The mail to a person who waited: to whom, when, once; against a real mail server that speaks STARTTLS."""

from __future__ import annotations

import logging
import smtplib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from email import message_from_bytes
from email.policy import SMTP
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope
from marshmallow import ValidationError
from sqlalchemy import select
from support.consoles import Authority
from support.portals import World, settings

from deskfleet.portal import tables
from deskfleet.portal.mail import Notices, _Cause, sender_over
from deskfleet.portal.services import Services
from deskfleet.portal.settings import address_of
from deskfleet.schemas.session import Event, Session, State

SID = "a" * 32
PASSWORD = "mail-server-password"
MAIL = {"server": "localhost", "sender": "desktops@example.org", "domain": "example.org"}


class _Listener(Controller):
    """On a port that the system chooses; the base class calls the server once, to see that it answers."""

    def _trigger_server(self) -> None:
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


class Server:
    """A mail server that keeps what it gets and refuses as often as it is told."""

    def __init__(self, tls: ssl.SSLContext | None, login: bool = False) -> None:
        self.got: list[Envelope] = []
        self.refuse = 0
        options: dict[str, Any] = {"tls_context": tls, "require_starttls": tls is not None}
        if login:
            options |= {"authenticator": self._check, "auth_required": True}
        self._controller = _Listener(self, hostname="127.0.0.1", port=0, **options)
        self._controller.start()
        self.port = self._controller.port

    def _check(self, _server: object, _session: object, _envelope: object, _how: str, data: Any) -> AuthResult:
        right = (data.login, data.password) == (b"portal", PASSWORD.encode())
        return AuthResult(success=right, handled=False)

    async def handle_DATA(self, _server: object, _session: object, envelope: Envelope) -> str:
        if self.refuse:
            self.refuse -= 1
            return f"451 not now, said {PASSWORD}"
        self.got.append(envelope)
        return "250 OK"

    def close(self) -> None:
        if not self._controller.loop.is_closed():
            self._controller.stop()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return context_for(authority, "localhost")


def context_for(authority: Authority, name: str) -> ssl.SSLContext:
    pair = authority.issue(name, "serverAuth")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    return context


@pytest.fixture
def server(tls: ssl.SSLContext) -> Iterator[Server]:
    server = Server(tls)
    yield server
    server.close()


@pytest.fixture
def world(tmp_path: Path, server: Server, authority: Authority) -> Iterator[World]:
    world = World(
        tmp_path,
        public_url="https://portal.example.org",
        console_url="wss://portal.example.org/console",
        mail=MAIL | {"port": server.port, "ca": authority.ca},
    )
    yield world
    world.close()


def waited(world: World, seconds: float = 90, sid: str = SID, user: str = "alice") -> Session:
    """A desktop that runs after a wait."""
    session = world.session(sid, user, State.QUEUED, lifetime_s=10 * 24 * 3600)
    for event in (Event.PLACE, Event.ACCEPTED, Event.READY):
        session = step_at(world, session, event, seconds)
    return session


def step_at(world: World, session: Session, event: Event, after_s: float) -> Session:
    """One step, so long after the request."""
    world.clock.now += after_s - (world.clock.wall() - session.created_at)
    return world.step(session, event)


def message_of(envelope: Envelope) -> Any:
    assert isinstance(envelope.content, bytes)
    return message_from_bytes(envelope.content, policy=SMTP)


def test_who_waited_gets_one_mail_with_the_address_of_the_desktop(world: World, server: Server) -> None:
    waited(world)
    for _ in range(3):
        world.portal.send_mails()
        world.clock.now += 600
    (envelope,) = server.got
    message = message_of(envelope)
    assert envelope.rcpt_tos == ["alice@example.org"] and envelope.mail_from == "desktops@example.org"
    assert message["To"] == "alice@example.org" and message["Subject"] == "Your desktop is ready: Linux desktop"
    assert message["Message-ID"] == f"<ready.{SID}@portal.example.org>"
    assert f"https://portal.example.org/desktop/{SID}\r\n" in message.get_content()


def test_a_mail_is_in_the_language_that_its_reader_read_last(world: World, server: Server) -> None:
    world.portal.people.reads("alice", "de")
    world.portal.people.reads("alice", "fr")
    waited(world)
    world.session("b" * 32, "bob", State.RUNNING, lifetime_s=700)
    world.clock.now += 420
    world.portal.send_mails()
    mine, others = sorted((message_of(envelope) for envelope in server.got), key=lambda message: str(message["To"]))
    assert mine["Subject"] == "Votre bureau est prêt\u00a0: Linux desktop"
    assert f"Ouvrez-le\u00a0: https://portal.example.org/desktop/{SID}\r\n" in mine.get_content()
    assert others["Subject"] == "Your desktop ends in 5 min: Linux desktop"


def test_who_reads_what_the_site_offers_no_more_gets_its_default(
    world: World, server: Server, authority: Authority
) -> None:
    portal = world.build(mail=MAIL | {"port": server.port, "ca": authority.ca}, languages=["fr"])
    portal.people.reads("alice", "en")
    waited(world)
    portal.send_mails()
    assert message_of(server.got[0])["Subject"].startswith("Votre bureau")
    portal.store.close()


def test_several_portals_send_one_mail(world: World, server: Server, authority: Authority) -> None:
    mail = MAIL | {"port": server.port, "ca": authority.ca}
    others = [world.build(mail=mail) for _ in range(3)]
    for number in range(3):
        waited(world, sid=f"{number:032x}")
    for portal in (world.portal, *others):
        portal.send_mails()
    assert len(server.got) == 3
    for portal in others:
        portal.store.close()


def test_a_claim_that_two_read_at_once_is_one_portals(world: World, server: Server) -> None:
    waited(world)
    seen = open_rows(world)
    assert isinstance(world.portal.notices, Notices)
    assert [world.portal.notices._claim(row) for row in seen * 2] == [True, False]


def open_rows(world: World) -> list[Any]:
    assert world.portal.notices is not None
    world.portal.notices._enter([_Cause(SID, "alice", "desktop", "ready")])
    with world.portal.store.reading() as connection:
        return list(connection.execute(select(tables.notice)).mappings())


@pytest.mark.parametrize("seconds", [0, 59])
def test_who_did_not_wait_gets_none(world: World, server: Server, seconds: float) -> None:
    waited(world, seconds)
    world.portal.send_mails()
    assert server.got == []


def test_a_slow_start_is_no_wait(world: World, server: Server) -> None:
    session = world.step(world.session(SID, "alice", State.QUEUED), Event.PLACE)
    for event in (Event.ACCEPTED, Event.READY):
        session = step_at(world, session, event, 300)
    world.portal.send_mails()
    assert server.got == []


def test_what_has_ended_or_ran_long_ago_is_no_news(world: World, server: Server) -> None:
    world.step(waited(world), Event.GONE)
    waited(world, sid="b" * 32)
    world.clock.now += 4000
    world.portal.send_mails()
    assert server.got == []


def test_a_refused_mail_is_tried_a_few_times_and_told_without_secrets(
    world: World, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.refuse = 2
    waited(world)
    world.portal.send_mails()
    world.portal.send_mails()
    assert server.refuse == 1, "not again at once"
    for _ in range(5):
        world.clock.now += 500
        world.portal.send_mails()
    assert len(server.got) == 1 and server.refuse == 0
    server.refuse = 100
    waited(world, sid="b" * 32)
    for _ in range(20):
        world.portal.send_mails()
        world.clock.now += 2000
    assert server.refuse == 96, "then it is given up"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("deskfleet")]
    told = [line for line in ours if line.startswith("the mail")]
    assert "SMTPDataError 451" in told[0] and "given up" in told[-1]
    assert PASSWORD not in "".join(ours)


def test_a_desktop_that_ended_before_the_next_try_gets_no_mail(world: World, server: Server) -> None:
    server.refuse = 1
    session = waited(world)
    world.portal.send_mails()
    world.step(session, Event.GONE)
    world.clock.now += 500
    world.portal.send_mails()
    assert server.got == []


@pytest.mark.parametrize("user", ["x\r\nBcc: all@example.org", "a b", "a,b@example.org", "<a@b>", "é@x"])
def test_a_name_that_makes_no_address_gets_no_mail_and_no_second_try(world: World, server: Server, user: str) -> None:
    waited(world, user=user)
    for _ in range(3):
        world.portal.send_mails()
        world.clock.now += 500
    assert server.got == []


def test_no_title_breaks_out_of_its_header(world: World, server: Server) -> None:
    world.machine("desktop", title="Linux\\r\\nBcc: all@example.org\\n\\nmore")
    waited(world)
    world.portal.send_mails()
    (envelope,) = server.got
    message = message_of(envelope)
    assert envelope.rcpt_tos == ["alice@example.org"] and message["Bcc"] is None
    assert message["Subject"] == "Your desktop is ready: LinuxBcc: all@example.orgmore"


@pytest.mark.parametrize(
    ("user", "domain", "address"),
    [
        ("alice", "example.org", "alice@example.org"),
        ("alice@elsewhere.net", "example.org", "alice@elsewhere.net"),
        ("alice", "mailhost", "alice@mailhost"),
        ("alice", "corp.local", None),
        ("alice", "", None),
        ("alice@", "example.org", None),
        ("@example.org", "example.org", None),
        ('"a b"@example.org', "", None),
        ("a@b@c", "", None),
    ],
)
def test_addresses(user: str, domain: str, address: str | None) -> None:
    assert address_of(user, domain) == address


# The way to the server.


def sending(to: Server, **changes: Any) -> Callable[[], None]:
    loaded = settings(mail=MAIL | {"port": to.port} | changes).mail
    assert loaded
    send = sender_over(loaded, "portal.example.org")

    def action() -> None:
        from email.message import EmailMessage

        message = EmailMessage(policy=SMTP)
        message["From"], message["To"] = "desktops@example.org", "alice@example.org"
        message.set_content("hello")
        send(message)

    return action


def test_a_certificate_of_another_name_or_authority_is_refused(
    server: Server, authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        sending(server)()
    with pytest.raises(ssl.SSLCertVerificationError):
        sending(server, ca=Authority(tmp_path / "other").ca)()
    with pytest.raises(ssl.SSLCertVerificationError):
        sending(server, ca=authority.ca, server="127.0.0.1")()
    assert server.got == []
    sending(server, ca=authority.ca)()
    assert len(server.got) == 1


def test_without_starttls_nothing_is_sent_unless_it_is_called_insecure() -> None:
    server = Server(None)
    try:
        with pytest.raises(smtplib.SMTPNotSupportedError):
            sending(server)()
        assert server.got == []
        sending(server, insecure=True)()
        assert len(server.got) == 1
    finally:
        server.close()


def test_it_logs_in_over_tls_only(tls: ssl.SSLContext, authority: Authority) -> None:
    server = Server(tls, login=True)
    try:
        sending(server, ca=authority.ca, user="portal", password=PASSWORD)()
        assert len(server.got) == 1
        with pytest.raises(smtplib.SMTPAuthenticationError):
            sending(server, ca=authority.ca, user="portal", password="wrong")()
    finally:
        server.close()


def test_a_server_that_is_away_stops_nothing_else(world: World, server: Server) -> None:
    server.close()
    waited(world)
    world.portal.send_mails()
    assert world.portal.health().ready


def test_without_the_section_there_is_no_mail(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert isinstance(world.portal, Services) and world.portal.notices is None
    world.portal.send_mails()
    world.portal.prune()
    world.close()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"server": "a b"}, "server"),
        ({"server": ""}, "server"),
        ({"port": 0}, "port"),
        ({"sender": "nobody"}, "sender"),
        ({"sender": "a@b\r\nBcc: c@d"}, "sender"),
        ({"domain": "a b"}, "domain"),
        ({"user": "portal"}, "password"),
        ({"password": PASSWORD}, "password"),
        ({"user": "portal", "password": PASSWORD, "insecure": True}, "insecure"),
        ({"insecure": "perhaps"}, "insecure"),
        ({"ca": "/nonexistent/ca.pem"}, "ca"),
        ({"tls": False}, "tls"),
    ],
)
def test_a_fault_in_the_section_is_told_by_its_key(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(mail=MAIL | changes)
    assert field in caught.value.messages["mail"]


def ends_in(world: World, seconds: float, sid: str = SID, lifetime_s: int = 7200) -> None:
    """A running desktop, so long before its end."""
    if world.reader.session(sid) is None:
        world.session(sid, "alice", lifetime_s=lifetime_s)
    session = world.reader.session(sid)
    assert session
    world.clock.now += session.changed_at + session.lifetime_s - seconds - world.clock.wall()


def subjects(server: Server) -> list[str]:
    return [message_of(envelope)["Subject"] for envelope in server.got]


def test_an_end_is_told_30_and_5_minutes_before_each_once(world: World, server: Server) -> None:
    for left in (1900, 1790, 1700, 299, 200, 10):
        ends_in(world, left)
        world.portal.send_mails()
    assert subjects(server) == [
        "Your desktop ends in 30 min: Linux desktop",
        "Your desktop ends in 5 min: Linux desktop",
    ]
    message = message_of(server.got[0])
    assert "https://portal.example.org/desktops\r\n" in message.get_content()
    assert message["Message-ID"] != message_of(server.got[1])["Message-ID"]


def test_a_portal_that_was_off_tells_an_end_once_as_it_is_now(world: World, server: Server) -> None:
    ends_in(world, 200)
    world.portal.send_mails()
    assert subjects(server) == ["Your desktop ends in 3 min: Linux desktop"]


def test_who_let_it_last_longer_is_told_again_at_the_new_end(world: World, server: Server) -> None:
    ends_in(world, 1790)
    world.portal.send_mails()
    before = world.reader.session(SID)
    assert before
    with world.writer.begin() as tx:
        tx.save(before, replace(before, lifetime_s=before.lifetime_s + 3600), Event.EXTEND)
    world.portal.send_mails()
    ends_in(world, 1790)
    world.portal.send_mails()
    assert len(server.got) == 2


def test_a_mail_that_could_not_be_sent_before_a_desktop_lasted_longer_is_needless(world: World, server: Server) -> None:
    server.close()
    ends_in(world, 1790)
    world.portal.send_mails()
    before = world.reader.session(SID)
    assert before
    with world.writer.begin() as tx:
        tx.save(before, replace(before, lifetime_s=before.lifetime_s + 36000), Event.EXTEND)
    world.clock.now += 200
    world.portal.send_mails()
    with world.portal.store.reading() as connection:
        assert [row.state for row in connection.execute(select(tables.notice))] == ["needless"]


@pytest.mark.parametrize(("lifetime_s", "left"), [(1800, 1700), (3000, 1700), (500, 200)])
def test_what_lasts_hardly_longer_than_the_warning_is_not_warned_of(
    world: World, server: Server, lifetime_s: int, left: float
) -> None:
    ends_in(world, left, lifetime_s=lifetime_s)
    world.portal.send_mails()
    assert not server.got


def test_a_site_may_send_no_mails_before_an_end(world: World, server: Server, authority: Authority) -> None:
    quiet = world.build(mail=MAIL | {"port": server.port, "ca": authority.ca, "mail_before_end": False})
    ends_in(world, 200)
    quiet.send_mails()
    assert not server.got
