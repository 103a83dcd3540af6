"""Why a host can't take a session now. Pure.

Fit counts what the ledger has promised to each host. What hosts report (load, memory, disk) lags behind a burst, so
it only serves as a ceiling: placing by it would send everybody to one host.

A filter is a function that names its reason, or None. The words for a reason are made only when somebody reads them:
a decision may look at thousands of hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deskfleet.scheduler.hosts import HostState
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import FetchState, Gpu
from deskfleet.schemas.session import Resources
from deskfleet.schemas.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be placed: a size, the digest of its image, the labels that the machine requires, the pools that are
    for its user (`admitted`) and those outside which the user gets nothing (`confined`), and for how many seconds it
    may run. On the hosts in `avoid` this very session failed to start before. Where its `template` is, it is ready at
    once."""

    sid: str
    resources: Resources
    sha256: str
    lifetime_s: float = 0.0
    labels: frozenset[str] = frozenset()
    admitted: frozenset[str] = frozenset()
    confined: frozenset[str] | None = None
    avoid: frozenset[str] = frozenset()
    template: str = ""

    @property
    def shape(self) -> tuple[object, ...]:
        """Whatever filters look at but time: beside room that is kept, two wants of one shape get the same answer."""
        return self.resources, self.sha256, self.labels, self.admitted, self.confined


@dataclass(slots=True)
class Reservation:
    """The room that is kept on a host for the session `sid`, which is expected to start there at `at` (monotonic
    seconds). What is left beside it then is the slack, which sessions that run longer may still use."""

    sid: str
    host: str
    at: float
    sessions: int
    cpus: float
    memory_mib: float
    gpu: frozenset[str] = frozenset()
    for_gpu: bool = False

    def needed_after(self, want: Want, now: float) -> bool:
        """Whether the room is not needed before `want`, started now, would end."""
        return now + want.lifetime_s <= self.at

    def spares(self, want: Want, now: float, overhead_mib: int) -> bool:
        """Whether `want` may start on this host now without delaying who the room is kept for."""
        if want.sid == self.sid or self.needed_after(want, now):
            return True
        # A request that waits for a GPU holds up other requests for GPUs only.
        if self.for_gpu and not want.resources.gpus:
            return True
        return (
            self.sessions >= 1
            and want.resources.cpus <= self.cpus
            and want.resources.memory_mib + overhead_mib <= self.memory_mib
        )

    def spend(self, want: Want, now: float, overhead_mib: int) -> None:
        """`want` was placed beside it."""
        if want.sid != self.sid and not self.needed_after(want, now):
            self.sessions -= 1
            self.cpus -= want.resources.cpus
            self.memory_mib -= want.resources.memory_mib + overhead_mib


@dataclass(frozen=True, slots=True)
class Moment:
    """When and by which rules is decided; reservations by host."""

    now: float
    policy: Policy
    reservations: Mapping[str, tuple[Reservation, ...]] = field(default_factory=dict)

    def shape(self, want: Want) -> tuple[object, ...]:
        """Two wants of one shape get the same answer now, unless room is kept for one of them. Of a lifetime counts
        only whether it ends before room is needed: a queue of many lifetimes is one of few shapes."""
        kept = (entry for entries in self.reservations.values() for entry in entries)
        return want.shape, tuple(entry.needed_after(want, self.now) for entry in kept)


Filter = Callable[[Want, HostState, Moment], Reason | None]


def _alive(_want: Want, host: HostState, at: Moment) -> Reason | None:
    if host.dead:
        return Reason.DECLARED_DEAD
    if host.report is None or not host.is_fresh(at.now, at.policy.fresh_s):
        return Reason.SILENT
    if host.distrust or host.report.accel == "none":
        return Reason.NOT_TRUSTED
    return Reason.FENCED if host.report.fenced else None


def _open(_want: Want, host: HostState, _at: Moment) -> Reason | None:
    return Reason.DRAINING if host.draining else None


def _label(want: Want, host: HostState, _at: Moment | None = None) -> Reason | None:
    return None if want.labels <= host.labels else Reason.LABEL_MISSING


def _pool(want: Want, host: HostState, _at: Moment | None = None) -> Reason | None:
    if want.confined is not None and not want.confined & host.pools:
        return Reason.WRONG_POOL
    if host.exclusive and not want.admitted & host.exclusive:
        return Reason.WRONG_POOL
    return None


def _image(want: Want, host: HostState, _at: Moment) -> Reason | None:
    if want.sha256 in host.images:
        return None
    if host.fetches is None:
        return Reason.NO_IMAGE
    fetch = host.fetches.get(want.sha256)
    if fetch is None:
        return Reason.IMAGE_FETCHABLE
    return Reason.NO_IMAGE if fetch.state is FetchState.FAILED else Reason.IMAGE_FETCHING


