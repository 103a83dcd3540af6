"""Processes of guests: starting them, and knowing them again after the agent's own death.

A process is identified by the guest's UUID and its QMP socket on the command line, and held by a pidfd
(pidfd_open(2), Linux 5.3): a pidfd names one process for ever, so a signal can never hit a stranger that got the
same number later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take at most: bytes of its largest file and of locked memory (None: as much as ourselves),
    and a control group that it lives in, its threads and children too. One that comes `last` gets the processor and the
    disk when nobody else wants them."""

    file_size: int | None = None
    locked: int | None = None
    group: Path | None = None
    last: bool = False


NO_LIMITS = Limits()


class Spawn(Protocol):
    """Starts a program and returns its pid. Raises OSError when it can't."""

    def __call__(
        self,
        argv: Sequence[str],
        *,
        uid: int | None,
        cwd: Path,
        log: Path,
        fds: Sequence[int],
        groups: Sequence[int] = (),
        limits: Limits = NO_LIMITS,
    ) -> int: ...


def spawn(
    argv: Sequence[str],
    *,
    uid: int | None,
    cwd: Path,
    log: Path,
    fds: Sequence[int],
    groups: Sequence[int] = (),
    limits: Limits = NO_LIMITS,
) -> int:
    """Start a program in a session of its own, as user `uid` with these supplementary groups (None: as ourselves),
    with its output in `log`.

    prlimit(1) sets the limits of itself and becomes the program: Python code between fork and exec could hang, since
    the agent has threads, and another user's process can't be limited from outside without more rights than ours. The
    pid goes into the control group while prlimit still runs, so what the program allocates is counted.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*_prlimit(limits), *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            pass_fds=tuple(fds),
            start_new_session=True,
            # SIGXFSZ stays ignored, as Python has it: a file that has reached its limit is an error for whoever writes,
            # and not the end of the program.
            restore_signals=False,
            umask=0o077,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else list(groups),
        )
    if limits.group is not None:
        try:
            (limits.group / "cgroup.procs").write_text(str(process.pid))
        except OSError:  # nothing may run without the limits that it was meant to have
            process.kill()
            process.wait()
            raise
    # The event loop waits by pidfd, for our children and for those of a former agent alike.
    process.returncode = 0
    return process.pid


def _prlimit(limits: Limits) -> list[str]:
    words = []
    for name, kind, wanted in (
        ("fsize", resource.RLIMIT_FSIZE, limits.file_size),
        ("memlock", resource.RLIMIT_MEMLOCK, limits.locked),
    ):
        if wanted is not None:
            _, most = resource.getrlimit(kind)  # no more than we may ourselves
            words.append(f"--{name}={wanted if most == resource.RLIM_INFINITY else min(wanted, most)}")
    behind = ["nice", "-n", "19", "ionice", "-c", "3"] if limits.last else []
    return [*behind, "prlimit", *words, "--"] if words or limits.group else behind


@dataclass(slots=True)
class Process:
    """A process held by its pidfd."""

    pid: int
    pidfd: int

    @classmethod
    def hold(cls, pid: int) -> Process | None:
        """Hold a process; None when it is gone."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError:
            return None

    def watch(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
        """Call `ended` once when the process is gone."""

        def gone() -> None:
            loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)  # reap it if it was ours
            ended()

        loop.add_reader(self.pidfd, gone)

    def reap(self) -> None:
        """Wait (blocking) until it has ended, then let go of it."""
        select.select([self.pidfd], [], [])
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        os.close(self.pidfd)
        self.pidfd = -1

    def cpu_s(self) -> float | None:
        """CPU seconds used so far, in user and kernel mode (proc(5), /proc/PID/stat, fields 14 and 15); None once it
        is gone."""
        try:
            text = (_PROC / str(self.pid) / "stat").read_text()
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()  # the name before may hold anything
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL; no error when it is gone."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


def arguments(pid: int) -> list[str]:
    """A process's argument list; empty when it is gone (or a zombie, which has none left)."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def pids() -> Iterator[int]:
    """Every process of the machine."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def find(matches: Callable[[int, list[str]], bool]) -> Process | None:
    """The first process whose pid and arguments match, looked at again once it is held."""
    for pid in pids():
        if matches(pid, arguments(pid)):
            process = Process.hold(pid)
            if process and matches(pid, arguments(pid)):
                return process
            if process:
                os.close(process.pidfd)
    return None


def leads_session(pid: int) -> bool:
    """Whether a process is the one that its session was made for, and not a fork of it."""
    try:
        return os.getsid(pid) == pid
    except OSError:
        return False


def option(argv: Sequence[str], name: str) -> str:
    """The value that follows an option on a command line; empty when it is not there."""
    for flag, value in pairwise(argv):
        if flag == name:
            return value
    return ""


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended.

    Once is not enough: wait_for of Python 3.11 drops a cancellation that comes in the same moment as the answer
    (seen as a stop that never ended, since the task that held the QMP socket lived on).
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=0.2)
