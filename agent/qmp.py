"""qemu's control socket (QMP), by the official client. Every call has a time limit: a busy socket only hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient
from qemu.qmp.error import QMPError

from deskfleet.schemas.errors import DeskfleetError

LIMIT_S = 3.0

# The client's own log repeats whole messages at debug level; errors reach us as exceptions.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class MonitorError(DeskfleetError):
    """Raised when qemu does not answer on its control socket, or refuses a command."""


class Monitor:
    """One connection to a guest's qemu."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        """Run one QMP command.

        Raises:
            MonitorError: no answer in time, an error answer, or the connection is gone.
        """
        try:
            return await asyncio.wait_for(self._client.execute(name, arguments), LIMIT_S)
        except (QMPError, TimeoutError, OSError, EOFError) as error:
            raise MonitorError(f"{name}: {error or type(error).__name__}") from error

    async def give(self, name: str, file: int) -> None:
        """Give qemu an open file, under this name (QMP getfd; the descriptor goes along with it).

        Raises:
            MonitorError: as for a command.
        """
        try:
            self._client.send_fd_scm(file)
        except (QMPError, OSError) as error:
            raise MonitorError(f"getfd: {error}") from error
        await self.command("getfd", {"fdname": name})

    @contextmanager
    def events(self, *names: str) -> Iterator[AsyncIterator[str]]:
        """The names of these events as they come, until the connection ends. Everything from the beginning of the
        block on is there: what is asked for inside it can't overtake an event unseen."""
        with self._client.listener(names) as listener:
            yield self._each(listener)

    async def _each(self, listener: EventListener) -> AsyncIterator[str]:
        while (name := await self._next(listener)) is not None:
            yield name

    async def _next(self, listener: EventListener) -> str | None:
        waiting = asyncio.ensure_future(listener.get())
        ended = asyncio.ensure_future(self._closed())
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
            return str(waiting.result()["event"]) if waiting.done() else None
        finally:
            waiting.cancel()
            ended.cancel()

    async def _closed(self) -> None:
        while self._client.runstate.name == "RUNNING":
            await self._client.runstate_changed()

    async def viewers(self) -> int:
        """How many VNC clients have finished their handshake (QMP query-vnc lists them)."""
        answer = await self.command("query-vnc")
        return len(answer.get("clients", []))


@asynccontextmanager
async def monitor(socket: Path) -> AsyncIterator[Monitor]:
    """Connect to a QMP socket for as long as the block runs.

    Raises:
        MonitorError: nothing answers there in time.
    """
    client = QMPClient(socket.parent.name)
    try:
        await asyncio.wait_for(client.connect(str(socket)), LIMIT_S)
    except (QMPError, TimeoutError, OSError) as error:
        raise MonitorError(f"{socket.name}: {error}") from error
    try:
        yield Monitor(client)
    finally:
        try:
            await asyncio.wait_for(client.disconnect(), LIMIT_S)
        except (QMPError, TimeoutError, OSError, EOFError) as error:
            logging.getLogger(__name__).debug("closing %s: %s", socket.name, error)


@asynccontextmanager
async def first_monitor(socket: Path, ended: asyncio.Event, limit_s: float) -> AsyncIterator[Monitor]:
    """The same, with a qemu that was started just now and opens its socket soon, unless it ends.

    Raises:
        MonitorError: it has ended, or did not open it in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    async with contextlib.AsyncExitStack() as stack:
        while True:
            with contextlib.suppress(MonitorError):
                if socket.exists():  # it appears between two system calls of qemu; who comes in between is refused
                    qemu = await stack.enter_async_context(monitor(socket))
                    break
            if ended.is_set() or loop.time() > deadline:
                raise MonitorError("qemu ended at its start" if ended.is_set() else "qemu does not answer")
            await asyncio.sleep(0.002)
        yield qemu
