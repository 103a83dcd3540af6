"""Whether each part of the service works, as far as this portal can tell now, and what to do where it does not.

What does not answer is unknown: no check shows what was true earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version

from sqlalchemy.exc import DBAPIError

from deskfleet.portal import words
from deskfleet.portal.errors import Problem
from deskfleet.portal.fleet import HostView, QueueView
from deskfleet.portal.languages import N_, gettext, ngettext
from deskfleet.portal.services import Services
from deskfleet.runtime.bus import BusError, Unroutable
from deskfleet.schemas.topology import SCHEDULER_COMMANDS

_PATIENCE_S = 2.0
_LATELY_S = 24 * 3600.0
#: A method that could not be asked so long ago, and not since, is no news any more.
_NEWS_S = 15 * 60.0
_SHOWN = 5


class Level(StrEnum):
    """How a part is."""

    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    UNKNOWN = "unknown"


LEVELS = {
    Level.GOOD: N_("works"),
    Level.WARN: N_("look"),
    Level.BAD: N_("broken"),
    Level.UNKNOWN: N_("unknown"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One part: `name` for programs, then how it is, in words, and what to do ("" when nothing is)."""

    name: str
    title: str
    level: Level
    sentence: str
    advice: str = ""

    @property
    def shown(self) -> str:
        """The level in words."""
        return gettext(LEVELS[self.level])


def checks(parts: Services) -> list[Check]:
    """All of them, the important first. Never raises for what is away."""
    queues = parts.fleet.queues()
    try:
        hosts: list[HostView] | None = parts.fleet.hosts()
    except Problem:
        hosts = None
    found = [_broker(parts), _ledger(hosts), _database(parts)]
    found += [_scheduler(parts, queues, hosts), _hosts(hosts), _versions(hosts), _proxies(parts), _letters(parts)]
    return [*found, *_mail(parts), *_sign_in(parts)]


def _broker(parts: Services) -> Check:
    title = gettext("Broker")
    if parts.bus.connected:
        return Check("broker", title, Level.GOOD, gettext("It takes messages."))
    return Check(
        "broker",
        title,
        Level.BAD,
        gettext("It can't be reached: launches and stops are stored here and wait."),
        gettext("Start RabbitMQ, or look at the address in broker_url and at the portal's log."),
    )


def _ledger(hosts: Sequence[HostView] | None) -> Check:
    title = gettext("Ledger")
    if hosts is not None:
        return Check("ledger", title, Level.GOOD, gettext("It can be read."))
    return Check(
        "ledger",
        title,
        Level.BAD,
        gettext("It can't be read: nobody can see the state of desktops. Those that run keep running."),
        gettext("Start its database, and look at the address in the section [ledger]."),
    )


def _database(parts: Services) -> Check:
    title = gettext("The portal's database")
    try:
        waiting = parts.outbox.waiting()
    except DBAPIError:
        sentence = gettext("It does not answer: nobody can log in or launch.")
        advice = gettext("Start it, or make room on its disk; see the portal's log.")
        return Check("database", title, Level.BAD, sentence, advice)
    if not waiting:
        return Check("database", title, Level.GOOD, gettext("It answers, and no request waits in it."))
    sentence = ngettext("%(num)s request is not yet taken up.", "%(num)s requests are not yet taken up.", waiting)
    return Check("database", title, Level.GOOD, sentence)


def _scheduler(parts: Services, queues: Sequence[QueueView], hosts: Sequence[HostView] | None) -> Check:
    title = gettext("Scheduler")
    look = gettext("Start deskfleet-scheduler, or look into its log.")
    consumers = next((queue.consumers for queue in queues if queue.name == SCHEDULER_COMMANDS), None)
    if consumers is None:
        return Check("scheduler", title, Level.UNKNOWN, gettext("Nobody can tell while the broker does not answer."))
    if consumers == 0:
        return Check("scheduler", title, Level.BAD, gettext("None takes launches: they wait."), look)
    ages = [host.seen_s for host in hosts or () if host.seen_s is not None]
    if not ages:
        return Check("scheduler", title, Level.GOOD, gettext("One takes launches. No host has reported yet."))
    said = gettext("The last heartbeat was taken %(ago)s.", ago=words.ago(0, min(ages)))
    if min(ages) > parts.settings.host_silent_s:
        advice = gettext("Look into its log; if it is well, no host reports: look at agents and network.")
        return Check("scheduler", title, Level.WARN, f"{gettext('One is connected.')} {said}", advice)
    return Check("scheduler", title, Level.GOOD, f"{gettext('One takes launches.')} {said}")


