"""From what a person filled in to a launch request, or to the reason why it can't be one. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from itsdangerous import BadSignature, URLSafeTimedSerializer

from deskfleet.portal import details
from deskfleet.portal.auth import Identity
from deskfleet.portal.email_codes import EmailCodes
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import gettext
from deskfleet.portal.settings import PortalSettings
from deskfleet.portal.words import duration
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Resources

#: How long a launch form stays good after it was shown.
FORM_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks for; None means the machine's or the site's default. MiB, GiB and seconds."""

    machine: str
    cpus: int | None = None
    memory_mib: int | None = None
    disk_gib: int | None = None
    gpus: int | None = None
    gpu_model: str = ""
    persistent: bool = False
    lifetime_s: int | None = None


class Seals:
    """Session ids for launch forms, signed for one person and one machine: the same form is the same request."""

    def __init__(self, key: str) -> None:
        self._serializer = URLSafeTimedSerializer(key, salt="deskfleet.launch.1")

    def mint(self, user: str, machine: str) -> str:
        """A new session id, sealed."""
        return str(self._serializer.dumps([secrets.token_hex(16), user, machine]))

    def open(self, seal: str, user: str, machine: str) -> str:
        """The session id inside. Raises Problem when the seal is forged, old, another person's or another machine's."""
        try:
            sid, for_user, for_machine = self._serializer.loads(seal, max_age=FORM_S)
        except (BadSignature, ValueError, TypeError):
            raise Problem(Refused.STALE_FORM) from None
        if (for_user, for_machine) != (user, machine):
            raise Problem(Refused.STALE_FORM)
        return str(sid)


def offered(machines: Mapping[str, Machine], who: Identity) -> list[Machine]:
    """The machines that somebody may start, by title."""
    allowed = (machine for machine in machines.values() if machine.allows(who.user, who.groups))
    return sorted(allowed, key=lambda machine: (machine.title.casefold(), machine.name))


def may_persist(who: Identity) -> bool:
    """Whether somebody's desktops may go on while they are away: not of who proved no more than that they read mail."""
    return who.method != EmailCodes.name


def lifetimes(settings: PortalSettings) -> list[int]:
    """The lifetimes that a form offers, in seconds."""
    usual = (1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600, 3 * 86_400, 7 * 86_400, 30 * 86_400)
    within = {seconds for seconds in usual if seconds <= settings.lifetime_max_s}
    return sorted(within | {settings.lifetime_default_s, settings.lifetime_max_s})


def prepare(
    sid: str, wish: Wish, who: Identity, machines: Mapping[str, Machine], settings: PortalSettings
) -> LaunchRequested:
    """The launch request that a wish amounts to.

    Raises:
        Problem: no such machine for this person, or a size or lifetime outside what is allowed, with every fault.
    """
    machine = machines.get(wish.machine)
    if machine is None or not machine.allows(who.user, who.groups):
        raise Problem(Refused.UNKNOWN_MACHINE)
    if wish.persistent and not may_persist(who):
        raise Problem(Refused.SINGLE_SHOT_ONLY)
    default = machine.defaults
    resources = Resources(
        cpus=default.cpus if wish.cpus is None else wish.cpus,
        memory_mib=default.memory_mib if wish.memory_mib is None else wish.memory_mib,
        disk_gib=default.disk_gib if wish.disk_gib is None else wish.disk_gib,
        gpus=default.gpus if wish.gpus is None else wish.gpus,
        gpu_model=wish.gpu_model,
    )
    lifetime_s = settings.lifetime_default_s if wish.lifetime_s is None else wish.lifetime_s
    wrong = [details.say(line) for line in machine.problems(resources)]
    if resources.gpu_model and not resources.gpus:
        wrong.append(gettext("GPUs: a model is named, but no GPU is asked for"))
    if not 60 <= lifetime_s <= settings.lifetime_max_s:
        longest = duration(settings.lifetime_max_s)
        wrong.append(gettext("lifetime: must lie between 1 min and %(longest)s", longest=longest))
    if wrong:
        raise Problem(Refused.BAD_RESOURCES, details=wrong)
    return LaunchRequested(
        sid=sid,
        user=who.user,
        groups=who.groups,
        machine=machine.name,
        resources=resources,
        persistent=wish.persistent,
        lifetime_s=lifetime_s,
        wait_s=settings.wait_s,
    )
