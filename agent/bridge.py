"""The host's console bridge: one websockify for all guests, kept running and kept when the agent restarts.

Starting websockify takes a quarter of a second, so there is one a host and never one a click. It lives in a session
of its own, so open consoles go on while the agent is down; the next agent finds it by its command line.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from deskfleet.agent.processes import Process, Spawn, find, leads_session, option

log = logging.getLogger(__name__)

_MODULE = "deskfleet.agent.console"
_LOG_LIMIT = 16 << 20


class Bridge:
    """Supervises the console bridge that listens on `listen`."""

    def __init__(
        self,
        listen: str,
        run: Path,
        nonces: Path,
        inputs: Path,
        words: Path,
        tls: tuple[str, str, str] | None,
        spawn: Spawn,
    ) -> None:
        self._listen = listen
        self._run = run
        self._words = words
        self._spawn = spawn
        self._argv = [sys.executable, "-m", _MODULE, "--listen", listen, "--run-dir", str(run)]
        self._argv += ["--nonce-dir", str(nonces), "--input-dir", str(inputs)]
        if tls:
            self._argv += ["--cert", tls[0], "--key", tls[1], "--ca", tls[2]]
        self._ended = asyncio.Event()
        #: Whether it accepts connections.
        self.up = False

    def _mine(self, line: list[str]) -> bool:
        return _MODULE in line and option(line, "--run-dir") == str(self._run)

    async def keep(self) -> None:
        """Keep it running until cancelled; a new start after a pause that grows to 10 s."""
        pause = 0.2
        while True:
            process = find(self._master)
            if process is None:
                process = self._start()
            if process:
                self._ended.clear()
                process.watch(asyncio.get_running_loop(), self._gone)
                if await self._accepts():
                    self.up, pause = True, 0.2
                    await self._ended.wait()
            await asyncio.sleep(pause)
            pause = min(10.0, pause * 2)

    def _master(self, pid: int, line: list[str]) -> bool:
        """The listening process. Its connections are forks with the same command line, but it leads the session."""
        return self._mine(line) and leads_session(pid)

    def _start(self) -> Process | None:
        if self._words.exists() and self._words.stat().st_size > _LOG_LIMIT:
            self._words.replace(self._words.with_suffix(".old"))
        try:
            return Process.hold(self._spawn(self._argv, uid=None, cwd=Path("/"), log=self._words, fds=[]))
        except OSError as error:
            log.error("the console bridge can't be started: %s", error.strerror)
            return None

    def _gone(self) -> None:
        log.warning("the console bridge has ended; its last words are in %s", self._words)
        self.up = False
        self._ended.set()

    async def _accepts(self) -> bool:
        host, _, port = self._listen.rpartition(":")
        target = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))  # noqa: S104  we connect
        while not self._ended.is_set():
            try:
                _, writer = await asyncio.open_connection(target, int(port))
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return True
        return False

    def stop(self) -> None:
        """End the bridge and every console that is open through it."""
        while process := find(lambda _, line: self._mine(line)):
            process.kill()
            process.reap()
