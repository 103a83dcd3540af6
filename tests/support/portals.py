"""A whole portal without network: its own database, a ledger beside it, a broker in memory, a clock moved by hand."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from support.bus_harness import TickingClock
from werkzeug.test import TestResponse

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer
from deskfleet.portal import accounts
from deskfleet.portal.auth import Identity
from deskfleet.portal.scopes import Scope
from deskfleet.portal.services import Services, build
from deskfleet.portal.settings import PortalSchema, PortalSettings
from deskfleet.portal.store import Store
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.schemas.host import Gpu, HostReport
from deskfleet.schemas.messages import (
    ExtendRequested,
    LaunchRequested,
    PlacementAnswered,
    PlacementAsked,
    StopRequested,
)
from deskfleet.schemas.session import Event, Outcome, Resources, Session, State, advance, place
from deskfleet.schemas.topology import (
    EVENTS,
    SCHEDULER_COMMANDS,
    SCHEDULER_QUESTIONS,
    answer_key,
    answers_queue,
    core,
    for_host,
    for_portal,
)
from deskfleet.schemas.verdict import Forecast, Outlook
from deskfleet.schemas.wire import decode, decode_as, encode

#: As in production; with it, most of what these tests took was hashing.
STRONG_HASHING, accounts.HASHING = accounts.HASHING, "scrypt:1024:8:1"
PASSWORD = "correct horse battery"
KEY = "k" * 40
REPLICA = "p1"
MACHINE = """
title = "{title}"
text = "For tests."
os = "linux"
[image]
file = "tiny.iso"
format = "iso"
sha256 = "{digest}"
[cpus]
min = 1
default = 2
max = 8
[memory_mib]
min = 512
default = 1024
max = 8192
[disk_gib]
min = 1
default = 4
max = 64
[gpu]
policy = "{gpu}"
[access]
users = {users}
"""


def settings(**changes: Any) -> PortalSettings:
    """Settings as a file would give them."""
    values: dict[str, Any] = {
        "public_url": "http://127.0.0.1:8080",
        "console_url": "ws://127.0.0.1:8090/console",
        "broker_url": "amqp://portal:secret@127.0.0.1/",
        "database": "sqlite:////nonexistent/portal.db",
        "secret_key": KEY,
        "ticket_keys": ["t" * 40],
        "auth": ["local"],
        "admins": ["root@example.org"],
    }
    loaded: PortalSettings = PortalSchema().load(values | changes)
    return loaded


def report(host: str, **changes: Any) -> HostReport:
    """A healthy host's heartbeat."""
    values: dict[str, Any] = {
        "host": host,
        "incarnation": "i",
        "seq": 1,
        "boot_id": "b",
        "last_generation": 0,
        "fenced": False,
        "console": "10.0.0.1:6080",
        "accel": "kvm",
        "cpus": 8,
        "memory_mib": 32768,
        "load1": 1.5,
        "memory_free_mib": 20000,
        "disk_mib": 500_000,
        "disk_free_mib": 400_000,
        "gpus": (Gpu("0000:01:00.0", "Tesla", 1, ("0000:01:00.0",), True),),
        "version": "1",
    }
    return HostReport(**values | changes)


