"""What a person sees of a desktop: the stored request and the ledger's session, put together.

The ledger has the last word. A request that it does not know is shown as what it is, a promise on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.reader import Reader, SessionEvent, Wait
from deskfleet.portal import details, words
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import N_, gettext
from deskfleet.portal.outbox import Outbox, Request, Stage
from deskfleet.portal.records import HostState, Records
from deskfleet.runtime.service import Clock
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Outcome, Resources, Session, State

#: States in which waiting makes sense: the page keeps asking.
WAITING = frozenset({"saved", "sent", "queued", "assigned", "starting"})
UNKNOWN = "unknown"
_SENDING = N_("Saved, and being sent.")
_QUEUE_AWAY = N_("Saved. The queue can't be reached right now; your request is sent as soon as it answers.")
# A broker that works confirms within this time.
_PROMPT_S = 1.5
_NOT_TAKEN_UP = N_("The request could not be handed over in time, so nothing was started. Start it again.")


@dataclass(frozen=True, slots=True)
class Desktop:
    """One desktop as its page, its list and the HTTP API show it.

    `state` is a session's state, or "saved" / "sent" while the scheduler is not known to have the request. `sentence`
    says it in words. `unsure` means that the ledger can't be read, so this is what was true last. `host_silent` means
    that its host does not answer, so that nobody knows how it is; `host_message` is what the administrator tells the
    people on that host. `birth` is how it came to be, once it runs. `wait` is what keeps it waiting, for one that was
    looked up by itself.
    """

    sid: str
    user: str
    machine: str
    title: str
    resources: Resources
    persistent: bool
    lifetime_s: int
    state: str
    sentence: str
    created_at: float
    changed_at: float
    host: str = ""
    generation: int = 0
    outcome: str = ""
    reason: str = ""
    time_left_s: float | None = None
    stop_asked: bool = False
    unsure: bool = False
    host_silent: bool = False
    host_message: str = ""
    birth: str = ""
    wait: Wait | None = None

    @property
    def shown(self) -> str:
        """The state as people see it: what was true last of a host that does not answer is not shown as if it were."""
        return UNKNOWN if self.host_silent else self.state

    @property
    def waiting(self) -> bool:
        """Whether it is on its way to run."""
        return self.state in WAITING

    @property
    def running(self) -> bool:
        """Whether its screen can be opened."""
        return self.state == State.RUNNING

    @property
    def over(self) -> bool:
        """Whether nothing more can happen to it."""
        return self.state == State.ENDED


@dataclass(frozen=True, slots=True)
class Story:
    """A desktop with how it got where it is: when it was asked for (UNIX seconds), its place among those that wait
    (1 = next), in how many seconds it starts at the latest (None: unknown), why no host took it at the last try, and
    its steps."""

    desktop: Desktop
    asked_at: float
    place: int | None
    estimate_s: float | None
    verdicts: tuple[tuple[str, str, str], ...]
    steps: tuple[SessionEvent, ...]


class Desktops:
    """Finds desktops."""

    def __init__(
        self,
        outbox: Outbox,
        reader: Reader,
        records: Records,
        machines: Callable[[], Mapping[str, Machine]],
        clock: Clock,
    ) -> None:
        self._outbox = outbox
        self._reader = reader
        self._records = records
        self._machines = machines
        self._clock = clock

    def find(self, sid: str) -> Desktop | None:
        """One desktop. Raises Problem when the ledger can't be read and this portal has no request of that id."""
        try:
            found = self._reader.watched(sid)
            hosts = self._hosts([found[0]] if found else [])
        except DBAPIError:
            request = self._outbox.find(sid)
            if request is None:
                raise Problem(Refused.RECORDS_AWAY) from None
            return replace(self._from_request(request), unsure=True)
        if found is not None:
            session, wait = found
            return replace(self._from_session(session, self._outbox.stop_asked(sid), hosts), wait=wait)
        request = self._outbox.find(sid)
        return self._from_request(request) if request else None

    def owner(self, sid: str) -> str | None:
        """Whose a session id is, as far as can be told: a launch must be taken while the ledger can't be read, too."""
        request = self._outbox.find(sid)
        if request is not None:
            return request.user
        try:
            session = self._reader.session(sid)
        except DBAPIError:
            return None
        return session.user if session else None

    def story(self, desktop: Desktop) -> Story:
        """A desktop with its steps and reasons."""
        request = self._outbox.find(desktop.sid)
        asked_at = min(request.created_at, desktop.created_at) if request else desktop.created_at
        wait = desktop.wait
        try:
            steps = tuple(self._reader.timeline(desktop.sid))
        except DBAPIError:
            desktop, wait, steps = replace(desktop, unsure=True), None, ()
        return Story(
            desktop,
            asked_at,
            wait.place if wait else None,
            wait.estimate_s if wait else None,
            tuple((v.host, v.reason.value, details.verdict(v.host, v.text)) for v in wait.verdicts) if wait else (),
            steps,
        )

    def of_user(self, user: str) -> tuple[list[Desktop], bool]:
        """A person's desktops, newest first, and whether the ledger could be read."""
        try:
            sessions = self._reader.of_user(user)
            hosts, sure = self._hosts(sessions), True
        except DBAPIError:
            sessions, hosts, sure = [], {}, False
        known = {session.sid for session in sessions}
        requests = [request for request in self._outbox.launches_of(user) if request.sid not in known]
        if sure:
            # A request that the ledger took up long ago and that is not among its newest is history.
            requests = [request for request in requests if request.stage is not Stage.KNOWN]
        stopping = self._outbox.stopping([*known])
        found = [self._from_session(session, session.sid in stopping, hosts) for session in sessions]
        found += [self._from_request(request) for request in requests]
        return sorted(found, key=lambda desktop: -desktop.created_at), sure

    def live(self) -> list[Desktop]:
        """Everybody's desktops that have not ended, oldest first. Raises Problem when the ledger can't be read."""
        try:
            sessions = self._reader.live()
            hosts = self._hosts(sessions)
        except DBAPIError:
            raise Problem(Refused.RECORDS_AWAY) from None
        stopping = self._outbox.stopping([session.sid for session in sessions])
        return [self._from_session(session, session.sid in stopping, hosts) for session in sessions]

    def why(self, desktops: Iterable[Desktop]) -> dict[str, str]:
        """Why those that wait for a place do so, by sid: the place, and what the first host lacked. Empty when the
        ledger can't be read."""
        try:
            waits = self._reader.waits(desktop.sid for desktop in desktops if desktop.state == State.QUEUED)
        except DBAPIError:
            return {}
        found = {}
        for sid, wait in waits.items():
            place = gettext("%(place)s in the queue", place=words.ordinal(wait.place)) if wait.place else ""
            first = [details.verdict(verdict.host, verdict.text) for verdict in wait.verdicts[:1]]
            found[sid] = " · ".join(text for text in (place, *first) if text)
        return found

    def _hosts(self, sessions: Sequence[Session]) -> dict[str, HostState]:
        return self._records.hosts({session.host for session in sessions if session.on_host})

    def _title(self, machine: str) -> str:
        entry = self._machines().get(machine)
        return entry.title if entry else machine or gettext("Desktop")

    def _from_session(self, session: Session, stop_asked: bool, hosts: Mapping[str, HostState]) -> Desktop:
        host = hosts.get(session.host) if session.on_host else None
        left = None
        if session.state is State.RUNNING and not (host and host.silent):
            left = max(0.0, session.changed_at + session.lifetime_s - self._clock.wall())
        return Desktop(
            sid=session.sid,
            user=session.user,
            machine=session.machine,
            title=self._title(session.machine),
            resources=session.resources,
            persistent=session.persistent,
            lifetime_s=session.lifetime_s,
            state=session.state.value,
            sentence=_silence(session, host.dead) if host and host.silent else _sentence(session),
            created_at=session.created_at,
            changed_at=session.changed_at,
            host=session.host,
            generation=session.generation,
            outcome=session.outcome.value if session.outcome else "",
            reason=session.reason.value if session.reason else "",
            time_left_s=left,
            stop_asked=stop_asked,
            host_silent=host.silent if host else False,
            host_message=host.message if host else "",
            birth=session.birth.value if session.birth else "",
        )

    def _from_request(self, request: Request) -> Desktop:
        wanted = request.launch or LaunchRequested(request.sid, request.user, (), "", Resources(0, 0, 0), False, 0, 0)
        age = self._clock.wall() - request.created_at
        state, sentence, outcome, reason = _on_its_way(request.stage, age)
        return Desktop(
            sid=request.sid,
            user=request.user,
            machine=wanted.machine,
            title=self._title(wanted.machine),
            resources=wanted.resources,
            persistent=wanted.persistent,
            lifetime_s=wanted.lifetime_s,
            state=state,
            sentence=sentence,
            created_at=request.created_at,
            changed_at=request.deadline if request.stage is Stage.EXPIRED else request.created_at,
            outcome=outcome,
            reason=reason,
        )


