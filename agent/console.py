"""The host's console server: one websockify that turns WebSockets of the proxies into connections to VNC sockets.

    python -m deskfleet.agent.console --listen [::]:6080 --run-dir DIR --nonce-dir DIR --input-dir DIR \\
        --cert PEM --key PEM --ca PEM

A proxy asks for `/websockify?token=<sid>.<nonce>`. The proxy has checked the ticket; here, where there is exactly one
place for each desktop, the nonce is made single-use. Only proxies may connect: they show a certificate of the CA that
is good for clients (extended key usage clientAuth), which no host's certificate is.

While a person types or points, the time of the file `<input-dir>/<sid>` changes every few seconds: that is how the
agent knows that somebody is there.

Facts of websockify 0.13: it forks a process for each connection (about 5 MiB and 17 ms of CPU). The parent keeps two
pipe ends for each living child, and a child waits with select(2), which takes file numbers below 1024 only; so the
508th console at once would be accepted and then die. It is refused with 503 instead.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import multiprocessing
import os
import re
import resource
import signal
import ssl
import stat
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from websockify.token_plugins import BasePlugin
from websockify.websocketproxy import ProxyRequestHandler, WebSocketProxy

from deskfleet.agent.rfb import Inputs
from deskfleet.schemas.tickets import NONCE, SID

log = logging.getLogger("deskfleet.agent.console")

PATH = "/websockify"
SOCKET = "vnc.sock"
HEARTBEAT_S = 25
_HEAD_S = 10.0
_HIGHEST_FD = 1023 - 8  # room for the files that a connection opens after it is accepted
_MOST_CHILDREN = 600  # about 507 consoles, and those that are being refused
_TARGET = re.compile(rf"{PATH}\?token=([0-9a-f.]{{1,128}})")
_TOKEN = re.compile(rf"({SID.pattern})\.({NONCE.pattern})")
_INPUT_S = 5.0
_SECRET = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{32}|token=[^\s'\"]*")


class TokenRefused(Exception):
    """Raised when a token opens nothing; `status` is what the proxy is told."""

    def __init__(self, status: HTTPStatus, problem: str) -> None:
        super().__init__(problem)
        self.status = status


class SessionToken(BasePlugin):  # type: ignore[misc]  # websockify is not typed
    """Token plugin: `<sid>.<nonce>` opens `<run_dir>/<sid>/vnc.sock`, once for each nonce.

    websockify's own plugin for folders of sockets joins the token to the folder, so `..` leaves it. This one holds
    the socket itself by O_PATH, so that nobody can put a link in its place between the check and the connection.
    """

    def __init__(self, run_dir: Path, nonce_dir: Path) -> None:
        super().__init__(str(run_dir))
        self._run_dir = run_dir
        self._nonce_dir = nonce_dir

    def lookup(self, token: str) -> tuple[str, str]:
        """The target, in websockify's form for unix sockets. It is good while this process lives.

        Raises:
            TokenRefused: no such token, no such desktop here, used before, or the use can't be recorded.
        """
        match = _TOKEN.fullmatch(token)
        if not match:
            raise TokenRefused(HTTPStatus.BAD_REQUEST, "not a console token")
        sid, nonce = match.groups()
        fd = self._socket(sid)
        try:
            os.close(os.open(self._nonce_dir / nonce, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            os.close(fd)
            if isinstance(error, FileExistsError):
                raise TokenRefused(HTTPStatus.FORBIDDEN, f"a used token for {sid}") from None
            problem = f"cannot record the use of a token for {sid}: {error.strerror}"
            raise TokenRefused(HTTPStatus.INTERNAL_SERVER_ERROR, problem) from None
        return "unix_socket", f"/proc/self/fd/{fd}"

    def _socket(self, sid: str) -> int:
        """The VNC socket of a session as an O_PATH file number; no link is followed below the run folder."""
        folder = -1
        try:
            folder = os.open(self._run_dir / sid, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            fd = os.open(SOCKET, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        except OSError:
            pass  # said below: whatever is there, it is no display
        finally:
            if folder >= 0:
                os.close(folder)
        raise TokenRefused(HTTPStatus.NOT_FOUND, f"no display of {sid} here")


class UsedNonces:
    """Forgets used nonces after a while. Their age is counted from when they were first seen here, by a clock that no
    date moves: by the files' own times, a date set forward would let a used ticket in again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, float] = {}

    def expire(self, older_than_s: float, now: float) -> int:
        """Remove the nonces seen first more than `older_than_s` before `now` (monotonic seconds); return how many.

        `older_than_s` must be well above a ticket's lifetime: a removed nonce could be used again while it lives.
        """
        names = {path.name for path in self._folder.iterdir() if NONCE.fullmatch(path.name)}
        self._seen = {name: self._seen.get(name, now) for name in names}
        old = [name for name, seen in self._seen.items() if now - seen > older_than_s]
        for name in old:
            (self._folder / name).unlink(missing_ok=True)
        return len(old)


