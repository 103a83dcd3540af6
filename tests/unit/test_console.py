"""The host's console server without a network: the token plugin, nonces, the command line."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskfleet.agent.console import (
    SOCKET,
    ConsoleServer,
    SessionToken,
    TokenRefused,
    UsedNonces,
    _Handler,
    _Redact,
    main,
)

S, N = "a" * 32, "1" * 32


class Place:
    """Folders as an agent makes them, with one display that listens."""

    def __init__(self, root: Path) -> None:
        self.run, self.nonces, self.outside = root / "run", root / "nonces", root / "outside"
        for folder in (self.run / S, self.nonces, self.outside / S):
            folder.mkdir(parents=True)
        self.display = listen(self.run / S / SOCKET)
        self.secret = listen(self.outside / S / SOCKET)
        self.plugin = SessionToken(self.run, self.nonces)

    def refused(self, token: str) -> HTTPStatus:
        before = os.listdir(self.nonces), len(os.listdir("/proc/self/fd"))
        with pytest.raises(TokenRefused) as caught:
            self.plugin.lookup(token)
        assert (os.listdir(self.nonces), len(os.listdir("/proc/self/fd"))) == before
        assert N not in str(caught.value)
        return caught.value.status


def listen(path: Path) -> socket.socket:
    """A listening socket; the path may be longer than a socket's address can be."""
    folder = os.open(path.parent, os.O_PATH)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)
    listener.listen()
    return listener


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.display.close()
    made.secret.close()


