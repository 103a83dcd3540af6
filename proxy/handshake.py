"""The WebSocket handshake (RFC 6455 section 4) on both legs, without I/O.

The browser's head is parsed strictly and then thrown away: the host gets a request that is built here, the browser
gets an answer that is built here. Nothing that one side wrote is ever forwarded as it came, so no second request,
header or cookie can travel along. Extensions are never offered to the host, so no frame is compressed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import h11

from deskfleet.proxy.refusals import Refusal, Refused

MAX_HEAD = 16 * 1024
HOST_PATH = "/websockify"

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_LONE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_FOLD = re.compile(rb"\r\n[ \t]")
_TICKET = re.compile(r"[A-Za-z0-9_.-]{1,4096}")
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
#: Headers that may stand once at most: two of them could be read differently by two parsers.
_SINGLE = (
    b"host",
    b"upgrade",
    b"connection",
    b"origin",
    b"sec-websocket-key",
    b"sec-websocket-version",
    b"sec-websocket-protocol",
    b"x-forwarded-for",
)


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What a browser's request asks for; everything else that it said is forgotten.

    `origin` is None when the header is missing; `forwarded` is the X-Forwarded-For header, to be believed only from
    a known front proxy; `binary` says that the sub-protocol "binary" was offered.
    """

    ticket: str
    key: bytes
    binary: bool
    origin: str | None
    cookie: bool
    forwarded: str


@dataclass(frozen=True, slots=True)
class HostAnswer:
    """A host's 101: whether it chose the sub-protocol, and the first frames that came right behind its head."""

    binary: bool
    early: bytes


def complete(data: bytes) -> bool:
    """Whether a request head has arrived whole; call it with all bytes so far.

    Raises:
        Refusal: the head is too long or holds bytes that no head may hold, as soon as that can be seen; or bytes
            follow it. A browser sends nothing before it has the answer, so those can only be a second request.
    """
    end = data.find(b"\r\n\r\n") + 4
    if end > MAX_HEAD or (end < 4 and len(data) > MAX_HEAD):
        raise Refusal(Refused.HEAD_TOO_LARGE)
    _check_bytes(data if end < 4 else data[:end])
    if end < 4:
        return False
    if len(data) > end:
        raise Refusal(Refused.BAD_REQUEST, "bytes follow the request's head")
    return True


def _check_bytes(head: bytes) -> None:
    if b"\0" in head:
        raise Refusal(Refused.BAD_REQUEST, "a NUL byte in the head")
    if _LONE_LINE_END.search(head):
        raise Refusal(Refused.BAD_REQUEST, "a line does not end with CR LF")
    if _FOLD.search(head):
        raise Refusal(Refused.BAD_REQUEST, "a folded header line")


def parse_upgrade(head: bytes, path: str) -> Upgrade:
    """The console request that a complete head holds.

    Raises:
        Refusal: anything but a well-formed WebSocket upgrade (RFC 6455 section 4.2.1) of `path?ticket=...`.
    """
    _check_bytes(head)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    try:
        connection.receive_data(head)
        request = connection.next_event()
    except h11.ProtocolError:  # also no Host, or two; its text quotes the request, and with it the ticket
        raise Refusal(Refused.BAD_REQUEST, "malformed HTTP/1.1") from None
    if not isinstance(request, h11.Request) or request.http_version != b"1.1" or connection.trailing_data[0]:
        raise Refusal(Refused.BAD_REQUEST, "not one HTTP/1.1 request")
    if request.method != b"GET":
        raise Refusal(Refused.BAD_REQUEST, "the method is not GET")
    headers = _single(request.headers, _SINGLE)
    for name in (b"content-length", b"transfer-encoding"):
        if any(name == other for other, _ in request.headers):
            raise Refusal(Refused.BAD_REQUEST, f"{name.decode()} is not allowed")
    target = request.target.decode("ascii")
    if not target.startswith("/"):
        raise Refusal(Refused.BAD_REQUEST, "the target is not a path")
    asked, _, query = target.partition("?")
    if asked != path:
        raise Refusal(Refused.NO_SUCH_PATH)
    if headers.get(b"upgrade", b"").lower() != b"websocket":
        raise Refusal(Refused.BAD_REQUEST, "not an upgrade to websocket")
    if "upgrade" not in _list(headers.get(b"connection", b"")):
        raise Refusal(Refused.BAD_REQUEST, "the connection header does not name the upgrade")
    if headers.get(b"sec-websocket-version") != b"13":
        raise Refusal(Refused.BAD_REQUEST, "the WebSocket version is not 13")
    field, _, ticket = query.partition("=")
    if field != "ticket" or not _TICKET.fullmatch(ticket):
        raise Refusal(Refused.BAD_TICKET, "not exactly one ticket in the query")
    origin = headers.get(b"origin")
    return Upgrade(
        ticket=ticket,
        key=_key(headers.get(b"sec-websocket-key", b"")),
        binary="binary" in _list(headers.get(b"sec-websocket-protocol", b"")),
        origin=None if origin is None else origin.decode("latin-1"),
        cookie=any(name == b"cookie" for name, _ in request.headers),
        forwarded=headers.get(b"x-forwarded-for", b"").decode("latin-1"),
    )


