"""Making a machine a host, with a real broker over TLS: what a bundle opens, and what it does not."""

from __future__ import annotations

import os
import queue
import random
import shlex
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner
from demo.broker import PrivateBroker, free_port
from support.bus_harness import PATIENCE

from deskfleet.agent.__main__ import main as agent_main
from deskfleet.agent.settings import AgentSchema, AgentSettings
from deskfleet.portal.cli import main as deskfleet
from deskfleet.runtime import rights
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import trust
from deskfleet.runtime.bus import AccessRefused, BusDown, BusError, Delivery, LoginRefused, Outgoing
from deskfleet.runtime.certificates import Authority
from deskfleet.runtime.service import MainLoop, SystemClock
from deskfleet.runtime.settings import load
from deskfleet.schemas import topology
from deskfleet.schemas.bundle import BundleError, parse_bundle
from deskfleet.schemas.config import SECTIONS

SECRET = "s" * 40


class Site:
    """A broker that speaks TLS under the site's own authority, and the command line of its administrator."""

    def __init__(self, folder: Path, broker: PrivateBroker, tls_port: int, authority: Authority) -> None:
        self.folder, self.broker, self.tls_port, self.authority = folder, broker, tls_port, authority
        self.ctl = folder / "ctl"
        environ = " ".join(f"{key}={shlex.quote(value)}" for key, value in broker.environ.items())
        self.ctl.write_text(f'#!/bin/sh\nexec env -i {environ} /usr/lib/rabbitmq/bin/rabbitmqctl "$@"\n')
        self.ctl.chmod(0o755)

    def run(self, *arguments: str) -> str:
        ca = str(self.authority.folder)
        done = CliRunner().invoke(deskfleet, ["host", *arguments, "--ca", ca, "--rabbitmqctl", str(self.ctl)])
        assert done.exit_code == 0, done.output
        return done.output

    def enroll(self, name: str) -> Path:
        bundle = self.folder / f"{name}-{random.random()}.bundle"
        address = f"amqps://localhost:{self.tls_port}/%2F"
        self.run(
            "enroll", name, "--address", f"{name}:6080", "--broker", address,
            "--broker-ca", str(self.authority.certificate), "--out", str(bundle),
        )  # fmt: skip
        return bundle

    def install(self, bundle: Path) -> AgentSettings:
        folder = self.folder / f"etc-{random.random()}"
        assert agent_main(["enroll", str(bundle), "--folder", str(folder)]) == 0
        settings: AgentSettings = load(folder / "deskfleet.toml", {"agent": AgentSchema()}, {}, SECTIONS)["agent"]
        return settings


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with TemporaryDirectory(prefix="dfen") as text:
        folder = Path(text)
        authority = Authority(folder / "ca")
        cert, key = authority.issue("localhost", "serverAuth")
        port = free_port()
        tls = {
            "listeners.ssl.1": f"127.0.0.1:{port}",
            "ssl_options.cacertfile": str(authority.certificate),
            "ssl_options.certfile": str(cert),
            "ssl_options.keyfile": str(key),
            "ssl_options.verify": "verify_none",
        }
        passwords = dict.fromkeys(("scheduler", "portal", "proxy"), SECRET)
        with PrivateBroker(folder / "mq", rights.services(passwords), settings=tls) as broker:
            site = Site(folder, broker, port, authority)
            with connected(site, f"amqp://scheduler:{SECRET}@127.0.0.1:{broker.port}/%2F", "", topology.core()):
                yield site


class Session:
    """A connection with somebody's login."""

    def __init__(self, bus: AmqpBus, fatal: list[BusError]) -> None:
        self.bus, self.fatal = bus, fatal

    def publish(self, exchange: str, key: str) -> BusError | None:
        for _ in range(100):
            error = self.bus.publish(Outgoing(exchange, key, "test", b"{}", mandatory=False)).exception(PATIENCE)
            if not isinstance(error, BusDown):
                break
            time.sleep(0.1)  # a refusal closes the channel, which is opened again
        assert error is None or isinstance(error, BusError)
        return error