def _resting(want: Want, host: HostState, at: Moment) -> Reason | None:
    if host.resting and host.resting.left_s(want.sha256, at.now) is not None:
        return Reason.RESTING
    return None


def _sessions(_want: Want, host: HostState, at: Moment) -> Reason | None:
    return None if host.usage.sessions < at.policy.max_sessions else Reason.SESSIONS_FULL


def _cpus(want: Want, host: HostState, _at: Moment) -> Reason | None:
    return None if host.usage.cpus + want.resources.cpus <= host.cpus_offered else Reason.CPUS_SHORT


def _memory(want: Want, host: HostState, at: Moment) -> Reason | None:
    needed = want.resources.memory_mib + at.policy.guest_overhead_mib
    if host.usage.memory_mib + needed > host.memory_offered:
        return Reason.MEMORY_SHORT
    assert host.report  # _alive has seen it
    return Reason.MEMORY_SHORT if needed > host.report.memory_free_mib else None


def memory_beside_templates(want: Want, host: HostState, at: Moment) -> bool:
    """Whether a host that has too little memory would have enough without its templates."""
    needed = want.resources.memory_mib + at.policy.guest_overhead_mib
    more = host.templates_mib * at.policy.memory_overcommit
    return host.usage.memory_mib + needed <= host.memory_offered + more


def _disk(want: Want, host: HostState, at: Moment) -> Reason | None:
    assert host.report
    free = host.report.disk_free_mib - at.policy.disk_reserve_mib
    return None if want.resources.disk_gib * 1024 <= free else Reason.DISK_SHORT


def _load(_want: Want, host: HostState, at: Moment) -> Reason | None:
    assert host.report
    return None if host.report.load1 <= at.policy.max_load * host.report.cpus else Reason.LOAD_HIGH


def _gpu(want: Want, host: HostState, at: Moment) -> Reason | None:
    if not want.resources.gpus or free_gpu(want, host, at):
        return None
    return Reason.GPU_BUSY if matching_gpus(want, host) else Reason.GPU_NONE


def _reserved(want: Want, host: HostState, at: Moment) -> Reason | None:
    for kept in at.reservations.get(host.name, ()):
        if not kept.spares(want, at.now, at.policy.guest_overhead_mib):
            return Reason.RESERVED
    return None


#: In this order: what an administrator decided first, then what the host lacks for good, then what is short now.
FILTERS: tuple[Filter, ...] = (
    _alive, _open, _label, _pool, _image, _resting, _sessions, _cpus, _memory, _disk, _load, _gpu, _reserved,
)  # fmt: skip


def kept_out(want: Want, host: HostState) -> Reason | None:
    """Why an administrator has settled that a host is not for a session, whatever room it has; None when it is."""
    return _label(want, host) or _pool(want, host)


def matching_gpus(want: Want, host: HostState) -> list[Gpu]:
    """The offered GPUs of the wanted model; an empty model means any."""
    return [gpu for gpu in host.gpus if want.resources.gpu_model in ("", gpu.model)]


def free_gpu(want: Want, host: HostState, at: Moment) -> Gpu | None:
    """The first matching GPU of which no function is held, nor kept for somebody whom `want` would delay."""
    kept: frozenset[str] = frozenset()
    for reservation in at.reservations.get(host.name, ()):
        if reservation.sid != want.sid and not reservation.needed_after(want, at.now):
            kept |= reservation.gpu
    for gpu in matching_gpus(want, host):
        if not (host.gpus_held | kept).intersection(gpu.functions):
            return gpu
    return None


def objection(want: Want, host: HostState, at: Moment) -> Reason | None:
    """Why `host` can't take it now, or None when it can. The first filter that objects speaks."""
    for check in FILTERS:
        reason = check(want, host, at)
        if reason:
            return reason
    return None


def beside_image(want: Want, host: HostState, at: Moment) -> Reason | None:
    """The same, as if the host held the image."""
    for check in FILTERS:
        reason = None if check is _image else check(want, host, at)
        if reason:
            return reason
    return None


def _gib(mib: float) -> str:
    return f"{max(0.0, mib) / 1024:.1f}"


def _say_untrusted(_want: Want, host: HostState, _at: Moment) -> str:
    if host.distrust:
        return f"its report can't be true: {host.distrust}"
    return "no way to run guests: " + "; ".join(host.report.problems if host.report else ())


def _say_silent(_want: Want, host: HostState, at: Moment) -> str:
    return "has not reported yet" if host.heard is None else f"not heard for {at.now - host.heard:.0f} s"


