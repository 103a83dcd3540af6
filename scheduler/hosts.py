"""A host as placement sees it: what it reported, what the ledger has promised on it, and what follows from both.

Everything that a decision over thousands of hosts asks again and again is worked out once, when it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deskfleet.scheduler.policy import Policy, Pool
from deskfleet.scheduler.resting import Resting
from deskfleet.schemas.host import Fetch, Gpu, HostBeat, HostReport, implausible
from deskfleet.schemas.session import Session
from deskfleet.schemas.template import TemplateReport


@dataclass(frozen=True, slots=True)
class Usage:
    """What the ledger has promised: to a host, a person or a group. Memory in MiB."""

    sessions: int = 0
    cpus: int = 0
    memory_mib: int = 0
    gpus: int = 0

    def plus(self, session: Session, sign: int, overhead_mib: int) -> Usage:
        """With one session more (+1) or less (-1)."""
        want = session.resources
        return Usage(
            self.sessions + sign,
            self.cpus + sign * want.cpus,
            self.memory_mib + sign * (want.memory_mib + overhead_mib),
            self.gpus + sign * want.gpus,
        )


@dataclass(slots=True, eq=False)
class HostState:
    """One host. `heard` is monotonic seconds, None until this process heard it; `distrust` says why its figures are
    not believed (`grew`: for as long as its agent lives); `asked` is when a full report was asked for last. `score`
    orders hosts, larger first. `fetches` is what it is fetching, by digest (None: it never does), `moved` since when
    each stands where it stands, and `told_images` when it was told last about images. `templates` are those that it
    keeps, by key (None: it never does), `serving` the keys of those that can be forked now, `templates_mib` what all
    take.
    """

    name: str
    generation: int = 0
    draining: bool = False
    dead: bool = False
    report: HostReport | None = None
    heard: float | None = None
    distrust: str = ""
    grew: str = ""
    asked: float | None = None
    usage: Usage = field(default_factory=Usage)
    gpus_held: frozenset[str] = frozenset()
    resting: Resting = field(default_factory=Resting)
    labels: frozenset[str] = frozenset()
    pools: frozenset[str] = frozenset()
    exclusive: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    fetches: Mapping[str, Fetch] | None = None
    moved: Mapping[str, float] = field(default_factory=dict)
    told_images: float = float("-inf")
    templates: Mapping[str, TemplateReport] | None = None
    serving: frozenset[str] = frozenset()
    templates_mib: int = 0
    told_templates: float = float("-inf")
    gpus: tuple[Gpu, ...] = ()
    cpus_offered: float = 0.0
    memory_offered: float = 0.0
    score: float = 0.0

    def belongs(self, pools: tuple[Pool, ...]) -> None:
        """Work out its pools and labels."""
        mine = [pool for pool in pools if pool.holds(self.name)]
        self.pools = frozenset(pool.name for pool in mine)
        self.labels = frozenset(label for pool in mine for label in (pool.name, *pool.labels))
        self.exclusive = frozenset(pool.name for pool in mine if pool.exclusive)

    def take(self, report: HostReport, now: float, policy: Policy) -> None:
        """A full report came in."""
        known = self.report
        same_life = known is not None and known.incarnation == report.incarnation
        self.grew = (self.grew if same_life else "") or _grown(known, report)
        self.distrust = implausible(report) or self.grew or _boasts(report, policy)
        self.heard = now
        self.report = report
        self.images = frozenset(report.images)
        before = self.fetches or {}
        self.fetches = None if report.fetches is None else {fetch.sha256: fetch for fetch in report.fetches}
        self.moved = {
            sha256: self.moved[sha256] if before.get(sha256) == fetch else now
            for sha256, fetch in (self.fetches or {}).items()
        }
        self.gpus = tuple(gpu for gpu in report.gpus if gpu.offered)
        self.cpus_offered = report.cpus * policy.cpu_overcommit
        self.templates = None if report.templates is None else {each.key: each for each in report.templates}
        self.serving = frozenset(each.key for each in report.templates or () if each.serving)
        self.templates_mib = sum(each.mib for each in report.templates or ())
        memory_mib = report.memory_mib - policy.host_reserve_mib - self.templates_mib
        self.memory_offered = max(0.0, memory_mib * policy.memory_overcommit)

    def take_beat(self, beat: HostBeat, report: HostReport, now: float, policy: Policy) -> HostReport:
        """A small heartbeat came in that stands for `report`; the report with its figures."""
        self.heard = now
        self.report = replace(
            report,
            seq=beat.seq,
            last_generation=beat.last_generation,
            fenced=beat.fenced,
            console=beat.console,
            load1=beat.load1,
            memory_free_mib=beat.memory_free_mib,
            disk_free_mib=beat.disk_free_mib,
        )
        self.distrust = implausible(self.report) or self.grew or _boasts(self.report, policy)
        return self.report

    def is_fresh(self, now: float, fresh_s: float) -> bool:
        """Whether this process heard it within the last `fresh_s` seconds."""
        return self.heard is not None and now - self.heard <= fresh_s


def _grown(old: HostReport | None, new: HostReport) -> str:
    """A machine does not grow while it runs: who reports that is mistaken, or wants to draw work to itself."""
    if old is None or old.boot_id != new.boot_id or old.incarnation != new.incarnation:
        return ""
    if new.cpus > old.cpus or new.memory_mib > old.memory_mib * 1.01 + 64:
        return "it grew while it was running"
    return ""


def _boasts(report: HostReport, policy: Policy) -> str:
    if report.cpus > policy.most_cpus:
        return f"{report.cpus} CPUs are more than any host has"
    if report.memory_mib > policy.most_memory_mib:
        return f"{report.memory_mib >> 10} GiB of memory are more than any host has"
    return ""
