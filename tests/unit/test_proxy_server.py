"""The server on real sockets, with a host that does as it is told: every refusal, limits, cuts, draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time

import pytest
from support.consoles import GRANT, head
from support.proxy_stage import GRANTED, PATIENCE, Host, S, T, play, request, stage, until

from deskfleet.proxy.handshake import MAX_HEAD
from deskfleet.proxy.routes import RouteTable
from deskfleet.proxy.server import Limits
from deskfleet.schemas.host import Phase
from deskfleet.schemas.messages import SessionChanged
from deskfleet.schemas.session import Outcome, State


def test_a_console_opens_and_carries_bytes() -> None:
    async def act() -> None:
        async with stage(host=Host(GRANTED + b"\x82\x0cRFB 003.008\n")) as on:
            reader, writer = await on.open()
            assert await reader.readexactly(len(GRANTED) + 14) == GRANTED + b"\x82\x0cRFB 003.008\n"
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert on.host.heads[0].startswith(b"GET /websockify?token=" + S.encode() + b".")
            assert b"Cookie" not in on.host.heads[0]
            writer.close()
            await until(lambda: not on.server.tunnels)
            assert (on.stats.opened, on.stats.up, on.stats.down) == (1, 5, 5)
            assert on.stats.endings == {"closed": 1}

    play(act)


def test_what_is_wrong_with_the_request_never_reaches_the_host() -> None:
    async def act() -> None:
        async with stage() as on:
            good = request()
            for data, expected in (
                (head(method="POST"), (400, "bad_request")),
                (good + b"GET /secret HTTP/1.1\r\nHost: x\r\n\r\n", (400, "bad_request")),
                (good.replace(b"websocket", b"foo"), (400, "bad_request")),
                (good.replace(b"keep-alive, Upgrade", b"keep-alive"), (400, "bad_request")),
                (good.replace(b": 13", b": 777"), (400, "bad_request")),
                (good.replace(b"\r\n", b"\n"), (400, "bad_request")),
                (head("/"), (404, "no_such_path")),
                (request(origin="https://evil.example"), (403, "bad_origin")),
                (head(), (403, "bad_ticket")),
                (request("c" * 32), (409, "session_ended")),
                (request(host="h9"), (502, "host_silent")),
                (request(generation=6), (409, "session_moved")),
                (good[:-4] + b"\r\nX: " + b"x" * 3 * MAX_HEAD + b"\r\n\r\n", (431, "head_too_large")),
            ):
                assert await on.refused(data) == expected
            assert on.host.heads == []
            assert on.stats.refused.total() == 13

    play(act)


def test_the_state_of_the_session_decides() -> None:
    async def act() -> None:
        async with stage() as on:
            on.hear({S: (7, Phase.STOPPING)})
            assert await on.refused() == (409, "session_ended")
            on.hear({S: (7, Phase.RUNNING)}, console="127.0.0.1:99999")
            assert await on.refused() == (502, "host_failed")
            fresh = RouteTable(600.0, 60.0)
            fresh.listening(time.monotonic())
            on.server._routes = fresh
            assert await on.refused() == (503, "not_ready")

    play(act)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", (502, "host_failed")),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", (403, "ticket_used")),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", (409, "session_ended")),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", (503, "host_full")),
        (GRANTED.replace(b"binary", b"other"), (502, "host_failed")),
        (b"RFB 003.008\n\r\n\r\n", (502, "host_failed")),
    ],
)
def test_a_host_that_says_something_else(says: bytes, expected: tuple[int, str]) -> None:
    async def act() -> None:
        async with stage(host=Host(says)) as on:
            assert await on.refused() == expected
            assert on.host.got == b""
            assert on.server._taken == {}

    play(act)


def test_a_host_that_is_not_there_or_hangs_up_or_is_silent() -> None:
    async def act() -> None:
        async with stage(dial_s=0.3) as on:
            on.hear({S: (7, Phase.RUNNING)}, console="127.0.0.1:1")
            assert await on.refused() == (502, "host_failed")
        async with stage(dial_s=0.3, host=Host(pause=asyncio.Event())) as on:
            assert await on.refused() == (504, "host_timeout")
            assert on.host.heads
            on.host.pause.set()  # type: ignore[union-attr]

        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with stage() as on:
            on.host.serve = hang_up  # type: ignore[method-assign]
            other = await asyncio.start_server(hang_up, "127.0.0.1", 0)
            on.hear({S: (7, Phase.RUNNING)}, console=f"127.0.0.1:{other.sockets[0].getsockname()[1]}")
            assert await on.refused() == (502, "host_failed")
            other.close()

    play(act)


@pytest.mark.parametrize("address", ["192.0.2.1:6080", "[2001:db8::1]:6080", "0.0.0.0:6080", "[::ffff:192.0.2.1]:80"])
def test_plain_hosts_are_dialled_on_loopback_only(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async def act() -> None:
        async with stage() as on:
            on.hear({S: (7, Phase.RUNNING)}, console=address)
            assert await on.refused() == (502, "host_failed")

    caplog.set_level(logging.INFO)
    play(act)
    assert "no TLS, and not on loopback" in caplog.text


@pytest.mark.parametrize("address", ["..:80", "a" * 64 + ":80", "no-such-name.invalid:80", "[::1%nope]:80"])
def test_an_address_that_means_nothing_is_the_hosts_failure(address: str) -> None:
    async def act() -> None:
        async with stage(plain_anywhere=True) as on:
            on.hear({S: (7, Phase.RUNNING)}, console=address)
            assert await on.refused() in ((502, "host_failed"), (504, "host_timeout"))
            assert on.server._taken == {}

    play(act)


def test_the_limits_count_open_and_opening_consoles_and_give_back() -> None:
    async def act() -> None:
        async with stage(Limits(tunnels=3, per_session=2)) as on:
            first, _ = await on.connect(), await on.connect()
            assert await on.refused() == (429, "session_full")
            on.hear({S: (7, Phase.RUNNING), T: (7, Phase.RUNNING)})
            await on.connect(T)
            assert await on.refused(request(T)) == (503, "proxy_full")
            first[1].close()
            await until(lambda: len(on.server.tunnels) == 2)
            await on.connect(S)
            on.host.pause = asyncio.Event()
            assert await on.refused(request(T)) == (503, "proxy_full")

    play(act)


def test_an_unfinished_head_ends_in_time() -> None:
    async def act() -> None:
        async with stage(Limits(head_s=0.2)) as on:
            assert await on.refused(b"GET /console") == (408, "head_timeout")
            assert await on.refused(b"") == (408, "head_timeout")

    play(act)


def test_slow_heads_do_not_keep_a_prompt_browser_out() -> None:
    """Slowloris: more dawdling connections than there is room for."""

    async def act() -> None:
        async with stage(Limits(heads=5, head_s=PATIENCE * 2)) as on:
            slow = []
            for _ in range(20):
                slow.append(await on.open(b"GET /console?"))
                await until(lambda: len(on.server._waiting) == min(len(slow), 5))
            reader, writer = await on.connect()
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            for oldest, _ in slow[:15]:
                assert (await oldest.read()).startswith(b"HTTP/1.1 503 ")
            assert on.stats.refused["proxy_full"] >= 15
            assert len(on.server._waiting) <= 5
            for _, writer in slow:
                writer.close()

    play(act)


def test_a_browser_that_leaves_early_costs_nothing() -> None:
    async def act() -> None:
        async with stage() as on:
            for data in (b"", b"GET", request()[:-2]):
                _, writer = await on.open(data)
                await until(lambda: len(on.server._tasks) == 1)
                writer.close()
                await until(lambda: not on.server._tasks)
            assert not on.stats.refused

    play(act)


def test_no_byte_of_the_browser_passes_before_the_hosts_101() -> None:
    async def act() -> None:
        async with stage(host=Host(pause=asyncio.Event())) as on:
            reader, writer = await on.open()
            await until(lambda: bool(on.host.heads))
            writer.write(b"eager")
            await writer.drain()
            await asyncio.sleep(0.1)
            assert on.host.got == b""
            on.host.pause.set()  # type: ignore[union-attr]
            assert await reader.readexactly(len(GRANTED) + 5) == GRANTED + b"eager"

    play(act)


def over(sid: str = S) -> SessionChanged:
    return SessionChanged(sid, State.STOPPING, Outcome.STOPPED, "h1", 7)


def test_a_cut_ends_the_sessions_consoles_and_no_other() -> None:
    async def act() -> None:
        async with stage() as on:
            on.hear({S: (7, Phase.RUNNING), T: (7, Phase.RUNNING)})
            mine = [await on.connect(), await on.connect()]
            other, other_writer = await on.connect(T)
            assert on.server.cut(S, "h2") == 0, "another host may not cut it"
            assert on.routes.announce("scheduler", over(), time.monotonic())
            assert on.server.cut(S) == 2
            for reader, _ in mine:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            other_writer.write(b"still here")
            assert await other.readexactly(10) == b"still here"
            assert await on.refused() == (409, "session_ended")
            assert on.stats.endings == {"cut": 2}

    play(act)


def test_a_heartbeat_without_the_guest_cuts_too() -> None:
    async def act() -> None:
        async with stage() as on:
            reader, _ = await on.connect()
            on.hear({T: (8, Phase.RUNNING)})
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            assert on.server.tunnels == []

    play(act)


def test_c20_a_right_that_is_taken_back_ends_what_was_opened_by_it_and_opens_nothing_more() -> None:
    async def act() -> None:
        async with stage() as on:
            by_link = "share-" + "1" * 16
            mine, mine_writer = await on.connect()
            guest, _ = await on.connect(grant=by_link)
            assert sorted(console.grant for console in on.server.consoles(S)) == sorted([GRANT, by_link])
            assert on.server.consoles(T) == ()
            assert on.server.revoke(by_link) == 1
            with contextlib.suppress(ConnectionResetError):
                assert await guest.read() == b""
            mine_writer.write(b"still here")
            assert await mine.readexactly(10) == b"still here"
            assert await on.refused(request(grant=by_link)) == (403, "revoked")
            assert [console.grant for console in on.server.consoles(S)] == [GRANT]

    play(act)


def test_c20_a_right_that_is_taken_back_while_the_host_is_asked_opens_nothing() -> None:
    async def act() -> None:
        async with stage(host=Host(pause=asyncio.Event())) as on:
            waiting = asyncio.create_task(on.refused())
            await until(lambda: bool(on.host.heads))
            assert on.server.revoke(GRANT) == 0
            on.host.pause.set()  # type: ignore[union-attr]
            assert await waiting == (403, "revoked")
            assert on.server._taken == {}

    play(act)


def test_a_session_that_ends_while_the_host_is_asked_is_not_opened() -> None:
    async def act() -> None:
        async with stage(host=Host(pause=asyncio.Event())) as on:
            waiting = asyncio.create_task(on.refused())
            await until(lambda: bool(on.host.heads))
            on.routes.announce("scheduler", over(), time.monotonic())
            assert on.server.cut(S) == 0
            on.host.pause.set()  # type: ignore[union-attr]
            assert await waiting == (409, "session_ended")
            assert on.server._taken == {}

    play(act)


def test_draining_serves_what_is_there_and_takes_nothing_new() -> None:
    async def act() -> None:
        async with stage() as on:
            reader, writer = await on.connect()
            queued = await on.open(b"")
            on.server.stop_accepting()
            with pytest.raises(ConnectionRefusedError):
                await on.open()
            queued[1].write(request())
            await queued[0].readuntil(b"\r\n\r\n")
            draining = asyncio.create_task(on.server.drain(PATIENCE, asyncio.Event()))
            writer.write(b"alive")
            assert await reader.readexactly(5) == b"alive"
            writer.close()
            await until(lambda: len(on.server.tunnels) == 1)
            assert not draining.done()
            queued[1].close()
            await draining
            assert on.stats.endings == {"closed": 2}

    play(act)


@pytest.mark.parametrize("hurried", [False, True])
def test_draining_ends_at_its_deadline_or_in_a_hurry(hurried: bool) -> None:
    async def act() -> None:
        async with stage() as on:
            reader, _ = await on.connect()
            on.server.stop_accepting()
            hurry = asyncio.Event()
            draining = asyncio.create_task(on.server.drain(PATIENCE if hurried else 0.2, hurry))
            if hurried:
                hurry.set()
            await draining
            assert await reader.read() == b""
            assert on.stats.endings == {"drained": 1}

    play(act)


def test_a_second_process_takes_the_port_while_the_first_drains() -> None:
    async def act() -> None:
        async with stage() as old, stage() as new:
            old_reader, old_writer = await old.connect()
            new.server.listen("127.0.0.1", old.port)
            old.server.stop_accepting()
            reader, writer = await new.open(port=old.port)
            await reader.readuntil(b"\r\n\r\n")
            assert len(new.server.tunnels) == 1
            old_writer.write(b"x")
            assert await old_reader.readexactly(1) == b"x"
            writer.close()

    play(act)


@pytest.mark.parametrize(("listen", "dial"), [("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1")])
def test_ipv6_listeners(listen: str, dial: str) -> None:
    async def act() -> None:
        async with stage(address=listen) as on:
            reader, writer = await on.open(address=dial)
            await reader.readuntil(b"\r\n\r\n")
            assert f"X-Forwarded-For: {dial}\r\n".encode() in on.host.heads[0]
            writer.close()

    play(act)


def test_running_out_of_files_pauses_accepting_and_goes_on() -> None:
    async def act() -> None:
        async with stage() as on:
            loop = asyncio.get_running_loop()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with socket.socket() as client:
                client.setblocking(False)
                lowest_free = os.dup(0)
                os.close(lowest_free)
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
                    await loop.sock_connect(client, ("127.0.0.1", on.port))
                    await loop.sock_sendall(client, request())
                    await asyncio.sleep(0.3)
                    assert not on.server._tasks
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert (await loop.sock_recv(client, 4096)).startswith(b"HTTP/1.1 101 ")

    play(act)


def test_no_ticket_and_no_query_in_any_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets: list[str] = []

    async def act() -> None:
        async with stage() as on:
            for changes in ({}, {"origin": "https://evil.example"}, {"method": "POST"}, {"sec_websocket_version": "1"}):
                data = request(**changes)
                secrets.append(data.split(b"ticket=")[1].split(b" ")[0].decode())
                _, writer = await on.open(data)
                await until(lambda: not on.server._tasks)
                writer.close()
            for head_ in on.host.heads:
                secrets.append(head_.split(b"token=")[1].split(b" ")[0].decode().partition(".")[2])
            await until(lambda: not on.server.tunnels)

    play(act)
    assert "opened by ana@example.org from 127.0.0.1" in caplog.text
    assert "console closed" in caplog.text
    assert len(secrets) == 5
    for secret in [*secrets, "ticket=", "token="]:
        assert secret not in caplog.text
