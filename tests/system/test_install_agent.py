"""deploy/install-agent on a bare Debian with its own systemd, from nothing to a host to nothing; and the units."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from demo.broker import PrivateBroker, free_port
from support.debian import Debian
from support.guests import PATIENCE, ROOT, SMALL, build_tiny, short_folder, start_order
from support.rfb import Rfb, UnixStream
from support.screen import TINY_TEXT, identity, read_identity, region_hash

from deskfleet.agent.argv import uuid_of
from deskfleet.runtime import rights
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.certificates import Authority
from deskfleet.runtime.service import SystemClock
from deskfleet.schemas import topology
from deskfleet.schemas.bundle import Bundle
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Instant, Machine, ReadyBy, Share, Size
from deskfleet.schemas.messages import HostFence, HostTemplates, VmStart, VmStop
from deskfleet.schemas.session import Outcome
from deskfleet.schemas.template import blueprints
from deskfleet.schemas.wire import encode

SID, FORKED = "7" * 32, "8" * 32
SECRET = "s" * 40
#: By their numbers in capabilities(7): CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID, NET_BIND_SERVICE, NET_ADMIN
CAPABILITIES = sum(1 << number for number in (0, 1, 5, 6, 7, 10, 12))
INSTALL = "bash /mnt/src/deploy/install-agent"
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_and_approves_the_units(unit: Path, tmp_path: Path) -> None:
    """Levels by systemd's own count, 0 to 10, lower is better. The agent starts guests as other users, so it can't get
    as low as the rest."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", unit.read_text()))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    threshold = "45" if "agent" in unit.name else "20"
    line = ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager", copy]
    rated = subprocess.run(line, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--nonsense", "unknown: --nonsense (--help says what there is)"),
        ("--bundle", "--bundle needs a value"),
        ("--bundle /nowhere", "there is no /nowhere"),
        ("--purge", "--purge goes with --uninstall"),
        ("", "run me as root: I install packages, a service, and files below /opt and /etc"),
    ],
)
def test_what_it_refuses(arguments: str, sentence: str) -> None:
    with short_folder() as folder:
        script = shutil.copy(ROOT / "deploy/install-agent", folder)
        line = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", script, *arguments.split()]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"install-agent: {sentence}\n")


class Site:
    """A bare machine, wheels of two versions and of one that does not start, a broker, and one image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ops = free_port()
        for name, version in (("one", "1.0.0"), ("two", "2.0.0"), ("bad", "3.0.0")):
            _wheels(folder, name, version)
        self.machine: Machine = build_tiny(folder / "tiny")
        mounts = {f"/mnt/{name}": folder / name for name in ("one", "two", "bad")}
        self.debian = Debian(folder / "root", {**mounts, "/mnt/src": ROOT, "/mnt/tiny": folder / "tiny"})
        services = rights.services(dict.fromkeys(("scheduler", "portal", "proxy"), SECRET))
        self.broker = PrivateBroker(folder / "mq", rights.document(services, rights.host("h7", SECRET)))

    def bundle(self) -> str:
        authority = Authority(self.folder / "ca")
        cert, key = (path.read_text() for path in authority.issue("h7", "serverAuth"))
        url = self.broker.url("agent-h7", SECRET)
        return Bundle("h7", url, f"localhost:{free_port()}", cert, key, authority.certificate.read_text()).dumps()

    def pid(self) -> int:
        """The agent's, as its systemd sees it."""
        return int(self.debian.ok("systemctl show --property MainPID --value deskfleet-agent"))

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ops}/metrics", timeout=10) as page:
            text = page.read().decode()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])

    def files(self) -> set[str]:
        """What an installation may have touched, and when."""
        return set(
            self.debian.ok("find /opt /etc /usr/local ! -path '*/__pycache__*' -printf '%p %T@ %l\n'").splitlines()
        )

    def ours(self) -> list[str]:
        """Files by our name anywhere on the machine."""
        others = "-path /mnt -prune -o -path /proc -prune -o -path /sys -prune"
        return sorted(self.debian.ok(f"find / {others} -o -name '*deskfleet*' -print").split())