def _unknown_hosts(name: str, title: str) -> Check:
    return Check(name, title, Level.UNKNOWN, gettext("Nobody can tell while the ledger can't be read."))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" (+{more})" if more > 0 else "")


def _hosts(hosts: Sequence[HostView] | None) -> Check:
    title = gettext("Hosts")
    if hosts is None:
        return _unknown_hosts("hosts", title)
    if not hosts:
        sentence = gettext("No host has reported yet: nothing can be launched.")
        return Check("hosts", title, Level.BAD, sentence, gettext("Enrol one: deskfleet host enroll."))
    silent = [host.name for host in hosts if host.report is None and not host.dead]
    answer = sum(1 for host in hosts if host.report is not None)
    said = ngettext("%(num)s host answers.", "%(num)s hosts answer.", answer)
    if not silent:
        return Check("hosts", title, Level.GOOD if answer else Level.BAD, said)
    sentence = f"{said} {gettext('Silent: %(hosts)s.', hosts=_some(silent))}"
    advice = gettext("Look at their agents, the network and the broker; one that is gone for good is declared dead.")
    return Check("hosts", title, Level.WARN if answer else Level.BAD, sentence, advice)


def _versions(hosts: Sequence[HostView] | None) -> Check:
    title, ours = gettext("Versions"), version("deskfleet")
    if hosts is None:
        return _unknown_hosts("versions", title)
    other = [f"{host.name} {host.report.version}" for host in hosts if host.report and host.report.version != ours]
    if not other:
        return Check("versions", title, Level.GOOD, gettext("Every host that answers runs %(version)s.", version=ours))
    sentence = gettext("This portal runs %(version)s; others: %(hosts)s.", version=ours, hosts=_some(other))
    return Check("versions", title, Level.WARN, sentence, gettext("Upgrade what is older; guests run on meanwhile."))


def _proxies(parts: Services) -> Check:
    title = gettext("Proxies")
    try:
        parts.grants.proxies().result(_PATIENCE_S)
    except Unroutable:
        sentence = gettext("None is connected: no desktop can be opened.")
        return Check("proxies", title, Level.BAD, sentence, gettext("Start deskfleet-proxy, or look into its log."))
    except (BusError, FutureTimeout):
        return Check("proxies", title, Level.UNKNOWN, gettext("Nobody can tell while the broker does not answer."))
    return Check("proxies", title, Level.GOOD, gettext("At least one listens."))


def _letters(parts: Services) -> Check:
    title = gettext("Dead letters")
    try:
        count = parts.letters.count()
    except DBAPIError:
        sentence = gettext("Nobody can tell while the portal's database does not answer.")
        return Check("dead_letters", title, Level.UNKNOWN, sentence)
    if not count:
        return Check("dead_letters", title, Level.GOOD, gettext("There is none."))
    sentence = ngettext("%(num)s message was taken by nobody.", "%(num)s messages were taken by nobody.", count)
    advice = gettext("Look at them on the page Queues; send them again or discard them.")
    return Check("dead_letters", title, Level.WARN, sentence, advice)


def _mail(parts: Services) -> Iterator[Check]:
    if parts.notices is None:
        return
    title = gettext("Mail")
    try:
        failed, tried = parts.notices.undelivered(_LATELY_S)
    except DBAPIError:
        sentence = gettext("Nobody can tell while the portal's database does not answer.")
        yield Check("mail", title, Level.UNKNOWN, sentence)
        return
    if not failed and not tried:
        yield Check("mail", title, Level.GOOD, gettext("No mail failed in the last 24 hours."))
        return
    sentence = gettext(
        "Mails given up in the last 24 hours: %(failed)s; to be tried again: %(tried)s.", failed=failed, tried=tried
    )
    advice = gettext("Look at the mail server and at [portal.mail]; see the portal's log.")
    yield Check("mail", title, Level.WARN, sentence, advice)


def _sign_in(parts: Services) -> Iterator[Check]:
    last = parts.answers.last()
    for method in parts.settings.auth:
        name, title = f"sign_in.{method}", gettext("Log in by %(method)s", method=method)
        result, age_s = last.get(method, ("", _NEWS_S))
        if age_s >= _NEWS_S:
            yield Check(name, title, Level.UNKNOWN, gettext("Nobody has logged in so in the last minutes."))
        elif result == "unavailable":
            sentence = gettext("It could not be asked %(ago)s.", ago=words.ago(0, age_s))
            advice = gettext("Look at that server and the network; the portal's log says what it answered.")
            yield Check(name, title, Level.BAD, sentence, advice)
        else:
            yield Check(name, title, Level.GOOD, gettext("It answered %(ago)s.", ago=words.ago(0, age_s)))
