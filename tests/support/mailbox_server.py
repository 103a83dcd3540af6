"""A private Dovecot: IMAP with STARTTLS and with TLS, and people out of a file; the system's is not touched."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from support.consoles import Pair
from support.directory_server import free_port, wait_for

_PATIENCE_S = 30


class Dovecot:
    """Dovecot 2.3 in `folder`, which must not be deep (unix sockets). It knows `people` by name and password."""

    def __init__(self, folder: Path, pair: Pair, people: Mapping[str, str], tls: bool = True) -> None:
        program = shutil.which("dovecot", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise RuntimeError("dovecot is not installed: apt-get install dovecot-imapd")
        self._argv = [program, "-F", "-c", str(folder / "dovecot.conf")]
        self.port, self.tls_port = free_port(), free_port()
        self.log = folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        me = pwd.getpwuid(os.geteuid()).pw_name
        group = grp.getgrgid(os.getegid()).gr_name
        # Root's processes go to the package's own user for what is not trusted; others stay who they are.
        inner = "dovenull" if os.geteuid() == 0 else me
        own = "dovecot" if os.geteuid() == 0 else me
        gid = own if own == "dovecot" else group
        (folder / "people").write_text("".join(f"{name}:{{PLAIN}}{word}::::::\n" for name, word in people.items()))
        (folder / "mail").mkdir(exist_ok=True)
        (folder / "mail").chmod(0o777)
        (folder / "dovecot.conf").write_text(
            f"base_dir = {folder}/run\nstate_dir = {folder}/state\nlog_path = {self.log}\nauth_verbose = yes\n"
            f"protocols = imap\ndefault_login_user = {inner}\ndefault_internal_user = {own}\n"
            f"listen = 127.0.0.1\nfirst_valid_uid = 0\nmail_location = maildir:{folder}/mail/%u\n"
            f"ssl = {'yes' if tls else 'no'}\nssl_cert = <{pair.cert}\nssl_key = <{pair.key}\n"
            f"disable_plaintext_auth = {'yes' if tls else 'no'}\nauth_mechanisms = plain login\n"
            "auth_failure_delay = 0\n"
            f"passdb {{\n driver = passwd-file\n args = scheme=PLAIN username_format=%u {folder}/people\n}}\n"
            f"userdb {{\n driver = static\n args = uid={own} gid={gid} home={folder}/mail/%u\n}}\n"
            f"service imap-login {{\n chroot =\n inet_listener imap {{\n  port = {self.port}\n }}\n"
            f" inet_listener imaps {{\n  port = {self.tls_port}\n  ssl = yes\n }}\n}}\n"
            "service anvil {\n chroot =\n unix_listener anvil-auth-penalty {\n  mode = 0\n }\n}\n"
            "auth_username_chars =\nservice stats {\n chroot =\n}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run it, and wait until it listens."""
        self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL)
        wait_for(self.port, self._process, self.log)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_PATIENCE_S)
            self._process = None