def _wheels(folder: Path, name: str, version: str) -> None:
    """A folder of wheels that needs no package index; the first one holds what the others need as well."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "docs", "*.egg-info", "out"))
    setup = (source / "setup.cfg").read_text()
    (source / "setup.cfg").write_text(setup.replace("version = 0.1.0", f"version = {version}", 1))
    if name == "bad":
        main = source / "agent/__main__.py"
        main.write_text(main.read_text().replace("    service.recover()\n", "    raise OSError('broken')\n"))
    # async-timeout is for the Python of a Debian, which may be older than this one.
    what = (
        [f"{source}[agent]", "setuptools>=77", "async-timeout>=4.0.3"] if name == "one" else ["--no-deps", str(source)]
    )
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder / name), *what]
    subprocess.run(line, check=True, timeout=300)
    if name != "one":
        for wheel in (folder / "one").glob("*.whl"):
            if not wheel.name.startswith("deskfleet-"):
                (folder / name / wheel.name).hardlink_to(wheel)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with short_folder() as folder:
        site = Site(folder)
        with site.debian, site.broker:
            yield site


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def send(site: Site, *messages: HostFence | HostTemplates | VmStart | VmStop) -> None:
    """Commands to the host, as its scheduler."""
    up = threading.Event()
    bus = AmqpBus(
        [site.broker.url("scheduler", SECRET)], name="test", dispatch=lambda action: action(), clock=SystemClock(),
        rng=random.Random(1), declare=topology.core(),
    )  # fmt: skip
    bus.on_connect(up.set)
    bus.start()
    assert up.wait(PATIENCE)
    for message in messages:
        kind, body = encode(message)
        bus.publish(Outgoing(topology.COMMANDS, topology.host_queue("h7"), kind, body)).result(PATIENCE)
    bus.stop()


def qemu() -> psutil.Process:
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if uuid_of(SID) in (line := process.info["cmdline"] or []) and "qemu-system" in line[0]
    )


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def processes_of(part: str) -> list[list[str]]:
    """The command lines that hold it."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(part in word for word in line)]


def keepers() -> set[int]:
    """The processes that hold the memory of templates."""
    return {p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "infinity"]}


