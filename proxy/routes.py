"""Whether a console may be opened where its ticket says that the desktop is, and the address of that host.

Pure: no clock, no network. The ticket names the host and the generation; heartbeats and the scheduler's announcements
tell what has changed since it was signed. No host can draw another's consoles to itself by what it claims.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.schemas.host import HostBeat, HostReport, Phase
from deskfleet.schemas.messages import SessionChanged
from deskfleet.schemas.session import State
from deskfleet.schemas.tickets import LIFETIME_S, SKEW_S

#: Logins on the broker. It verifies the sender of each message, so a host can speak for itself only.
SCHEDULER_LOGIN = "scheduler"
PORTAL_LOGIN = "portal"
AGENT_LOGIN = "agent-{host}"

_OVER_PHASES = frozenset({Phase.STOPPING, Phase.ENDED})
_OVER_STATES = frozenset({State.STOPPING, State.ENDED})
#: When an announcement is this old, no ticket from before it is valid any more.
_TICKETS_S = LIFETIME_S + SKEW_S
#: Earlier lives of an agent that are remembered, so that their late reports are recognised.
_LIVES = 4


class WrongSender(Exception):
    """Raised for a message that its verified sender may not send; it is dropped and counted."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where to dial: `address` is host:port; the certificate found there must name `host`."""

    sid: str
    generation: int
    host: str
    address: str


@dataclass(slots=True)
class _Host:
    incarnation: str
    seq: int
    heard_at: float
    address: str
    last_generation: int
    retired: tuple[str, ...]
    #: Of the last full heartbeat; `digest` is empty before there was one.
    guests: dict[str, tuple[int, Phase]]
    digest: str
    #: Whether that inventory still stands: a small heartbeat with another digest means that a full one was lost.
    current: bool


@dataclass(frozen=True, slots=True)
class _Announced:
    host: str
    generation: int
    over: bool
    at: float


@dataclass(slots=True)
class RouteTable:
    """The routes of one proxy process. Times are seconds of a monotonic clock, given by the caller.

    A host that falls silent is kept for `keep_s`: it may well be alive, and dialling decides. Until `settle_s` after
    the bus was connected a heartbeat of each host has yet to come.
    """

    keep_s: float
    settle_s: float
    _first_listening: float | None = None
    _listening: float | None = None
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _announced: dict[str, _Announced] = field(default_factory=dict)

    def listening(self, now: float) -> None:
        """The bus is connected, for the first time or again."""
        self._listening = now
        if self._first_listening is None:
            self._first_listening = now

    def settled(self, now: float) -> bool:
        """Whether every live host has had the time for a heartbeat since the bus was connected."""
        return self._listening is not None and now - self._listening >= self.settle_s

    def ready(self, now: float) -> bool:
        """Whether that was so once. Later the bus may be away for a while; the routes stay."""
        return self._first_listening is not None and now - self._first_listening >= self.settle_s

    @property
    def size(self) -> tuple[int, int]:
        """How many hosts are known, and how many desktops their last full heartbeats listed."""
        return len(self._hosts), sum(len(host.guests) for host in self._hosts.values())

    def heartbeat(self, sender: str, message: HostReport | HostBeat, now: float) -> frozenset[str]:
        """Take a host's heartbeat; return the sessions whose consoles on this host it ends, and on no other.

        One of the same life with a `seq` that is not greater, or of an earlier life, changes nothing.

        Raises:
            WrongSender: the broker did not verify that this host's own agent sent it.
        """
        if sender != AGENT_LOGIN.format(host=message.host):
            raise WrongSender(f"a heartbeat of {message.host} from {sender or 'nobody'}")
        host = self._hosts.get(message.host)
        if host is None:
            host = _Host(message.incarnation, -1, now, "", 0, (), {}, "", False)
            self._hosts[message.host] = host
        if message.incarnation in host.retired:
            return frozenset()
        if message.incarnation != host.incarnation:
            host.retired = (*host.retired, host.incarnation)[-_LIVES:]
            host.incarnation = message.incarnation
        elif message.seq <= host.seq:
            return frozenset()
        host.seq, host.heard_at, host.address = message.seq, now, message.console
        host.last_generation = message.last_generation
        if isinstance(message, HostBeat):
            host.current = message.digest == host.digest
            return frozenset()
        guests = {guest.sid: (guest.generation, guest.phase) for guest in message.guests}
        missing = host.guests.keys() - guests.keys()
        host.guests, host.digest, host.current = guests, message.digest, True
        return frozenset(missing) | {guest.sid for guest in message.guests if guest.phase in _OVER_PHASES}

    def announce(self, sender: str, changed: SessionChanged, now: float) -> bool:
        """Take the scheduler's word about a session; true when its consoles must be cut.

        The end is final: no later message opens the session again.

        Raises:
            WrongSender: not from the scheduler.
        """
        if sender != SCHEDULER_LOGIN:
            raise WrongSender(f"news of a session from {sender or 'nobody'}")
        old = self._announced.get(changed.sid)
        over = changed.state in _OVER_STATES or (old is not None and old.over)
        self._announced[changed.sid] = _Announced(changed.host, changed.generation, over, now)
        return over

    def expire(self, now: float) -> None:
        """Forget hosts and announcements older than `keep_s`; call it now and then."""
        for name in [name for name, host in self._hosts.items() if now - host.heard_at > self.keep_s]:
            del self._hosts[name]
        for sid in [sid for sid, word in self._announced.items() if now - word.at > self.keep_s]:
            del self._announced[sid]

    def find(self, sid: str, generation: int, host: str, now: float) -> Route:
        """The route of a session as `host` has started it under `generation`, by a ticket that is valid `now`.

        A host of which only small heartbeats are known, because this process has just started or a full one was lost,
        is dialled: it opens no console of a desktop that it does not run.

        Raises:
            Refusal: ended, moved, or the host is silent, or not heard of yet.
        """
        word = self._announced.get(sid)
        if word and word.over:
            raise Refusal(Refused.SESSION_ENDED)
        # The ticket is as good as the ledger when it was signed; an announcement from before that is no news.
        if word and (word.host, word.generation) != (host, generation) and now - word.at <= _TICKETS_S:
            raise Refusal(Refused.SESSION_MOVED)
        known = self._hosts.get(host)
        if known is None:
            raise Refusal(Refused.HOST_SILENT if self.settled(now) else Refused.NOT_READY, f"no heartbeat of {host}")
        if known.current:
            _check_listed(known, sid, generation)
        if not known.address:
            raise Refusal(Refused.HOST_FAILED, f"{host} offers no console address")
        return Route(sid, generation, host, known.address)


def _check_listed(host: _Host, sid: str, generation: int) -> None:
    """Refuse what a host's own inventory speaks against."""
    if host.last_generation < generation:
        return  # it is from before this start
    listed, phase = host.guests.get(sid, (None, Phase.ENDED))
    if listed not in (None, generation):
        raise Refusal(Refused.SESSION_MOVED, f"its host runs it under {listed}")
    if phase in _OVER_PHASES:
        raise Refusal(Refused.SESSION_ENDED, "its host does not run it")
