"""The host's leg until it is a WebSocket: resolve, connect, TLS, request, 101. Nothing of the browser passes yet."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from deskfleet.proxy.handshake import HostAnswer, HostHandshake
from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.proxy.routes import Route
from deskfleet.proxy.tls import ROOM, TlsSocket
from deskfleet.proxy.tunnel import tune

_T = TypeVar("_T")
Leg = socket.socket | TlsSocket

#: Shared: what is read is copied out before anything else runs.
_buffer = memoryview(bytearray(ROOM))


def client_context(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """TLS 1.3 towards hosts: ours is the certificate they ask for, theirs must come from `ca` (paths of PEM files).

    Raises:
        OSError: a file is missing, or is not what it should be (ssl.SSLError is an OSError).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=ca)
    context.load_cert_chain(cert, key)
    return context


class Dialler:
    """Opens consoles on hosts. With `tls` every host must show a certificate that names it (its Deskfleet name, not
    its address: the address is the host's own claim). Without, only loopback is dialled, or, with `plain_anywhere`,
    anything. Connecting and answering may take `limit_s` each.
    """

    def __init__(self, tls: ssl.SSLContext | None, plain_anywhere: bool, limit_s: float) -> None:
        self._tls = tls
        self._plain_anywhere = plain_anywhere
        self._limit_s = limit_s

    async def open(self, route: Route, handshake: HostHandshake) -> tuple[Leg, HostAnswer]:
        """A non-blocking socket on which the host has agreed to the WebSocket.

        Raises:
            Refusal: it could not be reached, is not who it should be, did not agree, or took too long.
        """
        loop = asyncio.get_running_loop()
        sock: Leg | None = None
        try:
            async with asyncio.timeout(self._limit_s):
                sock = await self._connect(loop, route)
                if self._tls:
                    sock = secured = TlsSocket(sock, self._tls, route.host)
                    await _attempt(loop, sock, secured.do_handshake)
            async with asyncio.timeout(self._limit_s):
                return sock, await _shake(loop, sock, handshake)
        except BaseException as error:
            if sock:
                sock.close()
            if isinstance(error, TimeoutError):
                raise Refusal(Refused.HOST_TIMEOUT, f"{route.host} at {route.address}") from None
            # A host's address is its own claim: a port over 65535 or a label over 63 letters is a ValueError of sorts.
            if isinstance(error, OSError | ValueError | OverflowError):
                raise Refusal(Refused.HOST_FAILED, f"{route.host} at {route.address}: {error}") from None
            raise

    async def _connect(self, loop: asyncio.AbstractEventLoop, route: Route) -> socket.socket:
        name, _, port = route.address.rpartition(":")
        problem: OSError = OSError("the name has no address")
        for family, kind, number, _, address in await _resolve(loop, name.strip("[]"), int(port)):
            if not (self._tls or self._plain_anywhere or ipaddress.ip_address(address[0]).is_loopback):
                raise Refusal(Refused.HOST_FAILED, f"{route.host} at {route.address}: no TLS, and not on loopback")
            sock = socket.socket(family, kind, number)
            try:
                tune(sock)
                await loop.sock_connect(sock, address)
                return sock
            except OSError as error:
                sock.close()
                problem = error
            except BaseException:
                sock.close()
                raise
        raise problem


async def _resolve(loop: asyncio.AbstractEventLoop, name: str, port: int) -> list[Any]:
    try:  # a literal needs no thread; zone ids of IPv6 are understood
        return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)


async def _shake(loop: asyncio.AbstractEventLoop, sock: Leg, handshake: HostHandshake) -> HostAnswer:
    data = handshake.request
    while data:
        data = data[await _attempt(loop, sock, partial(sock.send, data)) :]
    while True:
        count = await _attempt(loop, sock, partial(sock.recv_into, _buffer))
        answer = handshake.feed(bytes(_buffer[:count]))
        if answer:
            return answer


async def _attempt(loop: asyncio.AbstractEventLoop, sock: Leg, operation: Callable[[], _T]) -> _T:
    """Repeat a non-blocking operation until it succeeds; asyncio's own sock_* calls take plain sockets only.

    Only reading is waited for: a request of some hundred bytes always fits into the kernel's buffer of a new
    connection, and when it should not, the time limit ends it.
    """
    while True:
        try:
            return operation()
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_reader(sock.fileno(), _done, ready)
            try:
                await ready
            finally:
                loop.remove_reader(sock.fileno())


def _done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
