"""The request head, the request to the host and its answer, without I/O."""

from __future__ import annotations

import contextlib
import json

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.consoles import ORIGIN, WS_KEY, head

from deskfleet.proxy.handshake import (
    MAX_HEAD,
    HostHandshake,
    Upgrade,
    accept,
    check_origin,
    complete,
    parse_upgrade,
    switching,
)
from deskfleet.proxy.refusals import ANSWERS, Refusal, Refused, answer

HOST_101 = (
    b"HTTP/1.1 101 Switching Protocols\r\nServer: x\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + accept(WS_KEY.encode()) + b"\r\nSec-WebSocket-Protocol: binary\r\n\r\n"
)


def refused(data: bytes) -> Refused:
    """How the whole path judges the bytes; they must be judged now, not waited for."""
    with pytest.raises(Refusal) as caught:
        assert complete(data), "taken for an unfinished head"
        parse_upgrade(data, "/console")
    return caught.value.reason


def upgrade(**changed: object) -> Upgrade:
    plain = {"ticket": "t", "key": WS_KEY.encode(), "binary": True, "origin": ORIGIN, "cookie": False, "forwarded": ""}
    return Upgrade(**{**plain, **changed})  # type: ignore[arg-type]


def test_a_browsers_request_is_understood() -> None:
    data = head("/console?ticket=abc.DEF_-9", extra=("Cookie: a=b", "User-Agent: caf\xe9", "X-Forwarded-For: 10.0.0.1"))
    assert complete(data)
    assert parse_upgrade(data, "/console") == upgrade(ticket="abc.DEF_-9", cookie=True, forwarded="10.0.0.1")


def test_a_head_may_arrive_byte_by_byte() -> None:
    data = head()
    assert [complete(data[:end]) for end in range(len(data) + 1)] == [False] * len(data) + [True]