def _on_its_way(stage: Stage, age_s: float) -> tuple[str, str, str, str]:
    """State, sentence, outcome and reason of a request that the ledger does not show."""
    if stage is Stage.STORED:
        return "saved", gettext(_SENDING if age_s < _PROMPT_S else _QUEUE_AWAY), "", ""
    if stage is Stage.EXPIRED:
        return "ended", gettext(_NOT_TAKEN_UP), Outcome.NO_CAPACITY.value, "not_taken_up"
    if stage is Stage.CANCELLED:
        sentence = gettext("Stopped by its owner before it started.")
        return "ended", sentence, Outcome.CANCELLED.value, "stopped_by_user"
    return "sent", gettext("Sent. It waits for the scheduler to take it up."), "", ""


def _silence(session: Session, dead: bool) -> str:
    """What can be said of a desktop on a host that does not answer."""
    if dead:
        return gettext("%(host)s was declared dead, so this desktop is given up.", host=session.host)
    if session.state is State.RUNNING:
        return gettext("%(host)s does not answer; the desktop may well run on.", host=session.host)
    if session.state is State.STOPPING:
        return gettext("%(host)s does not answer; the desktop is stopped as soon as it does.", host=session.host)
    return gettext("%(host)s does not answer; whether it starts the desktop can't be told.", host=session.host)


def _sentence(session: Session) -> str:
    if session.state is State.QUEUED:
        return gettext("It waits for a place on a host.")
    if session.state is State.ASSIGNED:
        return gettext("Host %(host)s was chosen and is told to start it.", host=session.host)
    if session.state is State.STARTING:
        return gettext("Host %(host)s is starting it.", host=session.host)
    if session.state is State.RUNNING:
        where = gettext("It runs on host %(host)s.", host=session.host)
        return f"{where} {details.say(session.detail)}".rstrip()
    why = words.reason(session.reason)
    if session.state is State.STOPPING:
        return f"{gettext('It is being stopped.')} {why}".rstrip()
    return f"{words.outcome(session.outcome)}. {why}".rstrip()
