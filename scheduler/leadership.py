"""Which of several schedulers decides. One leads; the others stand by, connected and ready.

Each term of office has a bus connection of its own. Its end gives everything that was not settled back to the broker,
and the broker's single-active-consumer queues let nobody else in before. A leader that lost the broker or the ledger
steps down: somebody who stands by may reach both.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.lease import Demoted, Lease, Standing
from deskfleet.runtime.bus import Bus
from deskfleet.runtime.service import Clock
from deskfleet.scheduler.core import Scheduler

log = logging.getLogger(__name__)

#: A leader that shows no life for so long is succeeded. Renewed every RENEW_S, with each transaction besides.
TAKEOVER_S = 2.5
RENEW_S = 0.5
#: A leader that lost the broker for so long steps down; one that lost the ledger does so at once.
PATIENCE_S = 1.0


class Leadership:
    """Stands by, leads, steps down, and so on.

    Call `tick` a few times a second, on the thread that runs the bus's handlers; `scheduler` is the one that leads,
    None while standing by. `is_gone` tells of an owner whether it surely lives no more, so that nobody waits for a
    process of this very machine that was killed.
    """

    def __init__(
        self,
        lease: Lease,
        clock: Clock,
        make_bus: Callable[[], Bus],
        make_scheduler: Callable[[Lease, Bus], Scheduler],
        is_gone: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._lease = lease
        self._clock = clock
        self._make_bus = make_bus
        self._make_scheduler = make_scheduler
        self._is_gone = is_gone
        self.scheduler: Scheduler | None = None
        self.bus = self._fresh_bus()
        self._seen: tuple[Standing, float] | None = None
        self._renewed = self._connected = clock.monotonic()
        self._answers = True

    def _fresh_bus(self) -> Bus:
        bus = self._make_bus()
        bus.start()
        return bus

    def tick(self) -> None:
        """Look around."""
        now = self._clock.monotonic()
        if self.bus.connected:
            self._connected = now
        try:
            if self.scheduler is None:
                self._stand_by(now)
            else:
                self._lead(self.scheduler, now)
        except Demoted as error:
            self._step_down(str(error))
        except DBAPIError as error:
            if self._answers:
                log.warning("the ledger does not answer: %s", type(error.orig).__name__)
            self._answers, self._seen = False, None
            if self.scheduler:
                self._step_down("the ledger does not answer")

    def _stand_by(self, now: float) -> None:
        if not self.bus.connected:
            self._seen = None
            return
        standing = self._lease.look()
        self._answers = True
        if self._seen is None or self._seen[0] != standing:
            self._seen = standing, now
        free = not standing.owner or self._is_gone(standing.owner)
        if not free and now - self._seen[1] < TAKEOVER_S:
            return
        if self._lease.take(standing):
            log.info("leading from now on, after %s", standing.owner or "nobody")
            scheduler = self._make_scheduler(self._lease, self.bus)
            scheduler.start()
            self.scheduler, self._renewed = scheduler, now

    def _lead(self, scheduler: Scheduler, now: float) -> None:
        if scheduler.over:
            raise Demoted("somebody else leads")
        if not scheduler.healthy:
            self._step_down("the ledger does not answer")
        elif now - self._connected >= PATIENCE_S:
            self._step_down("the broker can't be reached")
        elif now - self._renewed >= RENEW_S:
            self._lease.renew()
            self._renewed = now

    def _step_down(self, why: str) -> None:
        log.warning("no longer leading: %s", why)
        self.stop()
        self.bus, self._seen, self._connected = self._fresh_bus(), None, self._clock.monotonic()

    def stop(self) -> None:
        """Stop leading in an orderly way; who stands by begins at once."""
        led, self.scheduler = self.scheduler, None
        if led:
            led.over = True
        self.bus.stop()
        if led:
            try:
                self._lease.release()
            except DBAPIError as error:
                log.warning("the lease could not be released: %s", type(error.orig).__name__)


def owner_name() -> str:
    """This process's name as an owner: for people the host's name, and where a process number means something."""
    return f"{socket.gethostname()} {_here()} {os.getpid()}"[:128]


def is_gone(owner: str, proc: Path = Path("/proc")) -> bool:
    """Whether an owner was a process of this boot and this process namespace, and there is no such process now."""
    parts = owner.split(" ")
    if len(parts) != 3:
        return False
    _, here, number = parts
    return here == _here() and number.isdigit() and not (proc / number).exists()


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink().name}"