def connected(target: str, listener: socket.socket) -> bool:
    """Whether the target of a token leads to this display."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(target)
        os.close(int(target.rpartition("/")[2]))
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            return True
    return False


def test_a_token_opens_its_display_once(place: Place) -> None:
    kind, target = place.plugin.lookup(f"{S}.{N}")
    assert kind == "unix_socket"
    assert connected(target, place.display)
    assert place.refused(f"{S}.{N}") is HTTPStatus.FORBIDDEN
    assert (place.nonces / N).stat().st_mode & 0o777 == 0o600
    assert connected(place.plugin.lookup(f"{S}.{'2' * 32}")[1], place.display)


def test_a_nonce_is_used_up_for_every_session(place: Place) -> None:
    (place.run / ("b" * 32)).mkdir()
    with listen(place.run / ("b" * 32) / SOCKET) as other:
        assert connected(place.plugin.lookup(f"{'b' * 32}.{N}")[1], other)
    assert place.refused(f"{S}.{N}") is HTTPStatus.FORBIDDEN


def test_many_at_once_are_one_use(place: Place) -> None:
    def use(_: int) -> bool:
        try:
            os.close(int(place.plugin.lookup(f"{S}.{N}")[1].rpartition("/")[2]))
        except TokenRefused:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(use, range(50))) == 1


@pytest.mark.parametrize(
    "token",
    [
        "", ".", S, f"{S}.", f".{N}", f"{S}{N}", f"{S}:{N}", f"{S}.{N}.{N}", f"{S}.{N}\n", f"\n{S}.{N}", f"{S}.{N} ",
        f"{S.upper()}.{N}", f"{S}.{N[:-1]}", f"{S}.{N}0", f"../outside/{S}.{N}", f"{S}/../../outside/{S}.{N}",
        f"/etc/passwd.{N}", f"{'.' * 32}.{N}", f"{'../' * 10}aa.{N}", f"{S}.{'../' * 10}aa", f"{S}\0.{N}",
        f"{S[:-1]}\u0430.{N}", f"{S}.{N[:-1]}\u0661",
    ],
)  # fmt: skip
def test_what_is_no_token_is_a_bad_request(place: Place, token: str) -> None:
    assert place.refused(token) is HTTPStatus.BAD_REQUEST


@given(st.text())
def test_no_text_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("p")
    with pytest.raises(TokenRefused):
        SessionToken(folder, folder).lookup(text)


def test_a_session_that_is_not_here(place: Place) -> None:
    assert place.refused(f"{'c' * 32}.{N}") is HTTPStatus.NOT_FOUND
    (place.run / ("c" * 32)).mkdir()
    assert place.refused(f"{'c' * 32}.{N}") is HTTPStatus.NOT_FOUND


@pytest.mark.parametrize("what", ["file", "folder", "fifo", "link to a socket", "dangling link"])
def test_only_a_socket_itself_is_a_display(place: Place, what: str) -> None:
    path = place.run / ("c" * 32) / SOCKET
    path.parent.mkdir()
    if what == "file":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link to a socket":
        path.symlink_to(place.outside / S / SOCKET)
    else:
        path.symlink_to("nowhere")
    assert place.refused(f"{'c' * 32}.{N}") is HTTPStatus.NOT_FOUND


def test_a_link_in_place_of_the_sessions_folder_is_not_followed(place: Place) -> None:
    (place.run / ("c" * 32)).symlink_to(place.outside / S)
    assert place.refused(f"{'c' * 32}.{N}") is HTTPStatus.NOT_FOUND
    (place.run / ("d" * 32)).symlink_to(place.run / S)
    assert place.refused(f"{'d' * 32}.{N}") is HTTPStatus.NOT_FOUND


def test_a_link_put_there_after_the_check_changes_nothing(place: Place) -> None:
    _, target = place.plugin.lookup(f"{S}.{N}")
    (place.run / S / SOCKET).unlink()
    (place.run / S / SOCKET).symlink_to(place.outside / S / SOCKET)
    assert connected(target, place.display)


def test_a_use_that_cannot_be_recorded_opens_nothing(place: Place) -> None:
    place.nonces.rmdir()
    with pytest.raises(TokenRefused) as caught:
        place.plugin.lookup(f"{S}.{N}")
    assert caught.value.status is HTTPStatus.INTERNAL_SERVER_ERROR


@pytest.mark.parametrize(("lowest", "status"), [(3, b"404"), (1016, b"503")])
def test_a_connection_that_select_could_not_watch_is_refused(tmp_path: Path, lowest: int, status: bytes) -> None:
    """select(2) ends at file number 1023; beyond, websockify would accept a console and then lose it."""

    class Server:
        token_plugin = SessionToken(tmp_path, tmp_path)
        only_upgrade = True
        EClose = ConsoleServer.EClose

    ours, theirs = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    placed = socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD, lowest))
    try:
        ours.sendall(
            f"GET /websockify?token={S}.{N} HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {'A' * 22}==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        with pytest.raises(Server.EClose):
            _Handler(placed, ("10.0.0.1", 1), Server())
        assert ours.recv(1000).split()[1] == status
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for sock in (ours, theirs, placed):
            sock.close()


def test_old_nonces_are_removed_and_nothing_else_whatever_the_date_is(tmp_path: Path) -> None:
    used = UsedNonces(tmp_path)
    for name in (N, "note", "3" * 31):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1.0, 1.0))  # as if the date had been set far ahead since
    assert used.expire(300.0, 1000.0) == 0
    (tmp_path / ("2" * 32)).touch()
    assert used.expire(300.0, 1200.0) == 0
    assert used.expire(300.0, 1301.0) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["2" * 32, "note", "3" * 31])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--listen", "0.0.0.0:6080"], "only a loopback address"),
        (["--listen", "[::]:6080"], "only a loopback address"),
        (["--listen", "127.0.0.1:6080", "--cert", "x"], "belong together"),
        (["--listen", "127.0.0.1:6080", "--cert", "x", "--key", "y", "--ca", "z"], "cannot be used"),
        (["--listen", "localhost:6080"], "is not ADDRESS:PORT"),
        (["--listen", "127.0.0.1"], "is not ADDRESS:PORT"),
        (["--listen", "127.0.0.1:0"], "is not ADDRESS:PORT"),
        (["--listen", "127.0.0.1:70000"], "is not ADDRESS:PORT"),
        (["--listen", "127.0.0.1:6080", "--run-dir", "/nonexistent"], "is not a folder"),
        (["--listen", "127.0.0.1:6080", "--web", "/"], "unrecognized"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*(f"--{kind}-dir={tmp_path}" for kind in ("run", "nonce", "input")), *arguments])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


def test_whatever_looks_like_a_token_is_masked_in_the_log() -> None:
    for text, arguments in (
        ("GET /websockify?token=%s HTTP/1.1", (f"{S}.{N}",)),
        ("Token '%s' not found", (f"{S}.{N}",)),
        ("Path: '/websockify?token=%s'", ("anything at all",)),
        (f"plain {S}.{N}", ()),
    ):
        record = logging.LogRecord("x", logging.INFO, "f", 1, text, arguments, None)
        assert _Redact().filter(record)
        line = record.getMessage()
        assert "***" in line
        assert N not in line
        assert "anything" not in line