@contextmanager
def connected(
    site: Site, url: str, ca: str, declare: topology.Topology | None = None, wait: bool = True
) -> Iterator[Session]:
    loop = MainLoop(SystemClock())
    thread = threading.Thread(target=loop.run)
    thread.start()
    up, fatal = threading.Event(), []
    bus = AmqpBus(
        [url], name="test", dispatch=loop.post, clock=SystemClock(), rng=random.Random(1), declare=declare,
        tls=trust(ca), confirm_timeout=5.0,
    )  # fmt: skip
    bus.on_connect(up.set)
    bus.on_fatal(lambda error: (fatal.append(error), up.set()))  # type: ignore[func-returns-value]
    bus.start()
    try:
        if wait:
            assert up.wait(PATIENCE), f"no connection to {site.broker.port}"
        yield Session(bus, fatal)
    finally:
        bus.stop()
        loop.stop()
        thread.join()


@contextmanager
def as_host(site: Site, settings: AgentSettings) -> Iterator[Session]:
    with connected(site, settings.broker_url.reveal(), settings.broker_ca) as session:
        yield session


def test_a_bundle_makes_a_machine_the_host_it_names(site: Site) -> None:
    settings = site.install(site.enroll("h1"))
    assert (settings.host, settings.console_address) == ("h1", "h1:6080")
    assert settings.console_tls and all(Path(file).is_file() for file in settings.console_tls)
    with as_host(site, settings) as h1:
        assert h1.bus.connected and h1.publish(topology.EVENTS, topology.heartbeat_key("h1")) is None
        assert h1.bus.depth(topology.host_queue("h1")).result(PATIENCE).messages == 0


