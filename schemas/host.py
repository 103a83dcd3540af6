"""What a host says about itself, and what the ledger knows about it.

A report is a claim by a half-trusted machine. Its shape and ranges are checked where it is decoded (messages.py);
whether its figures make sense together is `implausible`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from enum import StrEnum

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.session import Birth, Outcome
from deskfleet.schemas.template import TemplateReport

HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Phase(StrEnum):
    """Where a guest is, as its agent sees it."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: every function of its IOMMU group, named by the first PCI address that is a display controller.

    `offered` is true only when the whole group is bound to vfio-pci; `problem` says why not.
    """

    address: str
    model: str
    group: int
    functions: tuple[str, ...]
    offered: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class GuestReport:
    """One guest as its host sees it; `ran` is true once its display answered, and `birth` says how it came to be then.
    `left_s` is how many seconds of its `lifetime_s` are left while it runs. Ended guests stay listed for a while."""

    sid: str
    generation: int
    phase: Phase
    ran: bool = False
    viewers: int = 0
    outcome: Outcome | None = None
    reason: Reason | None = None
    detail: str = ""
    left_s: float | None = None
    lifetime_s: int | None = None
    birth: Birth | None = None


class FetchState(StrEnum):
    """How far a host is with an image that it does not hold yet."""

    WAITING = "waiting"
    FETCHING = "fetching"
    FAILED = "failed"


class FetchFault(StrEnum):
    """Why an image could not be fetched."""

    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    REDIRECT = "redirect"
    INCOMPLETE = "incomplete"
    STALLED = "stalled"
    WRONG_DIGEST = "wrong_digest"
    NO_SPACE = "no_space"
    UNWRITABLE = "unwritable"
    IMAGE_BAD = "image_bad"


@dataclass(frozen=True, slots=True)
class Fetch:
    """An image that a host is to fetch: how much of its `mib` (0: not known yet) is there, in steps of `STEP` percent,
    so that the inventory does not change with every heartbeat. A failed one is tried again; `detail` says when."""

    sha256: str
    state: FetchState
    percent: int = 0
    mib: int = 0
    fault: FetchFault | None = None
    detail: str = ""


#: The grain of `Fetch.percent`, and how many fetches stand in one report.
STEP = 5
MOST_FETCHES = 100


@dataclass(frozen=True, slots=True)
class HostReport:
    """A full heartbeat: the whole truth about one host. Sent when its inventory changed, when the scheduler asks, at
    each connect and now and then; in between a `HostBeat` is enough.

    `incarnation` names one life of the agent process and `seq` counts its heartbeats. `last_generation` is the
    highest command number the agent has processed: a guest with a generation up to it that is not listed does not
    exist. `fenced` says that the agent lost its journal and starts nothing until it is told where the numbers are.
    `digest` names the inventory: whatever is in here but not in a beat. Units: MiB; `load1` is the one-minute load
    average. `fetches` is None where no source of images is set; `catalogue` names the list of images (see HostImages)
    that the host was told last. `templates` is None where no desktops are kept ready; `blueprints` names the list of
    templates (see HostTemplates) that the host was told last.
    """

    host: str
    incarnation: str
    seq: int
    boot_id: str
    last_generation: int
    fenced: bool
    console: str
    accel: str
    cpus: int
    memory_mib: int
    load1: float
    memory_free_mib: int
    disk_mib: int
    disk_free_mib: int
    images: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    guests: tuple[GuestReport, ...] = ()
    problems: tuple[str, ...] = ()
    version: str = ""
    digest: str = ""
    catalogue: str = ""
    fetches: tuple[Fetch, ...] | None = None
    templates: tuple[TemplateReport, ...] | None = None
    blueprints: str = ""


@dataclass(frozen=True, slots=True)
class HostBeat:
    """A small heartbeat: what changes all the time. It stands for the last full report with the same `digest`; who
    does not hold that one asks for a full report. Units as in `HostReport`, with which it shares `seq`."""

    host: str
    incarnation: str
    seq: int
    last_generation: int
    fenced: bool
    console: str
    load1: float
    memory_free_mib: int
    disk_free_mib: int
    digest: str


_BEAT = tuple(field.name for field in fields(HostBeat))


def beat_of(report: HostReport) -> HostBeat:
    """The small heartbeat that may be sent instead of `report`."""
    return HostBeat(**{name: getattr(report, name) for name in _BEAT})


def inventory_digest(report: HostReport) -> str:
    """What names the inventory of a report: 16 hex digits over all that no beat tells. `left_s` is left out: it
    changes all the time, and the clock of whoever holds a report can count it down."""
    inventory = {field.name: getattr(report, field.name) for field in fields(report) if field.name not in _BEAT}
    text = json.dumps(inventory, default=_entry, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _entry(part: Gpu | GuestReport | Fetch | TemplateReport) -> dict[str, object]:
    return {field.name: getattr(part, field.name) for field in fields(part) if field.name != "left_s"}


@dataclass(frozen=True, slots=True)
class Host:
    """A host as the ledger knows it: its command number, what an administrator set, and its last report. `dead` was
    declared by an administrator, and holds until the host is back and clean."""

    name: str
    generation: int = 0
    draining: bool = False
    dead: bool = False
    message: str = ""
    seen_at: float = 0.0
    report: HostReport | None = None


def implausible(report: HostReport) -> str:
    """Why the figures of a report cannot be true together; empty when they can."""
    if report.cpus < 1 or report.memory_mib < 1:
        return "no CPU or no memory"
    if report.memory_free_mib > report.memory_mib * 1.01 + 64:
        return "more memory free than there is"
    if report.disk_free_mib > report.disk_mib:
        return "more disk free than there is"
    if sum(template.mib for template in report.templates or ()) > report.memory_mib:
        return "templates that take more memory than there is"
    sids = [guest.sid for guest in report.guests]
    if len(sids) != len(set(sids)):
        return "one guest listed twice"
    functions = [address for gpu in report.gpus for address in gpu.functions]
    if len(functions) != len(set(functions)):
        return "one PCI function in two GPUs"
    return ""
