"""A private RabbitMQ node in a folder of its own, for tests and for a demo on one machine.

It runs beside a system RabbitMQ and as any user: own node name, ports, database, logs, cookie, configuration and
name server (epmd), all on the loopback interface, no plugin. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

# The Debian wrappers in /usr/sbin switch to the user "rabbitmq" and refuse everyone but root; these do neither.
_BIN = Path("/usr/lib/rabbitmq/bin")
_LOOPBACK = "-kernel inet_dist_use_interface {127,0,0,1}"


class BrokerFailed(Exception):
    """Raised when the private broker does not start or a command on it fails; holds the end of its output."""


def free_port(taken: Iterable[int] = ()) -> int:
    """A free loopback port below the range that the kernel gives to outgoing connections (32768 and up)."""
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                if port not in taken:
                    return port
    raise BrokerFailed("no free port between 20000 and 32000")


class PrivateBroker:
    """Debian's rabbitmq-server as a private node that lives in `folder`.

    `definitions` is RabbitMQ's definitions document: users, vhosts, permissions, topic_permissions, exchanges,
    queues, bindings. It is loaded at each boot; what the database already holds stays. `settings` are further lines
    of rabbitmq.conf; `plugins` are switched on. The node dies with the thread that called start(), so a killed test
    run leaves nothing behind.
    """

    def __init__(
        self,
        folder: Path,
        definitions: Mapping[str, Any],
        port: int | None = None,
        settings: Mapping[str, str | int] | None = None,
        plugins: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self.port = port or free_port()
        self._distribution = free_port({self.port})
        self._epmd_port = free_port({self.port, self._distribution})
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        if not (_BIN / "rabbitmq-server").exists():
            raise BrokerFailed("RabbitMQ is not installed: apt-get install rabbitmq-server")
        for name in ("home", "log", "mnesia", "conf.d"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        cookie = folder / "home" / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(0o600)
            cookie.write_text(secrets.token_hex(20))
            cookie.chmod(0o400)
        (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        document = folder / "definitions.json"
        document.touch(0o600)
        document.write_text(json.dumps({"vhosts": [{"name": "/"}], **definitions}))
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"load_definitions = {document}\n"
            "log.file.level = info\n"
            # The write-ahead log of the quorum queues is kept in memory up to this size (512 MiB by default).
            "raft.wal_max_size_bytes = 33554432\n"
            + "".join(f"{key} = {value}\n" for key, value in (settings or {}).items())
        )
        self.environ = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(folder / "home"),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # One node name a folder: the database holds the name and refuses another.
            "RABBITMQ_NODENAME": f"deskfleet-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}@localhost",
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _LOOPBACK,
            "RABBITMQ_CTL_ERL_ARGS": _LOOPBACK,
            # Makes the start script become the Erlang machine instead of its parent, so our child is the node.
            "RUNNING_UNDER_SYSTEMD": "1",
        }

    def url(self, login: str, password: str, vhost: str = "/") -> str:
        """The address for an AMQP client."""
        return (
            f"amqp://{quote(login, safe='')}:{quote(password, safe='')}@127.0.0.1:{self.port}/{quote(vhost, safe='')}"
        )

    @property
    def pid(self) -> int:
        """Process id of the running node."""
        if self._node is None:
            raise BrokerFailed("the private broker is not running")
        return self._node.pid

    def start(self, timeout: float = 120.0) -> None:
        """Start the node and wait until it speaks AMQP; raises BrokerFailed with its output."""
        # Our own name server in the foreground: the node would start one that outlives it, or use the system's.
        self._epmd = self._spawn(["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"], "epmd.out")
        self._node = self._spawn([str(_BIN / "rabbitmq-server")], "node.out")
        deadline = time.monotonic() + timeout
        while not self.answers():
            code = self._node.poll()
            if code is not None or time.monotonic() > deadline:
                self.kill()
                output = (self.folder / "log" / "node.out").read_text(errors="replace")
                how = "did not answer in time" if code is None else f"ended with {code}"
                raise BrokerFailed(f"the private broker {how}: {output[-3000:]}")
            time.sleep(0.1)

    def answers(self) -> bool:
        """True when the node sends Connection.Start (class 10, method 10) to an AMQP 0-9-1 client."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                client.sendall(b"AMQP\x00\x00\x09\x01")
                return client.recv(11)[7:] == b"\x00\x0a\x00\x0a"
        except OSError:
            return False

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node and return its output; raises BrokerFailed. Takes seconds."""
        done = subprocess.run(
            [str(_BIN / "rabbitmqctl"), *arguments],
            env=self.environ,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise BrokerFailed(f"rabbitmqctl {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    def stop(self, timeout: float = 60.0) -> None:
        """End the node in an orderly way (SIGTERM, as systemd does), then its name server."""
        if self._node is not None:
            self._node.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._node.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """SIGKILL the node and its name server, as a power cut would."""
        for child in (self._node, self._epmd):
            if child is not None:
                child.kill()
                child.wait()
        self._node = self._epmd = None

    def pause(self) -> None:
        """SIGSTOP the node: it keeps its connections and answers nobody."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after pause()."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Stop and start again on the same port with the same database."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop and delete the folder."""
        self.stop()
        shutil.rmtree(self.folder)

    def __enter__(self) -> PrivateBroker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, argv: list[str], output: str) -> subprocess.Popen[bytes]:
        log = self.folder / "log" / output
        with log.open("ab") as sink:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                env=self.environ,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                # A Ctrl-C at the terminal is for the caller, who stops the broker last.
                start_new_session=True,
            )
