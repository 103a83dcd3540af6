"""deskfleet-scheduler --config FILE: run the scheduler until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import random
import ssl
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from deskfleet.ledger.engine import LedgerError, check_revision, migrate, open_engine
from deskfleet.ledger.lease import Lease
from deskfleet.ledger.writer import Writer
from deskfleet.runtime import log as logs
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl, trust
from deskfleet.runtime.metrics import Health, Metrics, serve
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.service import Clock, MainLoop, SystemClock, notify_systemd, stop_on_signals
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.figures import Figures
from deskfleet.scheduler.leadership import Leadership, is_gone, owner_name
from deskfleet.scheduler.settings import SchedulerSchema
from deskfleet.schemas import topology
from deskfleet.schemas.catalogue import Catalogue
from deskfleet.schemas.config import SECTIONS, LedgerSchema, MachinesSchema, address

log = logging.getLogger("deskfleet.scheduler")

_LOOK_S = 0.25
#: The broker notices within two to three of these that a leader hangs, and lets the next one in.
_HEARTBEAT_S = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; 0 after an orderly stop, 2 when it can't start as it is set up."""
    parser = argparse.ArgumentParser(prog="deskfleet-scheduler", description="Places desktops on hosts.")
    parser.add_argument("--config", type=Path, default=Path("/etc/deskfleet/deskfleet.toml"))
    parser.add_argument("--migrate", action="store_true", help="bring the ledger to this version's revision first")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--check", action="store_true", help="only look at the settings")
    options = parser.parse_args(arguments)
    logs.configure(options.log_level, "scheduler")
    try:
        schemas = {"scheduler": SchedulerSchema(), "ledger": LedgerSchema(), "machines": MachinesSchema()}
        settings = load(options.config, schemas, os.environ, SECTIONS)
        if options.check:
            return 0
        engine = open_engine(settings["ledger"]["url"])
        if options.migrate:
            migrate(engine)
        check_revision(engine)
        clock = SystemClock()
        loop = MainLoop(clock)
        catalogue = Catalogue(Path(settings["machines"]["catalogue"]))
        rules: Settings = settings["scheduler"]["settings"]
        leadership = Leadership(
            Lease(engine, owner_name()),
            clock,
            partial(_bus, settings["scheduler"]["broker_url"], trust(settings["scheduler"]["broker_ca"]), loop, clock),
            lambda lease, bus: Scheduler(Writer(engine, lease), bus, clock, catalogue.machines, rules, loop.post),
            is_gone,
        )
        metrics = Metrics("scheduler")
        metrics.registry.register(Figures(lambda: leadership.scheduler, rules.policy, clock, "deskfleet_scheduler"))
        ops = serve(*address(settings["scheduler"]["ops_listen"]), metrics.registry, lambda: _health(leadership), clock)
    except (SettingsError, LedgerError, BadBrokerUrl, OSError) as error:
        print(f"deskfleet-scheduler can't start:\n{error}", file=sys.stderr)
        return 2
    for problem in catalogue.errors:
        log.warning("%s", problem)
    loop.every(_LOOK_S, leadership.tick)
    stop_on_signals(loop.stop)
    notify_systemd("READY=1")
    loop.run()
    notify_systemd("STOPPING=1")
    leadership.stop()
    ops.close()
    engine.dispose()
    return 0


def _bus(url: Secret, tls: ssl.SSLContext | None, loop: MainLoop, clock: Clock) -> AmqpBus:
    return AmqpBus(
        url.reveal().split(),
        name="scheduler",
        dispatch=loop.post,
        clock=clock,
        rng=random.Random(),  # noqa: S311  jitter of the reconnects
        declare=topology.core(),
        tls=tls,
        heartbeat=_HEARTBEAT_S,
    )


def _health(leadership: Leadership) -> Health:
    scheduler, reasons = leadership.scheduler, []
    if not leadership.bus.connected:
        reasons.append("the broker is not connected")
    if scheduler and not scheduler.healthy:
        reasons.append("the ledger does not answer")
    return Health(not reasons, tuple(reasons))


if __name__ == "__main__":
    sys.exit(main())