class World:
    """A portal and what stands around it. `portal` is what create_app() takes; `forecast` is what the scheduler answers
    to every question, or None while it answers none."""

    def __init__(self, folder: Path, database: str = "", **changes: Any) -> None:
        self.clock = TickingClock()
        self.database = database or f"sqlite:///{folder}/portal.db"
        self.ledger_url = f"sqlite:///{folder}/ledger.db"
        self.ledger = open_engine(self.ledger_url)
        migrate(self.ledger)
        self._reading = open_engine(self.ledger_url, read_only=True)
        store = Store(self.database)
        store.migrate()
        store.close()
        self.catalogue = folder / "machines"
        self.catalogue.mkdir()
        self.machine("desktop")
        self.broker = MemoryBroker(random.Random(1), self.clock)
        self.broker.declare(core() + for_host("h1"))
        self.forecast: Forecast | None = Forecast(Outlook.NOW, "h1")
        self.questions: list[PlacementAsked] = []
        self._scheduler = self.broker.connect("scheduler", lambda action: action())
        self._scheduler.consume(SCHEDULER_QUESTIONS, self._answer)
        self._scheduler.start()
        self.bus = self.broker.connect("portal", lambda action: action(), for_portal(REPLICA))
        # The broker in memory moves nothing by itself: here, questions and answers are on their way at once.
        publish = self.bus.publish
        self.bus.publish = lambda message: self._ask(publish(message), message)  # type: ignore[method-assign]
        self.deferred: list[Callable[[], None]] = []
        self.portal = self.build(**changes)
        self.bus.start()
        self.writer = Writer(self.ledger)
        self.reader = Reader(self.ledger)

    def build(self, **changes: Any) -> Services:
        """Another portal process on the same databases and broker."""
        return build(
            settings(database=self.database, **changes),
            self._reading,
            self.catalogue,
            self.bus,
            self.clock,
            self.deferred.append,
            REPLICA,
        )

    def _ask(self, published: Future[None], message: Outgoing) -> Future[None]:
        if message.routing_key == "questions":
            self.broker.deliver_one(SCHEDULER_QUESTIONS)
        return published

    def _answer(self, delivery: Delivery) -> None:
        delivery.ack()
        asked = decode_as(PlacementAsked, delivery.type, delivery.body)
        self.questions.append(asked)
        if self.forecast is not None:
            kind, body = encode(PlacementAnswered(asked.question, self.forecast))
            self._scheduler.publish(Outgoing(EVENTS, answer_key(asked.replica), kind, body, durable=False))
            self.broker.deliver_one(answers_queue(asked.replica))

    def close(self) -> None:
        """Give files and connections back."""
        self.bus.stop()
        self._scheduler.stop()
        self.portal.store.close()
        self._reading.dispose()
        self.ledger.dispose()

    def machine(self, name: str, title: str = "Linux desktop", gpu: str = "never", users: str = '["*"]') -> None:
        """Put a machine into the catalogue."""
        text = MACHINE.format(title=title, gpu=gpu, users=users, digest="ab" * 32)
        (self.catalogue / f"{name}.toml").write_text(text)

    def run_deferred(self) -> None:
        """Run what the portal put off to its own thread."""
        todo, self.deferred[:] = list(self.deferred), []
        for action in todo:
            action()

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass, then sweep as the portal's thread does."""
        self.clock.now += seconds
        self.run_deferred()
        self.portal.outbox.sweep()
        self.run_deferred()

    def sent(self) -> list[LaunchRequested | StopRequested | ExtendRequested]:
        """What waits for the scheduler, oldest first."""
        messages = [decode(m.type, m.body) for m in self.broker.pending(SCHEDULER_COMMANDS)]
        return [m for m in messages if isinstance(m, LaunchRequested | StopRequested | ExtendRequested)]

    # What the scheduler would write.

    def session(self, sid: str, user: str, state: State = State.RUNNING, **changes: Any) -> Session:
        """A session in the ledger that came to `state` by the ordinary way on host h1."""
        now = self.clock.wall()
        values: dict[str, Any] = {
            "machine": "desktop",
            "resources": Resources(2, 1024, 4),
            "persistent": False,
            "lifetime_s": 3600,
            "wait_s": 600,
            "created_at": now,
            "changed_at": now,
        }
        session = Session(sid=sid, user=user, **values | changes)
        with self.writer.begin() as tx:
            tx.add_host("h1")
            tx.add(session)
        way = {
            State.QUEUED: [],
            State.ASSIGNED: [Event.PLACE],
            State.STARTING: [Event.PLACE, Event.ACCEPTED],
            State.RUNNING: [Event.PLACE, Event.ACCEPTED, Event.READY],
            State.STOPPING: [Event.PLACE, Event.ACCEPTED, Event.READY, Event.STOP],
            State.ENDED: [Event.PLACE, Event.ACCEPTED, Event.READY, Event.GONE],
        }
        for event in way[state]:
            session = self.step(session, event)
        return session

    def step(self, before: Session, event: Event) -> Session:
        """Let one thing happen to a session."""
        ends = event in (Event.GONE, Event.STOP)
        with self.writer.begin() as tx:
            if event is Event.PLACE:
                after = place(before, "h1", tx.claim("h1", tx.hosts()[0].generation))
            else:
                after = advance(before, event, outcome=Outcome.STOPPED if ends else None)
            after = replace(after, changed_at=self.clock.wall())
            tx.save(before, after, event)
        return after

    def take_up(self) -> None:
        """The scheduler records every launch that waits in its queue."""
        while self.broker.pending(SCHEDULER_COMMANDS):
            message = decode(*_parts(self.broker.drop(SCHEDULER_COMMANDS)))
            if isinstance(message, LaunchRequested):
                self.session(message.sid, message.user, State.QUEUED, resources=message.resources)

    def host(self, name: str = "h1", seen_ago: float = 1.0, **changes: Any) -> None:
        """A host that reported some seconds ago."""
        with self.writer.begin() as tx:
            tx.add_host(name)
            tx.save_reports([(report(name, **changes), self.clock.wall() - seen_ago)])


def _parts(pending: Any) -> tuple[str, bytes]:
    return pending.type, pending.body


class Browser:
    """A person with a browser: keeps cookies, fills in the CSRF token as the pages do."""

    def __init__(self, app: Flask, base: str = "http://127.0.0.1:8080") -> None:
        self.client: FlaskClient = app.test_client()
        self.client.open = partial(self.client.open, base_url=base)  # type: ignore[method-assign]

    def get(self, path: str, **options: Any) -> TestResponse:
        return self.client.get(path, buffered=True, **options)

    def csrf(self, path: str = "/login") -> str:
        found = re.search(r'name="csrf_token" value="([^"]+)"', self.get(path).text)
        found = found or re.search(r'name="csrf-token" content="([^"]+)"', self.get("/desktops").text)
        return found[1] if found else ""

    def post(self, path: str, data: Any = None, token: str | None = None, **options: Any) -> TestResponse:
        sent = self.csrf() if token is None else token
        if "json" not in options:
            options["data"] = {**(data or {}), "csrf_token": sent}
        else:
            options["headers"] = {"X-CSRFToken": sent, **options.get("headers", {})}
        return self.client.post(path, **options)

    def log_in(self, user: str, password: str = PASSWORD) -> TestResponse:
        return self.post("/login", {"user": user, "password": password})


def signed_in(app: Flask, user: str) -> Browser:
    browser = Browser(app)
    assert browser.log_in(user).status_code == 303
    return browser


def bearer(world: World, user: str, *scopes: Scope) -> dict[str, str]:
    """The header of a token of somebody's, which may do what they may unless scopes are named."""
    secret, _ = world.portal.logins.make_token(Identity(user, "local"), "test", 3600, scopes or [Scope.FLEET])
    return {"Authorization": f"Bearer {secret}"}
