"""The scheduler: takes messages in batches, decides, commits, and only then publishes and acknowledges.

One thread runs all of this. A batch is one transaction; when it does not go through, the cache is rebuilt from the
ledger and the batch's messages are taken one by one, so that one bad apple spoils nothing but itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.lease import Demoted
from deskfleet.ledger.writer import Conflict, Writer
from deskfleet.runtime.bus import Bus, Delivery, Outgoing
from deskfleet.runtime.service import Clock
from deskfleet.scheduler.decisions import Decisions, Machines, Settings
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.unit import Unit
from deskfleet.schemas import topology
from deskfleet.schemas.errors import DecodeError, IllegalTransition
from deskfleet.schemas.host import HostBeat, HostReport
from deskfleet.schemas.messages import Message, VmReport
from deskfleet.schemas.wire import decode

log = logging.getLogger(__name__)

Job = Callable[[Unit], object]

_QUEUES = (
    topology.SCHEDULER_COMMANDS,
    topology.SCHEDULER_REPORTS,
    topology.SCHEDULER_HEARTBEATS,
    topology.SCHEDULER_QUESTIONS,
)
#: How often a decision is taken again when somebody else changed the rows first.
CONFLICT_TRIES = 5


class Scheduler:
    """Placement, session life and reconciliation over one ledger and one bus.

    `defer` runs a callable soon on this same thread, after the deliveries that are already waiting: it is what
    makes a batch. Give a function that calls at once to have every message in a transaction of its own.
    """

    def __init__(
        self,
        writer: Writer,
        bus: Bus,
        clock: Clock,
        machines: Machines,
        settings: Settings,
        defer: Callable[[Callable[[], None]], None],
    ) -> None:
        self._writer = writer
        self._bus = bus
        self._clock = clock
        self._settings = settings
        self._defer = defer
        self.fleet = Fleet(settings.policy)
        self.decisions = Decisions(self.fleet, machines, settings, clock.monotonic())
        self._batch: list[tuple[Delivery, Message]] = []
        #: False while the ledger does not answer: nothing is decided then, and nothing is acknowledged.
        self.healthy = False
        #: True once somebody else leads: nothing is decided and nothing settled any more.
        self.over = False

    def start(self) -> None:
        """Read the ledger and begin to consume."""
        self._reload()
        for queue in _QUEUES:
            self._bus.consume(queue, self.on_delivery)
        self._bus.every(1.0, self.sweep)

    def _reload(self) -> None:
        """Rebuild the cache from the ledger."""
        with self._writer.begin() as tx:
            self.fleet.load(tx.hosts(), tx.live_sessions())
            self.decisions.load(tx.failed_starts())
        self.healthy = True

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one message. It is acknowledged after the commit that holds its effect."""
        try:
            message = decode(delivery.type, delivery.body)
        except DecodeError as error:
            log.warning("a message from %s can't be read: %s", delivery.sender or "an unknown sender", error)
            self._distrust(delivery.sender)
            delivery.reject()
            return
        if not _vouched(delivery.sender, message):
            log.warning("%s may not send this %s", delivery.sender or "an unknown sender", delivery.type)
            delivery.reject()
            return
        self._batch.append((delivery, message))
        if len(self._batch) == 1:
            self._defer(self.flush)

    def _distrust(self, sender: str) -> None:
        state = self.fleet.hosts.get(sender.removeprefix("agent-"))
        if state and sender.startswith("agent-"):
            state.distrust = "it can't be read"

    def flush(self) -> None:
        """Commit what has come in, then publish and acknowledge."""
        batch, self._batch = self._batch, []
        if not batch or self.over:
            return
        if self._attempt([self._job(message) for _, message in batch]):
            for delivery, _ in batch:
                delivery.ack()
            return
        for delivery, message in batch:
            if any(self._attempt([self._job(message)]) for _ in range(CONFLICT_TRIES)):
                delivery.ack()
            elif self.over:
                return
            elif self.healthy:
                log.error("a %s is put aside: it can't be applied", delivery.type)
                delivery.reject()
            else:
                # The ledger is away. What is left stays unacknowledged and in order; the sweep tries again.
                self._batch.append((delivery, message))

    def _job(self, message: Message) -> Job:
        return lambda unit: self.decisions.handle(unit, message, self._clock.monotonic(), self._clock.wall())

    def _attempt(self, jobs: list[Job]) -> bool:
        """One transaction over some jobs; False, with nothing kept, when it did not go through."""
        if not self.healthy:
            return False
        began = self._clock.monotonic()
        try:
            with self._writer.begin() as tx:
                unit = Unit(tx, self.fleet, self._clock.wall(), self._settings.limits)
                for job in jobs:
                    job(unit)
                if self.decisions.queue.soon:
                    self.decisions.queue.run(unit, self._clock.monotonic())
                if unit.outbox:
                    tx.prove()
        except Demoted as error:
            log.warning("not decided: %s", error)
            self.healthy, self.over = False, True
            return False
        except (Conflict, IllegalTransition) as error:
            log.info("deciding again on fresh rows: %s", error)
            self._recover()
            return False
        except DBAPIError as error:
            # Not tried again at once: a ledger that is gone takes its time to say so, and others could go on.
            log.warning("the ledger does not answer: %s", type(error.orig).__name__)
            self.healthy = False
            return False
        except Exception:
            # A fault of ours, met by one message. The rest of its batch must not stay unacknowledged for it, nor
            # the cache keep what the ledger has rolled back; the message itself ends among the dead letters.
            log.exception("a decision failed")
            self._recover()
            return False
        self.decisions.stats.took.add(self._clock.monotonic() - began)
        for message in unit.outbox:
            self._publish(message)
        return True

    def _publish(self, message: Outgoing) -> None:
        if message.exchange == topology.COMMANDS and message.correlation_id:
            self.decisions.commanded[message.correlation_id] = self._clock.monotonic()
        self._bus.publish(message).add_done_callback(partial(_unsent, message))

    def _recover(self) -> None:
        self.healthy = False
        try:
            self._reload()
        except Demoted:
            self.over = True
        except DBAPIError as error:
            log.error("the ledger can't be read: %s", type(error.orig).__name__)

    def sweep(self) -> None:
        """What only time brings: echoes that did not come, waits that are over, reports to be stored."""
        if self.over:
            return
        if not self.healthy:
            self._recover()
        self.flush()
        self._store_reports()
        for job in self.decisions.overdue(self._clock.monotonic()):
            self._attempt([job])

    def _store_reports(self) -> None:
        """What hosts said, for the pages: once a second, however many there are."""
        reports, figures = self.decisions.reports, self.decisions.figures
        self.decisions.reports, self.decisions.figures = {}, {}

        def store(unit: Unit) -> None:
            unit.tx.save_reports(list(reports.values()))
            unit.tx.save_figures(list(figures.values()))

        if reports or figures:
            self._attempt([store])


def _vouched(sender: str, message: Message) -> bool:
    """The broker proved who sent a message (AMQP user_id); an agent may speak for its own host only."""
    if isinstance(message, VmReport | HostReport | HostBeat):
        return sender == f"agent-{message.host}"
    return not sender.startswith("agent-")


def _unsent(message: Outgoing, done: Future[None]) -> None:
    """A command that was not sent is sent again by the sweep: the ledger's row is its outbox."""
    error = done.exception()
    if error:
        log.warning("a %s for %s was not sent: %s", message.type, message.routing_key, error)
