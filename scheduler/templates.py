"""Which hosts keep a memory template of which machine: a few hosts for each instant machine, and none that wants its
memory for people.

A host keeps what it has for as long as it may; a template that moves costs a boot. What a host says of its templates
is believed like the rest of its report: at worst a launch boots there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from deskfleet.scheduler.filters import Moment, Want, memory_beside_templates, objection
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.hosts import HostState
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import HostTemplates
from deskfleet.schemas.template import MOST_TEMPLATES, Blueprint, TemplateState, blueprints, tenants

log = logging.getLogger(__name__)

#: For so long a host keeps no templates, after somebody waited for the memory that they took.
SPARED_S = 600.0
#: So many kinds of requests are looked at in one pass.
MOST_SOUGHT = 20


def wanted(machines: Iterable[Machine]) -> Iterator[tuple[Machine, Blueprint]]:
    """Every template that the catalogue asks for."""
    for machine in machines:
        for tenant in tenants(machine):
            for blueprint in blueprints(machine, tenant):
                yield machine, blueprint


class Templates:
    """What the hosts of a fleet are told about templates. `now` is monotonic seconds."""

    def __init__(
        self, fleet: Fleet, machines: Callable[[], Mapping[str, Machine]], least: int, share: float, again_s: float
    ) -> None:
        self._fleet = fleet
        self._machines = machines
        self._least = least
        self._share = share
        self._again_s = again_s
        self._chosen: dict[str, tuple[str, ...]] = {}  # key -> hosts
        self._spared: dict[str, float] = {}  # host -> until when

    def seek(self, wants: Iterable[Want], at: Moment) -> None:
        """Somebody who waits for memory that templates take comes before the templates."""
        self._spared = {host: until for host, until in self._spared.items() if until > at.now}
        shapes = {want.shape: want for want in wants}
        for want in list(shapes.values())[:MOST_SOUGHT]:
            for host in self._fleet.hosts.values():
                short = host.templates_mib and objection(want, host, at) is Reason.MEMORY_SHORT
                if short and memory_beside_templates(want, host, at):
                    if host.name not in self._spared:
                        log.warning("%s gives its templates up: people wait for the memory", host.name)
                    self._spared[host.name] = at.now + SPARED_S
                    break

    def due(self, now: float, fresh_s: float) -> list[HostTemplates]:
        """What is to be said now to hosts whose list is not what it should be."""
        lists: dict[str, list[Blueprint]] = {
            host.name: [] for host in self._fleet.hosts.values() if host.templates is not None
        }
        taken: dict[str, int] = {}
        chosen: dict[str, tuple[str, ...]] = {}
        for machine, blueprint in wanted(self._machines().values()) if lists else ():
            hosts = self._choose(machine, blueprint, taken, now, fresh_s)
            chosen[blueprint.key] = tuple(host.name for host in hosts)
            for host in hosts:
                taken[host.name] = taken.get(host.name, 0) + blueprint.memory_mib
                lists[host.name].append(blueprint)
        self._chosen = chosen
        messages = []
        for name, told in lists.items():
            host = self._fleet.hosts[name]
            digest = _name(told)
            news = host.report is not None and host.report.blueprints != digest
            if news and now - host.told_templates >= self._again_s and host.is_fresh(now, fresh_s):
                host.told_templates = now
                messages.append(HostTemplates(name, digest, tuple(told)))
        return messages

    def _choose(
        self, machine: Machine, blueprint: Blueprint, taken: Mapping[str, int], now: float, fresh_s: float
    ) -> list[HostState]:
        able = [
            host
            for host in self._fleet.hosts.values()
            if self._able(host, machine, blueprint, taken.get(host.name, 0), now, fresh_s)
        ]
        before = self._chosen.get(blueprint.key, ())

        def order(host: HostState) -> tuple[bool, bool, float, str]:
            kept = (host.templates or {}).get(blueprint.key)
            return not (kept and kept.serving), host.name not in before, -host.memory_offered, host.name

        return sorted(able, key=order)[: self._least]

    def _able(
        self, host: HostState, machine: Machine, blueprint: Blueprint, taken: int, now: float, fresh_s: float
    ) -> bool:
        kept = (host.templates or {}).get(blueprint.key)
        return (
            host.templates is not None
            and host.report is not None
            and host.is_fresh(now, fresh_s)
            and not (host.dead or host.draining or host.distrust or host.report.fenced or host.name in self._spared)
            and blueprint.sha256 in host.images
            and frozenset(machine.labels) <= host.labels
            and (kept is None or kept.state is not TemplateState.DROPPED)
            and taken + blueprint.memory_mib <= self._share * host.report.memory_mib
            and len(host.templates) <= MOST_TEMPLATES
        )


def _name(told: Iterable[Blueprint]) -> str:
    return hashlib.sha256(json.dumps([blueprint.key for blueprint in told]).encode()).hexdigest()[:16]
