"""No password goes to a server that does not prove its name, or that hangs: LDAP, IMAP and SMTP; cases C07 and C08."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.bus_harness import TickingClock
from support.consoles import Authority, Pair
from support.eavesdropper import Eavesdropper
from support.portals import settings

from deskfleet.portal.auth import Answer, Realm, Unavailable, WrongPassword
from deskfleet.portal.auth_ldap import Directory
from deskfleet.portal.auth_mail import Imap, Smtp

PASSWORD = "the-canary-password"
PATIENCE_S = 60

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@dataclass(frozen=True)
class Protocol:
    """How far a server of this kind gets before TLS: `offers` with STARTTLS, `refuses` without."""

    kind: str
    greeting: bytes
    offers: Callable[[bytes], bytes]
    refuses: Callable[[bytes], bytes]
    upgrades: Callable[[bytes], bool]
    injected: bytes
    make: type[Directory] | type[Imap] | type[Smtp]


def _ldap(code: int) -> Callable[[bytes], bytes]:
    # RFC 4511: an extended response (tag 0x78) with a result code, to the message with this id.
    return lambda piece: b"\x30\x0c\x02\x01" + piece[4:5] + b"\x78\x07\x0a\x01" + bytes([code]) + b"\x04\x00\x04\x00"


def _imap(offer: bytes) -> Callable[[bytes], bytes]:
    def answer(piece: bytes) -> bytes:
        tag, _, command = piece.strip().partition(b" ")
        if command == b"CAPABILITY":
            return b"* CAPABILITY IMAP4rev1 " + offer + b" AUTH=PLAIN\r\n" + tag + b" OK done\r\n"
        if command == b"STARTTLS" and not offer:
            return tag + b" BAD what\r\n"
        if command == b"STARTTLS":
            return tag + b" OK done\r\n"
        return tag + b" NO [AUTHENTICATIONFAILED] wrong\r\n" if b"AUTHENTICATE" not in piece else b"+ \r\n"

    return answer


def _smtp(offer: bytes) -> Callable[[bytes], bytes]:
    def answer(piece: bytes) -> bytes:
        command = piece.strip().upper()
        if command.startswith(b"EHLO"):
            return b"250-here\r\n" + (b"250-" + offer + b"\r\n" if offer else b"") + b"250 AUTH PLAIN\r\n"
        if command == b"STARTTLS":
            return b"220 go\r\n" if offer else b"502 what\r\n"
        return b"535 wrong\r\n"

    return answer


PROTOCOLS = [
    Protocol("ldap", b"", _ldap(0), _ldap(2), lambda piece: b"1.3.6.1.4.1.1466.20037" in piece,
             b"\x30\x0c\x02\x01\x02\x61\x07\x0a\x01\x00\x04\x00\x04\x00", Directory),
    Protocol("imap", b"* OK hello\r\n", _imap(b"STARTTLS"), _imap(b""), lambda piece: b"STARTTLS" in piece,
             b"A3 OK you are in\r\nA4 OK you are in\r\n", Imap),
    Protocol("smtp", b"220 hello\r\n", _smtp(b"STARTTLS"), _smtp(b""), lambda piece: b"STARTTLS" in piece.upper(),
             b"250 AUTH PLAIN\r\n235 you are in\r\n", Smtp),
]  # fmt: skip


@pytest.fixture(params=PROTOCOLS, ids=lambda protocol: protocol.kind)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    found: Protocol = request.param
    return found


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def good(authority: Authority) -> ssl.SSLContext:
    return context(authority.issue("localhost", "serverAuth"))


def context(pair: Pair) -> ssl.SSLContext:
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.load_cert_chain(pair.cert, pair.key)
    return made


def expired(authority: Authority, folder: Path) -> Pair:
    """A certificate of the right authority and name whose time is over."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.load_pem_x509_certificate(Path(authority.ca).read_bytes())
    signer = serialization.load_pem_private_key((authority.folder / "ca.key").read_bytes(), None)
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    )
    pair = Pair(str(folder / "old.pem"), str(folder / "old.key"))
    Path(pair.cert).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    Path(pair.key).write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return pair


def method(protocol: Protocol, server: str, ca: str, **changes: Any) -> Any:
    values: dict[str, Any] = {"servers": [server], "ca": ca, "realm": "", "timeout_s": 2, **changes}
    if protocol.kind == "ldap":
        values |= {"base": "dc=example", "bind_dn": "cn=portal", "bind_password": PASSWORD}
    loaded = settings(auth=[protocol.kind], **{protocol.kind: values})
    return protocol.make(getattr(loaded, protocol.kind), Realm(""), TickingClock())


