"""The message bus as every service sees it: types, promises and errors. Two implementations keep them, `amqp` over
RabbitMQ and `memory_bus` for tests and simulation; the same contract tests run on both.

This module knows neither AMQP frames nor what the messages mean.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import ClassVar, Protocol

from deskfleet.schemas.errors import DeskfleetError

log = logging.getLogger(__name__)

#: Has an action run by the service; what it returns (an event loop's handle, say) is not looked at.
Dispatch = Callable[[Callable[[], None]], object]

_BACKOFF_FIRST = 0.25
_BACKOFF_CAP = 8.0
_SHORT_STRING = 255


class BusError(DeskfleetError):
    """Base of everything that goes wrong between a service and the broker; `reason` is the machine-readable half."""

    reason: ClassVar[str] = "bus_error"


class BusDown(BusError):
    """Raised when there is no connection, or it was lost or timed out before the answer: the outcome is unknown."""

    reason = "bus_down"


class Blocked(BusError):
    """Raised when the broker takes no messages (low on memory or disk) or too many of ours are unanswered."""

    reason = "bus_blocked"


class Unroutable(BusError):
    """Raised when the broker has no queue, or no exchange, for a mandatory message; it was not stored."""

    reason = "bus_unroutable"


class Nacked(BusError):
    """Raised when the broker refused to store a message, because the queue is full or failed."""

    reason = "bus_nacked"


class BadMessage(BusError):
    """Raised when a message cannot be put on the wire: too long a name, or not UTF-8, or a negative TTL."""

    reason = "bus_bad_message"


class AccessRefused(BusError):
    """Raised when our login lacks the broker's permission for this."""

    reason = "bus_access_refused"


class QueueMissing(BusError):
    """Raised when a queue does not exist."""

    reason = "bus_queue_missing"


class ConsumerRefused(BusError):
    """Raised, through on_fatal, when a queue that must be ours alone already has a consumer."""

    reason = "bus_consumer_refused"


class LoginRefused(BusError):
    """Raised, through on_fatal, when the broker refuses our login or its virtual host. Attempts go on."""

    reason = "bus_login_refused"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish. The names are AMQP short strings: at most 255 bytes of UTF-8 (AMQP 0-9-1, 4.2.5.3).

    `durable` survives a broker restart. `mandatory` makes a message without a queue an error.
    `ttl_seconds` is how long it may wait in a queue, which then dead-letters or drops it.
    """

    exchange: str
    routing_key: str
    type: str
    body: bytes = field(repr=False)
    correlation_id: str = ""
    durable: bool = True
    mandatory: bool = True
    ttl_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("exchange", "routing_key", "type", "correlation_id"):
            try:
                size = len(getattr(self, name).encode())
            except UnicodeEncodeError:
                raise BadMessage(f"{name} holds half a character (a lone surrogate)") from None
            if size > _SHORT_STRING:
                raise BadMessage(f"{name} has {size} bytes, at most {_SHORT_STRING} are allowed")
        if self.ttl_seconds is not None and self.ttl_seconds < 0:
            raise BadMessage(f"ttl_seconds is {self.ttl_seconds}, it must not be negative")


class Settlement(StrEnum):
    """What becomes of a delivery."""

    ACK = "ack"
    REJECT = "reject"
    REQUEUE = "requeue"


@dataclass(frozen=True, slots=True)
class Death:
    """Where a message died last and why, in the broker's words: rejected, expired, maxlen or delivery_limit. `at` is
    UNIX seconds by the broker's clock, None when it did not say."""

    queue: str
    reason: str
    at: float | None


@dataclass(eq=False, slots=True)
class Delivery:
    """A message handed to a consumer, to be settled exactly once, from any thread, inside the handler or later.

    A settlement that comes too late (the connection is gone, and the broker has given the message to somebody
    else) or twice is a line in the log. `sender` is the login that the broker vouches for (RabbitMQ's validated
    user-id), "" when the publisher did not say. `redelivered` means that somebody may have seen it before. `death` is
    there when it was dead-lettered.
    """

    queue: str
    exchange: str
    routing_key: str
    type: str
    body: bytes = field(repr=False)
    message_id: str
    correlation_id: str
    sender: str
    redelivered: bool
    settle: Callable[[Settlement], None] = field(repr=False)
    settled: bool = False
    death: Death | None = None

    def ack(self) -> None:
        """Done: the broker forgets the message."""
        self._settle_once(Settlement.ACK)

    def reject(self) -> None:
        """Never to be tried again: the queue's dead-letter exchange gets it."""
        self._settle_once(Settlement.REJECT)

    def requeue(self) -> None:
        """Back to the queue, to be delivered again."""
        self._settle_once(Settlement.REQUEUE)

    def _settle_once(self, how: Settlement) -> None:
        if self.settled:
            log.warning("delivery %s of %s was settled already; %s ignored", self.message_id, self.queue, how)
            return
        self.settled = True
        self.settle(how)


