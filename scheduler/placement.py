"""Which host gets a session. Pure: no clock, no I/O; the same question always has the same answer.

Fit counts what the ledger has promised to each host. What hosts report (load, memory, disk) lags behind a burst, so
it only serves as a ceiling and in the score: placing by it would send everybody to one host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from zlib import crc32

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, HostReport
from deskfleet.schemas.session import Resources
from deskfleet.schemas.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Policy:
    """What an administrator may set about placement. Memory and disk in MiB, load per CPU.

    `spread` prefers the host with the largest free share, otherwise hosts are filled one after the other.
    `guest_overhead_mib` is what qemu needs beside the guest's own memory.
    """

    spread: bool = True
    cpu_overcommit: float = 4.0
    memory_overcommit: float = 1.0
    host_reserve_mib: int = 512
    guest_overhead_mib: int = 96
    disk_reserve_mib: int = 2048
    max_load: float = 4.0
    max_sessions: int = 200


@dataclass(frozen=True, slots=True)
class Usage:
    """What the ledger has promised on one host. Memory in MiB."""

    sessions: int = 0
    cpus: int = 0
    memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be placed: a size, and the digest of the image that it needs."""

    sid: str
    resources: Resources
    sha256: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host as placement sees it. `gpus_held` are the PCI functions that sessions hold; `distrust` says why its
    figures are not believed; `failed_before` marks a host on which this very session failed to start."""

    name: str
    report: HostReport | None
    usage: Usage
    gpus_held: frozenset[str] = frozenset()
    fresh: bool = True
    draining: bool = False
    distrust: str = ""
    failed_before: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen host, and the PCI functions that go with the session."""

    host: str
    gpu_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoFit:
    """No host can take it now; one verdict a host."""

    verdicts: tuple[Verdict, ...]


def _gib(mib: float) -> str:
    return f"{mib / 1024:.1f}"


def _cpus_offered(report: HostReport, policy: Policy) -> float:
    return report.cpus * policy.cpu_overcommit


def _memory_offered(report: HostReport, policy: Policy) -> float:
    return max(0.0, (report.memory_mib - policy.host_reserve_mib) * policy.memory_overcommit)


def matching_gpus(report: HostReport, model: str) -> list[Gpu]:
    """The offered GPUs of a model; an empty model means any."""
    return [gpu for gpu in report.gpus if gpu.offered and model in ("", gpu.model)]


def free_gpu(want: Want, host: Candidate) -> Gpu | None:
    """The first matching GPU none of whose functions is held."""
    if host.report is None:
        return None
    for gpu in matching_gpus(host.report, want.resources.gpu_model):
        if not host.gpus_held.intersection(gpu.functions):
            return gpu
    return None


# One filter each: None, or the reason with its figures. They see only hosts that have reported.
_Filter = Callable[[Want, Candidate, HostReport, Policy], tuple[Reason, str] | None]


def _alive(_want: Want, host: Candidate, report: HostReport, _policy: Policy) -> tuple[Reason, str] | None:
    if not host.fresh:
        return Reason.SILENT, "no report for a while"
    if host.distrust:
        return Reason.NOT_TRUSTED, f"its report can't be true: {host.distrust}"
    if report.fenced:
        return Reason.FENCED, "waits for the scheduler to tell it where its command numbers are"
    if report.accel == "none":
        return Reason.NOT_TRUSTED, "no way to run guests: " + "; ".join(report.problems)
    return None


def _open(_want: Want, host: Candidate, _report: HostReport, _policy: Policy) -> tuple[Reason, str] | None:
    return (Reason.DRAINING, "drained for maintenance") if host.draining else None


def _image(want: Want, _host: Candidate, report: HostReport, _policy: Policy) -> tuple[Reason, str] | None:
    return None if want.sha256 in report.images else (Reason.NO_IMAGE, "does not hold this image")


def _sessions(_want: Want, host: Candidate, _report: HostReport, policy: Policy) -> tuple[Reason, str] | None:
    if host.usage.sessions < policy.max_sessions:
        return None
    return Reason.SESSIONS_FULL, f"runs {host.usage.sessions} of {policy.max_sessions} desktops"


def _cpus(want: Want, host: Candidate, report: HostReport, policy: Policy) -> tuple[Reason, str] | None:
    offered = _cpus_offered(report, policy)
    free = offered - host.usage.cpus
    if want.resources.cpus <= free:
        return None
    return Reason.CPUS_SHORT, f"{max(0, free):g} of {offered:g} CPUs free, {want.resources.cpus} wanted"