def status_of(process: psutil.Process) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_from_a_bare_machine_to_a_host_and_back(site: Site) -> None:
    debian, before = site.debian, keepers()
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt/one"}

    # Where systemd does not run, everything is put in place and what is left to do is said.
    done = debian.without_systemd(INSTALL, **offline)
    assert done.returncode == 0, done.stdout
    assert "systemd does not run here; start it with /usr/local/bin/deskfleet-agent" in done.stdout
    version = re.search(r"installing release (\S+)", done.stdout)
    assert version and debian.ok("readlink /opt/deskfleet/current").strip() == f"/opt/deskfleet/releases/{version[1]}"
    assert debian.ok("getent group kvm")
    assert 'GROUP="kvm"' in debian.path("/etc/udev/rules.d/65-deskfleet-kvm.rules").read_text()
    assert "not started: this machine is no host yet" in debian.ok(INSTALL, **offline)
    debian.ok("mkdir /etc/deskfleet && touch /etc/deskfleet/deskfleet.toml /var/lib/deskfleet/agent/kept")
    assert "settings in /etc/deskfleet stay" in debian.ok(f"{INSTALL} --uninstall")
    assert site.ours() == ["/etc/deskfleet", "/etc/deskfleet/deskfleet.toml", "/var/lib/deskfleet"]
    assert debian.path("/var/lib/deskfleet/agent/kept").exists()
    debian.ok(f"{INSTALL} --uninstall --purge")
    assert site.ours() == []

    # With a bundle it becomes a host; a second run changes nothing.
    (debian.root / "root/h7.bundle").write_text(site.bundle())
    override = debian.root / "etc/systemd/system/deskfleet-agent.service.d/ops.conf"
    override.parent.mkdir()
    more = {"OPS_LISTEN": f"127.0.0.1:{site.ops}", "TEMPLATE_LOAD": "1000.0", "TEMPLATE_STILL_S": "0.5"}
    lines = [f"Environment=DESKFLEET_AGENT__{name}={value}" for name, value in more.items()]
    override.write_text("\n".join(["[Service]", *lines, ""]))
    first = debian.ok(f"{INSTALL} --from /mnt/one --bundle /root/h7.bundle")
    assert re.search(r"^good +qemu ", first, re.MULTILINE) and re.search(r"^good +broker ", first, re.MULTILINE), first
    assert "\nbad" not in first
    assert first.endswith("the agent runs\n")
    agent, files = site.pid(), site.files()
    again = debian.ok(f"{INSTALL} --from /mnt/one --bundle /root/h7.bundle")
    assert "release 1.0.0-1 is current" in again and "this machine is a host already" in again
    assert site.pid() == agent
    assert site.files() ^ files == set()

    # A guest runs inside the unit's sandbox, with a picture, a keyboard and a network.
    debian.ok("cp /mnt/tiny/images/* /var/lib/deskfleet/images/")
    send(site, HostFence("h7", 0))
    index = debian.path("/var/lib/deskfleet/agent/images.json")
    until(lambda: site.machine.sha256 in text(index), "the image")
    send(site, start_order(site.machine, SID, 1, resources=SMALL))
    socket = debian.path(f"/run/deskfleet/{SID}/vnc.sock")
    journal = debian.path(f"/var/lib/deskfleet/agent/journal/{SID}.json")
    until(lambda: '"running"' in text(journal), "the guest")
    viewer = Rfb(UnixStream(socket))
    until(lambda: read_identity(viewer.picture()) == identity(SID), "the guest's picture")
    guest = qemu()
    facts = status_of(guest)
    assert facts["Uid"].split()[0] == "200000" and facts["NoNewPrivs"] == "1" and int(facts["CapEff"], 16) == 0
    assert int(facts["CapBnd"], 16) == CAPABILITIES
    names = [p.info["name"] for p in psutil.process_iter(["name", "uids"]) if p.info["uids"].real == 200_000]
    assert any(name.startswith("passt") for name in names), names

    # It lives in the group of the guests, not of the agent, and so does its passt. (This kernel may have no controllers
    # left for version 2; that the limits hold is shown in test_agent_limits.py.)
    group = Path(f"/proc/{guest.pid}/cgroup").read_text().splitlines()[-1]
    home = "/system.slice/deskfleet-guests.service"
    assert group.endswith(f"{home}/h7/{SID}"), group
    assert len(debian.path(f"/sys/fs/cgroup{home}/h7/{SID}/cgroup.procs").read_text().split()) == 2
    assert "refuse" in debian.run("systemctl stop deskfleet-guests").stdout.lower()

    # A template is made and forked in there as well.
    (wanted,) = blueprints(replace(site.machine, instant=Instant(ReadyBy.STILL, Share.MACHINE, (Size(1, 128),))))
    send(site, HostTemplates("h7", "1" * 16, (wanted,)))
    until(lambda: list(debian.path("/var/lib/deskfleet/agent/instant").glob("*/template.json")), "the template")
    send(site, start_order(site.machine, FORKED, 2, resources=SMALL, template=wanted.key))
    fork = debian.path(f"/var/lib/deskfleet/agent/journal/{FORKED}.json")
    until(lambda: '"running"' in text(fork), "the fork")
    assert '"forked"' in text(fork) and keepers() - before

    # An upgrade: another agent, the same guests under the same viewer. The former release stays.
    assert debian.ok(f"{INSTALL} --from /mnt/two").endswith("the agent runs\n")
    upgraded = site.pid()
    assert upgraded != agent and debian.ok("readlink /opt/deskfleet/current").endswith("/2.0.0-1\n")
    assert guest.is_running() and site.metric("deskfleet_agent_guests") == 2
    send(site, VmStop(FORKED, 3, Outcome.STOPPED, Reason.STOPPED_BY_USER))
    until(lambda: site.metric("deskfleet_agent_guests") == 1, "the fork's end")
    seen = region_hash(viewer.picture(), TINY_TEXT)
    viewer.type("hello")
    until(lambda: region_hash(viewer.picture(), TINY_TEXT) != seen, "the typed text")
    assert debian.ok("ls /opt/deskfleet/releases").split() == ["1.0.0-1", "2.0.0-1"]

    # A release that does not start is left again.
    failed = debian.run(f"{INSTALL} --from /mnt/bad")
    assert failed.returncode == 1 and "so the former one is current again" in failed.stdout
    assert debian.ok("readlink /opt/deskfleet/current").endswith("/2.0.0-1\n")
    until(lambda: debian.run("systemctl is-active deskfleet-agent").returncode == 0, "the former release")
    assert guest.is_running() and site.metric("deskfleet_agent_guests") == 1

    # Nobody's desktop is taken away by mistake.
    refused = debian.run(f"{INSTALL} --uninstall")
    assert refused.returncode == 1 and "1 desktops run here" in refused.stdout
    assert guest.is_running() and debian.run("systemctl is-active deskfleet-agent").returncode == 0
    viewer.close()
    assert "the agent is gone" in debian.ok(f"{INSTALL} --uninstall --purge")
    until(lambda: not guest.is_running(), "the guest's end")
    assert debian.run("systemctl is-active deskfleet-guests").stdout.strip() in ("inactive", "unknown")
    assert site.ours() == []
    assert debian.run("systemctl cat deskfleet-agent").returncode != 0
    assert "deskfleet_h7" not in debian.ok("nft list tables")
    assert not keepers() - before, "nothing holds the template's memory any more"
    until(lambda: not processes_of("/opt/deskfleet/"), "the last process's end")
