"""A private slapd: its own folder, its own port on 127.0.0.1, its own certificates; the system's is not touched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from support.consoles import Pair

BASE = "dc=example,dc=org"
SERVICE, SERVICE_PASSWORD = f"cn=portal,{BASE}", "service-account-secret"
_SCHEMAS = ("core", "cosine", "inetorgperson", "nis")
_PATIENCE_S = 30


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something listens. Raises RuntimeError with the log when the process ends first."""
    for _ in range(_PATIENCE_S * 20):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server does not listen: {log.read_text(errors='replace')[-2000:]}")


class Slapd:
    """OpenLDAP with these entries (LDIF). It listens with StartTLS on `port` and with TLS on `tls_port`, answers binds
    without a password with yes (as old servers do), and logs the filters that it is asked."""

    def __init__(self, folder: Path, pair: Pair, ldif: str, extra: str = "") -> None:
        program = shutil.which("slapd", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise RuntimeError("slapd is not installed: apt-get install slapd ldap-utils")
        self._folder = folder
        self._program = program
        self.port, self.tls_port = free_port(), free_port()
        self.log = folder / "log"
        (folder / "db").mkdir(parents=True)
        schemas = "".join(f"include /etc/ldap/schema/{name}.schema\n" for name in _SCHEMAS)
        (folder / "slapd.conf").write_text(
            f"{schemas}modulepath /usr/lib/ldap\nmoduleload back_mdb\nmoduleload memberof\n"
            f"pidfile {folder}/pid\nargsfile {folder}/args\n"
            f"TLSCertificateFile {pair.cert}\nTLSCertificateKeyFile {pair.key}\n"
            "allow bind_anon_dn\nloglevel stats\n"
            f'database mdb\nsuffix "{BASE}"\ndirectory {folder}/db\nmaxsize 16777216\nrootdn "cn=root,{BASE}"\n'
            "overlay memberof\nmemberof-refint true\n"
            f"access to attrs=userPassword by anonymous auth by * none\n"
            f'access to * by dn.exact="{SERVICE}" read by * none\n{extra}'
        )
        self._add(ldif)
        self._process: subprocess.Popen[bytes] | None = None

    def _add(self, ldif: str) -> None:
        path = self._folder / "entries.ldif"
        path.write_text(ldif)
        argv = [self._program, "-Ta", "-f", str(self._folder / "slapd.conf"), "-l", str(path), "-q"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"slapadd: {done.stderr}")

    def start(self) -> None:
        """Run it, and wait until it listens."""
        urls = f"ldap://127.0.0.1:{self.port}/ ldaps://127.0.0.1:{self.tls_port}/"
        argv = [self._program, "-d", "stats", "-h", urls, "-f", str(self._folder / "slapd.conf")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_for(self.port, self._process, self.log)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_PATIENCE_S)
            self._process = None

    def replace(self, ldif: str) -> None:
        """Other entries, while it is stopped."""
        shutil.rmtree(self._folder / "db")
        (self._folder / "db").mkdir()
        self._add(ldif)
