"""What a request can expect before it is made: starts now, waits, or never fits. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deskfleet.scheduler.filters import Want, kept_out
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.hosts import HostState, Usage
from deskfleet.scheduler.intake import refuse_launch
from deskfleet.scheduler.placement import Placement, choose, explain
from deskfleet.scheduler.plan import starts
from deskfleet.scheduler.policy import Caps, Policy
from deskfleet.scheduler.turns import over_cap
from deskfleet.scheduler.waiting import Queue
from deskfleet.schemas.errors import SENTENCES, Reason
from deskfleet.schemas.machine import GpuPolicy, Machine
from deskfleet.schemas.messages import PlacementAsked
from deskfleet.schemas.session import Resources, Session
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict

#: So many of those in front are looked at for an estimate; people ask often, and the answer is about now.
_MOST_AHEAD = 50


def supposed(asked: PlacementAsked, policy: Policy) -> Session:
    """The session that a question is about; it exists nowhere."""
    return Session(
        sid=asked.question,
        user=asked.user,
        machine=asked.machine,
        resources=asked.resources,
        persistent=False,
        lifetime_s=asked.lifetime_s,
        groups=asked.groups,
        queue_class=policy.class_of(asked.user, asked.groups),
    )


def outlook(
    session: Session,
    fleet: Fleet,
    queue: Queue,
    machines: Mapping[str, Machine],
    policy: Policy,
    max_lifetime_s: int,
    now: float,
    settled: bool,
) -> Forecast:
    """What would become of `session`, if it were asked for now. `settled`: every living host has had time to report."""
    refusal = refuse_launch(session, machines, max_lifetime_s)
    if refusal:
        reason = refusal.reason or Reason.BAD_RESOURCES
        return Forecast(Outlook.NEVER, why=SENTENCES[reason], verdicts=(Verdict("", reason, refusal.detail),))
    machine = machines[session.machine]
    want = queue.want(session, machine)
    never = never_fits(session, want, machine, fleet, policy, settled)
    if never:
        return never
    at = queue.moment(now)
    rule = queue.rule(session)
    verdicts: tuple[Verdict, ...] = (rule,) if rule else ()
    if rule is None:
        choice = choose(want, fleet.index.walk(want), at)
        if isinstance(choice, Placement):
            instant = want.template in fleet.hosts[choice.host].serving
            return Forecast(Outlook.NOW, host=choice.host, why=choice.why, instant=instant)
        verdicts = explain(want, fleet.hosts.values(), at)
    order = queue.in_order([session])
    place = next(number for number, entry in enumerate(order, 1) if entry.sid == session.sid)
    estimate = None
    if rule is None and place <= _MOST_AHEAD:
        ahead = [
            queue.want(entry, machines[entry.machine]) for entry in order[: place - 1] if entry.machine in machines
        ]
        start = starts([*ahead, want], fleet.hosts, fleet.leases(), at).get(session.sid)
        estimate = start.at - now if start else None
    return Forecast(Outlook.WAITS, place=place, estimate_s=estimate, verdicts=verdicts)


def never_fits(
    session: Session, want: Want, machine: Machine, fleet: Fleet, policy: Policy, settled: bool
) -> Forecast | None:
    """Why no host could ever give this, or no cap ever allow it; None when some day it may fit.

    A host that is drained or silent may come back, so its size counts; one that was declared dead does not. Until every
    known host has reported, and new ones had the time to, nothing is called impossible; nor while there is no host at
    all, which is somebody's mistake and not this request's.
    """
    size = want.resources
    for whose, reason, caps in _caps_of(session, policy):
        over = over_cap(caps, Usage(), size)
        if over:
            most = f"{SENTENCES[Reason.NEVER_FITS]} {whose} may have at most: {_caps(caps)}."
            return Forecast(Outlook.NEVER, why=most, verdicts=(Verdict("", reason, over),))
    hosts = fleet.hosts.values()
    if not settled or any(_could_give(size, host, policy) for host in hosts if _eligible(want, host)):
        return None
    known = [host for host in hosts if host.report and not host.distrust]
    # A host that this process has not heard yet may have what nobody else has.
    if not known or any(host.report is None and not host.dead for host in hosts):
        return None
    eligible = [host for host in known if _eligible(want, host)]
    largest = largest_of(machine, want, eligible, policy)
    reason = Reason.GPU_NONE if size.gpus and not any(_has_gpu(size, host) for host in eligible) else Reason.NEVER_FITS
    if not eligible:
        reason = Reason.LABEL_MISSING if want.labels else Reason.WRONG_POOL
    detail = "no host could ever give this" if largest is None else f"the largest that fits is {size_text(largest)}"
    return Forecast(Outlook.NEVER, why=SENTENCES[reason], largest=largest, verdicts=(Verdict("", reason, detail),))


def _caps_of(session: Session, policy: Policy) -> list[tuple[str, Reason, Caps]]:
    """Every cap that counts for a session: whose it is, and under which reason it refuses."""
    groups = [
        (f"The group {name}", Reason.GROUP_CAP, caps) for name, caps in policy.group_caps if name in session.groups
    ]
    return [("One person", Reason.USER_CAP, policy.user_caps), *groups]


def _caps(caps: Caps) -> str:
    pairs = ((caps.cpus, "CPUs"), (caps.memory_mib, "MiB of memory"), (caps.gpus, "GPUs"), (caps.sessions, "desktops"))
    return ", ".join(f"{cap} {label}" for cap, label in pairs if cap is not None)


def _eligible(want: Want, host: HostState) -> bool:
    return bool(host.report) and not host.distrust and kept_out(want, host) is None


def _has_gpu(size: Resources, host: HostState) -> bool:
    return any(size.gpu_model in ("", gpu.model) for gpu in host.gpus)


def _memory_most(host: HostState, policy: Policy) -> int:
    return int(host.memory_offered) - policy.guest_overhead_mib


def _disk_most(host: HostState, policy: Policy) -> int:
    return ((host.report.disk_mib if host.report else 0) - policy.disk_reserve_mib) // 1024


def _could_give(size: Resources, host: HostState, policy: Policy) -> bool:
    return (
        size.cpus <= host.cpus_offered
        and size.memory_mib <= _memory_most(host, policy)
        and size.disk_gib <= _disk_most(host, policy)
        and (not size.gpus or _has_gpu(size, host))
    )


def largest_of(machine: Machine, want: Want, hosts: list[HostState], policy: Policy) -> Resources | None:
    """The largest size of a machine that some host could give: with the wanted GPU where there is one, else without."""
    size = want.resources
    with_gpu = [host for host in hosts if _has_gpu(size, host)] if size.gpus else hosts
    gpus, model = (size.gpus, size.gpu_model) if with_gpu else (0, "")
    if size.gpus and not with_gpu and machine.gpu is GpuPolicy.REQUIRED:
        return None
    sizes = [
        Resources(
            min(machine.cpus.max, int(host.cpus_offered)),
            min(machine.memory_mib.max, _memory_most(host, policy)),
            min(machine.disk_gib.max, _disk_most(host, policy)),
            gpus,
            model,
        )
        for host in with_gpu or hosts
    ]
    possible = [size for size in sizes if not machine.problems(replace(size, gpu_model=""))]
    return max(possible, key=lambda size: (size.memory_mib, size.cpus, size.disk_gib), default=None)


def size_text(size: Resources) -> str:
    """A size in words."""
    gpu = f", {size.gpus} GPU" if size.gpus else ""
    return f"{size.cpus} CPUs, {size.memory_mib / 1024:.1f} GiB of memory, {size.disk_gib} GiB of disk{gpu}"
