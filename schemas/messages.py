"""Messages between the services, one frozen dataclass each. How they stand on the wire: wire.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, HostBeat, HostReport
from deskfleet.schemas.machine import Drivers, Firmware, Format, Os, Video
from deskfleet.schemas.session import Outcome, Resources, State
from deskfleet.schemas.template import Blueprint, TemplateOrder
from deskfleet.schemas.verdict import Forecast

REPLICA = re.compile(r"[a-z0-9]{1,32}")
INVENTORY = re.compile(r"[0-9a-f]{16}")
PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%a-z]{2,64}\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class LaunchRequested:
    """A person wants a desktop. `sid` was minted in the form, so a repeat is the same request; `wait_s` is how long
    it may wait for a place, counted by the receiver."""

    sid: str
    user: str
    groups: tuple[str, ...]
    machine: str
    resources: Resources
    persistent: bool
    lifetime_s: int
    wait_s: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """`actor` wants a session ended; `admin` is the portal's word that the actor is an administrator."""

    sid: str
    actor: str
    admin: bool


@dataclass(frozen=True, slots=True)
class ExtendRequested:
    """`actor` wants a running session to last `lifetime_s` seconds in all, counted from when it began to run; `admin`
    is the portal's word. Less than it has already changes nothing."""

    sid: str
    actor: str
    admin: bool
    lifetime_s: int


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An administrator takes a host out of placement, or puts it back; `text` is for the people who use it."""

    host: str
    draining: bool
    actor: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class HostDeclaredDead:
    """An administrator vouches that a host does not run: its sessions are lost, its command numbers void."""

    host: str
    actor: str


@dataclass(frozen=True, slots=True)
class PlacementAsked:
    """What would become of this request, if it were made now? Answered to `replica` under the same `question`."""

    question: str
    replica: str
    user: str
    groups: tuple[str, ...]
    machine: str
    resources: Resources
    lifetime_s: int


@dataclass(frozen=True, slots=True)
class PlacementAnswered:
    """The scheduler's answer to a `PlacementAsked`. It promises nothing: no place is kept."""

    question: str
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class VmStart:
    """Start this guest. Complete: the agent looks up nothing but the image file with that digest, and the template with
    that key ("": boot it), which it may do without. Seconds and MiB."""

    sid: str
    generation: int
    user: str
    machine: str
    os: Os
    sha256: str
    format: Format
    video: Video
    firmware: Firmware
    resources: Resources
    gpu_addresses: tuple[str, ...]
    persistent: bool
    lifetime_s: int
    grace_s: int
    connect_s: int
    idle_s: int = 0
    drivers: Drivers = Drivers.VIRTIO
    template: str = ""


@dataclass(frozen=True, slots=True)
class VmStop:
    """End this guest, and never start it under this generation or a lower one. Idempotent."""

    sid: str
    generation: int
    outcome: Outcome
    reason: Reason


@dataclass(frozen=True, slots=True)
class VmExtend:
    """This guest may run for `lifetime_s` seconds in all. Idempotent; never makes it shorter."""

    sid: str
    generation: int
    lifetime_s: int


@dataclass(frozen=True, slots=True)
class HostFence:
    """Where the numbers are: an agent that lost its journal starts nothing up to `generation`."""

    host: str
    generation: int


@dataclass(frozen=True, slots=True)
class HostInventory:
    """Send a full heartbeat: the scheduler does not hold the inventory that a small one refers to."""

    host: str


@dataclass(frozen=True, slots=True)
class VmLook:
    """A portal process, `replica`, wants to see this guest's screen. Worth nothing a moment later."""

    sid: str
    replica: str


@dataclass(frozen=True, slots=True)
class VmPicture:
    """A small picture (PNG) of a guest's screen: the answer to a `VmLook`, or, if `last`, the last one that was taken
    of a guest which ended without having been told to."""

    host: str
    sid: str
    png: bytes
    last: bool


@dataclass(frozen=True, slots=True)
class CatalogueImage:
    """An image that the catalogue names. `file` is its name at the source, never a path here."""

    sha256: str
    file: str
    format: Format


@dataclass(frozen=True, slots=True)
class HostImages:
    """Every image that the catalogue names, and the digests of those which this host shall fetch now. `digest` names
    the list of images; the host repeats it in its reports. Idempotent: what it says replaces what was said before."""

    host: str
    digest: str
    images: tuple[CatalogueImage, ...]
    wanted: tuple[str, ...]


#: A message of this many images is still below wire.MAX_BODY.
MOST_IMAGES = 3000


@dataclass(frozen=True, slots=True)
class HostTemplates:
    """The templates that this host shall keep ready; others go. `digest` names the list; the host repeats it in its
    reports. Idempotent."""

    host: str
    digest: str
    blueprints: tuple[Blueprint, ...]


@dataclass(frozen=True, slots=True)
class TemplateOrdered:
    """An administrator wants the template with this key of a host made anew, or gone. The portal tells the scheduler,
    and that the host. A dropped one stays away until it is ordered again."""

    host: str
    key: str
    order: TemplateOrder
    actor: str


@dataclass(frozen=True, slots=True)
class VmReport:
    """One guest changed; the same entry also stands in the next heartbeat."""

    host: str
    guest: GuestReport


@dataclass(frozen=True, slots=True)
class GrantRevoked:
    """A login has ended, or a share was taken back: consoles that were opened by it are cut. Idempotent."""

    grant: str


@dataclass(frozen=True, slots=True)
class ConsolesAsked:
    """A portal process, `replica`, wants to know who has this desktop open. Each proxy answers for itself."""

    sid: str
    replica: str


@dataclass(frozen=True, slots=True)
class Console:
    """One open console: whose, by which grant, and for how many seconds."""

    user: str
    grant: str
    open_s: float


@dataclass(frozen=True, slots=True)
class ConsolesListed:
    """The consoles of a desktop that are open at one proxy process."""

    proxy: str
    sid: str
    consoles: tuple[Console, ...]


@dataclass(frozen=True, slots=True)
class SessionChanged:
    """The scheduler's announcement: a session is in a new state. Proxies cut consoles on it."""

    sid: str
    state: State
    outcome: Outcome | None
    host: str
    generation: int


Message = (
    LaunchRequested
    | StopRequested
    | ExtendRequested
    | DrainRequested
    | HostDeclaredDead
    | PlacementAsked
    | PlacementAnswered
    | VmStart
    | VmStop
    | VmExtend
    | HostFence
    | HostInventory
    | VmLook
    | VmPicture
    | HostImages
    | HostTemplates
    | TemplateOrdered
    | VmReport
    | HostReport
    | HostBeat
    | SessionChanged
    | GrantRevoked
    | ConsolesAsked
    | ConsolesListed
)
