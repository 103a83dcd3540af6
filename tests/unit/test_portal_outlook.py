"""Questions to the scheduler: who is believed, who waits and for how long."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from support.bus_harness import TickingClock

from deskfleet.portal.outlook import Forecasts
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.schemas.messages import (
    REPLICA,
    LaunchRequested,
    PlacementAnswered,
    PlacementAsked,
)
from deskfleet.schemas.session import Resources
from deskfleet.schemas.topology import (
    EVENTS,
    QUESTION_TTL_MS,
    SCHEDULER_QUESTIONS,
    answer_key,
    answers_queue,
    core,
    for_portal,
)
from deskfleet.schemas.verdict import Forecast, Outlook
from deskfleet.schemas.wire import decode_as, encode

WANT = LaunchRequested("a" * 32, "alice", ("lab",), "desktop", Resources(2, 1024, 4), False, 3600, 600)
WAITS = Forecast(Outlook.WAITS, place=3, estimate_s=700.0)
PATIENCE_S = 30.0


class Stage:
    """A portal's questions and a scheduler that answers when told."""

    def __init__(self, patience_s: float = PATIENCE_S, most_open: int = 4) -> None:
        self.clock = TickingClock()
        self.broker = MemoryBroker(random.Random(1), self.clock)
        self.broker.declare(core())
        self.bus = self.connect("portal", "p1")
        self.forecasts = Forecasts(self.bus, "p1", self.clock, most_open, patience_s)
        self.pool = ThreadPoolExecutor(8)

    def connect(self, login: str, replica: str = "") -> MemoryBus:
        declared = for_portal(replica) if replica else None
        bus = self.broker.connect(login, lambda action: action(), declared)
        bus.start()
        return bus

    def asked(self, count: int = 1) -> list[PlacementAsked]:
        """The questions, once there are so many."""
        wait = threading.Event()
        while len(pending := self.broker.pending(SCHEDULER_QUESTIONS)) < count:
            wait.wait(0.005)
        return [decode_as(PlacementAsked, message.type, message.body) for message in pending]

    def answer(self, question: str, forecast: Forecast = WAITS, login: str = "scheduler") -> None:
        kind, body = encode(PlacementAnswered(question, forecast))
        self.send(kind, body, login)

    def send(self, kind: str, body: bytes, login: str = "scheduler") -> None:
        self.connect(login).publish(Outgoing(EVENTS, answer_key("p1"), kind, body, durable=False)).result(0)
        assert self.broker.deliver_one(answers_queue("p1"))


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_question_holds_the_request_and_dies_soon(stage: Stage) -> None:
    answer = stage.pool.submit(stage.forecasts.ask, WANT)
    (asked,) = stage.asked()
    assert (asked.user, asked.groups, asked.machine, asked.resources, asked.lifetime_s, asked.replica) == (
        "alice",
        ("lab",),
        "desktop",
        WANT.resources,
        3600,
        "p1",
    )
    assert REPLICA.fullmatch(asked.replica) and re.fullmatch(r"[0-9a-f]{32}", asked.question)
    (message,) = stage.broker.pending(SCHEDULER_QUESTIONS)
    assert not message.durable
    stage.answer(asked.question)
    assert answer.result(PATIENCE_S) == WAITS
    stage.clock.now += QUESTION_TTL_MS / 1000 + 1
    assert stage.broker.pending(SCHEDULER_QUESTIONS) == ()