def test_the_answer_to_the_example_of_the_rfc() -> None:
    assert accept(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 section 1.3


def test_protocols_other_than_binary_are_dropped() -> None:
    assert parse_upgrade(head(sec_websocket_protocol="base64, Binary"), "/console").binary
    assert not parse_upgrade(head(sec_websocket_protocol="base64"), "/console").binary
    assert not parse_upgrade(head(without=("sec-websocket-protocol",)), "/console").binary


@pytest.mark.parametrize(
    "data",
    [
        head(method="POST"),
        head(method="HEAD"),
        head(method="CONNECT"),
        head(version="HTTP/1.0"),
        head(version="HTTP/2.0"),
        head("http://portal.example/console?ticket=t"),
        head("//portal.example/console?ticket=t").replace(b"GET //", b"GET x//"),
        head("*"),
        head(without=("host",)),
        head(without=("upgrade",)),
        head(without=("connection",)),
        head(without=("sec-websocket-key",)),
        head(without=("sec-websocket-version",)),
        head(upgrade="h2c"),
        head(upgrade="websocket, h2c"),
        head(connection="keep-alive"),
        head(connection="upgraded"),
        head(sec_websocket_version="8"),
        head(sec_websocket_version="13, 8"),
        head(sec_websocket_key="c2hvcnQ="),
        head(sec_websocket_key="!" * 24),
        head(sec_websocket_key=WS_KEY[:-2] + "A="),
        head(extra=("Content-Length: 0",)),
        head(extra=("content-length: 5",)),
        head(extra=("Transfer-Encoding: chunked",)),
        head(extra=("Transfer-Encoding: identity",)),
        head(extra=("Host: other.example",)),
        head(extra=("Upgrade: websocket",)),
        head(extra=("Connection: Upgrade",)),
        head(extra=("Origin: https://evil.example",)),
        head(extra=(f"Sec-WebSocket-Key: {WS_KEY}",)),
        head(extra=("Sec-WebSocket-Version: 13",)),
        head(extra=("Sec-WebSocket-Protocol: binary",)),
        head(extra=("X-Forwarded-For: 10.0.0.1", "x-forwarded-for: 10.0.0.2")),
        head(extra=("X-Folded: a", " b")),
        head(extra=("X-Folded: a", "\tb")),
        head(extra=("X-Nul: a\0b",)),
        head(extra=("X Space: a",)),
        head(extra=("X-Space : a",)),
        head(extra=(": a",)),
        head(extra=("no colon",)),
        head().replace(b"\r\n", b"\n"),
        head().replace(b"Origin", b"X: a\nOrigin"),
        head().replace(b"Origin", b"X: a\rOrigin"),
        head() + b"GET /secret HTTP/1.1\r\nHost: x\r\n\r\n",
        head() + b"x",
        b"\r\n" + head(),
        b"\r\n\r\n",
        b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4",
        b"GET /console?ticket=t\r\n\r\n",
    ],
)
def test_what_is_no_upgrade_is_a_bad_request(data: bytes) -> None:
    assert refused(data) is Refused.BAD_REQUEST


@pytest.mark.parametrize("target", ["/", "/consol?ticket=t", "/console/?ticket=t", "/Console?ticket=t", "//console"])
def test_only_one_path_is_served(target: str) -> None:
    assert refused(head(target)) is Refused.NO_SUCH_PATH


@pytest.mark.parametrize(
    "query",
    ["", "?", "?ticket", "?ticket=", "?token=t", "?ticket=t&ticket=u", "?ticket=t&x=1", "?x=1&ticket=t", "?ticket=%41",
     "?Ticket=t", "?ticket=t#f", f"?ticket={'t' * 4097}"],
)  # fmt: skip
def test_the_query_is_exactly_one_ticket(query: str) -> None:
    assert refused(head(f"/console{query}")) is Refused.BAD_TICKET


def test_a_long_head_is_refused_as_soon_as_it_is_too_long() -> None:
    cookies = tuple(f"Cookie: c{number}=x" for number in range(100))
    assert complete(head(extra=cookies))
    endless = head(extra=("X: " + "x" * MAX_HEAD,)).removesuffix(b"\r\n\r\n")
    assert refused(endless) is Refused.HEAD_TOO_LARGE
    assert refused(endless + b"\r\n\r\n") is Refused.HEAD_TOO_LARGE
    fits = head(extra=("X: " + "x" * (MAX_HEAD - len(head()) - 5),))
    assert len(fits) == MAX_HEAD
    assert complete(fits)


@given(
    st.lists(st.sampled_from([head(), b"\r\n", b"\n", b"\0", b" ", b"GET / HTTP/1.1", b"Host: x", b":"])), st.binary()
)
@settings(max_examples=300)
def test_no_bytes_do_anything_but_pass_or_be_refused(parts: list[bytes], noise: bytes) -> None:
    data = b"".join(parts) + noise
    try:
        if complete(data):
            parse_upgrade(data, "/console")
    except Refusal as refusal:
        assert answer(refusal).startswith(b"HTTP/1.1 4")


@given(st.integers(0, len(head()) - 1), st.binary(min_size=0, max_size=3))
@settings(max_examples=500)
def test_a_damaged_head_never_smuggles_anything_to_the_host(at: int, put: bytes) -> None:
    data = head()[:at] + put + head()[at + 1 :]
    with contextlib.suppress(Refusal):
        if complete(data):
            parsed = parse_upgrade(data, "/console")
            request = HostHandshake("h:1", "token", parsed, "192.0.2.1").request
            host = h11.Connection(h11.SERVER)
            host.receive_data(request)
            event = host.next_event()
            assert isinstance(event, h11.Request)
            assert event.target == b"/websockify?token=token"
            assert {name for name, _ in event.headers} <= {
                b"host", b"upgrade", b"connection", b"sec-websocket-key", b"sec-websocket-version",
                b"sec-websocket-protocol", b"x-forwarded-for",
            }  # fmt: skip
            assert host.trailing_data == (b"", False)


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example", "null", "", "http://portal.example", "https://portal.example:8443",
        "https://portal.example:443", "https://portal.example.evil", "https://evil.portal.example",
        "HTTPS://PORTAL.EXAMPLE", "https://Portal.example", "https://portal.example/", "https://portal.example.",
        "https://portal.example https://portal.example", "http://localhost", "http://127.0.0.1", "https://[::1]", "*",
        "https://portal.example\xe9", "https://portal.example@evil.example",
    ],
)  # fmt: skip
@pytest.mark.parametrize("may_omit", [False, True])
def test_a_foreign_origin_is_refused(origin: str, may_omit: bool) -> None:
    parsed = parse_upgrade(head(origin=origin), "/console")
    with pytest.raises(Refusal) as caught:
        check_origin(parsed, {ORIGIN, "https://other.example:8443"}, may_omit)
    assert caught.value.reason is Refused.BAD_ORIGIN


def test_the_listed_origins_pass() -> None:
    for origin in (ORIGIN, "https://other.example:8443"):
        check_origin(parse_upgrade(head(origin=origin), "/console"), {ORIGIN, "https://other.example:8443"}, False)


def test_a_missing_origin_needs_a_known_program_without_a_cookie() -> None:
    bare = parse_upgrade(head(without=("origin",)), "/console")
    check_origin(bare, {ORIGIN}, True)
    with pytest.raises(Refusal):
        check_origin(bare, {ORIGIN}, False)
    with pytest.raises(Refusal):
        check_origin(parse_upgrade(head(without=("origin",), extra=("Cookie: a=b",)), "/console"), {ORIGIN}, True)


