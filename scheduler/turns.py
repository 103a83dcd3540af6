"""Whose turn it is: the order of the queue, and who may not have more for now. Pure.

Order: class, then fair share, then first come. Fair share goes by what each person has in use, as the largest of the
person's shares of all CPUs, memory and GPUs (dominant share); whoever has least goes next, and each request that goes
counts as had. Somebody who asks for fifty desktops thus waits behind others who ask for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush

from deskfleet.scheduler.hosts import Usage
from deskfleet.scheduler.policy import Caps, Policy
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.session import Resources, Session
from deskfleet.schemas.verdict import Verdict


def share(usage: Usage, total: Usage) -> float:
    """The dominant share: the largest of the shares of all CPUs, memory and GPUs."""
    pairs = ((usage.cpus, total.cpus), (usage.memory_mib, total.memory_mib), (usage.gpus, total.gpus))
    return max((used / whole for used, whole in pairs if whole > 0), default=float(usage.sessions))


def in_order(waiting: Iterable[Session], usage: Mapping[str, Usage], total: Usage, policy: Policy) -> Iterator[Session]:
    """The queue in the order in which requests take their turns. `waiting` is oldest first, `usage` by user."""
    age: dict[str, int] = {}
    classes: dict[int, dict[str, list[Session]]] = {}
    for session in waiting:
        age[session.sid] = len(age)
        classes.setdefault(policy.rank(session.queue_class), {}).setdefault(session.user, []).append(session)
    for rank in sorted(classes):
        yield from _by_share(classes[rank], age, usage, total)


def _by_share(
    queues: Mapping[str, list[Session]], age: Mapping[str, int], usage: Mapping[str, Usage], total: Usage
) -> Iterator[Session]:
    had = {user: usage.get(user, Usage()) for user in queues}
    turns = [(share(had[user], total), age[queue[0].sid], user, 0) for user, queue in queues.items()]
    heapify(turns)
    while turns:
        _, _, user, number = heappop(turns)
        queue = queues[user]
        yield queue[number]
        had[user] = had[user].plus(queue[number], +1, 0)
        if number + 1 < len(queue):
            heappush(turns, (share(had[user], total), age[queue[number + 1].sid], user, number + 1))


def over_cap(caps: Caps, usage: Usage, want: Resources) -> str:
    """Which cap one more session of this size would break, in words; empty when none."""
    for label, cap, used, more in (
        ("desktops", caps.sessions, usage.sessions, 1),
        ("CPUs", caps.cpus, usage.cpus, want.cpus),
        ("MiB of memory", caps.memory_mib, usage.memory_mib, want.memory_mib),
        ("GPUs", caps.gpus, usage.gpus, want.gpus),
    ):
        if cap is not None and more and used + more > cap:
            return f"{used} of {cap} {label} in use, {more} wanted"
    return ""


def capped(
    user: str,
    groups: Iterable[str],
    want: Resources,
    used: Mapping[str, Usage],
    grouped: Mapping[str, Usage],
    policy: Policy,
) -> Verdict | None:
    """The cap that keeps somebody from one more session of this size now; None when there is none."""
    broken = over_cap(policy.user_caps, used.get(user, Usage()), want)
    if broken:
        return Verdict("", Reason.USER_CAP, f"you have {broken}")
    belongs = set(groups)
    for group, caps in policy.group_caps:
        if group in belongs:
            broken = over_cap(caps, grouped.get(group, Usage()), want)
            if broken:
                return Verdict("", Reason.GROUP_CAP, f"the group {group} has {broken}")
    return None
