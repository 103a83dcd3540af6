"""Which memory templates a host keeps: what it was told to have, made one at a time when there is room for it, lent to
launches, and given up when memory runs short.

Nothing here may cost a person a launch: whoever is not lent a template boots, and is told why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deskfleet.agent.seal import describes
from deskfleet.agent.template_store import Template
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.messages import HostTemplates, TemplateOrdered, VmStart
from deskfleet.schemas.session import Birth
from deskfleet.schemas.template import Blueprint, TemplateOrder, TemplateReport, TemplateState

log = logging.getLogger(__name__)

#: So many forks of a template that fail one after the other, and it rests until it was made anew.
MOST_FAILURES = 3
#: When a template could not be made, it is tried again after so long (seconds), then after twice as long, and so on.
RETRY_S = 60.0
MOST_RETRY_S = 3600.0
_LOOK_S = 2.0


@dataclass(frozen=True, slots=True)
class Room:
    """What a host has: load of the last minute, CPUs, MiB of memory that can be had at once."""

    load1: float
    cpus: int
    memory_free_mib: int


@dataclass(frozen=True, slots=True)
class Rules:
    """When a template is made: while the load for each CPU is below `most_load`, and when `floor_mib` of memory stay
    free. When less is free, templates are given up. `hold_s`: for how long one that was given up stays away."""

    most_load: float = 0.8
    floor_mib: int = 1024
    hold_s: float = 300.0


class Store(Protocol):
    """Where templates are (template_store.py)."""

    def load(self, clean: Callable[[str], None]) -> dict[str, Template]: ...

    def remove(self, template: Template) -> None: ...


class Build(Protocol):
    """Makes a template (template_build.py). Raises DeskfleetError or OSError when it can't."""

    def __call__(self, blueprint: Blueprint, seal: str, testing: Callable[[], None]) -> Awaitable[Template]: ...


@dataclass(slots=True)
class Slot:
    """One template that is wanted, or was found. `due` is when it may be made next (seconds of a clock that never goes
    back), `used_at` when it was lent last."""

    blueprint: Blueprint
    template: Template | None = None
    doing: TemplateState | None = None
    anew: bool = False
    dropped: bool = False
    resting: bool = False
    failures: int = 0
    tries: int = 0
    due: float = 0.0
    used_at: float = 0.0
    hits: int = 0
    misses: int = 0
    detail: str = ""

    @property
    def serves(self) -> bool:
        """Whether launches are forked from it."""
        return self.template is not None and not self.resting and not self.dropped

    @property
    def state(self) -> TemplateState:
        """How far it is."""
        if self.doing:
            return self.doing
        if self.dropped:
            return TemplateState.DROPPED
        if self.resting:
            return TemplateState.RESTING
        if self.template:
            return TemplateState.READY
        return TemplateState.FAILED if self.tries else TemplateState.WAITING


def next_to_make(slots: Iterable[Slot], room: Room, rules: Rules, now: float) -> Slot | None:
    """Which template is made next, if any; the others are told what they wait for."""
    wanted = [slot for slot in slots if not slot.dropped and (slot.template is None or slot.anew or slot.resting)]
    for slot in sorted(wanted, key=lambda each: (each.due, each.blueprint.key)):
        if slot.due > now:
            continue
        needed = slot.blueprint.memory_mib + rules.floor_mib
        if room.load1 > rules.most_load * room.cpus:
            slot.detail = f"waits until the host is less busy (load {room.load1:.1f})"
        elif room.memory_free_mib < needed:
            slot.detail = f"waits for {needed} MiB of free memory ({room.memory_free_mib} MiB are free)"
        else:
            return slot
    return None


def to_give_up(slots: Iterable[Slot], room: Room, rules: Rules) -> Slot | None:
    """Which template goes, because the host is short of memory: the one that was not used for the longest time."""
    held = [slot for slot in slots if slot.template]
    if room.memory_free_mib >= rules.floor_mib or not held:
        return None
    return min(held, key=lambda slot: (slot.used_at, slot.blueprint.key))


