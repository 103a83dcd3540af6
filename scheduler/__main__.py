"""deskfleet-scheduler --config FILE: run the scheduler until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from deskfleet.ledger.engine import LedgerError, check_revision, migrate, open_engine
from deskfleet.ledger.writer import Writer
from deskfleet.runtime import log as logs
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl
from deskfleet.runtime.metrics import Health, Metrics, serve
from deskfleet.runtime.service import MainLoop, SystemClock, notify_systemd, stop_on_signals
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.settings import SchedulerSchema
from deskfleet.schemas import topology
from deskfleet.schemas.catalogue import Catalogue
from deskfleet.schemas.config import SECTIONS, LedgerSchema, MachinesSchema, address
from deskfleet.schemas.session import State

log = logging.getLogger("deskfleet.scheduler")


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
        bus = AmqpBus(
            settings["scheduler"]["broker_url"].reveal().split(),
            name="scheduler",
            dispatch=loop.post,
            clock=clock,
            rng=random.Random(),  # noqa: S311  jitter of the reconnects
            declare=topology.core(),
        )
        catalogue = Catalogue(Path(settings["machines"]["catalogue"]))
        scheduler = Scheduler(
            Writer(engine), bus, clock, catalogue.machines, settings["scheduler"]["settings"], loop.post
        )
        scheduler.start()
        metrics = Metrics("scheduler")
        _gauges(metrics, scheduler)
        ops = serve(
            *address(settings["scheduler"]["ops_listen"]), metrics.registry, lambda: _health(bus, scheduler), clock
        )
    except (SettingsError, LedgerError, BadBrokerUrl, OSError) as error:
        print(f"deskfleet-scheduler can't start:\n{error}", file=sys.stderr)
        return 2
    for problem in catalogue.errors:
        log.warning("%s", problem)
    bus.start()
    stop_on_signals(loop.stop)
    notify_systemd("READY=1")
    loop.run()
    notify_systemd("STOPPING=1")
    bus.stop()
    ops.close()
    engine.dispose()
    return 0


def _health(bus: AmqpBus, scheduler: Scheduler) -> Health:
    reasons = []
    if not bus.connected:
        reasons.append("the broker is not connected")
    if not scheduler.healthy:
        reasons.append("the ledger does not answer")
    return Health(not reasons, tuple(reasons))


def _gauges(metrics: Metrics, scheduler: Scheduler) -> None:
    """Read at scrape time, from the cache."""
    sessions = metrics.gauge("sessions", "Sessions that have not ended", ["state"])
    for state in State:
        if state is not State.ENDED:
            sessions.labels(state.value).set_function(partial(scheduler.count, state))
    hosts = metrics.gauge("hosts", "Hosts known, and those heard lately", ["kind"])
    hosts.labels("known").set_function(lambda: len(scheduler.fleet.hosts))
    hosts.labels("fresh").set_function(scheduler.fresh_hosts)


if __name__ == "__main__":
    sys.exit(main())
