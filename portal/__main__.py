"""deskfleet-portal --config FILE: run the portal under gunicorn until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import random
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.engine import LedgerError, check_revision, open_engine
from deskfleet.portal.app import create_app
from deskfleet.portal.services import Services, build
from deskfleet.portal.settings import PortalSchema, PortalSettings
from deskfleet.portal.store import Store, StoreError
from deskfleet.runtime import log as logs
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl, trust
from deskfleet.runtime.metrics import SHARED_COUNTS, serve
from deskfleet.runtime.service import MainLoop, SystemClock, notify_systemd
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.schemas.config import SECTIONS, LedgerSchema, MachinesSchema, address
from deskfleet.schemas.errors import TicketError
from deskfleet.schemas.topology import for_portal

log = logging.getLogger("deskfleet.portal")

_VIEWER = Path(__file__).parent / "static" / "vendor" / "novnc" / "core" / "rfb.js"
_SWEEP_S = 1.0
_SAMPLE_S = 15.0
_PRUNE_S = 600.0
_MAIL_S = 5.0
_RECHECK_S = 30.0


class _Gunicorn(BaseApplication):  # type: ignore[misc]  # gunicorn is not typed
    """gunicorn without a settings file of its own. The application is made in each worker, after the fork."""

    def __init__(self, sections: dict[str, Any], level: str) -> None:
        self._sections = sections
        self._level = level
        super().__init__()

    def load_config(self) -> None:
        settings: PortalSettings = self._sections["portal"]
        for key, value in {
            "bind": settings.listen,
            "workers": settings.workers,
            "worker_class": "gthread",
            "threads": settings.threads,
            "worker_tmp_dir": "/dev/shm",  # noqa: S108  its heartbeat file must not wait for a disk
            "timeout": 60,
            "graceful_timeout": 10,
            "keepalive": 30,
            "limit_request_line": 4094,
            "limit_request_fields": 64,
            "limit_request_field_size": 8190,
            "accesslog": None,  # addresses of pages hold session ids; the metrics count requests
            "loglevel": "warning",
            "proc_name": "deskfleet-portal",
            "control_socket_disable": True,
            "on_exit": _forget_counts,
        }.items():
            if key in self.cfg.settings:
                self.cfg.set(key, value)

    def load(self) -> Flask:
        logs.configure(self._level, "portal")
        return create_app(start(self._sections))


def _forget_counts(_: object) -> None:
    """The counts of this life of the portal end with it, as those of one process would."""
    if SHARED_COUNTS in os.environ:
        shutil.rmtree(os.environ[SHARED_COUNTS], ignore_errors=True)


def start(sections: dict[str, Any]) -> Services:
    """Make the parts of one worker and start its threads: the bus's own, for sweeps, for rights, for mails."""
    settings: PortalSettings = sections["portal"]
    clock = SystemClock()
    loop = MainLoop(clock)
    replica = secrets.token_hex(8)
    bus = AmqpBus(
        settings.broker_url.reveal().split(),
        name="portal",
        dispatch=loop.post,
        clock=clock,
        rng=random.Random(),  # noqa: S311  jitter of the reconnects
        tls=trust(settings.broker_ca),
        declare=for_portal(replica),
    )
    ledger = open_engine(sections["ledger"]["url"], read_only=True)
    parts = build(settings, ledger, Path(sections["machines"]["catalogue"]), bus, clock, loop.post, replica)
    loop.every(_SWEEP_S, parts.sweep)
    loop.every(_SAMPLE_S, parts.sample)
    loop.every(_PRUNE_S, parts.prune)
    bus.on_connect(parts.sweep)
    bus.start()
    threading.Thread(target=loop.run, name="portal-loop", daemon=True).start()
    rights = MainLoop(clock)
    rights.every(_RECHECK_S, parts.recheck)
    threading.Thread(target=rights.run, name="portal-rights", daemon=True).start()
    if parts.notices is not None:
        post = MainLoop(clock)
        post.every(_MAIL_S, parts.send_mails)
        threading.Thread(target=post.run, name="portal-mail", daemon=True).start()
    try:
        serve(*address(settings.ops_listen), parts.metrics.registry, parts.health, clock)
    except OSError as error:
        # With several workers one of them answers for all.
        log.info("another worker answers for the metrics: %s", error)
    notify_systemd("READY=1")
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; 2 when it can't start as it is set up."""
    parser = argparse.ArgumentParser(prog="deskfleet-portal", description="The web portal.")
    parser.add_argument("--config", type=Path, default=Path("/etc/deskfleet/deskfleet.toml"))
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--check", action="store_true", help="only look at the settings")
    options = parser.parse_args(arguments)
    logs.configure(options.log_level, "portal")
    try:
        schemas = {"portal": PortalSchema(), "ledger": LedgerSchema(), "machines": MachinesSchema()}
        sections = load(options.config, schemas, os.environ, SECTIONS)
        if options.check:
            return 0
        _check(sections)
    except (SettingsError, LedgerError, StoreError, BadBrokerUrl, TicketError, OSError) as error:
        print(f"deskfleet-portal can't start:\n{error}", file=sys.stderr)
        return 2
    if sections["portal"].workers > 1 and SHARED_COUNTS not in os.environ:
        # What the workers count is added up by files; prometheus_client has to be told before it is imported.
        os.environ[SHARED_COUNTS] = tempfile.mkdtemp(prefix="deskfleet-portal-")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    _Gunicorn(sections, options.log_level).run()
    return 0


def _check(sections: dict[str, Any]) -> None:
    """Refuse to start on databases of another revision, or without what the pages need, before any worker is forked."""
    if not _VIEWER.is_file():
        raise StoreError("the pages' libraries are not installed: run portal/assets/install, or install a release")
    engine = open_engine(sections["ledger"]["url"], read_only=True)
    store = Store(sections["portal"].database.reveal())
    for what, check in (
        ("the ledger", partial(check_revision, engine)),
        ("the portal's database", store.check_revision),
    ):
        try:
            check()
        except DBAPIError as error:
            # The driver's words alone: the URL, which SQLAlchemy would add, may hold a password.
            raise StoreError(f"{what} can't be opened: {error.orig}".splitlines()[0]) from None
    engine.dispose()
    store.close()


if __name__ == "__main__":
    sys.exit(main())