def test_the_request_to_the_host_is_ours() -> None:
    parsed = parse_upgrade(head(extra=("Cookie: secret", "Sec-WebSocket-Extensions: permessage-deflate")), "/console")
    assert HostHandshake("[::1]:6080", "sid.nonce", parsed, "2001:db8::1").request == (
        b"GET /websockify?token=sid.nonce HTTP/1.1\r\nHost: [::1]:6080\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: " + WS_KEY.encode() + b"\r\nSec-WebSocket-Version: 13\r\n"
        b"X-Forwarded-For: 2001:db8::1\r\nSec-WebSocket-Protocol: binary\r\n\r\n"
    )


def shake(*parts: bytes, binary: bool = True) -> bytes:
    """What the browser is sent when the host answers in these parts."""
    asked = upgrade(binary=binary)
    host = HostHandshake("h:1", "token", asked, "192.0.2.1")
    for part in parts[:-1]:
        assert host.feed(part) is None
    granted = host.feed(parts[-1])
    assert granted is not None
    return switching(asked, granted) + granted.early


def test_the_browser_gets_our_101_and_the_hosts_first_frames() -> None:
    ours = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept(WS_KEY.encode()) + b"\r\nSec-WebSocket-Protocol: binary\r\n\r\n"
    )
    evil = HOST_101.replace(b"Server: x", b"Set-Cookie: __Host-session=stolen")
    assert shake(evil + b"\x82\x0cRFB 003.008\n") == ours + b"\x82\x0cRFB 003.008\n"
    assert shake(*(HOST_101[at : at + 1] for at in range(len(HOST_101)))) == ours
    plain = HOST_101.replace(b"Sec-WebSocket-Protocol: binary\r\n", b"")
    assert shake(plain) == shake(plain, binary=False) == ours.replace(b"Sec-WebSocket-Protocol: binary\r\n", b"")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Refused.HOST_FAILED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret", Refused.HOST_FAILED),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", Refused.HOST_FAILED),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Refused.HOST_FAILED),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", Refused.TICKET_USED),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Refused.SESSION_ENDED),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", Refused.HOST_FULL),
        (b"RFB 003.008\n" + bytes(20_000), Refused.HOST_FAILED),
        (b"SSH-2.0-OpenSSH\r\n\r\n", Refused.HOST_FAILED),
        (HOST_101.replace(b"\r\n", b"\n").replace(b"\n\n", b"\r\n\r\n"), Refused.HOST_FAILED),
        (HOST_101.replace(accept(WS_KEY.encode()), accept(b"other")), Refused.HOST_FAILED),
        (HOST_101.replace(b"binary", b"base64"), Refused.HOST_FAILED),
        (HOST_101.replace(b"Server: x", b"Sec-WebSocket-Extensions: permessage-deflate"), Refused.HOST_FAILED),
        (HOST_101.replace(b"Server: x", b"Sec-WebSocket-Protocol: binary"), Refused.HOST_FAILED),
        (HOST_101.replace(b"WebSocket\r", b"h2c\r"), Refused.HOST_FAILED),
        (HOST_101.replace(b"Connection: Upgrade", b"Connection: close"), Refused.HOST_FAILED),
        (HOST_101.replace(b"Server: x", b"X: " + b"x" * MAX_HEAD)[:-4], Refused.HOST_FAILED),
    ],
)
def test_a_host_that_does_not_agree_exactly_is_refused(text: bytes, reason: Refused) -> None:
    with pytest.raises(Refusal) as caught:
        shake(text)
    assert caught.value.reason is reason


@given(st.integers(0, len(HOST_101) - 1), st.binary(max_size=3))
@settings(max_examples=300)
def test_a_damaged_answer_passes_or_is_the_hosts_failure(at: int, put: bytes) -> None:
    host = HostHandshake("h:1", "token", upgrade(), "192.0.2.1")
    try:
        host.feed(HOST_101[:at] + put + HOST_101[at + 1 :])
    except Refusal as refusal:
        assert refusal.reason in (Refused.HOST_FAILED, Refused.TICKET_USED, Refused.SESSION_ENDED, Refused.HOST_FULL)


def test_every_refusal_is_a_small_http_answer_with_a_reason_and_a_sentence() -> None:
    assert set(ANSWERS) == set(Refused)
    for reason in Refused:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        client.receive_data(answer(Refusal(reason, "detail of ours")))
        response, body = client.next_event(), client.next_event()
        assert isinstance(response, h11.Response)
        assert isinstance(body, h11.Data)
        document = json.loads(bytes(body.data))
        assert document["reason"] == reason.value
        assert document["message"].endswith(".")
        assert ("detail of ours" in document["message"]) is (reason is Refused.BAD_REQUEST)
        assert (b"connection", b"close") in response.headers
