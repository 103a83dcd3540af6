"""deskfleet-proxy --config FILE: run one token proxy until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import resource
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deskfleet.proxy.dial import Dialler, client_context
from deskfleet.proxy.gate import Gate
from deskfleet.proxy.routes import RouteTable
from deskfleet.proxy.server import Server
from deskfleet.proxy.service import News, health, measure
from deskfleet.proxy.settings import ProxySchema, ProxySettings
from deskfleet.proxy.stats import Stats
from deskfleet.proxy.tunnel import Relay
from deskfleet.runtime import log as logs
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl
from deskfleet.runtime.metrics import Metrics, serve
from deskfleet.runtime.service import SystemClock, notify_systemd
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.schemas import topology
from deskfleet.schemas.config import SECTIONS, address
from deskfleet.schemas.errors import TicketError
from deskfleet.schemas.tickets import Tickets

log = logging.getLogger("deskfleet.proxy")

PATH = "/console"
#: A peer that was told that nothing more comes, and does not end its side, is cut off after this long.
HALF_CLOSE_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; 0 after an orderly stop, 2 when it can't start as it is set up."""
    parser = argparse.ArgumentParser(prog="deskfleet-proxy", description="Routes consoles to their hosts.")
    parser.add_argument("--config", type=Path, default=Path("/etc/deskfleet/deskfleet.toml"))
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--check", action="store_true", help="only look at the settings")
    options = parser.parse_args(arguments)
    logs.configure(options.log_level, "proxy")
    try:
        settings: ProxySettings = load(options.config, {"proxy": ProxySchema()}, os.environ, SECTIONS)["proxy"]
        if options.check:
            return 0
        # Two files a console: the browser's and the host's.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return asyncio.run(_run(settings))
    except (SettingsError, BadBrokerUrl, TicketError, OSError) as error:
        print(f"deskfleet-proxy can't start:\n{error}", file=sys.stderr)
        return 2


async def _run(settings: ProxySettings) -> int:
    clock = SystemClock()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    replica = secrets.token_hex(8)
    bus = AmqpBus(
        settings.broker_url.reveal().split(),
        name=f"proxy-{replica}",
        dispatch=lambda action: _discard(loop.call_soon_threadsafe(action)),
        clock=clock,
        rng=random.Random(),  # noqa: S311  jitter of the reconnects
        declare=topology.for_proxy(replica),
    )
    routes = RouteTable(settings.keep_s, settings.settle_s, clock.monotonic())
    gate = Gate(PATH, settings.origins, Tickets(settings.ticket_keys), settings.front_proxies, settings.originless)
    tls = None
    if settings.tls:
        cert, key, authority = settings.tls
        tls = client_context(authority, cert, key)
    dialler = Dialler(tls, settings.insecure_plain_hosts, settings.dial_s)
    stats = Stats()
    server = Server(gate, routes, dialler, Relay(loop, HALF_CLOSE_S), settings.limits, stats, clock.monotonic)
    news = News(routes, server, stats, clock)
    metrics = Metrics("proxy")
    measure(metrics, server, routes, stats)
    ops = serve(*address(settings.ops_listen), metrics.registry, lambda: health(bus, routes, clock), clock)
    server.listen(*address(settings.listen))
    bus.consume(topology.proxy_queue(replica), news.on_delivery, prefetch=500)
    bus.start()
    expiring = asyncio.create_task(news.expire())
    notify_systemd("READY=1")
    await stop.wait()
    notify_systemd("STOPPING=1")
    server.stop_accepting()
    await server.drain(settings.drain_s)
    expiring.cancel()
    await asyncio.to_thread(bus.stop)
    ops.close()
    return 0


def _discard(_: object) -> None:
    """The loop's handle is not needed."""


if __name__ == "__main__":
    sys.exit(main())
