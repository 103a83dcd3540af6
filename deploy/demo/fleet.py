"""Starts, watches and stops every process of a fleet on this machine. All its state is below one folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from demo.broker import PrivateBroker, free_port
from demo.definitions import definitions, login
from demo.keys import Keys

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0


class FleetError(Exception):
    """Raised when the fleet can't be started or stopped; the text says what to do."""


@dataclass
class Service:
    """One process: how it is started, and where it says that it is ready."""

    name: str
    argv: list[str]
    ops_port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it in a session of its own; it dies with us, except where it must not (guests do not)."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )

    @property
    def pid(self) -> int:
        """Its process id; 0 when it was never started."""
        return self.process.pid if self.process else 0

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None and self.process.poll() is None

    def ready(self) -> bool:
        """Whether it says that it can work."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ops_port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def kill(self) -> None:
        """kill -9, as a crash would."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout: float = 15.0) -> None:
        """SIGTERM, and kill when it does not obey."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Fleet:
    """A broker, a scheduler, a portal, a proxy and `hosts` agents below `state`.

    Sizes offered by each host are the machine's own, divided by their number. `say` hears what goes on.
    """

    def __init__(
        self,
        state: Path,
        hosts: int = 2,
        port: int = 0,
        say: Callable[[str], None] = lambda _: None,
        overrides: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self.state = state
        self.hosts = [f"h{number + 1}" for number in range(hosts)]
        self._say = say
        self._overrides = overrides or {}
        self._lock: IO[str] | None = None
        state.mkdir(parents=True, exist_ok=True, mode=0o711)
        if state.is_symlink() or state.stat().st_uid != os.geteuid():
            raise FleetError(f"{state} is not a folder of ours. Remove it, or give another --state DIR.")
        self.take()
        self.keys = Keys(state / "keys")
        for name in ("logs", "settings", "images", "catalogue"):
            (state / name).mkdir(exist_ok=True)
        (state / "settings").chmod(0o700)
        taken: set[int] = set()
        self._ports: dict[str, int] = {}
        for name in ("portal", "proxy", *(f"console-{h}" for h in self.hosts)):
            self._ports[name] = port if name == "portal" and port else free_port(taken)
            taken.add(self._ports[name])
        for name in ("scheduler", "portal", "proxy", *self.hosts):
            self._ports[f"ops-{name}"] = free_port(taken)
            taken.add(self._ports[f"ops-{name}"])
        self.url = f"http://127.0.0.1:{self._ports['portal']}"
        self.console_url = f"ws://127.0.0.1:{self._ports['proxy']}/console"
        self.broker: PrivateBroker | None = None
        self.services: dict[str, Service] = {}

    def take(self) -> None:
        """Make this the one fleet of its folder."""
        self._lock = (self.state / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            running = self.state / "running.json"
            where = json.loads(running.read_text())["url"] if running.exists() else "an unknown address"
            raise FleetError(
                f"A fleet already runs from {self.state}, at {where}. Stop it there, or give this one --state DIR."
            ) from None

    # --- start ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises:
            FleetError: something does not come up; it holds the last words of what failed.
        """
        with self._step("broker"):
            self.broker = PrivateBroker(self.state / "broker", definitions(self.hosts, self.keys), free_port())
            self.broker.start()
        self._write_settings()
        self._command("deskfleet", "migrate", "--config", self._settings("portal"))
        self._accounts()
        self._make_services()
        with self._step("scheduler, agents, proxy and portal"):
            for service in self.services.values():
                service.start()
            for service in self.services.values():
                self.wait_ready(service.name)
        (self.state / "running.json").write_text(json.dumps({"url": self.url, "console": self.console_url}))

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        self._say(f"starting {what} …")
        yield
        self._say(f"  {what}: up after {time.monotonic() - begun:.1f} s")

    def wait_ready(self, name: str) -> None:
        """Wait until a service says that it is ready."""
        service = self.services[name]
        deadline = time.monotonic() + START_S
        while not service.ready():
            if not service.running():
                raise FleetError(f"{name} ended while it was starting:\n{service.last_words()}")
            if time.monotonic() > deadline:
                raise FleetError(f"{name} is not ready after {START_S:.0f} s:\n{service.last_words()}")
            time.sleep(0.05)

    def _program(self, name: str) -> str:
        return str(Path(sys.executable).parent / name)

    def _settings(self, name: str) -> str:
        return str(self.state / "settings" / f"{name}.toml")

    def _command(self, *argv: str, stdin: str = "") -> str:
        done = subprocess.run(
            [self._program(argv[0]), *argv[1:]], input=stdin, capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise FleetError(f"{' '.join(argv[:3])} failed:\n{done.stderr or done.stdout}")
        return done.stdout

    def _accounts(self) -> None:
        """The person and the administrator that the demo prints."""
        known = self._command("deskfleet", "user", "list", "--config", self._settings("portal"))
        for name, rights in (("demo", []), ("admin", ["--admin"])):
            if name not in known.split():
                password = self.keys.secret(f"login-{name}", 9)
                line = ["deskfleet", "user", "add", name, *rights, "--config", self._settings("portal")]
                self._command(*line, stdin=f"{password}\n")

    def token(self, user: str) -> str:
        """A new access token of an account."""
        return self._command(
            "deskfleet", "token", "create", user, "--scope", "fleet", "--config", self._settings("portal")
        ).strip()

    def _make_services(self) -> None:
        for name in ("scheduler", *(login(host) for host in self.hosts), "proxy", "portal"):
            program = f"deskfleet-{name.split('-')[0]}"
            ops = self._ports[f"ops-{name.removeprefix('agent-')}"]
            argv = [self._program(program), "--config", self._settings(name)]
            self.services[name] = Service(name, argv, ops, self.state / "logs" / f"{name}.log")

    # --- settings -------------------------------------------------------------------------------------------

    def _write_settings(self) -> None:
        assert self.broker is not None
        shared = {
            "ledger": {"url": f"sqlite:///{self.state}/ledger.db"},
            "machines": {"catalogue": str(self.state / "catalogue")},
        }
        proxy_cert, proxy_key = self.keys.certificate("proxy", "clientAuth")
        ticket_key = self.keys.secret("ticket", 48)
        own: dict[str, dict[str, object]] = {
            "scheduler": {"disk_reserve_mib": 256, "max_load": 16.0, "grace_s": 60},
            "portal": {
                "listen": f"127.0.0.1:{self._ports['portal']}",
                "public_url": self.url,
                "console_url": self.console_url,
                "database": f"sqlite:///{self.state}/portal.db",
                "secret_key": self.keys.secret("portal", 48),
                "ticket_keys": [ticket_key],
                "admins": ["admin"],
                "auth": ["local"],
            },
            "proxy": {
                "listen": f"127.0.0.1:{self._ports['proxy']}",
                "origins": [self.url],
                "ticket_keys": [ticket_key],
                "tls_cert": str(proxy_cert),
                "tls_key": str(proxy_key),
                "tls_ca": str(self.keys.ca),
            },
        }
        for name, values in own.items():
            self._write(name, name, values, shared if name != "proxy" else {})
        for number, host in enumerate(self.hosts):
            self._write(login(host), "agent", self._agent(number, host), {})

    def _agent(self, number: int, host: str) -> dict[str, object]:
        cert, key = self.keys.certificate(host, "serverAuth")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        console = f"127.0.0.1:{self._ports[f'console-{host}']}"
        # Two fleets on one machine must not share user ids: the guard of each speaks of its own.
        first_uid = 1_000_000 + zlib.crc32(str(self.state).encode()) % 10_000 * 10_000 + 1_000 * number
        return {
            "host": host,
            "state": str(self.state / host),
            "run": str(self.state / host / "run"),
            "images": str(self.state / "images"),
            "console_listen": console,
            "console_address": console,
            "console_cert": str(cert),
            "console_key": str(key),
            "console_ca": str(self.keys.ca),
            "first_uid": first_uid,
            "last_uid": first_uid + 999,
            "offer_memory_mib": memory // len(self.hosts),
            # All hosts are this one machine, and the first copy of the desktop is waited for.
            "template_load": 4.0,
        }

    def _write(self, name: str, section: str, values: dict[str, object], shared: dict[str, dict[str, str]]) -> None:
        assert self.broker is not None
        ops = f"127.0.0.1:{self._ports['ops-' + name.removeprefix('agent-')]}"
        broker = self.broker.url(name, self.keys.secret(f"broker-{name}"))
        values = {"broker_url": broker, "ops_listen": ops, **values, **self._overrides.get(section, {})}
        lines = []
        for title, content in {section: values, **shared}.items():
            lines += [f"[{title}]", *(f"{key} = {_toml(value)}" for key, value in content.items()), ""]
        path = Path(self._settings(name))
        path.touch(0o600)
        path.write_text("\n".join(lines))

    def kept_ready(self) -> bool:
        """Whether a host has a template of a machine (agent/template_store.py)."""
        return any(next((self.state / host / "instant").glob("*/template.json"), None) for host in self.hosts)

    # --- stop -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop everything, guests included; what stays is the folder with ledger, images and logs."""
        for name in ("portal", "proxy", "scheduler"):
            if name in self.services:
                self.services[name].stop()
        for host in self.hosts:
            service = self.services.get(login(host))
            if service:
                service.stop()
                with contextlib.suppress(FleetError, subprocess.TimeoutExpired):
                    self._command("deskfleet-agent", "--purge", "--config", self._settings(login(host)))
        if self.broker:
            self.broker.stop()
        (self.state / "running.json").unlink(missing_ok=True)
        if self._lock:
            self._lock.close()

    def leftovers(self) -> list[str]:
        """What is still there that a stopped fleet must not leave: processes, overlays, sockets."""
        found = [str(p) for host in self.hosts for p in (self.state / host).glob("run/*")]
        found += [str(p) for host in self.hosts for p in (self.state / host).glob("disks/*")]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    if f"{self.state}/" in line and "demo" not in line and "pytest" not in line:
                        found.append(f"process {entry.name}: {line[:200]}")
        return found

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.state, ignore_errors=True)


def _toml(value: object) -> str:
    # JSON's strings, numbers, booleans and lists of strings are TOML's.
    return json.dumps(value)


def interruptible() -> None:
    """Turn SIGTERM into the KeyboardInterrupt that Ctrl-C is, so that one way of stopping serves both."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
