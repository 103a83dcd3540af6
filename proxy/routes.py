"""Where each desktop's console is, as heartbeats and the scheduler's announcements tell it.

Pure: no clock, no network. A wrong desktop is worse than none, so a route counts only for the generation that the
ticket names, and two hosts that claim the same one cancel each other out until the scheduler's word settles it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.schemas.host import HostReport, Phase
from deskfleet.schemas.messages import SessionChanged
from deskfleet.schemas.session import State

#: Logins on the broker. It verifies the sender of each message, so a host can speak for itself only.
SCHEDULER_LOGIN = "scheduler"
AGENT_LOGIN = "agent-{host}"

_OVER_PHASES = frozenset({Phase.STOPPING, Phase.ENDED})
_OVER_STATES = frozenset({State.STOPPING, State.ENDED})
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
    guests: dict[str, tuple[int, Phase]]
    retired: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Announced:
    host: str
    generation: int
    over: bool
    at: float


@dataclass(slots=True)
class RouteTable:
    """The routes of one proxy process. Times are seconds of a monotonic clock, given by the caller.

    A host that falls silent keeps its routes for `keep_s`: it may well be alive, and dialling decides. Until `settle_s`
    after the bus was connected a heartbeat of each host has yet to come.
    """

    keep_s: float
    settle_s: float
    _first_listening: float | None = None
    _listening: float | None = None
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _claims: dict[str, set[str]] = field(default_factory=dict)
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
        """How many hosts and how many desktops are known."""
        return len(self._hosts), len(self._claims)

    def heartbeat(self, sender: str, report: HostReport, now: float) -> frozenset[str]:
        """Take a host's report; return the sessions whose consoles on this host it ends, and on no other.

        A report of the same life with a `seq` that is not greater, or of an earlier life, changes nothing.

        Raises:
            WrongSender: the broker did not verify that this host's own agent sent it.
        """
        if sender != AGENT_LOGIN.format(host=report.host):
            raise WrongSender(f"a heartbeat of {report.host} from {sender or 'nobody'}")
        old = self._hosts.get(report.host)
        retired: tuple[str, ...] = ()
        if old:
            if report.incarnation in old.retired or (report.incarnation == old.incarnation and report.seq <= old.seq):
                return frozenset()
            retired = old.retired
            if report.incarnation != old.incarnation:
                retired = (*retired, old.incarnation)[-_LIVES:]
        guests = {guest.sid: (guest.generation, guest.phase) for guest in report.guests}
        self._claim(report.host, old.guests if old else {}, guests)
        self._hosts[report.host] = _Host(
            report.incarnation, report.seq, now, report.console, report.last_generation, guests, retired
        )
        missing = old.guests.keys() - guests.keys() if old else set()
        return frozenset(missing) | {guest.sid for guest in report.guests if guest.phase in _OVER_PHASES}

    def _claim(self, host: str, old: dict[str, tuple[int, Phase]], new: dict[str, tuple[int, Phase]]) -> None:
        for sid in old.keys() - new.keys():
            hosts = self._claims[sid]
            hosts.discard(host)
            if not hosts:
                del self._claims[sid]
        for sid in new.keys() - old.keys():
            self._claims.setdefault(sid, set()).add(host)

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
            self._claim(name, self._hosts.pop(name).guests, {})
        for sid in [sid for sid, word in self._announced.items() if now - word.at > self.keep_s]:
            del self._announced[sid]

    def find(self, sid: str, generation: int, now: float) -> Route:
        """The route of a session as started under `generation`.

        Raises:
            Refusal: ended, moved, unknown, or not known yet.
        """
        word = self._announced.get(sid)
        if word and word.over:
            raise Refusal(Refused.SESSION_ENDED)
        if word and word.host and word.generation == generation:
            return self._route(sid, generation, word.host, now)
        claims = self._claims.get(sid, set())
        hosts = [host for host in claims if self._hosts[host].guests[sid][0] == generation]
        if len(hosts) > 1:
            raise Refusal(Refused.HOST_FAILED, f"claimed by {', '.join(sorted(hosts))}")
        if hosts:
            return self._route(sid, generation, hosts[0], now)
        raise Refusal(Refused.SESSION_MOVED if claims or word else self._unknown(now))

    def _unknown(self, now: float) -> Refused:
        return Refused.UNKNOWN_SESSION if self.settled(now) else Refused.NOT_READY

    def _route(self, sid: str, generation: int, name: str, now: float) -> Route:
        host = self._hosts.get(name)
        if host is None:
            raise Refusal(self._unknown(now), f"no heartbeat of {name}")
        listed = host.guests.get(sid)
        if listed is None and host.last_generation >= generation:
            raise Refusal(Refused.SESSION_ENDED, f"{name} does not run it")
        if listed and listed[0] != generation:
            raise Refusal(Refused.SESSION_MOVED, f"{name} runs it under {listed[0]}")
        if listed and listed[1] in _OVER_PHASES:
            raise Refusal(Refused.SESSION_ENDED, f"{listed[1]} on {name}")
        if not host.address:
            raise Refusal(Refused.HOST_FAILED, f"{name} offers no console address")
        return Route(sid, generation, name, host.address)
