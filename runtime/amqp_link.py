"""One connection to one RabbitMQ node, from connecting to its end; everything here runs on the I/O thread.

`amqp` makes a new Link for every attempt and keeps what must outlive a connection. The order of a Link's life:
connect, declare the topology, open the publisher's channel with confirms, subscribe the consumers.
Facts marked (tried) were tried on RabbitMQ 3.10.8 and are held by the contract tests.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pika  # type: ignore[import-untyped]
from pika.exceptions import AMQPError  # type: ignore[import-untyped]

from deskfleet.runtime.amqp_publisher import Publisher
from deskfleet.runtime.amqp_wire import ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, code_of, death_of, text, text_of
from deskfleet.runtime.bus import (
    AccessRefused,
    BusDown,
    BusError,
    ConsumerRefused,
    Delivery,
    Handler,
    Outgoing,
    QueueDepth,
    QueueMissing,
    Settlement,
    backoff,
)
from deskfleet.runtime.service import Clock
from deskfleet.schemas.topology import Topology

log = logging.getLogger(__name__)

_IN_USE = "in exclusive use"


@dataclass(eq=False)
class Subscription:
    """What a service consumes; outlives connections. `held` says that this process has consumed it before."""

    queue: str
    handler: Handler
    prefetch: int
    exclusive: bool
    held: bool = False
    attempt: int = 0
    refused_since: float | None = None
    reported: bool = False


class Owner(Protocol):
    """What a Link tells the bus it belongs to."""

    def link_up(self, link: Link) -> None:
        """Publishing is possible."""
        ...

    def link_blocked(self, why: str | None) -> None:
        """The broker takes no messages, with its reason; None = it does again."""
        ...

    def link_down(self, link: Link, error: BaseException) -> None:
        """The connection failed or ended; called once, last."""
        ...

    def hand_out(self, link: Link, handler: Handler, delivery: Delivery) -> None:
        """A message arrived."""
        ...

    def fatal(self, error: BusError) -> None:
        """Something that no retry mends."""
        ...

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the I/O thread; from any thread."""
        ...


