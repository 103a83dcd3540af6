"""A private PostgreSQL on a unix socket in a folder of its own; no port, nothing shared with a system cluster."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path


class PrivatePostgres:
    """Debian's PostgreSQL, initialised in `folder` (which must not be deep: unix sockets have 107 bytes). Without
    `fsync` a commit survives no power cut, which tests do without."""

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self._folder = folder
        self._fsync = "on" if fsync else "off"
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
        self._bin = found[-1].parent
        # The server refuses to run as root, so root hands the folder to the package's own user.
        self._user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name

    def _run(self, *argv: str) -> None:
        extra: dict[str, object] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam(self._user)
            extra = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        done = subprocess.run(argv, cwd="/", capture_output=True, text=True, check=False, **extra)  # type: ignore[call-overload]
        if done.returncode:
            raise RuntimeError(f"{argv[0]}: {done.stderr or done.stdout}")

    def start(self) -> None:
        """Initialise the cluster and wait until it answers."""
        data = self._folder / "data"
        self._folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(self._folder, self._user)
        self._run(f"{self._bin}/initdb", "-D", str(data), "-A", "trust", "-U", "deskfleet", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c fsync={self._fsync}"
        log = str(self._folder / "log")
        self._run(f"{self._bin}/pg_ctl", "-D", str(data), "-w", "-o", options, "-l", log, "start")

    def database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        self._run(f"{self._bin}/createdb", "-h", str(self._folder), "-U", "deskfleet", name)
        return f"postgresql+psycopg://deskfleet@/{name}?host={self._folder}"

    def stop(self) -> None:
        """Stop the server at once."""
        self._run(f"{self._bin}/pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")