Handler = Callable[[Delivery], None]


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How many messages wait in a queue (without those handed out) and how many consumers it has.

    RabbitMQ counts only the active consumer of a quorum queue with single-active-consumer, not who stands by.
    """

    name: str
    messages: int
    consumers: int


class Bus(Protocol):
    """One service's connection to the broker. Every method may be called from any thread and none blocks but stop().

    Handlers, ticks and callbacks run through the `dispatch` given to the constructor, never on the thread that
    owns the socket. A future's own done-callbacks may run on that thread and MUST be short.
    """

    @property
    def connected(self) -> bool:
        """True while messages can be published."""
        ...

    def publish(self, message: Outgoing) -> Future[None]:
        """Publish; the future MUST succeed only after the broker confirmed that the message is stored.

        It fails with BusDown, Blocked, Unroutable, Nacked or AccessRefused, always within the confirm time limit.
        BusDown leaves open whether the message was stored, so it is safe to repeat only what is idempotent.
        """
        ...

    def consume(self, queue: str, handler: Handler, prefetch: int = 100, exclusive: bool = False) -> None:
        """Call `handler` for each message of `queue`, at most `prefetch` unsettled at once, across reconnects.

        A handler that raises has its delivery requeued the first time and rejected when it is a redelivery, so
        that a poison message cannot loop. With `exclusive`, another consumer on the queue is reported to on_fatal,
        once, and ours waits until it goes.
        """
        ...

    def every(self, seconds: float, tick: Callable[[], None]) -> None:
        """Call `tick` periodically, connected or not; a tick that still runs is not started again."""
        ...

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call `callback` each time that publishing becomes possible."""
        ...

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` each time that the connection is lost."""
        ...

    def on_fatal(self, callback: Callable[[BusError], None]) -> None:
        """Call `callback` with what no retry mends by itself: ConsumerRefused, LoginRefused."""
        ...

    def depth(self, queue: str) -> Future[QueueDepth]:
        """Ask for the depth of a queue; fails with QueueMissing, AccessRefused or BusDown. The connection survives."""
        ...

    def start(self) -> None:
        """Connect, and keep connecting until stop()."""
        ...

    def stop(self, timeout: float = 5.0) -> None:
        """Stop consuming, let handed-out handlers finish, wait for outstanding confirms, close; at most `timeout` s.

        On the thread that runs the handlers it waits for no handler: what was handed out but not begun goes back
        to the broker. Afterwards every publish fails with BusDown; a second stop() does nothing.
        """
        ...


class Listeners:
    """What every bus does alike: keep the callbacks of a service and run them through its dispatch."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._on_connect: list[Callable[[], None]] = []
        self._on_disconnect: list[Callable[[], None]] = []
        self._on_fatal: list[Callable[[BusError], None]] = []

    def on_connect(self, callback: Callable[[], None]) -> None:
        """See Bus.on_connect."""
        self._on_connect.append(callback)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """See Bus.on_disconnect."""
        self._on_disconnect.append(callback)

    def on_fatal(self, callback: Callable[[BusError], None]) -> None:
        """See Bus.on_fatal."""
        self._on_fatal.append(callback)

    def dispatch(self, action: Callable[[], None]) -> bool:
        """Hand `action` to the service; False when it takes nothing any more (an event loop that was closed)."""
        try:
            self._dispatch(action)
        except RuntimeError as error:
            log.error("the service takes no more work: %s", error)
            return False
        return True

    def announce(self, connected: bool) -> None:
        """Run the callbacks of on_connect or on_disconnect."""
        for callback in self._on_connect if connected else self._on_disconnect:
            self.dispatch(partial(run_callback, callback, "on_connect" if connected else "on_disconnect"))

    def fatal(self, error: BusError) -> None:
        """Run the callbacks of on_fatal."""
        for callback in self._on_fatal:
            self.dispatch(partial(run_callback, partial(callback, error), "on_fatal"))


@dataclass(eq=False)
class Tick:
    """Something periodic; `due` is for whoever has no timers."""

    seconds: float
    action: Callable[[], None]
    due: float = 0.0
    running: bool = False

    def begin(self, dispatch: Callable[[Callable[[], None]], bool]) -> None:
        """Dispatch one run, unless the last one has not ended."""
        if not self.running:
            # Set before: an immediate dispatch runs, and ends, inside the call.
            self.running = True
            if not dispatch(self._run):
                self.running = False

    def _run(self) -> None:
        run_callback(self.action, "tick")
        self.running = False


def backoff(attempt: int, rng: random.Random) -> float:
    """Seconds to wait before try number `attempt` (0 = first): doubling, capped, with jitter over the upper half.

    Half is kept fixed so that a broker that just came back is not met by everybody in the same instant, and
    nobody hammers it by drawing zeros.
    """
    ceiling = min(_BACKOFF_CAP, _BACKOFF_FIRST * 2.0 ** min(attempt, 16))
    return ceiling * rng.uniform(0.5, 1.0)


def run_handler(handler: Handler, delivery: Delivery) -> None:
    """Run one handler and settle its delivery when it raises: requeue once, then dead-letter."""
    try:
        handler(delivery)
    except Exception:
        log.exception("handler of %s failed on %s %s", delivery.queue, delivery.type, delivery.message_id)
        if delivery.settled:
            return
        if delivery.redelivered:
            delivery.reject()
        else:
            delivery.requeue()


def run_callback(callback: Callable[[], None], what: str) -> None:
    """Run a tick or a callback of a service; an exception is logged and goes no further."""
    try:
        callback()
    except Exception:
        log.exception("%s failed", what)
