"""The bus over RabbitMQ (AMQP 0-9-1) with pika: one thread owns the socket, everybody else posts work to it.

What outlives a connection is here: threads, subscriptions, ticks, counters, the reconnect loop. One connection is a
`Link`. Make it after a fork, never before: neither the thread nor the socket survives one.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from pika.adapters.select_connection import IOLoop  # type: ignore[import-untyped]
from pika.exceptions import (  # type: ignore[import-untyped]
    AuthenticationError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from deskfleet.runtime.amqp_link import Link, Subscription
from deskfleet.runtime.amqp_wire import BadBrokerUrl, parameters, text_of
from deskfleet.runtime.bus import (
    Blocked,
    BusDown,
    BusError,
    Delivery,
    Dispatch,
    Handler,
    Listeners,
    LoginRefused,
    Outgoing,
    QueueDepth,
    Tick,
    backoff,
    run_callback,
    run_handler,
)
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.service import Clock
from deskfleet.schemas.topology import Topology

log = logging.getLogger(__name__)

_REFUSALS = (AuthenticationError, ProbableAuthenticationError, ProbableAccessDeniedError)
# A connection that lived this long counts as healthy, and the next loss starts the backoff from the beginning.
_HEALTHY_SECONDS = 10.0


class AmqpBus(Listeners):
    """A Bus (see `bus.Bus`) on the RabbitMQ nodes behind `urls`, which are tried in turn.

    `heartbeat`, `blocked_timeout` (how long the broker may refuse messages before we reconnect), `confirm_timeout`
    and `connect_timeout` are in seconds. `declare` is declared at each connect, before consuming.
    """

    def __init__(
        self,
        urls: Sequence[str | Secret],
        *,
        name: str,
        dispatch: Dispatch,
        clock: Clock,
        rng: random.Random,
        declare: Topology | None = None,
        tls: ssl.SSLContext | None = None,
        heartbeat: int = 10,
        blocked_timeout: float = 60.0,
        confirm_timeout: float = 10.0,
        connect_timeout: float = 5.0,
        max_outstanding: int = 10_000,
    ) -> None:
        if not urls:
            raise BadBrokerUrl("broker address: none is given")
        self._parameters = [
            parameters(
                url.reveal() if isinstance(url, Secret) else url,
                name,
                heartbeat=heartbeat,
                blocked_timeout=blocked_timeout,
                connect_timeout=connect_timeout,
                tls=tls,
            )
            for url in urls
        ]
        super().__init__(dispatch)
        self._name = name
        self._clock = clock
        self._rng = rng
        self._declare = declare
        self._confirm_timeout = confirm_timeout
        self._max_outstanding = max_outstanding
        # Shared by all threads, under the lock of `changed`, which is held for moments only.
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._loop: Any = None
        self._awake = False
        self._up = False
        self._blocked: str | None = None
        self._stopping = False
        self._skip_handlers = False
        self._outstanding = 0
        self._handed_out = 0
        self._handler_threads: set[int] = set()
        self._thread: threading.Thread | None = None
        # The I/O thread's own.
        self._link: Link | None = None
        self._attempt = 0
        self._complaints: set[str] = set()
        self._subscriptions: list[Subscription] = []
        self._ticks: list[Tick] = []

    # The contract; any thread.

    @property
    def connected(self) -> bool:
        """True while messages can be published."""
        return self._up

    def publish(self, message: Outgoing) -> Future[None]:
        """See Bus.publish."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # a publish cannot be taken back
        with self._changed:
            problem = self._refusal()
            if problem is None:
                self._outstanding += 1
                self.post(partial(self._send, message, partial(self._confirmed, future)))
        if problem is not None:
            future.set_exception(problem)
        return future

    def consume(self, queue: str, handler: Handler, prefetch: int = 100, exclusive: bool = False) -> None:
        """See Bus.consume."""
        self.post(partial(self._subscribe, Subscription(queue, handler, prefetch, exclusive)))

    def every(self, seconds: float, tick: Callable[[], None]) -> None:
        """See Bus.every."""
        self.post(partial(self._add_tick, Tick(seconds, tick)))

    def depth(self, queue: str) -> Future[QueueDepth]:
        """See Bus.depth."""
        future: Future[QueueDepth] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            up = self._up
            if up:
                self.post(partial(self._ask_depth, queue, future))
        if not up:
            future.set_exception(BusDown("not connected to the broker"))
        return future

    def start(self) -> None:
        """See Bus.start."""
        self._thread = threading.Thread(target=self._run, name=f"bus {self._name}", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """See Bus.stop."""
        deadline = self._clock.monotonic() + timeout

        def left() -> float:
            return max(0.0, deadline - self._clock.monotonic())

        with self._changed:
            self._stopping = True
            self.post(self._drain)
            if threading.get_ident() not in self._handler_threads:
                self._changed.wait_for(lambda: self._handed_out == 0, left())
            self._skip_handlers = True
            self._changed.wait_for(lambda: self._outstanding == 0, left())
            self.post(self._close)
        if self._thread is not None:
            self._thread.join(left())
            if self._thread.is_alive():
                # The broker does not answer our goodbye.
                self.post(self._abort)
                self._thread.join(1.0)

    # The crossing between threads.

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` run on the I/O thread. Many posts cost one wake-up."""
        with self._changed:
            self._inbox.append(action)
            if self._loop is not None and not self._awake:
                self._awake = True
                self._loop.add_callback_threadsafe(self._work)

    def _work(self) -> None:
        with self._changed:
            work, self._inbox = self._inbox, []
            self._awake = False
        for action in work:
            run_callback(action, "a request to the broker")

    def _refusal(self) -> BusError | None:
        if not self._up:
            return BusDown("not connected to the broker")
        if self._blocked is not None:
            return Blocked(f"the broker takes no messages at the moment: {self._blocked}")
        if self._outstanding >= self._max_outstanding:
            return Blocked(f"{self._outstanding} messages wait for the broker's confirm already")
        return None

    def _confirmed(self, future: Future[None], error: BusError | None) -> None:
        with self._changed:
            self._outstanding -= 1
            self._changed.notify_all()
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _handle(self, link: Link, handler: Handler, delivery: Delivery) -> None:
        self._handler_threads.add(threading.get_ident())
        try:
            # A delivery of a lost connection is the broker's again, so a handler that has not begun need not.
            if link.alive and not self._skip_handlers:
                run_handler(handler, delivery)
        finally:
            self._handled()

    def _handled(self) -> None:
        with self._changed:
            self._handed_out -= 1
            self._changed.notify_all()

    # The I/O thread.

    def _run(self) -> None:
        """Run pika's loop until stop(), whatever happens on it."""
        with self._changed:
            self._loop, self._awake = IOLoop(), True
        self._loop.add_callback(self._work)
        self._loop.add_callback(self._connect)
        while True:
            try:
                self._loop.start()
                break
            except Exception as error:
                log.exception("%s: the connection broke on a bug or on nonsense from the broker", self._name)
                if self._link is not None:
                    self._link.sever(error)
        with self._changed:
            loop, self._loop = self._loop, None
        loop.close()
        self._lost()
        # Nothing is posted any more that waits for an answer, since the bus is down; what was posted fails now.
        self._work()

    def _abort(self) -> None:
        if self._link is not None:
            self._link.sever(BusDown("the broker did not answer in time while we were stopping"))

    def _drain(self) -> None:
        if self._link is not None:
            self._link.drain()

    def _close(self) -> None:
        if self._link is None:
            self._loop.stop()
        else:
            self._link.close()

    def _connect(self) -> None:
        if self._stopping:
            self._loop.stop()
            return
        chosen = self._parameters[self._attempt % len(self._parameters)]
        self._link = Link(
            chosen,
            self._loop,
            self,
            self._clock,
            self._rng,
            declare=self._declare,
            subscriptions=self._subscriptions,
            confirm_timeout=self._confirm_timeout,
        )

    def _send(self, message: Outgoing, done: Callable[[BusError | None], None]) -> None:
        if self._link is None:
            done(BusDown("the connection to the broker was lost before the message was sent"))
        else:
            self._link.publish(message, done)

    def _ask_depth(self, queue: str, future: Future[QueueDepth]) -> None:
        if self._link is None:
            future.set_exception(BusDown("the connection to the broker was lost"))
        else:
            self._link.depth(queue, future)

    def _subscribe(self, subscription: Subscription) -> None:
        self._subscriptions.append(subscription)
        if self._link is not None and self._up:
            self._link.subscribe(subscription)

    def _add_tick(self, tick: Tick) -> None:
        self._ticks.append(tick)
        self._arm(tick)

    def _arm(self, tick: Tick) -> None:
        self._loop.call_later(tick.seconds, partial(self._fire, tick))

    def _fire(self, tick: Tick) -> None:
        if self._stopping:
            return
        self._arm(tick)
        tick.begin(self.dispatch)

    # What a Link reports; the I/O thread as well.

    def link_up(self, link: Link) -> None:
        """See Owner."""
        log.info("%s is connected to the broker", self._name)
        self._complaints.clear()
        with self._changed:
            self._up, self._blocked = True, None
        self._loop.call_later(_HEALTHY_SECONDS, partial(self._healthy, link))
        self.announce(connected=True)

    def _healthy(self, link: Link) -> None:
        if link.alive:
            self._attempt = 0

    def link_blocked(self, why: str | None) -> None:
        """See Owner."""
        log.warning("the broker %s", "takes messages again" if why is None else f"takes no messages: {why}")
        with self._changed:
            self._blocked = why

    def link_down(self, link: Link, error: BaseException) -> None:
        """See Owner."""
        self._lost()
        if self._stopping:
            self._loop.stop()
            return
        delay = backoff(self._attempt // len(self._parameters), self._rng)
        self._attempt += 1
        self._complain(link, error, delay)
        self._loop.call_later(delay, self._connect)

    def _lost(self) -> None:
        with self._changed:
            was_up, self._up, self._blocked = self._up, False, None
        self._link = None
        if was_up and not self._stopping:
            self.announce(connected=False)

    def _complain(self, link: Link, error: BaseException, delay: float) -> None:
        """Say it once an outage, in plain words; the repeats are for debugging."""
        refused = isinstance(error, _REFUSALS)
        kind = "refused" if refused else "unreachable"
        if kind in self._complaints:
            log.debug("no connection to %s, next try in %.1f s: %s", link.address, delay, text_of(error))
        elif refused:
            problem = LoginRefused(f"{link.address} refuses the login {link.login!r}: {text_of(error)}")
            log.error("%s; check login, password and virtual host. Trying again.", problem)
            self.fatal(problem)
        else:
            log.warning("no connection to %s, trying again: %s", link.address, text_of(error))
        self._complaints.add(kind)

    def hand_out(self, link: Link, handler: Handler, delivery: Delivery) -> None:
        """See Owner."""
        with self._changed:
            self._handed_out += 1
        if not self.dispatch(partial(self._handle, link, handler, delivery)):
            self._handled()
