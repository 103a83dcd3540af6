"""Exchanges, queues and bindings on the broker, as literals.

Every argument is written out: RabbitMQ's defaults change between versions, ours must not.
Facts (RabbitMQ 3.10): at-least-once dead-lettering needs a quorum queue with overflow=reject-publish;
a quorum queue with single-active-consumer refuses basic.get, so depths come from a passive declare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

COMMANDS = "commands"
EVENTS = "events"
DEAD = "dead"
#: From portals to every proxy, and back to the portal that asked.
CONSOLES = "consoles"
VIEWERS = "viewers"

SCHEDULER_COMMANDS = "scheduler.commands"
SCHEDULER_REPORTS = "scheduler.reports"
SCHEDULER_HEARTBEATS = "scheduler.heartbeats"
SCHEDULER_QUESTIONS = "scheduler.questions"

HEARTBEAT_TTL_MS = 15_000
COMMAND_TTL_MS = 60_000
QUESTION_TTL_MS = 3_000
LOOK_TTL_MS = 3_000
PICTURE_TTL_MS = 15_000
DEAD_TTL_MS = 14 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange; `kind` is direct, topic or fanout. All are durable."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue with its arguments written out."""

    name: str
    arguments: Mapping[str, str | int | bool] = field(default_factory=dict)
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """Messages of `exchange` whose routing key matches `key` go to `queue`."""

    queue: str
    exchange: str
    key: str


@dataclass(frozen=True, slots=True)
class Topology:
    """What one process declares on the broker."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()

    def __add__(self, other: Topology) -> Topology:
        return Topology(self.exchanges + other.exchanges, self.queues + other.queues, self.bindings + other.bindings)


EXCHANGES = (
    Exchange(COMMANDS, "direct"),
    Exchange(EVENTS, "topic"),
    Exchange(DEAD, "fanout"),
    Exchange(CONSOLES, "fanout"),
    Exchange(VIEWERS, "direct"),
)

#: What must be there before a host's queue can be bound.
EXCHANGES_ONLY = Topology(EXCHANGES)

_QUORUM: dict[str, str | int | bool] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 5,
    "x-dead-letter-exchange": DEAD,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def host_queue(host: str) -> str:
    """The queue of one host's commands."""
    return f"host.{host}"


def look_queue(host: str) -> str:
    """The queue of the wishes to see screens of one host. A host's name holds no dot, so it is no other host's."""
    return f"host.{host}.look"


def proxy_queue(replica: str) -> str:
    """The queue of one proxy process; it vanishes with its connection."""
    return f"proxy.{replica}"


def answers_queue(replica: str) -> str:
    """The queue of the answers to one portal process; it vanishes with its connection."""
    return f"answers.{replica}"


def pictures_queue(replica: str) -> str:
    """The queue of the pictures of screens for one portal process; it vanishes with its connection."""
    return f"pictures.{replica}"


def viewers_queue(replica: str) -> str:
    """The queue of the proxies' answers to one portal process; it vanishes with its connection."""
    return f"viewers.{replica}"


def answer_key(replica: str) -> str:
    """Routing key of the scheduler's answers to one portal process."""
    return f"answer.{replica}"


def heartbeat_key(host: str) -> str:
    """Routing key of a host's heartbeats."""
    return f"host.{host}.heartbeat"


def report_key(host: str) -> str:
    """Routing key of a host's reports about its guests, and of its hello."""
    return f"host.{host}.vm"


def picture_key(host: str, replica: str) -> str:
    """Routing key of a host's pictures for one portal process."""
    return f"host.{host}.picture.{replica}"


def last_key(host: str) -> str:
    """Routing key of the last pictures of a host's guests."""
    return f"host.{host}.last"


def session_key(sid: str) -> str:
    """Routing key of the scheduler's announcements about a session."""
    return f"session.{sid}"


