"""Everything that a page or an API call may use, made once for each process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from flask import current_app
from prometheus_client import Counter
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.reader import Reader
from deskfleet.portal import methods
from deskfleet.portal.accounts import Accounts
from deskfleet.portal.audit import Audit
from deskfleet.portal.auth import Chain
from deskfleet.portal.auth_header import ProxyHeaders
from deskfleet.portal.auth_oidc import OpenIdConnect
from deskfleet.portal.broker_stats import BrokerStats
from deskfleet.portal.dead_letters import DeadLetters
from deskfleet.portal.desktops import Desktops
from deskfleet.portal.email_codes import EmailCodes
from deskfleet.portal.fleet import Fleet, gpus_held
from deskfleet.portal.grants import Grants
from deskfleet.portal.history import History
from deskfleet.portal.launching import Seals
from deskfleet.portal.logins import Logins
from deskfleet.portal.mail import Notices, sender_over
from deskfleet.portal.outbox import Outbox
from deskfleet.portal.outlook import Forecasts
from deskfleet.portal.people import People
from deskfleet.portal.pictures import Pictures
from deskfleet.portal.records import Records
from deskfleet.portal.settings import PortalSettings
from deskfleet.portal.shares import Shares
from deskfleet.portal.store import Store
from deskfleet.portal.throttle import Throttle
from deskfleet.runtime.bus import Bus, run_callback
from deskfleet.runtime.metrics import Health, Metrics
from deskfleet.runtime.service import Clock
from deskfleet.schemas.catalogue import Catalogue
from deskfleet.schemas.tickets import Tickets

log = logging.getLogger(__name__)

EXTENSION = "deskfleet"


@dataclass(frozen=True, slots=True)
class Counts:
    """What the portal counts."""

    requests: Counter
    logins: Counter
    launches: Counter
    forecasts: Counter
    never: Counter
    tickets: Counter


@dataclass(frozen=True, slots=True)
class Services:
    """The portal's parts."""

    settings: PortalSettings
    clock: Clock
    store: Store
    bus: Bus
    catalogue: Catalogue
    accounts: Accounts
    chain: Chain
    codes: EmailCodes | None
    headers: ProxyHeaders | None
    oidc: OpenIdConnect | None
    answers: methods.Answers
    logins: Logins
    people: People
    throttle: Throttle
    audit: Audit
    letters: DeadLetters
    outbox: Outbox
    desktops: Desktops
    fleet: Fleet
    history: History
    forecasts: Forecasts
    pictures: Pictures
    grants: Grants
    shares: Shares
    seals: Seals
    tickets: Tickets
    notices: Notices | None
    metrics: Metrics
    counts: Counts

    def sweep(self) -> None:
        """Send what is not known yet. Failures are logged; the next sweep tries again."""
        run_callback(self.outbox.sweep, "the sweep of stored requests")
        run_callback(self.letters.sweep, "the sweep of dead letters")
        run_callback(self.shares.sweep, "the sweep of links")
        run_callback(self.logins.sweep, "the sweep of logins")
        run_callback(self.grants.sweep, "the sweep of rights that have ended")

    def send_mails(self) -> None:
        """Send the mails that are due, on a thread that may take its time. Failures are logged."""
        if self.notices is not None:
            run_callback(self.notices.sweep, "the sweep of mails")

    def sample(self) -> None:
        """Look at the queues; keep the figures of the hosts, once a minute, whichever portal comes first. Failures are
        logged."""
        run_callback(self.fleet.watch_queues, "looking at the queues")

        def take() -> None:
            if self.history.due():
                self.history.keep(self.fleet.hosts(), gpus_held(self.desktops.live()))

        run_callback(take, "keeping the figures of the hosts")

    def recheck(self) -> None:
        """End what people had whose account is gone or disabled by now, on a thread that may take its time: directories
        are asked. Failures are logged."""

        def look() -> None:
            for who in self.logins.end_gone(self.chain.current):
                log.warning("%s has no account any more: logins ended", who.user)
                self.audit.note(who.user, "-", "shut out", detail=f"no {who.method} account any more")

        run_callback(look, "looking whether people still have their accounts")

    def prune(self) -> None:
        """Forget what is old."""
        for what, prune in (
            ("requests", self.outbox.prune),
            ("throttle", self.throttle.prune),
            ("audit", self.audit.prune),
            ("dead letters", self.letters.prune),
            ("pictures", self.pictures.prune),
            ("figures", self.history.prune),
            ("links", self.shares.prune),
            ("rights", self.grants.prune),
            *([("mails", self.notices.prune)] if self.notices is not None else []),
            *([("codes", self.codes.prune)] if self.codes is not None else []),
        ):
            run_callback(prune, f"forgetting old {what}")

    def health(self) -> Health:
        """Whether requests can be taken and shown. A broker that is away is told, since nothing moves then."""
        reasons = []
        if not self.bus.connected:
            reasons.append("the broker is not connected; requests are stored and sent later")
        if not self.fleet.readable():
            reasons.append("the ledger can't be read")
        try:
            self.outbox.waiting()
        except DBAPIError:
            reasons.append("the portal's database does not answer")
        return Health(not reasons, tuple(reasons))


