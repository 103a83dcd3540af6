"""A bare Debian in a folder, booted by its own systemd in namespaces of its own; it shares the machine's network."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

_BOOT = """
set -e
echo $$ >"$CGROUP/cgroup.procs"
exec unshare --mount --pid --fork --cgroup --uts --ipc --propagation private --kill-child sh -ec '
    mount --bind "$ROOT" "$ROOT"
    mount -t proc proc "$ROOT/proc"
    mount -t sysfs -o ro sysfs "$ROOT/sys"
    mount -t cgroup2 cgroup "$ROOT/sys/fs/cgroup"
    mount -t tmpfs tmpfs "$ROOT/run"
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
    for name in null zero full random urandom tty; do
        touch "$ROOT/dev/$name"
        mount --bind "/dev/$name" "$ROOT/dev/$name"
    done
    mkdir "$ROOT/dev/pts" "$ROOT/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$ROOT/dev/pts"
    ln -s pts/ptmx "$ROOT/dev/ptmx"
    mount -t tmpfs tmpfs "$ROOT/dev/shm"
    while read -r from to; do
        mkdir -p "$ROOT$to"
        mount --bind -o ro "$from" "$ROOT$to"
    done <"$ROOT/.mounts"
    cd "$ROOT"
    mkdir -p .old
    pivot_root . .old
    umount -l /.old
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd systemd.unit=multi-user.target
'
"""


def _cgroup2() -> Path:
    """Where the machine has its version 2 control groups."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise AssertionError("systemd needs control groups of version 2, and they are not mounted here")


class Debian:
    """A machine of its own below `root`. `mounts` are folders of this machine that it sees, read-only, by their place
    there."""

    def __init__(self, root: Path, mounts: Mapping[str, Path]) -> None:
        self.root = root
        self._mounts = mounts
        self._cgroup = _cgroup2() / root.parent.name
        self._init = 0

    def __enter__(self) -> Debian:
        codename = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)[
            "VERSION_CODENAME"
        ]
        line = ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--include=systemd"]
        subprocess.run([*line, codename, str(self.root)], check=True, timeout=300)
        (self.root / "etc/resolv.conf").write_text(Path("/etc/resolv.conf").read_text())
        (self.root / ".mounts").write_text("".join(f"{here} {there}\n" for there, here in self._mounts.items()))
        self._cgroup.mkdir()
        environ = {**os.environ, "ROOT": str(self.root), "CGROUP": str(self._cgroup)}
        self._unshare = subprocess.Popen(
            ["sh", "-c", _BOOT],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not self._booted():
            if self._unshare.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError("systemd does not boot")
            time.sleep(0.1)
        return self

    def _booted(self) -> bool:
        children = psutil.Process(self._unshare.pid).children()
        self._init = children[0].pid if children else 0
        return bool(self._init) and self.run("systemctl is-system-running").stdout.strip() in ("running", "degraded")

    def __exit__(self, *_: object) -> None:
        if self._init:
            os.kill(self._init, signal.SIGKILL)  # the first process of a pid namespace takes all others with it
        self._unshare.wait(30)
        folders = [Path(name) for name, _, _ in os.walk(self._cgroup, topdown=False)]
        for folder in folders:
            folder.rmdir()

    def run(self, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command there; output and errors together."""
        return self._enter(["sh", "-c", command], environ)

    def without_systemd(self, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """The same, where systemd can't be seen."""
        hidden = f"mount -t tmpfs tmpfs /run && {command}"
        return self._enter(["unshare", "--mount", "sh", "-c", hidden], environ)

    def ok(self, command: str, **environ: str) -> str:
        """What a command says, which must succeed."""
        done = self.run(command, **environ)
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def path(self, name: str) -> Path:
        """A file of the machine, as this one sees it: its own mounts included. Short, as sockets' names must be."""
        return Path(f"/proc/{self._init}/root{name}")

    def _enter(self, line: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        # Entering a mount namespace makes its root ours.
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        words = [f"{key}={value}" for key, value in {"PATH": path, "HOME": "/root", **environ}.items()]
        enter = ["nsenter", "--target", str(self._init), "--mount", "--pid", "--cgroup", "--uts", "--ipc"]
        return subprocess.run(
            [*enter, "env", "-i", *words, *line],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            timeout=300,
        )  # fmt: skip