def test_what_is_secret_is_readable_by_nobody_else(site: Site) -> None:
    bundle = site.enroll("h3")
    settings = site.install(bundle)
    password = parse_bundle(bundle.read_text()).broker_url.split(":")[2].split("@")[0]
    assert settings.console_tls
    keys = Path(settings.console_tls[1]).parent
    for path in (bundle, *keys.iterdir(), keys.parent / "deskfleet.toml"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert password not in (keys.parent / "deskfleet.toml").read_text()
    assert password not in repr(parse_bundle(bundle.read_text()))


def test_c42_a_stolen_bundle_commands_no_other_host_and_no_service(site: Site) -> None:
    site.enroll("victim")
    with as_host(site, site.install(site.enroll("thief"))) as thief:
        for exchange, key in (
            (topology.EVENTS, topology.heartbeat_key("victim")),
            (topology.EVENTS, topology.report_key("victim")),
            (topology.EVENTS, topology.session_key("f" * 32)),
            (topology.EVENTS, topology.answer_key("w1")),
            (topology.COMMANDS, topology.host_queue("victim")),
            (topology.COMMANDS, "scheduler"),
            (topology.COMMANDS, "questions"),
            ("", topology.host_queue("victim")),
            ("", topology.SCHEDULER_COMMANDS),
        ):
            assert isinstance(thief.publish(exchange, key), AccessRefused), (exchange, key)
        taken: list[Delivery] = []
        for name in (topology.host_queue("victim"), topology.SCHEDULER_COMMANDS, topology.DEAD):
            thief.bus.consume(name, taken.append)
        portal = f"amqp://portal:{SECRET}@127.0.0.1:{site.broker.port}/%2F"
        with connected(site, portal, "") as somebody:
            somebody.publish(topology.COMMANDS, topology.host_queue("victim"))
        assert thief.publish(topology.EVENTS, topology.heartbeat_key("thief")) is None, "its own it may"
        assert taken == []
        waiting = thief.bus.depth(topology.host_queue("victim")).result(PATIENCE)
        assert (waiting.messages, waiting.consumers) == (1, 0)


def test_the_manual_says_the_portals_rights_as_they_are() -> None:
    services = rights.services(dict.fromkeys(("scheduler", "portal", "proxy"), SECRET))
    (ours,) = [right for right in services["permissions"] if right["user"] == "portal"]
    command = "rabbitmqctl set_permissions portal '{configure}' '{write}' '{read}'".format(**ours)
    assert command in (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_dead_letters_are_the_portals_to_take_and_to_send_again(site: Site) -> None:
    """The portal's rights are enough for its dead letters: to take one, and to put it back where it came from."""
    portal = f"amqp://portal:{SECRET}@127.0.0.1:{site.broker.port}/%2F"
    scheduler = f"amqp://scheduler:{SECRET}@127.0.0.1:{site.broker.port}/%2F"
    with connected(site, portal, "") as ours, connected(site, scheduler, "") as theirs:
        taken: queue.Queue[Delivery] = queue.Queue()
        ours.bus.consume(topology.DEAD, taken.put)
        seen: queue.Queue[Delivery] = queue.Queue()
        theirs.bus.consume(topology.SCHEDULER_COMMANDS, seen.put)
        assert ours.publish(topology.COMMANDS, "scheduler") is None
        seen.get(timeout=PATIENCE).reject()
        dead = taken.get(timeout=PATIENCE)
        assert dead.death and (dead.sender, dead.death.queue) == ("portal", topology.SCHEDULER_COMMANDS)
        assert ours.publish(topology.COMMANDS, "scheduler") is None
        dead.ack()
        again = seen.get(timeout=PATIENCE)
        assert (again.sender, again.body) == ("portal", dead.body)
        again.ack()


def test_c40_enrolling_again_puts_the_old_bundle_out_of_force(site: Site) -> None:
    old = site.install(site.enroll("again"))
    with as_host(site, old) as first:
        gone = threading.Event()
        first.bus.on_disconnect(gone.set)
        new = site.install(site.enroll("again"))
        assert gone.wait(PATIENCE), "whoever used the old one is cut off"
    with as_host(site, new) as second, as_host(site, old) as late:
        assert second.bus.connected
        assert isinstance(late.fatal[0], LoginRefused)


def test_a_revoked_host_is_out_at_once_and_stays_out(site: Site) -> None:
    settings = site.install(site.enroll("leaver"))
    with as_host(site, settings) as host:
        gone = threading.Event()
        host.bus.on_disconnect(gone.set)
        site.run("revoke", "leaver", "--yes")
        assert gone.wait(PATIENCE)
    with as_host(site, settings) as late:
        assert isinstance(late.fatal[0], LoginRefused)


def test_a_broker_of_another_authority_is_not_believed(site: Site, tmp_path: Path) -> None:
    settings = site.install(site.enroll("careful"))
    stranger = Authority(tmp_path / "ca").certificate
    with connected(site, settings.broker_url.reveal(), str(stranger), wait=False) as host:
        assert not threading.Event().wait(2.0) and not host.bus.connected


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"kind": "deskfleet-host-1"}', "x" * 300_000, "[" * 100_000])
def test_what_is_no_bundle_is_refused_in_words(text: str) -> None:
    with pytest.raises(BundleError, match="this is no bundle"):
        parse_bundle(text)


def test_a_machine_that_is_a_host_already_is_left_as_it_is(site: Site, tmp_path: Path) -> None:
    bundle = str(site.enroll("twice"))
    folder = tmp_path / "etc"
    assert agent_main(["enroll", bundle, "--folder", str(folder)]) == 0
    before = (folder / "deskfleet.toml").read_text()
    os.utime(folder / "deskfleet.toml", (1, 1))
    assert agent_main(["enroll", bundle, "--folder", str(folder)]) == 2
    assert (folder / "deskfleet.toml").stat().st_mtime == 1
    assert agent_main(["enroll", bundle, "--folder", str(folder), "--replace"]) == 0
    assert (folder / "deskfleet.toml.before").read_text() == before


@pytest.mark.parametrize("name", ["", "H1", "a b", "-x", "x;id", "../x", "a" * 64, "a_b"])
def test_c26_a_name_is_never_a_path_or_a_command(site: Site, name: str) -> None:
    options = ["--address", "h:1", "--broker", "amqps://b/", "--ca", str(site.folder / "no")]
    done = CliRunner().invoke(deskfleet, ["host", "enroll", *options, "--", name])
    assert done.exit_code == 1 and "name" in done.output and not (site.folder / "no").exists()