def _single(headers: Iterable[tuple[bytes, bytes]], names: Collection[bytes]) -> dict[bytes, bytes]:
    """The named headers by lower-case name; two of one name are refused."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in names:
            if name in found:
                raise Refusal(Refused.BAD_REQUEST, f"two {name.decode()} headers")
            found[name] = value
    return found


def _list(value: bytes) -> list[str]:
    return [item.strip().lower() for item in value.decode("latin-1").split(",")]


def _key(value: bytes) -> bytes:
    try:
        if _KEY.fullmatch(value) and len(base64.b64decode(value, validate=True)) == 16:
            return value
    except binascii.Error:
        pass
    raise Refusal(Refused.BAD_REQUEST, "the WebSocket key is not 16 bytes in base64")


def check_origin(upgrade: Upgrade, allowed: Collection[str], may_omit: bool) -> None:
    """Let only the portal's own pages in: WebSockets are not bound by the same-origin policy (RFC 6455 section 10.2).

    `may_omit` says that the client's address belongs to a program that is no browser; it must not send a cookie,
    since that is what a browser would do.

    Raises:
        Refusal: the origin is not exactly an entry of `allowed`, or is missing.
    """
    if upgrade.origin is None:
        if may_omit and not upgrade.cookie:
            return
        raise Refusal(Refused.BAD_ORIGIN, "no origin")
    if upgrade.origin not in allowed:
        raise Refusal(Refused.BAD_ORIGIN, f"origin {upgrade.origin[:200]!r}")


def _host_connection(authority: str, token: str, upgrade: Upgrade, client: str) -> tuple[h11.Connection, bytes]:
    headers = [
        ("Host", authority),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", upgrade.key.decode()),
        ("Sec-WebSocket-Version", "13"),
        ("X-Forwarded-For", client),
    ]
    if upgrade.binary:
        headers.append(("Sec-WebSocket-Protocol", "binary"))
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    head = connection.send(h11.Request(method="GET", target=f"{HOST_PATH}?token={token}", headers=headers))
    return connection, head or b""


class HostHandshake:
    """The handshake with a host: `request` goes out first, then everything the host says goes into `feed`."""

    def __init__(self, authority: str, token: str, upgrade: Upgrade, client: str) -> None:
        self._connection, self.request = _host_connection(authority, token, upgrade, client)
        self._upgrade = upgrade
        self._data = b""

    def feed(self, data: bytes) -> HostAnswer | None:
        """The host's answer once it is whole, else None. Empty `data` means that the host closed.

        Raises:
            Refusal: the host said no, or something that is not exactly the 101 that belongs to our request.
        """
        if not data:
            raise Refusal(Refused.HOST_FAILED, "the host closed the connection instead of answering")
        self._data += data
        end = self._data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(self._data) > MAX_HEAD:
                raise Refusal(Refused.HOST_FAILED, "the host's answer is too long")
            return None
        try:
            _check_bytes(self._data[:end])
            self._connection.receive_data(self._data[:end])
            event = self._connection.next_event()
            return self._check(event, self._data[end:])
        except h11.ProtocolError:
            # Its text quotes what the host wrote, and a host may echo the token: keep it out of the log.
            raise Refusal(Refused.HOST_FAILED, "the host's answer is not HTTP/1.1") from None
        except Refusal as refusal:
            if refusal.reason is Refused.BAD_REQUEST:
                raise Refusal(Refused.HOST_FAILED, f"the host's answer: {refusal.detail}") from None
            raise

    def _check(self, event: object, early: bytes) -> HostAnswer:
        if isinstance(event, h11.Response) and event.status_code in _HOST_SAYS:
            raise Refusal(_HOST_SAYS[event.status_code], f"the host answered {event.status_code}")
        if not isinstance(event, h11.InformationalResponse) or event.status_code != 101:
            raise Refusal(Refused.HOST_FAILED, f"the host answered {getattr(event, 'status_code', 'nothing')}")
        headers = _single(
            event.headers,
            (
                b"upgrade",
                b"connection",
                b"sec-websocket-accept",
                b"sec-websocket-protocol",
                b"sec-websocket-extensions",
            ),
        )
        protocol = headers.get(b"sec-websocket-protocol")
        if (
            headers.get(b"upgrade", b"").lower() != b"websocket"
            or "upgrade" not in _list(headers.get(b"connection", b""))
            or headers.get(b"sec-websocket-accept") != accept(self._upgrade.key)
            or protocol not in ((None, b"binary") if self._upgrade.binary else (None,))
            or b"sec-websocket-extensions" in headers
        ):
            raise Refusal(Refused.HOST_FAILED, "the host's 101 does not answer our request")
        return HostAnswer(protocol is not None, early)


#: What a host's console server says about a token (deskfleet.agent.console), as the person should hear it.
_HOST_SAYS = {403: Refused.TICKET_USED, 404: Refused.SESSION_ENDED, 503: Refused.HOST_FULL}


def accept(key: bytes) -> bytes:
    """The Sec-WebSocket-Accept value for a key (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def switching(upgrade: Upgrade, host: HostAnswer) -> bytes:
    """Our own 101 to the browser. A host's headers never reach it: they could set cookies for the portal's name."""
    protocol = b"Sec-WebSocket-Protocol: binary\r\n" if host.binary else b""
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept(upgrade.key) + b"\r\n" + protocol + b"\r\n"
    )
