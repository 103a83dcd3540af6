"""What an administrator may set about placement and the queue. Memory and disk in MiB, times in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each term of a host's score counts: free memory, free CPUs, idleness (see placement.TERMS)."""

    memory: float = 1.0
    cpus: float = 1.0
    idle: float = 0.2


@dataclass(frozen=True, slots=True)
class Pool:
    """Hosts that belong together, by name patterns ("lab-*").

    `labels` are what machines may require of a host. `groups` are the people it is for: `exclusive` keeps others out,
    `confine` keeps these people off all other hosts.
    """

    name: str
    hosts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    exclusive: bool = False
    confine: bool = False

    def holds(self, host: str) -> bool:
        """Whether a host belongs to it."""
        return any(fnmatchcase(host, pattern) for pattern in self.hosts)


@dataclass(frozen=True, slots=True)
class QueueClass:
    """A class of the queue: whose requests it holds. Earlier classes go first."""

    name: str
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that one person, or one group, may have in use; None is no limit."""

    sessions: int | None = None
    cpus: int | None = None
    memory_mib: int | None = None
    gpus: int | None = None


@dataclass(frozen=True, slots=True)
class Rest:
    """After `failures` failed starts within `window_s` a host rests for `first_s`, twice as long each further time, at
    most `longest_s`; then one launch tries it."""

    failures: int = 3
    window_s: float = 20 * 60.0
    first_s: float = 5 * 60.0
    longest_s: float = 60 * 60.0


#: The class of whoever no other class holds.
NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of placement.

    `spread` prefers the host with the most room, otherwise hosts are filled one after the other.
    `guest_overhead_mib` is what qemu needs beside the guest's own memory; `max_load` is load per CPU. A host unheard
    for more than `fresh_s` gets no new work. Reports of more than `most_cpus` or `most_memory_mib` are not believed.
    Each instant machine is kept ready on `templates_min` hosts, where all templates together take `templates_share` of
    the memory at most.
    """

    spread: bool = True
    weights: Weights = field(default_factory=Weights)
    cpu_overcommit: float = 4.0
    memory_overcommit: float = 1.0
    host_reserve_mib: int = 512
    guest_overhead_mib: int = 96
    disk_reserve_mib: int = 2048
    max_load: float = 4.0
    max_sessions: int = 200
    fresh_s: float = 15.0
    most_cpus: int = 4096
    most_memory_mib: int = 64 << 20
    templates_min: int = 2
    templates_share: float = 0.25
    rest: Rest = field(default_factory=Rest)
    pools: tuple[Pool, ...] = ()
    classes: tuple[QueueClass, ...] = ()
    user_caps: Caps = field(default_factory=Caps)
    group_caps: tuple[tuple[str, Caps], ...] = ()

    def class_of(self, user: str, groups: Iterable[str]) -> str:
        """The queue class of a person's requests: the first that names the person or one of the groups."""
        belongs = set(groups)
        for entry in self.classes:
            if user in entry.users or belongs.intersection(entry.groups):
                return entry.name
        return NORMAL

    def rank(self, queue_class: str) -> int:
        """The place of a class among the classes, 0 for the first. A class that is no longer set counts as normal."""
        names = [entry.name for entry in self.classes]
        return names.index(queue_class) if queue_class in names else len(names)

    def admitted(self, groups: Iterable[str]) -> frozenset[str]:
        """The pools that are for somebody of these groups."""
        belongs = set(groups)
        return frozenset(pool.name for pool in self.pools if belongs.intersection(pool.groups))

    def confined(self, groups: Iterable[str]) -> frozenset[str] | None:
        """The pools outside which somebody of these groups gets nothing; None when no pool confines them."""
        belongs = set(groups)
        kept_in = [pool.name for pool in self.pools if pool.confine and belongs.intersection(pool.groups)]
        return frozenset(kept_in) or None
