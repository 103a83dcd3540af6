"""Publishing with confirms, pipelined, on one channel; everything here runs on the I/O thread."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pika  # type: ignore[import-untyped]
import pika.spec  # type: ignore[import-untyped]
from pika.exceptions import AMQPError  # type: ignore[import-untyped]

from deskfleet.runtime.amqp_wire import ACCESS_REFUSED, NOT_FOUND, code_of, text, text_of
from deskfleet.runtime.bus import AccessRefused, BusDown, BusError, Nacked, Outgoing, Unroutable
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

Done = Callable[[BusError | None], None]


@dataclass(eq=False, slots=True)
class _Sent:
    message: Outgoing
    message_id: str
    deadline: float
    done: Done
    returned: str = ""


class Publisher:
    """The publishing channel of one connection. It is opened again when a bad message makes the broker close it."""

    def __init__(self, connection: Any, login: str, clock: Clock, confirm_timeout: float) -> None:
        self._connection = connection
        self._login = login
        self._clock = clock
        self._confirm_timeout = confirm_timeout
        self._channel: Any = None
        self._next_tag = 1
        # By delivery tag and by message id: a confirm names the tag, a returned message only its own properties.
        self._sent: dict[int, _Sent] = {}
        self._by_id: dict[str, _Sent] = {}

    def open(self, ready: Callable[[], None]) -> None:
        """Open the channel; `ready` is called when messages can be sent."""

        def opened(channel: Any) -> None:
            channel.add_on_close_callback(self._closed)
            channel.add_on_return_callback(self._returned)
            channel.confirm_delivery(self._confirmed, callback=lambda _: selected(channel))

        def selected(channel: Any) -> None:
            self._channel, self._next_tag = channel, 1
            ready()

        self._connection.channel(on_open_callback=opened)

    def publish(self, message: Outgoing, done: Done) -> None:
        """Send one message; `done` gets None when it is confirmed, else the error."""
        if self._channel is None:
            done(BusDown("the publishing channel is being opened"))
            return
        sent = _Sent(message, str(uuid.uuid4()), self._clock.monotonic() + self._confirm_timeout, done)
        properties = pika.BasicProperties(
            content_type="application/json",
            delivery_mode=2 if message.durable else 1,
            message_id=sent.message_id,
            type=message.type,
            correlation_id=message.correlation_id or None,
            timestamp=int(self._clock.wall()),
            # The broker refuses a user-id that is not the connection's login, which is what makes it worth reading.
            user_id=self._login,
            expiration=None if message.ttl_seconds is None else str(round(message.ttl_seconds * 1000)),
        )
        try:
            self._channel.basic_publish(
                message.exchange, message.routing_key, message.body, properties, message.mandatory
            )
        except AMQPError as error:
            done(BusDown(f"not sent: {error}"))
            return
        # Counted after the send: the broker numbers what it received.
        self._sent[self._next_tag] = self._by_id[sent.message_id] = sent
        self._next_tag += 1

    def expire(self) -> None:
        """Give up on confirms whose time is up. Tags are in the order of their deadlines."""
        now = self._clock.monotonic()
        for tag in list(self._sent):
            if self._sent[tag].deadline > now:
                break
            self._finish(tag, BusDown(f"the broker did not confirm within {self._confirm_timeout:g} s"))

    def fail_all(self, error: BusError) -> None:
        """Every outstanding message fails with `error`, and no more are sent."""
        self._channel = None
        for tag in list(self._sent):
            self._finish(tag, error)

    def _returned(self, _: Any, method: Any, properties: Any, __: bytes) -> None:
        sent = self._by_id.get(properties.message_id)
        if sent is not None:
            sent.returned = text(method.reply_text) or "returned"

    def _confirmed(self, frame: Any) -> None:
        tag = frame.method.delivery_tag
        if not frame.method.multiple:
            tags = [tag] if tag in self._sent else []  # else its time was up before
        else:
            tags = []
            for known in self._sent:
                if known > tag > 0:
                    break
                tags.append(known)
        nacked = isinstance(frame.method, pika.spec.Basic.Nack)
        for one in tags:
            sent = self._sent[one]
            error: BusError | None = None
            if nacked:
                error = Nacked("the broker refused to store the message; its queue is full or failed")
            elif sent.returned:
                where = f"{sent.message.routing_key!r} from exchange {sent.message.exchange!r}"
                error = Unroutable(f"no queue takes {where}: {sent.returned}")
            self._finish(one, error)

    def _closed(self, _: Any, reason: Exception) -> None:
        """One bad message (404, 403) closes the channel for all; what became of the others is unknown."""
        self._channel = None
        if not self._connection.is_open:
            return
        words = text_of(reason)
        log.error("the broker closed the publishing channel: %s", words)
        kind = {NOT_FOUND: Unroutable, ACCESS_REFUSED: AccessRefused}.get(code_of(reason), BusDown)
        for tag, sent in list(self._sent.items()):
            guilty = _names(words, sent.message)
            self._finish(tag, kind(words) if guilty else BusDown("the publishing channel failed on another message"))
        self.open(lambda: None)

    def _finish(self, tag: int, error: BusError | None) -> None:
        sent = self._sent.pop(tag)
        del self._by_id[sent.message_id]
        sent.done(error)


def _names(words: str, message: Outgoing) -> bool:
    """True when the broker's words are about this message: they quote the exchange, and the topic if that is it."""
    if f"exchange '{message.exchange or 'amq.default'}'" not in words:
        return False
    return "topic '" not in words or f"topic '{message.routing_key}'" in words
