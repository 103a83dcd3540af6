"""The scheduler's metrics, read when somebody scrapes: whether it leads, its hosts, sessions, queue and decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from deskfleet.runtime.metrics import counter_of, gauge_of
from deskfleet.runtime.service import Clock
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.hosts import HostState
from deskfleet.scheduler.policy import NORMAL, Policy
from deskfleet.scheduler.stats import Stats, Times
from deskfleet.schemas.session import State


class Figures(Collector):
    """Called on the monitoring server's thread, so it works on copies. While standing by, only `leader` is shown."""

    def __init__(self, leading: Callable[[], Scheduler | None], policy: Policy, clock: Clock, prefix: str) -> None:
        self._leading = leading
        self._policy = policy
        self._clock = clock
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        scheduler = self._leading()
        yield self._gauge("leader", "1 while this process decides, 0 while it stands by", "", {"": bool(scheduler)})
        if scheduler is None:
            return
        now, fleet, stats = self._clock.monotonic(), scheduler.fleet, scheduler.decisions.stats
        sessions, hosts = list(fleet.sessions.values()), list(fleet.hosts.values())
        in_state = Counter(session.state.value for session in sessions)
        states = {state.value: in_state[state.value] for state in State if state is not State.ENDED}
        yield self._gauge("sessions", "Sessions that have not ended", "state", states)
        kinds = Counter(host_state(host, now, self._policy) for host in hosts)
        yield self._gauge("hosts", "Hosts by what they are to placement", "state", {k: kinds[k] for k in HOST_STATES})
        waited = scheduler.decisions.queue.waited
        length: Counter[str] = Counter()
        age: dict[str, float] = {}
        for name in (*(entry.name for entry in self._policy.classes), NORMAL):
            length[name], age[name] = 0, 0.0
        for session in sessions:
            if session.state is State.QUEUED:
                name = session.queue_class or NORMAL
                length[name] += 1
                age[name] = max(age.get(name, 0.0), waited.get(session.sid, session.waited_s))
        yield self._gauge("queue_length", "Requests that wait", "queue_class", length)
        yield self._gauge("queue_age_seconds", "How long the longest has waited", "queue_class", age)
        yield from self._counts(stats)

    def _counts(self, stats: Stats) -> Iterable[Metric]:
        yield self._counter("placements", "Sessions placed on a host", "", {"": stats.placed})
        yield self._counter("questions", "Questions answered beforehand", "", {"": stats.asked})
        yield self._counter(
            "refusals", "Reasons that kept a request waiting, counted when they change", "reason", stats.refused.copy()
        )
        yield self._counter("failed_starts", "Starts that failed on their host", "host", stats.failed.copy())
        yield self._histogram("decision_seconds", "Transactions with what they decided", "", {"": stats.took})
        yield self._histogram("wait_seconds", "Waits for a place on a host", "", {"": stats.waited})
        yield self._histogram("start_seconds", "From the command to a desktop that runs", "birth", stats.started)

    def _histogram(self, name: str, text: str, label: str, values: Mapping[Any, Times]) -> Metric:
        family = HistogramMetricFamily(f"{self._prefix}_{name}", text, labels=[label] if label else [])
        for key, times in values.items():
            rows, seen = [], 0
            for bound, count in zip((*map(str, times.bounds), "+Inf"), list(times.counts), strict=True):
                seen += count
                rows.append((bound, float(seen)))
            family.add_metric([key] if label else [], rows, times.sum_s)
        return family

    def _gauge(self, name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
        return gauge_of(f"{self._prefix}_{name}", text, label, values)

    def _counter(self, name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
        return counter_of(f"{self._prefix}_{name}", text, label, values)


HOST_STATES = ("open", "draining", "silent", "not_trusted", "dead")


def host_state(host: HostState, now: float, policy: Policy) -> str:
    """What a host is to placement, in one word."""
    if host.dead:
        return "dead"
    if not host.is_fresh(now, policy.fresh_s):
        return "silent"
    if host.distrust:
        return "not_trusted"
    return "draining" if host.draining else "open"
