"""What would become of a request: the scheduler is asked over the bus, and nobody waits long for its answer.

A question that is not answered costs one sentence on a page, never a launch: unknown is an answer here.
"""

from __future__ import annotations

import logging
import secrets
import threading
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import partial

from deskfleet.runtime.bus import Bus, Delivery, Outgoing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.messages import (
    LaunchRequested,
    PlacementAnswered,
    PlacementAsked,
)
from deskfleet.schemas.session import Resources
from deskfleet.schemas.topology import COMMANDS, QUESTION_TTL_MS, answers_queue
from deskfleet.schemas.verdict import Forecast, Outlook
from deskfleet.schemas.wire import decode_as, encode

log = logging.getLogger(__name__)

PATIENCE_S = 1.5
# After a question that nobody answered: long enough that an absent scheduler does not slow every click.
_QUIET_S = 3.0
_LATELY_S = 60.0
_MOST_REMEMBERED = 1_000
_SCHEDULER = "scheduler"

#: What decides whether a request can ever fit.
Size = tuple[str, tuple[str, ...], str, Resources, int]


class Forecasts:
    """Questions to the scheduler. Any thread may ask; the answers come to the queue of this process, `replica`.

    At most `most_open` callers wait at once, at most `patience_s` seconds each; everybody else gets "unknown" at once.
    """

    def __init__(self, bus: Bus, replica: str, clock: Clock, most_open: int, patience_s: float = PATIENCE_S) -> None:
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._most_open = most_open
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._open: dict[str, Future[Forecast | None]] = {}
        self._quiet_until = float("-inf")
        self._possible: dict[Size, float] = {}
        bus.consume(answers_queue(replica), self._take)

    def never(self, request: LaunchRequested) -> Forecast | None:
        """The forecast of a request that can never fit; None when it may fit, or nobody can tell.

        What was found possible a moment ago, beside the button that was just pressed, is not asked again: a click
        shall not wait for an answer that it has.
        """
        if self._possible.get(_size(request), 0.0) > self._clock.monotonic():
            return None
        forecast = self.ask(request)
        return forecast if forecast and forecast.outlook is Outlook.NEVER else None

    def ask(self, request: LaunchRequested) -> Forecast | None:
        """What would become of `request` if it were made now; None when nobody can tell. Never raises for that."""
        question = secrets.token_hex(16)
        answer: Future[Forecast | None] = Future()
        with self._lock:
            if len(self._open) >= self._most_open or self._clock.monotonic() < self._quiet_until:
                return None
            self._open[question] = answer
        try:
            self._publish(question, request).add_done_callback(partial(_not_asked, answer))
            forecast = answer.result(self._patience_s)
        except FutureTimeout:
            log.warning("the scheduler did not say what would become of a request within %g s", self._patience_s)
            self._quiet_until = self._clock.monotonic() + _QUIET_S
            return None
        finally:
            with self._lock:
                del self._open[question]
        if forecast is not None:
            self._remember(request, forecast)
        return forecast

    def _remember(self, request: LaunchRequested, forecast: Forecast) -> None:
        with self._lock:
            if len(self._possible) >= _MOST_REMEMBERED:
                self._possible.clear()
            if forecast.outlook is Outlook.NEVER:
                self._possible.pop(_size(request), None)
            else:
                self._possible[_size(request)] = self._clock.monotonic() + _LATELY_S

    def _publish(self, question: str, request: LaunchRequested) -> Future[None]:
        asked = PlacementAsked(
            question,
            self._replica,
            request.user,
            request.groups,
            request.machine,
            request.resources,
            request.lifetime_s,
        )
        kind, body = encode(asked)
        ttl_s = QUESTION_TTL_MS / 1000
        message = Outgoing(COMMANDS, "questions", kind, body, question, durable=False, ttl_seconds=ttl_s)
        return self._bus.publish(message)

    def _take(self, delivery: Delivery) -> None:
        """An answer; it runs on the portal's own thread."""
        delivery.ack()
        if delivery.sender != _SCHEDULER:
            log.warning("an answer that %r sent is not believed", delivery.sender)
            return
        try:
            answered = decode_as(PlacementAnswered, delivery.type, delivery.body)
        except DecodeError as error:
            log.warning("an answer of the scheduler can't be read: %s", error)
            return
        with self._lock:
            waiting = self._open.get(answered.question)
        if waiting is not None:  # else it came too late
            _settle(waiting, answered.forecast)


def _size(request: LaunchRequested) -> Size:
    return request.user, request.groups, request.machine, request.resources, request.lifetime_s


def _not_asked(answer: Future[Forecast | None], published: Future[None]) -> None:
    if published.exception() is not None:
        _settle(answer, None)


def _settle(answer: Future[Forecast | None], forecast: Forecast | None) -> None:
    with suppress(InvalidStateError):  # the broker may deliver what it fails to confirm
        answer.set_result(forecast)
