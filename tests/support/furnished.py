"""A portal's world with something of everything in it, and the pages that show it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from support.portals import PASSWORD, World

from deskfleet.ledger.reader import Wait
from deskfleet.portal.auth import Identity
from deskfleet.portal.scopes import Scope
from deskfleet.portal.shares import Audience
from deskfleet.runtime.bus import Outgoing
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Event, Outcome, Resources, State, advance
from deskfleet.schemas.topology import DEAD
from deskfleet.schemas.verdict import Verdict
from deskfleet.schemas.wire import encode

RUNNING, QUEUED, FAILED, OTHERS, LOST = "a" * 32, "b" * 32, "c" * 32, "d" * 32, "e" * 32
PERSON, OTHER_PERSON, ADMIN = "ada@example.org", "grace@example.org", "boss"
_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A page: its name, its address, and who looks at it (empty: nobody who is logged in)."""

    name: str
    path: str
    user: str = PERSON


_PAGES = (
    Shown("login", "/login", ""),
    Shown("terms", "/terms", ""),
    Shown("launch", "/launch"),
    Shown("machine", "/launch/desktop"),
    Shown("desktops", "/desktops"),
    Shown("progress", f"/progress/{QUEUED}"),
    Shown("failed", f"/progress/{FAILED}"),
    Shown("desktop", f"/desktop/{RUNNING}"),
    Shown("share", f"/desktops/{RUNNING}/share"),
    Shown("tokens", "/tokens/"),
    Shown("error", "/nowhere"),
    Shown("admin", "/admin/", ADMIN),
    Shown("sessions", "/admin/sessions", ADMIN),
    Shown("people", "/admin/people", ADMIN),
    Shown("machines", "/admin/machines", ADMIN),
    Shown("queues", "/admin/queues/", ADMIN),
    Shown("health", "/admin/health", ADMIN),
    Shown("host", "/admin/hosts/h2", ADMIN),
    Shown("audit", "/admin/audit", ADMIN),
)


def furnish(world: World) -> tuple[Shown, ...]:
    """People, machines, hosts good and bad, and desktops in several states; returns every page that there is."""
    world.portal.accounts.add(PERSON, PASSWORD)
    world.portal.accounts.add(OTHER_PERSON, PASSWORD)
    world.portal.accounts.add(ADMIN, PASSWORD, admin=True)
    world.machine("workstation", "Graphics workstation", gpu="optional")
    world.machine("classroom", "Classroom")
    for minute in range(90):
        world.clock.now += _MINUTE
        if not 30 < minute < 40:  # it was restarted
            busy = 2.0 + math.sin(minute / 9)
            world.host(
                "h2", load1=busy, memory_free_mib=int(24_000 - 5_000 * busy), disk_free_mib=400_000 - 500 * minute
            )
            world.portal.sample()
    world.host("h1", load1=2.4)
    card = Gpu("0000:41:00.0", "A4000", 2, ("0000:41:00.0",), False, "no way to reset it")
    world.host("h2", load1=0.3, gpus=(card,), problems=("guests are not fully limited: no cpu controller",))
    world.host("h3", seen_ago=900)
    with world.writer.begin() as tx:
        tx.drain("h2", True, "Shuts down on Friday at 18:00; save your work.")
    now = world.clock.wall()
    world.session(RUNNING, PERSON, State.RUNNING, created_at=now - 50 * _MINUTE, changed_at=now, persistent=True)
    big = Resources(8, 8192, 64, 1, "A4000")
    world.session(QUEUED, PERSON, State.QUEUED, machine="workstation", resources=big, created_at=now - 4 * _MINUTE)
    verdicts = (
        Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 31.0 GiB memory free, 8.1 wanted"),
        Verdict("h2", Reason.DRAINING),
        Verdict("h3", Reason.SILENT, "not heard for 900 s"),
    )
    with world.writer.begin() as tx:
        tx.explain([(QUEUED, Wait(2, 1080.0, verdicts), 240.0)])
    failed = world.session(FAILED, PERSON, State.STARTING, machine="classroom", created_at=now - 200 * _MINUTE)
    with world.writer.begin() as tx:
        after = advance(failed, Event.GONE, outcome=Outcome.FAILED, reason=Reason.QEMU_EXITED)
        tx.save(failed, after, Event.GONE)
    world.session(OTHERS, OTHER_PERSON, State.RUNNING, created_at=now - 20 * _MINUTE)
    link, _ = world.portal.shares.make(RUNNING, PERSON, Audience.SIGNED_IN, 3600, "open sesame")
    for label, scope in (("Nightly run", Scope.DESKTOPS), ("What is there", Scope.DESKTOPS_READ)):
        world.portal.logins.make_token(Identity(PERSON, "local"), label, 30 * 24 * 3600, [scope])
    world.portal.audit.note(ADMIN, "192.0.2.7", "drain", "h2", "Shuts down on Friday at 18:00; save your work.")
    world.portal.audit.note(PERSON, "192.0.2.31", "launch", RUNNING, "desktop")
    kind, body = encode(LaunchRequested(LOST, PERSON, (), "desktop", Resources(2, 1024, 4), False, 3600, 600))
    world.bus.publish(Outgoing(DEAD, "", kind, body)).result(0)
    world.broker.deliver_one(DEAD)
    (letter,) = world.portal.letters.newest()
    return (
        *_PAGES,
        Shown("guest", f"/shared?link={link}", OTHER_PERSON),
        Shown("letter", f"/admin/queues/dead/{letter.name}", ADMIN),
    )