def test_each_caller_gets_the_answer_to_its_own_question(stage: Stage) -> None:
    wants = [LaunchRequested("a" * 32, "alice", (), "desktop", Resources(n, 512, 1), False, 60, 60) for n in (1, 2, 3)]
    answers = [stage.pool.submit(stage.forecasts.ask, want) for want in wants]
    for asked in reversed(stage.asked(3)):
        stage.answer(asked.question, Forecast(Outlook.WAITS, place=asked.resources.cpus))
    assert [answer.result(PATIENCE_S).place for answer in answers] == [1, 2, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("login", ["agent-h1", "portal", "proxy", "", "Scheduler", "scheduler2"])
def test_nobody_but_the_scheduler_is_believed(stage: Stage, login: str) -> None:
    answer = stage.pool.submit(stage.forecasts.ask, WANT)
    (asked,) = stage.asked()
    stage.answer(asked.question, Forecast(Outlook.NEVER), login)
    assert not answer.done()
    stage.answer(asked.question)
    assert answer.result(PATIENCE_S) == WAITS


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kind, body: (kind, b"{"),
        lambda kind, body: ("session.changed.v1", body),
        lambda kind, body: (kind, body.replace(b'"waits"', b'"perhaps"')),
        lambda kind, body: (kind, b"\xff" * 100),
    ],
)
def test_an_answer_that_can_not_be_read_is_no_answer(
    stage: Stage, spoil: Callable[[str, bytes], tuple[str, bytes]]
) -> None:
    answer = stage.pool.submit(stage.forecasts.ask, WANT)
    (asked,) = stage.asked()
    stage.send(*spoil(*encode(PlacementAnswered(asked.question, WAITS))))
    stage.answer("f" * 32, Forecast(Outlook.NEVER))  # to a question that nobody asked
    assert not answer.done()
    stage.answer(asked.question)
    stage.answer(asked.question, Forecast(Outlook.NEVER))  # a second one changes nothing
    assert answer.result(PATIENCE_S) == WAITS


def test_without_an_answer_nobody_can_tell_and_the_next_do_not_wait() -> None:
    stage = Stage(patience_s=0.05)
    assert stage.forecasts.ask(WANT) is None
    (late,) = stage.asked()
    stage.answer(late.question)  # nobody is there any more
    assert stage.forecasts.ask(WANT) is None
    assert len(stage.asked()) == 1, "while the scheduler is away, a click does not wait for it"
    stage.clock.now += 60
    assert stage.forecasts.ask(WANT) is None
    assert len(stage.asked()) == 1, "asked again after a while; the first question has died"


def test_a_click_does_not_wait_for_what_was_found_possible_a_moment_ago(stage: Stage) -> None:
    def asked_and_answered(forecast: Forecast, count: int, want: LaunchRequested = WANT) -> Forecast | None:
        found = stage.pool.submit(stage.forecasts.never, want)
        stage.answer(stage.asked(count)[-1].question, forecast)
        return found.result(PATIENCE_S)

    never = Forecast(Outlook.NEVER, largest=Resources(1, 1, 1))
    assert asked_and_answered(never, 1) == never
    assert asked_and_answered(WAITS, 2) is None, "what was impossible is asked about again"
    assert stage.forecasts.never(WANT) is None and len(stage.asked()) == 2, "what was possible is not"
    for want in (replace(WANT, user="bob"), replace(WANT, groups=()), replace(WANT, resources=Resources(3, 1024, 4))):
        assert asked_and_answered(never, len(stage.asked()) + 1, want) == never, "another's answer says nothing"
    stage.clock.now += 61
    assert asked_and_answered(never, 1) == never, "the others have died by now"


def test_only_so_much_is_remembered(stage: Stage) -> None:
    for number in range(2_500):
        stage.forecasts._remember(replace(WANT, lifetime_s=60 + number), WAITS)
    assert len(stage.forecasts._possible) <= 1_000


def test_a_broker_that_is_away_means_unknown_at_once(stage: Stage) -> None:
    stage.broker.crash()
    assert stage.forecasts.ask(WANT) is None
    stage.broker.recover()
    answer = stage.pool.submit(stage.forecasts.ask, WANT)
    stage.answer(stage.asked()[0].question)
    assert answer.result(PATIENCE_S) == WAITS


def test_only_so_many_wait_at_once(stage: Stage) -> None:
    answers = [stage.pool.submit(stage.forecasts.ask, WANT) for _ in range(4)]
    questions = stage.asked(4)
    assert stage.forecasts.ask(WANT) is None
    for asked in questions:
        stage.answer(asked.question)
    assert [answer.result(PATIENCE_S) for answer in answers] == [WAITS] * 4
    answer = stage.pool.submit(stage.forecasts.ask, WANT)
    stage.answer(stage.asked(5)[-1].question)
    assert answer.result(PATIENCE_S) == WAITS, "whose question was answered gives the place back"