class _Handler(ProxyRequestHandler):  # type: ignore[misc]
    """One connection, in a process of its own. Serves nothing but the WebSocket, and logs no request line."""

    timeout = _HEAD_S
    _inputs: Inputs
    _told_at = float("-inf")

    def log_message(self, *_: object) -> None:
        """Drop what the library says: it holds request lines and paths, and with them tokens."""

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.close_connection = True

    def send_error(self, code: int, *_: object) -> None:
        """A bare status: the library's page would repeat the request."""
        log.info("refused %s: %s", self.client_address[0], HTTPStatus(code).phrase)
        self.request_version = self.protocol_version  # else there is no answer to a line that could not be read
        self.send_response_only(code)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def validate_connection(self) -> None:
        """Turn the token into the target (called by the library before it answers the upgrade)."""
        match = _TARGET.fullmatch(self.path)
        try:
            if self.connection.fileno() > _HIGHEST_FD:
                raise TokenRefused(HTTPStatus.SERVICE_UNAVAILABLE, "too many consoles are open")
            if not match or self.command != "GET":
                raise TokenRefused(HTTPStatus.BAD_REQUEST, "not a request for a console")
            _, self.server.unix_target = self.server.token_plugin.lookup(match.group(1))
            self._sid = match.group(1).partition(".")[0]
        except TokenRefused as refused:
            log.warning("%s", refused)
            self.send_error(refused.status)
            raise self.server.EClose("") from None

    def new_websocket_client(self) -> None:
        self.connection.settimeout(None)
        self._inputs = Inputs()
        log.info("console of %s opened for %s", self._sid, self.headers.get("X-Forwarded-For", "?")[:64])
        try:
            super().new_websocket_client()
        finally:
            log.info("console of %s closed", self._sid)

    def recv_frames(self) -> Any:
        """What the viewer sent; told on when a person did it."""
        pieces, closed = super().recv_frames()
        touched = False
        for piece in pieces:
            touched |= self._inputs.feed(piece)
        if touched and time.monotonic() - self._told_at > _INPUT_S:
            self._told_at = time.monotonic()
            try:
                (self.server.input_dir / self._sid).touch()
            except OSError as error:
                log.warning("input at %s can't be told: %s", self._sid, error.strerror)
        return pieces, closed


class ConsoleServer(WebSocketProxy):  # type: ignore[misc]
    """websockify with our handler, our token plugin and a TLS context that is built once."""

    def __init__(
        self, host: str, port: int, plugin: SessionToken, input_dir: Path, context: ssl.SSLContext | None
    ) -> None:
        # What the library says about its settings is wrong for this subclass.
        self.get_logger().setLevel(logging.WARNING)
        super().__init__(
            RequestHandlerClass=_Handler,
            listen_host=host,
            listen_port=port,
            source_is_ipv6=":" in host,
            token_plugin=plugin,
            heartbeat=HEARTBEAT_S,
        )
        self._context = context
        self.input_dir = input_dir

    def started(self) -> None:
        log.info(
            "consoles on %s port %d, %s", self.listen_host, self.listen_port, "mutual TLS" if self._context else "plain"
        )
        self.logger.setLevel(logging.INFO)

    def poll(self) -> None:
        """Called in the accept loop: stop accepting while there are very many connections, good ones or not.

        SIGTERM raises an exception wherever the loop is, once, and it may get lost, as in a call of logging. Here it
        can't.
        """
        if self.terminating:
            raise self.Terminate
        while len(multiprocessing.active_children()) >= _MOST_CHILDREN:
            time.sleep(0.1)

    def top_new_client(self, startsock: Any, address: Any) -> None:
        """One connection, in a process of its own, which SIGTERM simply ends."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        super().top_new_client(startsock, address)

    def do_handshake(self, sock: Any, address: Any) -> Any:
        """TLS, if asked for, always: the library would let the client choose."""
        sock.settimeout(_HEAD_S)
        if self._context:
            try:
                sock = self._context.wrap_socket(sock, server_side=True)
            except OSError as error:
                raise self.EClose(f"TLS failed: {getattr(error, 'reason', None) or error}") from None
        self.RequestHandlerClass(sock, address, self)
        return sock


class _Redact(logging.Filter):
    """Masks what looks like a token in any line, whoever wrote it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = _SECRET.sub("***", record.getMessage())
        record.args = None
        return True


def server_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """TLS 1.3, and a client certificate from `ca` is required (paths of PEM files).

    Raises:
        OSError: a file is missing, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=ca)
    context.load_cert_chain(cert, key)
    return context


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        if not 1 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, such as 0.0.0.0:6080 or [::]:6080") from None
    return host, int(port)


def _folder(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deskfleet.agent.console", description=__doc__.splitlines()[0])
    parser.add_argument("--listen", type=_address, required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--run-dir", type=_folder, required=True, help="holds <sid>/vnc.sock")
    parser.add_argument("--nonce-dir", type=_folder, required=True, help="holds a file for each used nonce")
    parser.add_argument("--input-dir", type=_folder, required=True, help="holds a file for each desktop with input")
    for name, text in (("cert", "this host's certificate"), ("key", "its key"), ("ca", "who signs proxies")):
        parser.add_argument(f"--{name}", default="", help=f"{text}, PEM")
    options = parser.parse_args(arguments)
    host, port = options.listen
    files = (options.cert, options.key, options.ca)
    if any(files) and not all(files):
        parser.error("--cert, --key and --ca belong together")
    if not any(files) and not ipaddress.ip_address(host).is_loopback:
        parser.error("without --cert, --key and --ca only a loopback address may be listened on")
    try:
        context = server_context(*files) if all(files) else None
    except OSError as error:
        parser.error(f"the certificate files cannot be used: {error}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_Redact())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # refusing takes files as well
    multiprocessing.set_start_method("fork")  # from Python 3.14 on the default would not inherit the listener's state
    ConsoleServer(
        host, port, SessionToken(options.run_dir, options.nonce_dir), options.input_dir, context
    ).start_server()
    for child in multiprocessing.active_children():
        child.kill()  # else the end would wait for those that have missed SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
