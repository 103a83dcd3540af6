"""What a build asks of the machine it runs on, and how it fails. Tests give a `System` of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
"""A plain user's PATH lacks these, and mke2fs and sfdisk live there."""

LOG_LINES = 15


class Failure(Enum):
    """Why a build failed: the word for programs and the exit code of `build-machine`."""

    RECIPE = ("bad_recipe", 2)
    TOOL = ("missing_tool", 3)
    SPACE = ("no_space", 4)
    MIRROR = ("mirror_unreachable", 5)
    STEP = ("step_failed", 6)
    PRIVILEGE = ("needs_root", 7)

    @property
    def reason(self) -> str:
        """The machine-readable word."""
        return self.value[0]

    @property
    def exit_code(self) -> int:
        """The exit code."""
        return self.value[1]


class BuildError(Exception):
    """A build that cannot go on; the text is for the person who started it."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure


MIRROR_SIGNS = (
    "apt-get update --error-on=any",
    "Could not resolve",
    "Temporary failure resolving",
    "Failed to fetch",
    "Could not connect",
    "Unable to connect",
    "Connection timed out",
    "Network is unreachable",
    "Unable to locate package",
    "has no installation candidate",
)
SPACE_SIGNS = ("No space left on device", "You don't have enough free space", "Could not allocate block")


def classify(output: str, otherwise: Failure = Failure.STEP) -> Failure:
    """Why a command failed, by what it printed."""
    if any(sign in output for sign in SPACE_SIGNS):
        return Failure.SPACE
    if any(sign in output for sign in MIRROR_SIGNS):
        return Failure.MIRROR
    return otherwise


def spawn(argv: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    """Run a command to its end and return exit code and output. It is ended first when this process is interrupted."""
    try:
        process = subprocess.Popen(
            argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        return 127, f"{argv[0]}: {error.strerror}"
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    return process.returncode, output.decode(errors="replace")


def which(command: str) -> str | None:
    """The path of a command, or None; an absolute path is answered when that file exists."""
    if command.startswith("/"):
        return command if Path(command).exists() else None
    return shutil.which(command, path=os.environ.get("PATH", os.defpath) + SBIN)


def free_mib(folder: Path) -> int:
    """MiB that this process may still write in the file system of the folder."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize >> 20


def is_root() -> bool:
    """Whether this process is root."""
    return os.geteuid() == 0


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(text, flush=True)


@dataclass
class System:
    """Processes, disk space, privileges, clock and messages, each replaceable."""

    spawn: Callable[[Sequence[str], Mapping[str, str]], tuple[int, str]] = spawn
    which: Callable[[str], str | None] = which
    free_mib: Callable[[Path], int] = free_mib
    is_root: Callable[[], bool] = is_root
    has_terminal: Callable[[], bool] = sys.stdin.isatty
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = say

    def __post_init__(self) -> None:
        self._start = self.clock()

    def step(self, text: str) -> None:
        """Say what begins now, with the seconds since the build began."""
        self.say(f"[{self.clock() - self._start:6.1f} s] {text}")

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        otherwise: Failure = Failure.STEP,
        as_root: bool = False,
    ) -> str:
        """Run a command and return what it printed; BuildError with the end of that when it fails.

        `as_root` gives it root over the files that this build makes, see `root_prefix`.
        """
        whole = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
        whole["PATH"] = os.environ.get("PATH", os.defpath) + SBIN
        prefix = self.root_prefix() if as_root else []
        code, output = self.spawn([*prefix, *argv], whole)
        if code == 0:
            return output
        failure = classify(output, otherwise)
        advice = {
            Failure.SPACE: "There is no disk space left. ",
            Failure.MIRROR: "The package mirror does not answer or lacks the package: check the network, "
            "/etc/apt/sources.list.d and `apt-get update`. ",
        }.get(failure, "")
        tail = "\n".join("    " + line for line in output.strip().splitlines()[-LOG_LINES:])
        raise BuildError(failure, f"{advice}`{' '.join(argv[:6])}` ended with {code}:\n{tail}")

    def need_space(self, folder: Path, mib: int) -> None:
        """BuildError unless the file system of the folder has this many MiB left."""
        free = self.free_mib(folder)
        if free < mib:
            text = (
                f"{folder} has {free} MiB left and the build needs {mib} MiB: free some space or choose another --out."
            )
            raise BuildError(Failure.SPACE, text)

    def need_tools(self, tools: Mapping[str, str]) -> None:
        """Install the packages of the commands (or files) that are missing: {"xorriso": "xorriso", ...}.

        As root, else by sudo; BuildError when neither is possible or a package cannot be had.
        """
        packages = sorted({package for tool, package in tools.items() if not self.which(tool)})
        if not packages:
            return
        self.step(f"install {', '.join(packages)}")
        install = ("install", "-y", "--no-install-recommends", *packages)
        try:
            self.apt(*install)
        except BuildError as error:
            if error.failure is not Failure.MIRROR:
                raise
            self.apt("update")  # the lists are missing or too old
            self.apt(*install)
        missing = sorted(tool for tool in tools if not self.which(tool))
        if missing:
            text = f"{', '.join(packages)} are installed, but {', '.join(missing)} are still missing."
            raise BuildError(Failure.TOOL, text)

    def apt(self, *arguments: str) -> None:
        """Run apt-get as root, else by sudo, which asks for a password only at a terminal."""
        command = ["apt-get", "-q", *arguments]
        if not self.which("apt-get"):
            raise BuildError(Failure.TOOL, f"There is no apt-get here, and this is needed: {' '.join(command)}")
        if not self.is_root():
            if not self.which("sudo"):
                raise BuildError(Failure.TOOL, f"This is needed, as root: {' '.join(command)}")
            command = ["sudo", *([] if self.has_terminal() else ["-n"]), *command]
        self.run(command, {"DEBIAN_FRONTEND": "noninteractive"}, Failure.TOOL)

    def root_prefix(self) -> list[str]:
        """A command prefix: root over files that this build makes, in a mount namespace that ends with the command.

        Another user than root gets a user namespace with the ids of /etc/subuid; BuildError when there are none.
        """
        # setpriv: when this process is killed, unshare goes with it, and by --kill-child all below.
        prefix = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        if self.is_root():
            return prefix
        self.need_tools({"newuidmap": "uidmap"})
        prefix += ["--user", "--map-root-user", "--map-auto"]
        code, output = self.spawn([*prefix, "true"], os.environ)
        if code != 0:
            text = (
                "This account has no user ids of its own to build with, so the build needs root: run it by sudo, or "
                "let root run `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER`. "
                f"({output.strip()})"
            )
            raise BuildError(Failure.PRIVILEGE, text)
        return prefix

    def remove(self, folder: Path) -> None:
        """Remove a folder that may not be there, also one with files of other user ids."""
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except PermissionError:
            self.run(["rm", "-rf", str(folder)], as_root=True)
