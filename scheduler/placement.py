"""Which host gets a session. Pure: no clock, no I/O; the same question always has the same answer.

A host's score depends on the host alone, not on what is wanted. So hosts can be kept in the order of their scores,
and the first that fits is the best: exact, and at ten thousand hosts far cheaper than looking at all of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from deskfleet.scheduler.filters import Moment, Want, free_gpu, objection, verdict
from deskfleet.scheduler.hosts import HostState
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas.errors import SENTENCES, Reason
from deskfleet.schemas.verdict import Verdict

#: A verdict a host is told for so many hosts; of more, it is told how many refused for which reason.
MOST_VERDICTS = 30


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen host, the PCI functions that go with the session, and what spoke for the host."""

    host: str
    gpu_addresses: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class NoFit:
    """No host can take it now, and why."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a host's score: a share between 0 and 1, and how much it counts."""

    name: str
    weight: float
    value: float


def _free(used: float, offered: float) -> float:
    return max(0.0, 1.0 - used / offered) if offered > 0 else 0.0


def _busy(host: HostState, policy: Policy) -> float:
    if host.report is None:
        return 1.0
    # A tenth is the grain: load moves all the time, and hosts must not change places for nothing.
    return round(min(1.0, host.report.load1 / max(1.0, policy.max_load * host.report.cpus)), 1)


def terms(host: HostState, policy: Policy) -> tuple[Term, ...]:
    """What a host's score is made of. Pack turns room into use: the fullest host that fits comes first."""
    memory, cpus = _free(host.usage.memory_mib, host.memory_offered), _free(host.usage.cpus, host.cpus_offered)
    if not policy.spread:
        memory, cpus = 1.0 - memory, 1.0 - cpus
    weights = policy.weights
    return (
        Term("memory", weights.memory, memory),
        Term("cpus", weights.cpus, cpus),
        Term("idle", weights.idle, 1.0 - _busy(host, policy)),
    )


def score(host: HostState, policy: Policy) -> float:
    """How good a host is; larger is better."""
    # Rounded: two orders of the same additions must not make one of two equal hosts the better one.
    return round(sum(term.weight * term.value for term in terms(host, policy)), 9)


def why(host: HostState, policy: Policy) -> str:
    """What spoke for a host, in words."""
    memory, cpus = _free(host.usage.memory_mib, host.memory_offered), _free(host.usage.cpus, host.cpus_offered)
    order = "most room" if policy.spread else "fullest that fits"
    load = host.report.load1 if host.report else 0.0
    return f"{order}: {memory:.0%} of its memory and {cpus:.0%} of its CPUs free, load {load:.1f}"


class Index:
    """Hosts in the order in which they are tried: those that have the template which is wanted; those without GPUs, so
    that a GPU host is spent on a request without GPU only when nothing else fits; then by score, then by name."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._plain: list[tuple[float, str, HostState]] = []
        self._gpu: list[tuple[float, str, HostState]] = []
        self._warm: dict[str, list[tuple[bool, float, str, HostState]]] = {}
        self._where: dict[str, tuple[list[tuple[float, str, HostState]], float, frozenset[str]]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def put(self, host: HostState) -> None:
        """Add a host, or move it to where it belongs now."""
        host.score = score(host, self._policy)
        rows, key = self._gpu if host.gpus else self._plain, -host.score
        known = self._where.get(host.name)
        if known is not None:
            before, old_key, templates = known
            if before is rows and old_key == key and templates == host.serving:
                return
            # No two rows share key and name, so hosts themselves are never compared.
            del before[bisect_left(before, (old_key, host.name, host))]
            for template in templates:
                warm = self._warm[template]
                del warm[bisect_left(warm, (before is self._gpu, old_key, host.name, host))]
        insort(rows, (key, host.name, host))
        for template in host.serving:
            insort(self._warm.setdefault(template, []), (rows is self._gpu, key, host.name, host))
        self._where[host.name] = (rows, key, host.serving)

    def walk(self, want: Want) -> Iterator[HostState]:
        """The hosts in order. Those where this session failed before come last."""
        avoided = []
        for *_, name, host in self._warm.get(want.template, ()):
            if name not in want.avoid:
                yield host
        for rows in (self._gpu,) if want.resources.gpus else (self._plain, self._gpu):
            for _, name, host in rows:
                if want.template in host.serving and name not in want.avoid:
                    continue  # it was asked already
                if name in want.avoid:
                    avoided.append(host)
                else:
                    yield host
        yield from avoided
        if want.resources.gpus:
            yield from (host for _, _, host in self._plain)  # they are asked for what they say


def rank(want: Want, host: HostState) -> tuple[bool, bool, bool, float, str]:
    """The order of `Index.walk` as a key, for those who look at all hosts; smaller is better."""
    wrong_kind = bool(host.gpus) != bool(want.resources.gpus)
    cold = want.template not in host.serving or host.name in want.avoid
    return host.name in want.avoid, cold, wrong_kind, -host.score, host.name


def choose(want: Want, hosts: Iterable[HostState], at: Moment) -> Placement | NoFit:
    """The first host in this order that fits, or why none does."""
    for host in hosts:
        if objection(want, host, at) is None:
            gpu = free_gpu(want, host, at) if want.resources.gpus else None
            return Placement(host.name, gpu.functions if gpu else (), why(host, at.policy))
    return NoFit(())


def explain(want: Want, hosts: Iterable[HostState], at: Moment) -> tuple[Verdict, ...]:
    """Why each host does not fit; by reason when there are many hosts."""
    found = list(hosts)
    if not found:
        return (Verdict("", Reason.NO_HOSTS, "no host is connected"),)
    if len(found) <= MOST_VERDICTS:
        named = (verdict(want, host, at) for host in sorted(found, key=_by_name))
        return tuple(entry for entry in named if entry)
    reasons = Counter(reason for host in found if (reason := objection(want, host, at)))
    return tuple(Verdict("", reason, f"{count} hosts: {SENTENCES[reason]}") for reason, count in reasons.most_common())


def _by_name(host: HostState) -> str:
    return host.name


def naive(want: Want, hosts: Sequence[HostState], at: Moment) -> HostState | None:
    """The same choice by looking at every host: what the index is measured and tested against."""
    fitting = [host for host in hosts if objection(want, host, at) is None]
    return min(fitting, key=lambda host: rank(want, host), default=None)
