"""deskfleet-agent --config FILE: run this host's agent until SIGTERM. Its guests go on without it.

deskfleet-agent --config FILE preflight [--json]: say whether this machine is fit to be a host.
deskfleet-agent --config FILE gpu list | gpu release ADDRESS: the GPUs in quarantine; put one back into use.
deskfleet-agent enroll BUNDLE [--folder /etc/deskfleet] [--replace]: make this machine the host of a bundle.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from deskfleet.agent import accel
from deskfleet.agent.enrolment import install
from deskfleet.agent.journal import JournalError
from deskfleet.agent.preflight import Level, as_json, as_text, look
from deskfleet.agent.quarantine import QUARANTINE, NotKept, Ward
from deskfleet.agent.service import AgentError, Service, lock
from deskfleet.agent.settings import AgentSchema, AgentSettings
from deskfleet.agent.this_machine import this_machine
from deskfleet.runtime import log as logs
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl, trust
from deskfleet.runtime.bus import BusError
from deskfleet.runtime.metrics import Health, Metrics, serve
from deskfleet.runtime.service import SystemClock, notify_systemd
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.schemas.bundle import BundleError, parse_bundle
from deskfleet.schemas.config import SECTIONS, address

log = logging.getLogger("deskfleet.agent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; 0 after an orderly stop, 2 when it can't start as it is set up. Preflight: 1 when something
    is bad."""
    parser = argparse.ArgumentParser(prog="deskfleet-agent", description="Runs the guests of this host.")
    parser.add_argument("--config", type=Path, default=Path("/etc/deskfleet/deskfleet.toml"))
    parser.add_argument("--purge", action="store_true", help="end every guest of this host, remove its files, and exit")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--check", action="store_true", help="only look at the settings")
    parser.add_argument("command", nargs="?", choices=["run", "preflight", "enroll", "gpu"], default="run")
    parser.add_argument(
        "words", nargs="*", help="enroll: the file from `deskfleet host enroll`; gpu: list, or release and an address"
    )
    parser.add_argument("--folder", type=Path, default=Path("/etc/deskfleet"), help="enroll: where settings go")
    parser.add_argument("--replace", action="store_true", help="enroll: although this machine is a host already")
    parser.add_argument("--json", action="store_true", help="preflight: the findings for programs")
    options = parser.parse_args(arguments)
    logs.configure(options.log_level, "agent")
    try:
        if options.command == "enroll":
            return _enroll(options.words, options.folder, replace=options.replace)
        settings: AgentSettings = load(options.config, {"agent": AgentSchema()}, os.environ, SECTIONS)["agent"]
        if options.check:
            return 0
        if options.command == "preflight":
            findings = look(this_machine(settings))
            print(as_json(findings) if options.json else as_text(findings))
            return int(any(finding.level is Level.BAD for finding in findings))
        if options.command == "gpu":
            return _gpu(options.words, Ward(settings.state / QUARANTINE))
        with lock(settings.state):
            return asyncio.run(_run(settings, purge=options.purge))
    except (SettingsError, AgentError, BundleError, JournalError, BadBrokerUrl, NotKept, OSError) as error:
        what = "start" if options.command == "run" else f"do {options.command}"
        print(f"deskfleet-agent can't {what}:\n{error}", file=sys.stderr)
        return 2


def _gpu(words: Sequence[str], ward: Ward) -> int:
    match words:
        case ["list"]:
            kept = ward.load().values()
            print("\n".join(f"{k.gpu.address} {k.gpu.model}: {k.problem}" for k in kept) or "no GPU is in quarantine")
        case ["release", address]:
            ward.release(address)
            print(f"{address} is released. A running agent checks it within seconds, and offers it if it is fit.")
        case _:
            raise NotKept("say: deskfleet-agent gpu list, or deskfleet-agent gpu release ADDRESS")
    return 0


def _enroll(words: Sequence[str], folder: Path, *, replace: bool) -> int:
    if len(words) != 1:
        raise BundleError("say which bundle: deskfleet-agent enroll BUNDLE")
    settings = install(parse_bundle(Path(words[0]).read_text()), folder, replace=replace)
    print(f"This machine is a host now, by {settings}. Remove the bundle, and start the agent.")
    return 0


async def _run(settings: AgentSettings, *, purge: bool) -> int:
    clock = SystemClock()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    bus = AmqpBus(
        settings.broker_url.reveal().split(),
        name=f"agent-{settings.host}",
        dispatch=loop.call_soon_threadsafe,
        clock=clock,
        rng=random.Random(),  # noqa: S311  jitter of the reconnects
        tls=trust(settings.broker_ca),
    )
    service = Service(
        settings, accel.choose(settings.uids.start if os.geteuid() == 0 else None), bus, clock, version("deskfleet")
    )
    if purge:
        print(f"{service.purge()} guests ended on {settings.host}")
        return 0
    service.recover()
    looking = asyncio.create_task(_look_at_machine(service, settings))
    trouble: list[str] = []
    bus.on_fatal(lambda error: _alarm(error, trouble))
    metrics = Metrics("agent")
    metrics.gauge("guests", "Guests that this host holds", lambda: sum(entry.live for entry in service.agent.entries))
    unfit = "GPUs that are kept out of use until an administrator releases them"
    metrics.gauge("gpus_in_quarantine", unfit, lambda: service.lending.in_quarantine)
    ops = serve(*address(settings.ops_listen), metrics.registry, lambda: _health(bus, service, trouble), clock)
    notify_systemd("READY=1")
    await service.run(stop)
    looking.cancel()
    notify_systemd("STOPPING=1")
    await asyncio.to_thread(bus.stop)
    ops.close()
    return 0


async def _look_at_machine(service: Service, settings: AgentSettings) -> None:
    """Tell administrators, with the host, what is not as it should be. Beside the work: guests must not wait for it."""
    findings = await asyncio.to_thread(look, this_machine(settings, running=True))
    # What KVM and control groups lack was said when they were set up.
    told = ("kvm", "limits")
    bad = [finding for finding in findings if finding.level is not Level.GOOD and finding.name not in told]
    service.remark([finding.line for finding in bad])


def _alarm(error: BusError, trouble: list[str]) -> None:
    log.error("%s", error)
    trouble[:] = [str(error)]


def _health(bus: AmqpBus, service: Service, trouble: Sequence[str]) -> Health:
    reasons = [] if bus.connected else ["the broker is not connected", *trouble]
    if not service.bridge.up:
        reasons.append("the console bridge does not accept connections")
    return Health(not reasons, tuple(reasons))


if __name__ == "__main__":
    sys.exit(main())