def build(
    settings: PortalSettings,
    ledger: Engine,
    catalogue_folder: Path,
    bus: Bus,
    clock: Clock,
    defer: Callable[[Callable[[], None]], None],
    replica: str,
) -> Services:
    """Put the parts together. Nothing is started; `defer` runs an action soon on the portal's own thread, `replica`
    names this process on the bus."""
    store = Store(settings.database.reveal())
    people = People(store)
    reader = Reader(ledger)
    records = Records(ledger, clock, settings.host_silent_s)
    catalogue = Catalogue(catalogue_folder)
    accounts = Accounts(store, clock)
    outbox = Outbox(store, reader, bus, clock, defer)
    grants = Grants(store, bus, replica, clock)
    broker = urlsplit(settings.broker_url.reveal().split()[0])
    login, vhost = unquote(broker.username or ""), unquote(broker.path[1:]) or "/"
    stats = BrokerStats(settings.broker_management, vhost, clock) if settings.broker_management else None
    letters = DeadLetters(store, bus, outbox, login, clock)
    metrics = Metrics("portal")
    lost = "Messages that nobody could take, and nobody has looked after"
    metrics.gauge("dead_letters", lost, partial(_number, letters.count))
    waiting = "Stored requests that the scheduler is not seen to know"
    metrics.gauge("requests_waiting", waiting, partial(_number, outbox.waiting))
    metrics.gauge("broker_connected", "1 while messages can be published", lambda: float(bus.connected))
    logins = metrics.counter("logins", "Answers to tries to log in", ["method", "result"])
    answers = methods.Answers(logins, clock)
    notices = send = None
    if settings.mail is not None:
        send = sender_over(settings.mail, urlsplit(settings.public_url).hostname or "localhost")
        mails = metrics.counter("mails", "What became of mails to people whose desktop is ready", ["fate"])
        language = partial(_mail_language, people, settings)
        notices = Notices(
            store, records, catalogue.machines, clock, settings.mail, settings.public_url, language, send, mails
        )
    ways = methods.build(settings, accounts, store, clock, send, answers)
    return Services(
        settings=settings,
        clock=clock,
        store=store,
        bus=bus,
        catalogue=catalogue,
        accounts=accounts,
        chain=ways.chain,
        codes=ways.codes,
        headers=ways.headers,
        oidc=ways.oidc,
        answers=answers,
        logins=Logins(store, clock, settings.login_idle_s),
        people=people,
        throttle=Throttle(store, clock),
        audit=Audit(store, clock),
        letters=letters,
        outbox=outbox,
        desktops=Desktops(outbox, reader, records, catalogue.machines, clock),
        fleet=Fleet(reader, records, bus, clock, stats),
        history=History(store, clock),
        # Half of the threads may wait for the scheduler, so that the others go on when it is away.
        forecasts=Forecasts(bus, replica, clock, max(1, settings.threads // 2)),
        grants=grants,
        shares=Shares(store, grants, clock),
        pictures=Pictures(store, reader, bus, replica, clock),
        seals=Seals(settings.secret_key.reveal()),
        tickets=Tickets([key.reveal() for key in settings.ticket_keys]),
        notices=notices,
        metrics=metrics,
        counts=Counts(
            metrics.counter("http_requests", "Answers by endpoint and status", ["endpoint", "status"]),
            logins,
            metrics.counter("launches", "Launches that were stored", ["via"]),
            metrics.counter("forecasts", "What the scheduler said of would-be launches", ["outlook"]),
            metrics.counter("launches_never_fit", "Launches refused because no host could ever take them"),
            metrics.counter("tickets", "Console tickets handed out"),
        ),
    )


def _mail_language(people: People, settings: PortalSettings, user: str) -> str:
    """In which language somebody gets mails: what they read last, while the site offers it."""
    known = people.language(user)
    return known if known in settings.languages else settings.default_language


def _number(count: Callable[[], int]) -> float:
    try:
        return float(count())
    except DBAPIError:
        return float("nan")


def services() -> Services:
    """The parts of the application that answers the present request."""
    return cast(Services, current_app.extensions[EXTENSION])