class Link:
    """A connection attempt and what becomes of it."""

    def __init__(
        self,
        parameters: pika.connection.Parameters,
        loop: Any,
        owner: Owner,
        clock: Clock,
        rng: random.Random,
        *,
        declare: Topology | None,
        subscriptions: list[Subscription],
        confirm_timeout: float,
    ) -> None:
        self.alive = True
        self.login: str = parameters.credentials.username
        self.address = f"{parameters.host}:{parameters.port} (virtual host {parameters.virtual_host!r})"
        self._parameters = parameters
        self._loop = loop
        self._owner = owner
        self._clock = clock
        self._rng = rng
        self._declare = declare or Topology()
        self._subscriptions = subscriptions
        self._confirm_timeout = confirm_timeout
        self._consuming: dict[Any, str] = {}
        self._draining = False
        self._connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._opened,
            on_open_error_callback=self._ended,
            on_close_callback=self._ended,
            custom_ioloop=loop,
        )
        self._publisher = Publisher(self._connection, self.login, clock, confirm_timeout)

    # From connected to ready.

    def _opened(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(
            lambda _, frame: self._owner.link_blocked(text(frame.method.reason) or "no reason given")
        )
        connection.add_on_connection_unblocked_callback(lambda *_: self._owner.link_blocked(None))
        connection.channel(on_open_callback=self._declare_all)

    def _declare_all(self, channel: Any) -> None:
        channel.add_on_close_callback(self._declared)
        for exchange in self._declare.exchanges:
            channel.exchange_declare(exchange.name, exchange.kind, durable=True, callback=_answered)
        for queue in self._declare.queues:
            channel.queue_declare(
                queue.name,
                durable=queue.durable,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
                callback=_answered,
            )
        for binding in self._declare.bindings:
            channel.queue_bind(binding.queue, binding.exchange, binding.key, callback=_answered)
        # pika sends one request after the other's answer, so this close comes when all are done.
        channel.close()

    def _declared(self, _: Any, reason: Exception) -> None:
        if not self._connection.is_open:
            return
        if code_of(reason):
            log.error("the broker refuses our exchanges and queues: %s", text_of(reason))
            self.close()
        else:
            self._publisher.open(self._ready)

    def _ready(self) -> None:
        self._expire()
        for subscription in self._subscriptions:
            self.subscribe(subscription)
        self._owner.link_up(self)

    # Publishing.

    def publish(self, message: Outgoing, done: Callable[[BusError | None], None]) -> None:
        """Send one message; `done` gets None when it is confirmed, else the error."""
        self._publisher.publish(message, done)

    def _expire(self) -> None:
        if self.alive:
            self._publisher.expire()
            self._loop.call_later(min(1.0, self._confirm_timeout / 4), self._expire)

    # Consuming.

    def subscribe(self, subscription: Subscription) -> None:
        """Consume on a channel of its own, so that an error of one consumer is no other's."""
        if self._connection.is_open and not self._draining:
            self._connection.channel(on_open_callback=partial(self._consume, subscription))

    def _consume(self, subscription: Subscription, channel: Any) -> None:
        channel.add_on_close_callback(partial(self._consumer_closed, subscription))
        channel.add_on_cancel_callback(lambda _: channel.close(reply_text="the queue was deleted or moved"))
        channel.basic_qos(prefetch_count=subscription.prefetch)
        if not subscription.exclusive:
            self._start_consuming(subscription, channel)
            return
        # A quorum queue ignores the exclusive flag of basic.consume and serves every consumer (tried), so the
        # number of consumers is looked at before and after. Two that start in the same instant both withdraw.
        self._count_consumers(
            subscription, channel, allowed=0, then=partial(self._start_consuming, subscription, channel)
        )

    def _count_consumers(
        self, subscription: Subscription, channel: Any, allowed: int, then: Callable[[], None]
    ) -> None:
        def counted(frame: Any) -> None:
            if frame.method.consumer_count > allowed:
                channel.close(reply_text=f"queue '{subscription.queue}' {_IN_USE}")
            else:
                then()

        channel.queue_declare(subscription.queue, passive=True, callback=counted)

    def _start_consuming(self, subscription: Subscription, channel: Any) -> None:
        def consuming(frame: Any) -> None:
            self._consuming[channel] = frame.method.consumer_tag
            if subscription.exclusive:
                self._count_consumers(subscription, channel, allowed=1, then=settled)
            else:
                settled()

        def settled() -> None:
            subscription.held, subscription.attempt = True, 0
            subscription.refused_since, subscription.reported = None, False

        channel.basic_consume(
            subscription.queue,
            partial(self._on_message, subscription),
            exclusive=subscription.exclusive,
            callback=consuming,
        )

    def _on_message(self, subscription: Subscription, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        delivery = Delivery(
            subscription.queue,
            text(method.exchange),
            text(method.routing_key),
            text(properties.type),
            body,
            text(properties.message_id),
            text(properties.correlation_id),
            text(properties.user_id),
            bool(method.redelivered),
            lambda how: self._owner.post(partial(self._settle, channel, method.delivery_tag, how)),
            death=death_of(properties.headers),
        )
        self._owner.hand_out(self, subscription.handler, delivery)

    def _settle(self, channel: Any, tag: int, how: Settlement) -> None:
        if not channel.is_open:
            log.info("stale %s ignored: the channel it belongs to is gone", how)
        elif how is Settlement.ACK:
            channel.basic_ack(tag)
        else:
            channel.basic_nack(tag, requeue=how is Settlement.REQUEUE)

    def _consumer_closed(self, subscription: Subscription, channel: Any, reason: Exception) -> None:
        self._consuming.pop(channel, None)
        if not self._connection.is_open or self._draining:
            return
        words = text_of(reason)
        delay = backoff(subscription.attempt, self._rng)
        subscription.attempt += 1
        if _IN_USE in words:
            self._refused(subscription, words)
        else:
            log.warning("consuming %s ended, next try in %.1f s: %s", subscription.queue, delay, words)
        self._loop.call_later(delay, partial(self.subscribe, subscription))

    def _refused(self, subscription: Subscription, words: str) -> None:
        """Another consumer holds the queue. It may be our own ghost, that is, our last connection, which the broker
        holds for alive until two heartbeats are missed; so one that held the queue before gets the time of three."""
        now = self._clock.monotonic()
        if subscription.refused_since is None:
            subscription.refused_since = now
        patience = 3 * self._parameters.heartbeat if subscription.held else 0
        if now - subscription.refused_since >= patience and not subscription.reported:
            subscription.reported = True
            self._owner.fatal(ConsumerRefused(f"{words}; another process consumes it"))

    # Asking.

    def depth(self, queue: str, future: Future[QueueDepth]) -> None:
        """Passive declare on a channel of its own, for a missing queue closes the channel.

        It needs no permission at all: neither configure nor read on the queue (tried).
        """

        def opened(channel: Any) -> None:
            channel.add_on_close_callback(closed)
            channel.queue_declare(queue, passive=True, callback=partial(answered, channel))

        def answered(channel: Any, frame: Any) -> None:
            if not future.done():
                future.set_result(QueueDepth(queue, frame.method.message_count, frame.method.consumer_count))
            channel.close()

        def closed(_: Any, reason: Exception) -> None:
            kinds = {NOT_FOUND: QueueMissing, ACCESS_REFUSED: AccessRefused, RESOURCE_LOCKED: AccessRefused}
            fail(kinds.get(code_of(reason), BusDown)(text_of(reason)))

        def fail(error: BusError) -> None:
            if not future.done():
                future.set_exception(error)

        try:
            self._connection.channel(on_open_callback=opened)
        except AMQPError as error:
            fail(BusDown(f"cannot ask: {error}"))
            return
        late = BusDown(f"the broker did not answer within {self._confirm_timeout:g} s")
        self._loop.call_later(self._confirm_timeout, lambda: fail(late))

    # The end.

    def drain(self) -> None:
        """Take no more messages. What still arrives goes back to the broker by itself (pika rejects it)."""
        self._draining = True
        for channel, tag in self._consuming.items():
            if channel.is_open:
                channel.basic_cancel(tag)

    def close(self) -> None:
        """End the connection in an orderly way, or the attempt at once; link_down follows."""
        if self._connection.is_open:
            self._connection.close()
        elif not self._connection.is_closing:
            self.sever(BusDown("given up while connecting"))

    def sever(self, error: BaseException) -> None:
        """End the connection without the broker's consent; link_down follows.

        pika has no public way to do this, and without it a broker that went silent holds the socket open.
        """
        try:
            self._connection._adapter_disconnect_stream()
        except Exception:  # noqa: BLE001 - pika's state is unknown here, and the link must end all the same
            self._ended(self._connection, error)

    def _ended(self, _: Any, error: BaseException) -> None:
        if self.alive:
            self.alive = False
            self._publisher.fail_all(BusDown(f"the connection ended before the broker confirmed: {text_of(error)}"))
            self._owner.link_down(self, error)


def _answered(_: Any) -> None:
    """Asking pika for the answer, and ignoring it, makes a request synchronous, so an error is reported."""
