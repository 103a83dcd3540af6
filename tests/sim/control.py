"""The scheduler's and the portal's processes: the real code, on a wire and databases that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim.database import Access, PortalStore
from sim.process import Clock, Process
from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.lease import Lease
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer
from deskfleet.portal.auth import Identity
from deskfleet.portal.desktops import Desktops
from deskfleet.portal.errors import Problem
from deskfleet.portal.fleet import Fleet
from deskfleet.portal.launching import Wish, prepare
from deskfleet.portal.outbox import Outbox
from deskfleet.portal.records import Records
from deskfleet.portal.settings import PortalSchema, PortalSettings
from deskfleet.runtime.bus import Bus, run_callback
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.leadership import Leadership
from deskfleet.schemas import topology
from deskfleet.schemas.tickets import Mode, Ticket, Tickets

if TYPE_CHECKING:
    from sim.world import World

KEYS = ["k" * 40]


def portal_settings(wait_s: int) -> PortalSettings:
    """The portal's settings, as a file would give them."""
    settings: PortalSettings = PortalSchema().load(
        {
            "public_url": "https://portal.test",
            "console_url": "wss://portal.test/console",
            "broker_url": "amqp://portal:secret@broker.test/",
            "database": "sqlite:////nonexistent/portal.db",
            "secret_key": "s" * 40,
            "ticket_keys": KEYS,
            "auth": ["local"],
            "wait_s": wait_s,
        }
    )
    return settings


class Decider(Process):
    """One scheduler process, which leads or stands by."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(f"scheduler-{number}", "scheduler", world.broker, Clock(world.time), world.evidence)
        self.world = world
        self._leadership: Leadership
        self._soon: list[Callable[[], None]] = []

    def run(self) -> None:
        self._soon.clear()
        ledger: Any = Access(self.world.ledger, self)

        def scheduler(lease: Lease, bus: Bus) -> Scheduler:
            settings = self.world.settings
            return Scheduler(
                Writer(ledger, lease), bus, self.clock, lambda: self.world.machines, settings, self._soon.append
            )

        lease = Lease(ledger, f"{self.name}-{self.lives}")
        self._leadership = Leadership(lease, self.clock, self._fresh_bus, scheduler)

    @property
    def busy(self) -> bool:
        """Whether it has put something off."""
        return self.alive and not self.paused and bool(self._soon)

    @property
    def leads(self) -> bool:
        """Whether it believes to lead."""
        return self.alive and self._leadership.scheduler is not None

    def _fresh_bus(self) -> Bus:
        bus: Any = self.connect(topology.core())
        return bus

    def tick(self) -> None:
        if self.alive and not self.paused:
            run_callback(self._leadership.tick, "leading")
        super().tick()

    def kill(self) -> None:
        self._soon.clear()
        super().kill()

    def flush(self) -> None:
        """Run what it put off: one batch."""
        if not self.paused:
            work, self._soon[:] = list(self._soon), []
            for action in work:
                run_callback(action, "a batch")


class Portal(Process):
    """The portal's process, and what people do there."""

    def __init__(self, world: World) -> None:
        super().__init__("portal", "portal", world.broker, Clock(world.time), world.evidence)
        self.world = world
        self._soon: list[Callable[[], None]] = []
        self.outbox: Outbox
        self.desktops: Desktops
        self.tickets: Tickets
        self.settings = portal_settings(world.wait_s)

    def run(self) -> None:
        bus = self.connect()
        self._soon.clear()
        ledger: Any = Access(self.world.ledger, self)
        reader, records = Reader(ledger), Records(ledger, self.clock, 20.0)
        store = PortalStore(Access(self.world.requests, self))
        self.outbox = Outbox(store, reader, bus, self.clock, self._soon.append)
        self.desktops = Desktops(self.outbox, reader, records, lambda: self.world.offered, self.clock)
        self.fleet = Fleet(reader, records, bus, self.clock)
        self.tickets = Tickets(KEYS, self.clock.wall)
        bus.on_connect(self._sweep)
        bus.every(1.0, self._sweep)
        bus.start()

    @property
    def busy(self) -> bool:
        """Whether it has put something off."""
        return self.alive and not self.paused and bool(self._soon)

    def _sweep(self) -> None:
        self.flush()
        run_callback(self.outbox.sweep, "the sweep")
        self.flush()
        self.world.evidence.swept(self)

    def flush(self) -> None:
        """Run what it put off."""
        if not self.paused:
            work, self._soon[:] = list(self._soon), []
            for action in work:
                run_callback(action, "the outbox")

    def launch(self, sid: str, user: str, wish: Wish) -> str:
        """A click on Launch; what the person is told."""
        if not self.alive or self.paused:
            return "no answer"
        try:
            request = prepare(sid, wish, Identity(user, "local"), self.world.offered, self.settings)
        except Problem as problem:
            return f"refused: {problem.reason}"
        self.world.evidence.asked(request)
        try:
            self.outbox.launch(request)
        except DBAPIError:
            return "not stored"
        self.world.evidence.accepted.add(sid)
        return "accepted"

    def stop(self, sid: str, user: str, admin: bool) -> str:
        """A click on Stop."""
        if not self.alive or self.paused:
            return "no answer"
        self.world.evidence.stop_asked.add(sid)
        try:
            self.outbox.stop(sid, user, admin)
        except DBAPIError:
            return "not stored"
        self.world.evidence.stop_accepted.add(sid)
        return "accepted"

    def change_host(self, change: Callable[[Fleet], None]) -> str:
        """An administrator's click."""
        if not self.alive or self.paused:
            return "no answer"
        try:
            change(self.fleet)
        except Problem as problem:
            return problem.reason
        return "asked"

    def ticket(self, sid: str, user: str, nonce: str) -> str:
        """A ticket for a running desktop, as portal/actions.py gives it to the owner; "" when it does not run."""
        if not self.alive or self.paused:
            return ""
        try:
            desktop = self.desktops.find(sid)
        except (Problem, DBAPIError):
            return ""
        if desktop is None or not desktop.running or desktop.unsure or desktop.user != user:
            return ""
        return self.tickets.sign(
            Ticket(sid, user, "login-" + "0" * 16, desktop.host, desktop.generation, Mode.FULL, nonce)
        )

    def kill(self) -> None:
        self._soon.clear()
        super().kill()