def core() -> Topology:
    """What the scheduler declares: the exchanges and every queue that outlives a process."""
    active = {**_QUORUM, "x-single-active-consumer": True}
    return Topology(
        EXCHANGES,
        (
            Queue(SCHEDULER_COMMANDS, active),
            Queue(SCHEDULER_REPORTS, active),
            Queue(
                SCHEDULER_HEARTBEATS,
                {
                    "x-queue-type": "classic",
                    "x-message-ttl": HEARTBEAT_TTL_MS,
                    "x-max-length": 20_000,
                    "x-single-active-consumer": True,
                },
            ),
            # Nobody waits for an old answer, and a question lost costs one word on a page.
            Queue(
                SCHEDULER_QUESTIONS,
                {
                    "x-queue-type": "classic",
                    "x-message-ttl": QUESTION_TTL_MS,
                    "x-max-length": 1_000,
                    "x-single-active-consumer": True,
                },
            ),
            Queue(
                DEAD,
                {"x-queue-type": "quorum", "x-message-ttl": DEAD_TTL_MS, "x-max-length": 100_000},
            ),
        ),
        (
            Binding(SCHEDULER_COMMANDS, COMMANDS, "scheduler"),
            Binding(SCHEDULER_QUESTIONS, COMMANDS, "questions"),
            Binding(SCHEDULER_REPORTS, EVENTS, "host.*.vm"),
            Binding(SCHEDULER_HEARTBEATS, EVENTS, "host.*.heartbeat"),
            Binding(DEAD, DEAD, ""),
        ),
    )


def for_host(host: str) -> Topology:
    """The queues of one host. Declared when the host is enrolled: its own login may not declare anything."""
    name, look = host_queue(host), look_queue(host)
    return Topology(
        (),
        (
            Queue(name, {**_QUORUM, "x-message-ttl": COMMAND_TTL_MS}),
            # A wish that nobody took is forgotten, not kept with the dead letters.
            Queue(look, {"x-queue-type": "classic", "x-message-ttl": LOOK_TTL_MS, "x-max-length": 100}),
        ),
        (Binding(name, COMMANDS, name), Binding(look, COMMANDS, look)),
    )


def for_proxy(replica: str) -> Topology:
    """The queue of one proxy replica: heartbeats for its routes, ends of sessions and rights for its cuts."""
    name = proxy_queue(replica)
    return Topology(
        (),
        (
            Queue(
                name,
                {"x-queue-type": "classic", "x-message-ttl": HEARTBEAT_TTL_MS, "x-max-length": 50_000},
                durable=False,
                exclusive=True,
                auto_delete=True,
            ),
        ),
        (
            Binding(name, EVENTS, "host.*.heartbeat"),
            Binding(name, EVENTS, "session.*"),
            Binding(name, CONSOLES, ""),
        ),
    )


def for_portal(replica: str) -> Topology:
    """The queues of one portal process: answers of the scheduler and of proxies, and pictures of screens."""
    answers, pictures, viewers = answers_queue(replica), pictures_queue(replica), viewers_queue(replica)
    return Topology(
        (),
        (
            Queue(
                answers,
                {"x-queue-type": "classic", "x-message-ttl": QUESTION_TTL_MS, "x-max-length": 1_000},
                durable=False,
                exclusive=True,
                auto_delete=True,
            ),
            Queue(
                viewers,
                {"x-queue-type": "classic", "x-message-ttl": QUESTION_TTL_MS, "x-max-length": 1_000},
                durable=False,
                exclusive=True,
                auto_delete=True,
            ),
            Queue(
                pictures,
                {"x-queue-type": "classic", "x-message-ttl": PICTURE_TTL_MS, "x-max-length": 500},
                durable=False,
                exclusive=True,
                auto_delete=True,
            ),
        ),
        (
            Binding(viewers, VIEWERS, replica),
            Binding(answers, EVENTS, answer_key(replica)),
            Binding(pictures, EVENTS, picture_key("*", replica)),
            Binding(pictures, EVENTS, last_key("*")),
        ),
    )