def _say_label(want: Want, host: HostState, _at: Moment) -> str:
    return f"lacks the label {', '.join(sorted(want.labels - host.labels))}"


def _say_pool(want: Want, host: HostState, _at: Moment) -> str:
    if host.exclusive and not want.admitted & host.exclusive:
        return f"is only for the pool {', '.join(sorted(host.exclusive))}"
    return f"is not in the pool {', '.join(sorted(want.confined or ()))}"


def _say_no_image(want: Want, host: HostState, _at: Moment) -> str:
    failed = (host.fetches or {}).get(want.sha256)
    return f"could not fetch this image: {failed.detail}" if failed else "does not hold this image"


def _say_fetching(want: Want, host: HostState, _at: Moment) -> str:
    fetch = (host.fetches or {})[want.sha256]
    return f"fetching the image, {fetch.percent} %" if fetch.state is FetchState.FETCHING else "fetches the image next"


def _say_resting(want: Want, host: HostState, at: Moment) -> str:
    left = host.resting.left_s(want.sha256, at.now) or 0.0
    if not left:
        return "another launch tries it first, after it failed several times"
    return f"rests for another {max(1, round(left / 60))} min after it failed several launches"


def _say_sessions(_want: Want, host: HostState, at: Moment) -> str:
    return f"runs {host.usage.sessions} of {at.policy.max_sessions} desktops"


def _say_cpus(want: Want, host: HostState, _at: Moment) -> str:
    free = max(0.0, host.cpus_offered - host.usage.cpus)
    return f"{free:g} of {host.cpus_offered:g} CPUs free, {want.resources.cpus} wanted"


def _say_memory(want: Want, host: HostState, at: Moment) -> str:
    needed = want.resources.memory_mib + at.policy.guest_overhead_mib
    free = host.memory_offered - host.usage.memory_mib
    if needed > free or host.report is None:
        return f"{_gib(free)} of {_gib(host.memory_offered)} GiB memory free, {_gib(needed)} wanted"
    return f"only {_gib(host.report.memory_free_mib)} GiB of memory is really free on it, {_gib(needed)} wanted"


def _say_disk(want: Want, host: HostState, at: Moment) -> str:
    free = (host.report.disk_free_mib if host.report else 0) - at.policy.disk_reserve_mib
    return f"{_gib(free)} GiB of disk free, {want.resources.disk_gib} wanted"


def _say_load(_want: Want, host: HostState, _at: Moment) -> str:
    return f"load {host.report.load1:.1f} on {host.report.cpus} CPUs is above the limit" if host.report else ""


def _say_gpu_busy(want: Want, host: HostState, _at: Moment) -> str:
    matching = matching_gpus(want, host)
    return f"{len(matching)} of {len(matching)} matching GPUs in use or spoken for"


def _say_gpu_none(want: Want, _host: HostState, _at: Moment) -> str:
    return f"no {want.resources.gpu_model or 'GPU'} to give"


def _say_reserved(_want: Want, host: HostState, at: Moment) -> str:
    soonest = min(kept.at for kept in at.reservations[host.name])
    minutes = max(1, round((soonest - at.now) / 60))
    return f"its room is kept for an earlier, larger request that starts here in about {minutes} min"


_WORDS: dict[Reason, Callable[[Want, HostState, Moment], str]] = {
    Reason.DECLARED_DEAD: lambda *_: "was declared dead",
    Reason.SILENT: _say_silent,
    Reason.NOT_TRUSTED: _say_untrusted,
    Reason.FENCED: lambda *_: "waits for the scheduler to tell it where its command numbers are",
    Reason.DRAINING: lambda *_: "drained for maintenance",
    Reason.LABEL_MISSING: _say_label,
    Reason.WRONG_POOL: _say_pool,
    Reason.NO_IMAGE: _say_no_image,
    Reason.IMAGE_FETCHING: _say_fetching,
    Reason.IMAGE_FETCHABLE: lambda *_: "does not hold this image yet, and can fetch it",
    Reason.RESTING: _say_resting,
    Reason.SESSIONS_FULL: _say_sessions,
    Reason.CPUS_SHORT: _say_cpus,
    Reason.MEMORY_SHORT: _say_memory,
    Reason.DISK_SHORT: _say_disk,
    Reason.LOAD_HIGH: _say_load,
    Reason.GPU_BUSY: _say_gpu_busy,
    Reason.GPU_NONE: _say_gpu_none,
    Reason.RESERVED: _say_reserved,
}


def verdict(want: Want, host: HostState, at: Moment) -> Verdict | None:
    """The objection of a host with its figures, in words; None when it can take the session."""
    reason = objection(want, host, at)
    return Verdict(host.name, reason, _WORDS[reason](want, host, at)) if reason else None