@dataclass(slots=True)
class Templates:
    """The templates of one host, on the agent's event loop. `seal` works out what a template must be bound to now (""
    when qemu is missing), `images` are the digests that are there, `forks` counts the live forks by key, `now` are
    seconds of a clock that never goes back; `changed` is called when a report would say something new."""

    store: Store
    build: Build
    seal: Callable[[Blueprint], str]
    images: Callable[[], frozenset[str]]
    room: Callable[[], Room]
    forks: Callable[[], Mapping[str, int]]
    now: Callable[[], float]
    changed: Callable[[], None]
    rules: Rules = field(default_factory=Rules)
    #: Names the list that was told last; "" before.
    told_digest: str = ""
    slots: dict[str, Slot] = field(default_factory=dict)

    def recover(self, clean: Callable[[str], None]) -> None:
        """Take over what a former agent has made: it serves until somebody says that it is not wanted. What was in the
        making goes, its guests by `clean`."""
        for key, template in self.store.load(clean).items():
            self.slots[key] = Slot(template.blueprint, template, used_at=self.now())

    def told(self, wish: HostTemplates) -> None:
        """Have these, and no others."""
        wanted = {blueprint.key: blueprint for blueprint in wish.blueprints}
        for key in self.slots.keys() - wanted.keys():
            self._remove(self.slots.pop(key))  # one in the making goes when it is done
        for key, blueprint in wanted.items():
            self.slots.setdefault(key, Slot(blueprint))
        self.told_digest = wish.digest
        self.changed()

    def ordered(self, wish: TemplateOrdered) -> None:
        """Do what an administrator wants of one."""
        slot = self.slots.get(wish.key)
        if slot is None:
            log.warning("%s wants to %s the template %s, which is not here", wish.actor, wish.order, wish.key)
            return
        log.warning("%s has ordered to %s the template of %s", wish.actor, wish.order, slot.blueprint.machine)
        slot.due, slot.tries = self.now(), 0
        if wish.order is TemplateOrder.DROP:
            slot.dropped = True
            slot.detail = "dropped by an administrator"
            if not slot.doing:
                self._remove(slot)
        else:
            slot.dropped, slot.anew, slot.detail = False, True, ""
        self.changed()

    def _remove(self, slot: Slot) -> None:
        if slot.template:
            self.store.remove(slot.template)
            slot.template = None

    # --- lending --------------------------------------------------------------------------------------------

    def lend(self, start: VmStart) -> tuple[Template | None, Birth]:
        """The template to fork for a launch, or why it has to boot."""
        if not start.template:
            return None, Birth.BOOTED
        slot = self.slots.get(start.template)
        if slot is None or not describes(slot.blueprint, start):
            return None, Birth.NO_TEMPLATE
        slot.used_at = self.now()
        if slot.template and slot.template.seal != self.seal(slot.blueprint):
            log.warning("the template of %s was made by another qemu, or for other devices", slot.blueprint.machine)
            slot.detail = "made anew: qemu, the processor or the devices have changed"
            self._remove(slot)
        if not slot.serves:
            slot.misses += 1
            return None, Birth.TEMPLATE_RESTS if slot.resting else Birth.NO_TEMPLATE
        return slot.template, Birth.FORKED

    def worked(self, key: str) -> None:
        """A fork runs."""
        slot = self.slots.get(key)
        if slot:
            slot.hits += 1
            slot.failures = 0

    def failed(self, key: str, why: str) -> None:
        """A fork did not work. After some in a row the template rests, and is made anew."""
        log.error("a fork of %s failed: %s", key, why)
        slot = self.slots.get(key)
        if slot:
            slot.misses += 1
            slot.failures += 1
            slot.detail = f"a fork failed: {why}"[:400]
            if slot.failures >= MOST_FAILURES and not slot.resting:
                slot.resting = True
                slot.due = self.now() + RETRY_S
            self.changed()

    def images_in_use(self) -> set[str]:
        """The digests of the images that templates are made of."""
        return {slot.blueprint.sha256 for slot in self.slots.values() if slot.template or slot.doing}

    def report(self) -> tuple[TemplateReport, ...]:
        """How they stand."""
        forks = self.forks()
        return tuple(
            TemplateReport(
                key=key,
                machine=slot.blueprint.machine,
                tenant=slot.blueprint.tenant,
                cpus=slot.blueprint.cpus,
                memory_mib=slot.blueprint.memory_mib,
                state=slot.state,
                serving=slot.serves,
                mib=slot.template.mib if slot.template else 0,
                made_at=slot.template.made_at if slot.template else 0,
                forks=forks.get(key, 0),
                hits=slot.hits,
                misses=slot.misses,
                detail=slot.detail,
            )
            for key, slot in sorted(self.slots.items())
        )

    # --- making ---------------------------------------------------------------------------------------------

    def purge(self) -> None:
        """Remove all of them."""
        for slot in self.slots.values():
            self._remove(slot)

    async def keep(self) -> None:
        """Make what is missing, and give up what there is no room for; for ever."""
        while True:
            try:
                await self.tend()
            except Exception:  # a fault of ours: templates are a help, and the rest of them go on
                log.exception("looking after the templates failed")
            await asyncio.sleep(_LOOK_S)

    async def tend(self) -> None:
        """One look: at most one template goes, and at most one is made."""
        room, now = self.room(), self.now()
        for slot in self.slots.values():
            if slot.template and not slot.anew and slot.template.seal != self.seal(slot.blueprint):
                slot.anew, slot.detail = True, "made anew: qemu, the processor or the devices have changed"
        if gone := to_give_up(self.slots.values(), room, self.rules):
            log.warning("the template of %s is given up: the host is short of memory", gone.blueprint.machine)
            self._remove(gone)
            gone.detail = "given up: the host was short of memory"
            gone.due = now + self.rules.hold_s
            self.changed()
            return
        images = self.images()
        here = [slot for slot in self.slots.values() if slot.blueprint.sha256 in images and not slot.doing]
        if chosen := next_to_make(here, room, self.rules, now):
            await self._make(chosen)

    async def _make(self, slot: Slot) -> None:
        seal = self.seal(slot.blueprint)
        if not seal:
            slot.detail, slot.due = "qemu is missing, or does not work", self.now() + RETRY_S
            return
        log.info("making the template of %s", slot.blueprint.machine)
        slot.detail = ""
        self._step(slot, TemplateState.BUILDING)
        slot.tries += 1
        try:
            made = await self.build(slot.blueprint, seal, lambda: self._step(slot, TemplateState.TESTING))
        except (DeskfleetError, OSError) as error:
            log.error("the template of %s can't be made: %s", slot.blueprint.machine, error)
            slot.detail = f"can't be made: {error}"[:400]
            slot.due = self.now() + min(MOST_RETRY_S, RETRY_S * 2 ** (slot.tries - 1))
        else:
            self._remove(slot)
            slot.template, slot.anew, slot.resting = made, False, False
            slot.failures = slot.tries = 0
            slot.used_at = self.now()
        finally:
            slot.doing = None
        if slot.dropped or self.slots.get(slot.blueprint.key) is not slot:
            self._remove(slot)
        self.changed()

    def _step(self, slot: Slot, state: TemplateState) -> None:
        slot.doing = state
        self.changed()
