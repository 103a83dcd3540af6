"""The memory templates of this very host: the rules of templates.py with qemu, files and clocks behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deskfleet.agent.hypervisor import QemuHypervisor
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.agent.processes import Spawn
from deskfleet.agent.seal import Program, digest, processor
from deskfleet.agent.settings import AgentSettings
from deskfleet.agent.template_build import Builder, Patience
from deskfleet.agent.template_store import TemplateStore
from deskfleet.agent.templates import Room, Templates
from deskfleet.runtime.service import Clock
from deskfleet.schemas.template import Blueprint

#: The folder of the agent's state that they are in.
FOLDER = "instant"


def templates_of(
    settings: AgentSettings,
    accel: str,
    boot_id: str,
    hypervisor: QemuHypervisor,
    images: ImageIndex,
    disks: Disks,
    spawn: Spawn,
    clock: Clock,
    *,
    room: Callable[[], Room],
    forks: Callable[[], Mapping[str, int]],
    changed: Callable[[], None],
) -> Templates | None:
    """What keeps them; None where there shall be none. The hypervisor is told where to look for them."""
    if settings.templates is None:
        return None
    starter, program, cpu = hypervisor.starter, Program(), processor(accel)

    def seal(blueprint: Blueprint) -> str:
        version = program.version()
        return digest(blueprint, version, cpu, accel, starter.ports) if version else ""

    store = TemplateStore(settings.state / FOLDER, boot_id, spawn)
    patience = Patience(build_s=settings.template_build_s, still_s=settings.template_still_s)
    builder = Builder(starter, images, disks, store, hypervisor.clean, clock.wall, patience)
    found = Templates(
        store=store,
        build=builder.build,
        seal=seal,
        images=images.digests,
        room=room,
        forks=forks,
        now=clock.monotonic,
        changed=changed,
        rules=settings.templates,
    )
    hypervisor.forks.templates = found
    return found