def _memory(want: Want, host: Candidate, report: HostReport, policy: Policy) -> tuple[Reason, str] | None:
    offered = _memory_offered(report, policy)
    free = offered - host.usage.memory_mib
    needed = want.resources.memory_mib + policy.guest_overhead_mib
    if needed > free:
        text = f"{_gib(max(0, free))} of {_gib(offered)} GiB memory free, {_gib(needed)} wanted"
        return Reason.MEMORY_SHORT, text
    if needed > report.memory_free_mib:
        return Reason.MEMORY_SHORT, f"only {_gib(report.memory_free_mib)} GiB of memory is really free on it"
    return None


def _disk(want: Want, _host: Candidate, report: HostReport, policy: Policy) -> tuple[Reason, str] | None:
    free = report.disk_free_mib - policy.disk_reserve_mib
    if want.resources.disk_gib * 1024 <= free:
        return None
    return Reason.DISK_SHORT, f"{_gib(max(0, free))} GiB of disk free, {want.resources.disk_gib} wanted"


def _load(_want: Want, _host: Candidate, report: HostReport, policy: Policy) -> tuple[Reason, str] | None:
    if report.load1 <= policy.max_load * report.cpus:
        return None
    return Reason.LOAD_HIGH, f"load {report.load1:.1f} on {report.cpus} CPUs is above the limit"


def _gpu(want: Want, host: Candidate, report: HostReport, _policy: Policy) -> tuple[Reason, str] | None:
    if not want.resources.gpus or free_gpu(want, host):
        return None
    matching = matching_gpus(report, want.resources.gpu_model)
    if matching:
        return Reason.GPU_BUSY, f"{len(matching)} of {len(matching)} matching GPUs in use"
    return Reason.GPU_NONE, f"no {want.resources.gpu_model or 'GPU'} to give"


FILTERS: tuple[_Filter, ...] = (_alive, _open, _image, _sessions, _cpus, _memory, _disk, _load, _gpu)


def refusal(want: Want, host: Candidate, policy: Policy) -> Verdict | None:
    """Why `host` can't take it now, or None when it can. The first filter that objects speaks."""
    if host.report is None:
        return Verdict(host.name, Reason.SILENT, "has not reported yet")
    for objection in FILTERS:
        found = objection(want, host, host.report, policy)
        if found:
            return Verdict(host.name, *found)
    return None


def _score(want: Want, host: Candidate, report: HostReport, policy: Policy) -> tuple[float, ...]:
    """Larger is better; compared field by field."""
    offered = _memory_offered(report, policy)
    memory_left = 1 - (host.usage.memory_mib + want.resources.memory_mib) / offered if offered else 0.0
    cpus_left = 1 - (host.usage.cpus + want.resources.cpus) / _cpus_offered(report, policy)
    left = min(memory_left, cpus_left)
    busy = min(1.0, report.load1 / max(1.0, policy.max_load * report.cpus))
    spends_gpu_host = not want.resources.gpus and any(gpu.offered for gpu in report.gpus)
    return (
        -float(host.failed_before),
        -float(spends_gpu_host),
        # A tenth of a share is the grain: finer differences are noise, and load may decide between equals.
        round(left if policy.spread else -left, 1),
        -round(busy, 1),
        left if policy.spread else -left,
        # The tie goes to a host that depends on the session, so that equal hosts share a burst evenly.
        float(crc32(f"{want.sid}/{host.name}".encode())),
    )


def choose(want: Want, hosts: Iterable[Candidate], policy: Policy) -> Placement | NoFit:
    """The best host that fits, or why each host does not."""
    verdicts: list[Verdict] = []
    best: tuple[tuple[float, ...], str, Candidate] | None = None
    for host in hosts:
        verdict = refusal(want, host, policy)
        if verdict or host.report is None:
            verdicts.append(verdict or Verdict(host.name, Reason.SILENT))
            continue
        ranked = (_score(want, host, host.report, policy), host.name, host)
        if best is None or ranked[:2] > best[:2]:
            best = ranked
    if best is None:
        return NoFit(tuple(verdicts) or (Verdict("-", Reason.NO_HOSTS, "no host is connected"),))
    gpu = free_gpu(want, best[2]) if want.resources.gpus else None
    return Placement(best[2].name, gpu.functions if gpu else ())
