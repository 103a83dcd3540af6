"""Typed errors and the reasons that reach people.

A `Reason` is the machine-readable half of every refusal; `SENTENCES` holds the half that a person reads.
"""

from __future__ import annotations

from enum import StrEnum


class DeskfleetError(Exception):
    """Base of every error that Deskfleet raises on purpose."""


class DecodeError(DeskfleetError):
    """Raised when a message body is not what its type promises; the bytes are kept for the dead-letter queue."""

    def __init__(self, kind: str, body: bytes, problem: str) -> None:
        super().__init__(f"{kind or 'untyped message'}: {problem}")
        self.kind = kind
        self.body = body
        self.problem = problem


class IllegalTransition(DeskfleetError):
    """Raised when an event does not apply to the state that a session is in; nothing has changed."""


class MachineError(DeskfleetError):
    """Raised when a catalogue entry is not valid; `problems` lists everything that is wrong with it."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__(f"machine {name!r}: " + "; ".join(problems))
        self.name = name
        self.problems = problems


class TicketError(DeskfleetError):
    """Raised when a console ticket is forged, expired, or not for this purpose."""


class Reason(StrEnum):
    """Why something was refused or ended; stored, sent and counted under these names."""

    # a request that can never be served as written
    UNKNOWN_MACHINE = "unknown_machine"
    NOT_ALLOWED = "not_allowed"
    BAD_RESOURCES = "bad_resources"
    NEVER_FITS = "never_fits"
    # a host that cannot take a request now
    SILENT = "silent"
    DRAINING = "draining"
    NOT_TRUSTED = "not_trusted"
    NO_IMAGE = "no_image"
    IMAGE_FETCHING = "image_fetching"
    IMAGE_FETCHABLE = "image_fetchable"
    SESSIONS_FULL = "sessions_full"
    CPUS_SHORT = "cpus_short"
    MEMORY_SHORT = "memory_short"
    DISK_SHORT = "disk_short"
    LOAD_HIGH = "load_high"
    GPU_NONE = "gpu_none"
    GPU_BUSY = "gpu_busy"
    RESTING = "resting"
    DECLARED_DEAD = "declared_dead"
    LABEL_MISSING = "label_missing"
    WRONG_POOL = "wrong_pool"
    RESERVED = "reserved"
    USER_CAP = "user_cap"
    GROUP_CAP = "group_cap"
    NO_HOSTS = "no_hosts"
    # a launch that failed on its host
    STALE = "stale"
    FENCED = "fenced"
    IMAGE_MISSING = "image_missing"
    IMAGE_BAD = "image_bad"
    NO_SPACE = "no_space"
    GPU_UNAVAILABLE = "gpu_unavailable"
    QEMU_EXITED = "qemu_exited"
    START_TIMEOUT = "start_timeout"
    NETWORK_FAILED = "network_failed"
    VOLUME_UNAVAILABLE = "volume_unavailable"
    SPAWN_FAILED = "spawn_failed"
    STATE_UNWRITABLE = "state_unwritable"
    AGENT_RESTARTED = "agent_restarted"
    HOST_REBOOTED = "host_rebooted"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    # an ordinary end
    STOPPED_BY_USER = "stopped_by_user"
    STOPPED_BY_ADMIN = "stopped_by_admin"
    GUEST_OFF = "guest_off"
    DISCONNECTED = "disconnected"
    NEVER_CONNECTED = "never_connected"
    EXPIRED = "expired"
    IDLE = "idle"
    WAITED_TOO_LONG = "waited_too_long"
    HOST_DEAD = "host_dead"
    ORPHAN = "orphan"
    ABSENT = "absent"


SENTENCES: dict[Reason, str] = {
    Reason.UNKNOWN_MACHINE: "This machine is not in the catalogue. Pick one from the launch page.",
    Reason.NOT_ALLOWED: "Your account may not use this machine. Ask an administrator for access.",
    Reason.BAD_RESOURCES: "The size asked for is outside what this machine allows. Choose another size.",
    Reason.NEVER_FITS: "No host could ever give this size. Choose a smaller one.",
    Reason.SILENT: "The host has not reported for a while; it gets no new desktops until it does.",
    Reason.DRAINING: "The host is being drained for maintenance and takes no new desktops.",
    Reason.NOT_TRUSTED: "The host reported figures that cannot be true and is left out until it is mended.",
    Reason.NO_IMAGE: "The host does not hold this machine's image.",
    Reason.IMAGE_FETCHING: "The host is fetching this machine's image.",
    Reason.IMAGE_FETCHABLE: "The host does not hold this machine's image, but can fetch it.",
    Reason.SESSIONS_FULL: "The host runs as many desktops as it is allowed to.",
    Reason.CPUS_SHORT: "The host has too few free CPUs.",
    Reason.MEMORY_SHORT: "The host has too little free memory.",
    Reason.DISK_SHORT: "The host has too little free disk space.",
    Reason.LOAD_HIGH: "The host is too busy at the moment.",
    Reason.GPU_NONE: "The host has no GPU of the kind asked for.",
    Reason.GPU_BUSY: "All matching GPUs of the host are in use.",
    Reason.RESTING: "The host failed several launches in a row and rests before the next try.",
    Reason.DECLARED_DEAD: "The host was declared dead; it is used again once it is back and has stopped what was lost.",
    Reason.LABEL_MISSING: "The host lacks a label that this machine requires.",
    Reason.WRONG_POOL: "The host belongs to a pool that your group does not use.",
    Reason.RESERVED: "The free room on this host is kept for an earlier request that needs more of it.",
    Reason.USER_CAP: "You have as much in use as one person may. It starts when one of your desktops ends.",
    Reason.GROUP_CAP: "Your group has as much in use as it may. It starts when one of the group's desktops ends.",
    Reason.NO_HOSTS: "No host is connected. Ask an administrator to check the agents.",
    Reason.STALE: "The command reached the host too late and was not carried out; it is sent again.",
    Reason.FENCED: "The host lost its records and waits for the scheduler before it starts anything.",
    Reason.IMAGE_MISSING: "The machine's image is missing on the host. Ask an administrator to install it.",
    Reason.IMAGE_BAD: "The machine's image on the host is damaged or not safe to use.",
    Reason.NO_SPACE: "The host has no disk space left for this desktop.",
    Reason.GPU_UNAVAILABLE: "The GPU could not be given to the desktop.",
    Reason.QEMU_EXITED: "The virtual machine ended while it was starting.",
    Reason.START_TIMEOUT: "The virtual machine did not show a display in time.",
    Reason.NETWORK_FAILED: "The desktop's network could not be set up.",
    Reason.VOLUME_UNAVAILABLE: "A folder that the desktop needs can't be reached on the host. Ask an administrator.",
    Reason.SPAWN_FAILED: "The host could not start the virtual machine's programs.",
    Reason.STATE_UNWRITABLE: "The host cannot write its records, so it starts nothing.",
    Reason.AGENT_RESTARTED: "The host's agent restarted before the desktop was up.",
    Reason.HOST_REBOOTED: "The host restarted, and everything that ran on it ended.",
    Reason.TOO_MANY_ATTEMPTS: "The desktop failed to start on every host that was tried.",
    Reason.STOPPED_BY_USER: "Stopped by its owner.",
    Reason.STOPPED_BY_ADMIN: "Stopped by an administrator.",
    Reason.GUEST_OFF: "The desktop was shut down from inside.",
    Reason.DISCONNECTED: "Nobody was connected any more to this single-shot desktop.",
    Reason.NEVER_CONNECTED: "Nobody connected to the desktop in time.",
    Reason.EXPIRED: "The desktop reached the end of its lifetime.",
    Reason.IDLE: "Nobody was connected and nothing was being computed for a long time.",
    Reason.WAITED_TOO_LONG: "The desktop could not be placed within the time allowed for waiting.",
    Reason.HOST_DEAD: "The host was declared dead by an administrator, and this desktop was lost with it.",
    Reason.ORPHAN: "The host ran a desktop that no record knows; it was stopped.",
    Reason.ABSENT: "The host no longer runs this desktop.",
}
