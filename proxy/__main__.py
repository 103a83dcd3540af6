"""deskfleet-proxy --config FILE: run one token proxy until SIGTERM; a second one ends it without draining."""

from __future__ import annotations

import argparse
import asyncio
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
from deskfleet.proxy.server import Limits, Server
from deskfleet.proxy.service import Figures, News, health
from deskfleet.proxy.settings import ProxySchema, ProxySettings
from deskfleet.proxy.stats import Stats
from deskfleet.proxy.tunnel import Relay
from deskfleet.runtime import log as logs
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl, trust
from deskfleet.runtime.metrics import Metrics, serve
from deskfleet.runtime.service import SystemClock, notify_systemd
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.schemas import topology
from deskfleet.schemas.config import SECTIONS, address
from deskfleet.schemas.tickets import Tickets

PATH = "/console"


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
        _raise_file_limit(settings.limits)
        return asyncio.run(_run(settings))
    except (SettingsError, BadBrokerUrl, OSError) as error:
        print(f"deskfleet-proxy can't start:\n{error}", file=sys.stderr)
        return 2


def _raise_file_limit(limits: Limits) -> None:
    """Two files a console, the browser's and the host's, and some for everything else.

    Raises:
        SettingsError: the system does not allow as many.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * limits.tunnels + limits.heads + 256
    if most != resource.RLIM_INFINITY and most < needed:
        problem = f"needs {needed} open files and may have {most}; raise LimitNOFILE= or lower max_tunnels"
        raise SettingsError([f"proxy.max_tunnels: {problem}"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _run(settings: ProxySettings) -> int:
    clock = SystemClock()
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    replica = secrets.token_hex(8)
    bus = AmqpBus(
        settings.broker_url.reveal().split(),
        name=f"proxy-{replica}",
        dispatch=loop.call_soon_threadsafe,
        clock=clock,
        rng=random.Random(),  # noqa: S311  jitter of the reconnects
        tls=trust(settings.broker_ca),
        declare=topology.for_proxy(replica),
    )
    routes, stats = RouteTable(settings.keep_s, settings.settle_s), Stats()
    tickets = Tickets([key.reveal() for key in settings.ticket_keys])
    gate = Gate(PATH, settings.origins, tickets, settings.front_proxies, settings.originless)
    tls = None
    if settings.tls:
        cert, key, authority = settings.tls
        tls = client_context(authority, cert, key)
    dialler = Dialler(tls, settings.insecure_plain_hosts, settings.dial_s)
    relay = Relay(loop, settings.half_close_s)
    server = Server(gate, routes, dialler, relay, settings.limits, stats, clock.monotonic)
    news = News(routes, server, stats, clock, bus, replica)
    metrics = Metrics("proxy")
    metrics.registry.register(Figures(loop, server, routes, stats, "deskfleet_proxy"))
    ops = serve(*address(settings.ops_listen), metrics.registry, lambda: health(bus, routes, clock), clock)
    server.listen(*address(settings.listen))
    bus.on_connect(news.on_connect)
    bus.consume(topology.proxy_queue(replica), news.on_delivery, prefetch=500)
    bus.start()
    expiring = asyncio.create_task(news.expire())
    notify_systemd("READY=1")
    await stop.wait()
    notify_systemd("STOPPING=1")
    server.stop_accepting()
    await server.drain(settings.drain_s, hurry)
    expiring.cancel()
    await asyncio.to_thread(bus.stop)
    # Off the loop, which a scrape that is under way still needs.
    await asyncio.to_thread(ops.close)
    return 0


if __name__ == "__main__":
    sys.exit(main())