def checked(found: Any) -> Answer:
    """The answer, in a time that no hanging server could make."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(found.check("alice", PASSWORD)), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert answers, "the server hangs, and the portal hangs with it"
    return answers[0]


def leaked(server: Eavesdropper, kind: str) -> bool:
    heard = server.got + server.inside
    plain = base64.b64encode(f"\0alice\0{PASSWORD}".encode())
    return PASSWORD.encode() in heard or plain in heard or (kind == "ldap" and b"cn=portal" in heard)


@pytest.mark.parametrize("at_once", [False, True], ids=["starttls", "tls"])
@pytest.mark.parametrize("fault", ["name", "authority", "self-signed", "expired"])
def test_c07_a_server_that_does_not_prove_its_name_sees_nothing(
    protocol: Protocol, authority: Authority, good: ssl.SSLContext, tmp_path: Path, fault: str, at_once: bool
) -> None:
    host, ca, tls = "localhost", authority.ca, good
    if fault == "name":
        host = "127.0.0.1"
    elif fault == "authority":
        ca = Authority(tmp_path / "other", "another").ca
    elif fault == "self-signed":
        other = Authority(tmp_path / "self", "localhost")
        tls = context(Pair(other.ca, str(other.folder / "ca.key")))
    else:
        tls = context(expired(authority, tmp_path))
    with Eavesdropper(protocol.offers, protocol.greeting, tls, at_once, protocol.upgrades) as server:
        scheme = protocol.kind + "s" * at_once
        answer = checked(method(protocol, f"{scheme}://{host}:{server.port}", ca))
        assert isinstance(answer, Unavailable) and server.connections == 1
        assert not leaked(server, protocol.kind)


def test_c07_a_server_that_offers_no_starttls_sees_nothing(protocol: Protocol, authority: Authority) -> None:
    with Eavesdropper(protocol.refuses, protocol.greeting) as server:
        answer = checked(method(protocol, f"{protocol.kind}://localhost:{server.port}", authority.ca))
        assert isinstance(answer, Unavailable) and not leaked(server, protocol.kind)


def test_c07_a_server_that_says_yes_and_then_goes_on_in_clear_sees_nothing(
    protocol: Protocol, authority: Authority
) -> None:
    with Eavesdropper(protocol.offers, protocol.greeting) as server:
        answer = checked(method(protocol, f"{protocol.kind}://localhost:{server.port}", authority.ca))
        assert isinstance(answer, Unavailable) and not leaked(server, protocol.kind)


def test_c07_what_is_said_before_tls_is_not_believed_inside_it(
    protocol: Protocol, authority: Authority, good: ssl.SSLContext
) -> None:
    def injecting(piece: bytes) -> bytes:
        return protocol.offers(piece) + (protocol.injected if protocol.upgrades(piece) else b"")

    with Eavesdropper(injecting, protocol.greeting, good, False, protocol.upgrades) as server:
        answer = checked(method(protocol, f"{protocol.kind}://localhost:{server.port}", authority.ca))
        assert isinstance(answer, Unavailable | WrongPassword)
        # Either it ends there, or the server was asked inside TLS after all and nothing injected taken for its answer.
        ended = isinstance(answer, Unavailable) and not server.inside
        assert ended or (server.inside and leaked(server, protocol.kind))


def test_c07_in_clear_only_to_this_machine_or_by_a_word_that_says_so(protocol: Protocol, authority: Authority) -> None:
    with Eavesdropper(protocol.refuses, protocol.greeting) as server:
        local = method(protocol, f"{protocol.kind}://127.0.0.1:{server.port}", authority.ca, starttls=False)
        checked(local)
        assert leaked(server, protocol.kind), "the test's own ear works"


# C08.


@pytest.mark.parametrize("at_once", [False, True], ids=["starttls", "tls"])
def test_c08_a_server_that_accepts_and_stays_silent_is_away(
    protocol: Protocol, authority: Authority, at_once: bool
) -> None:
    with Eavesdropper(lambda _: b"") as server:
        scheme = protocol.kind + "s" * at_once
        found = method(protocol, f"{scheme}://localhost:{server.port}", authority.ca, timeout_s=1)
        assert isinstance(checked(found), Unavailable)
        again = checked(found)
        assert isinstance(again, Unavailable) and "rests" in again.detail and server.connections == 1


@pytest.fixture
def trickle() -> Iterator[Eavesdropper]:
    """One byte at a time, for ever, each well within the limit for one."""
    stop = threading.Event()

    def drip(server: Eavesdropper) -> None:
        while not stop.wait(0.2):
            for connection in list(server._open):
                try:
                    connection.sendall(b"\x30" if stop.is_set() else b"2")
                except OSError:
                    continue

    with Eavesdropper(lambda _: b"") as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        yield server
        stop.set()
        thread.join()


def test_c08_one_byte_after_another_is_no_answer_in_time(
    protocol: Protocol, authority: Authority, trickle: Eavesdropper
) -> None:
    found = method(protocol, f"{protocol.kind}://localhost:{trickle.port}", authority.ca, timeout_s=1)
    assert isinstance(checked(found), Unavailable)
