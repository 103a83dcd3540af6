"""The channel to the agent inside a guest (qemu-guest-agent): it is held open, and used to show a text, and to make a
forked guest one of its own.

Its protocol is JSON, one object a line (QEMU: docs/interop/qemu-ga-ref). What comes from there is a guest's word: it is
read up to a limit, and nothing depends on it. A guest without an agent answers nothing, so every question has a time
limit; and what was asked then is still in the channel when an agent comes to listen, so that its late answer must be
told apart from a new one (guest-sync).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.machine import Os

LIMIT_S = 15.0  # a guest under emulation, or at its limits, is slow
_LONGEST_LINE = 64 * 1024
_POLL_S = 0.02
_STALE_LINES = 50

#: What shows a text, by the guest's family: a program and its arguments, the text comes last.
_SHOW = {
    # The image's own program where it has one (docs/images.md), else every terminal.
    Os.LINUX: (
        "/bin/sh",
        "-c",
        'p=/usr/lib/deskfleet/notify; [ -x "$p" ] && exec "$p" "$1"; echo "$1" | exec wall',
        "sh",
    ),
    Os.WINDOWS: (r"C:\Windows\System32\msg.exe", "*"),
}


class GuestAgentError(DeskfleetError):
    """Raised when the agent in a guest does not answer, or does not do what it was asked."""


class _RefusedError(GuestAgentError):
    """Raised when the agent is there, and does not do it."""


def _decoded(words: object) -> str:
    try:
        return base64.b64decode(str(words or "")).decode(errors="replace").strip()[-300:]
    except ValueError:
        return ""


class GuestAgent:
    """One guest's channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    async def show(self, text: str, system: Os) -> None:
        """Show a text to whoever uses the guest.

        Raises:
            GuestAgentError: there is no agent, it forbids running programs, or nothing can show a text there.
        """
        if system not in _SHOW:
            raise GuestAgentError("this kind of guest shows no texts")
        program, *arguments = _SHOW[system]
        await self.command("guest-exec", {"path": program, "arg": [*arguments, text]})

    async def run(self, program: str, arguments: Sequence[str], words: str, limit_s: float) -> tuple[int, str]:
        """Run a program with `words` as its input; its exit code (-1: killed) and the end of its complaints.

        Raises:
            GuestAgentError: there is no agent, it forbids running programs, or the program took longer than `limit_s`.
        """
        text = base64.b64encode(words.encode()).decode()
        order = {"path": program, "arg": list(arguments), "input-data": text, "capture-output": True}
        begun = await self.command("guest-exec", order)
        pid = begun.get("pid") if isinstance(begun, dict) else None
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    status = await self.command("guest-exec-status", {"pid": pid})
                    if not isinstance(status, dict) or status.get("exited"):
                        break
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise GuestAgentError(f"{program} did not end within {limit_s:g} s") from None
        if not isinstance(status, dict):
            raise GuestAgentError("the agent in the guest talks of something else")
        code = status.get("exitcode")
        return code if isinstance(code, int) else -1, _decoded(status.get("err-data"))

    async def holds(self, path: str) -> bool:
        """Whether a file is there.

        Raises:
            GuestAgentError: there is no agent.
        """
        try:
            handle = await self.command("guest-file-open", {"path": path})
        except _RefusedError:
            return False
        await self.command("guest-file-close", {"handle": handle})
        return True

    async def command(self, name: str, arguments: dict[str, object] | None = None) -> object:
        """Let the agent do one thing; what it answers.

        Raises:
            GuestAgentError: there is no agent, or it refuses.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(LIMIT_S):
                    await self._sync()
                    answer = await self._ask(name, arguments or {})
            except TimeoutError:
                raise GuestAgentError("no agent answers in the guest") from None
            except (OSError, ValueError, RecursionError, asyncio.IncompleteReadError) as error:
                raise GuestAgentError(f"the channel to the guest's agent: {error or type(error).__name__}") from error
        if "return" not in answer:
            raise _RefusedError(f"the agent in the guest refused {name}")
        return answer["return"]

    async def _sync(self) -> None:
        """Skip what was answered too late (guest-sync answers with the number that it was given)."""
        number = secrets.randbelow(1 << 31)
        answer = await self._ask("guest-sync", {"id": number})
        for _ in range(_STALE_LINES):
            if answer.get("return") == number:
                return
            answer = await self._read()
        raise GuestAgentError("the agent in the guest talks of something else")

    async def _ask(self, command: str, arguments: dict[str, object]) -> dict[str, object]:
        line = json.dumps({"execute": command, "arguments": arguments}) + "\n"
        self._writer.write(line.encode())
        await self._writer.drain()
        return await self._read()

    async def _read(self) -> dict[str, object]:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            raise GuestAgentError("the agent in the guest talks without end") from error
        found = json.loads(line)
        return found if isinstance(found, dict) else {}


@contextlib.asynccontextmanager
async def guest_agent(socket: Path) -> AsyncIterator[GuestAgent | None]:
    """Hold the channel open for as long as the block runs: an agent in a guest whose channel nobody holds spins. None
    when this guest has no such channel."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket), limit=_LONGEST_LINE)
    except OSError:
        yield None
        return
    try:
        yield GuestAgent(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
