"""What makes a fork of a template a desktop of its own: the state, the size that was asked for, and who it is.

In this order, because each guest must be alone in what it is before it meets others:
1. qemu takes up the saved state; CPUs, memory and disk grow, volumes are plugged in; it runs, and can be seen;
2. inside, by its own agent and the image's hook (docs/images.md): clock, hostname, machine-id, keys, entropy;
3. the network card is plugged in only now, with an address of its own, so that nobody ever meets two of the same;
4. the clipboard's port comes last. By it an agent that has died in between knows what is left to do.
Facts about qemu 7.2: what is plugged in before the guest runs is there when it looks; a saved state holds the card's
old address and would restore it, so templates have none; vmgenid tells the kernel by itself that it was forked.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from deskfleet.agent import argv as build
from deskfleet.agent.guest_agent import GuestAgent
from deskfleet.agent.qmp import Monitor
from deskfleet.agent.template_store import Template, TemplateError
from deskfleet.agent.volumes import Mount, shares_memory, told
from deskfleet.schemas.machine import Os
from deskfleet.schemas.messages import VmStart

#: How long the image's hook may take (seconds), and how many bytes of entropy it is given.
HOOK_S = 60.0
_ENTROPY = 64
_CARD, _CLIPBOARD = "card", "clipboard"
_PLAIN_MEMORY: dict[str, object] = {"qom-type": "memory-backend-ram"}

#: What an image brings along, by the guest's family: the hook, and the mark of a desktop that is ready.
HOOKS = {
    Os.LINUX: ("/usr/lib/deskfleet/resume",),
    Os.WINDOWS: (
        r"C:\Windows\System32\WindowsPowerShell\v1.0\powershell.exe",
        "-ExecutionPolicy",
        "Bypass",
        "-File",
        r"C:\ProgramData\Deskfleet\resume.ps1",
    ),
}
MARKS = {Os.LINUX: "/run/deskfleet/ready", Os.WINDOWS: r"C:\ProgramData\Deskfleet\ready"}

#: A guest without an agent of its own has nothing to be told: it is complete when it runs.
SILENT = Os.OTHER


async def receive(qemu: Monitor, state: Path) -> None:
    """Take up a template's state; the guest is stopped afterwards.

    Raises:
        MonitorError: qemu does not take it, or is gone.
        OSError: there is no such state.
    """
    file = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
    try:
        await qemu.give("state", file)
    finally:
        os.close(file)
    await qemu.command("migrate-set-capabilities", IGNORE_SHARED)
    await qemu.command("migrate-incoming", {"uri": "fd:state"})
    while (await qemu.command("query-status"))["status"] == "inmigrate":
        await asyncio.sleep(0.001)


#: The memory is not in the stream: it is mapped. Its name says that qemu may yet change it; another qemu that does not
#: know it refuses, and the guest is booted.
IGNORE_SHARED: dict[str, object] = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


async def grow(qemu: Monitor, template: Template, start: VmStart, mounts: Sequence[Mount], disk: int) -> None:
    """Give a fork that has not run yet the size that was asked for; its disk has `disk` bytes.

    Raises:
        MonitorError: qemu can't.
    """
    blueprint, want = template.blueprint, start.resources
    if want.cpus > blueprint.cpus:
        slots = [slot for slot in await qemu.command("query-hotpluggable-cpus") if "qom-path" not in slot]
        # They are told from the last to the first.
        for number, slot in enumerate(slots[::-1][: want.cpus - blueprint.cpus]):
            await qemu.command("device_add", {"driver": slot["type"], "id": f"cpu-more{number}", **slot["props"]})
    if want.memory_mib > blueprint.memory_mib:
        size = (want.memory_mib - blueprint.memory_mib) << 20
        # vhost-user servers end when some of the memory has no file that they can map.
        kind = {"qom-type": "memory-backend-memfd", "share": True} if shares_memory(mounts) else _PLAIN_MEMORY
        await qemu.command("object-add", {**kind, "id": "ram-more", "size": size})
        await qemu.command("device_add", {"driver": "pc-dimm", "id": "dimm-more", "memdev": "ram-more"})
    if want.disk_gib << 30 > disk:
        await qemu.command("block_resize", {"node-name": "disk", "size": want.disk_gib << 30})


async def plug_volumes(qemu: Monitor, mounts: Sequence[Mount]) -> None:
    """Plug in the volumes; the first port is the network card's. Raises MonitorError."""
    for number, mount in enumerate(mounts):
        device = build.volume(mount, number)
        await qemu.command("device_add", {**device, "id": f"volume{number}", "bus": build.PORT.format(number + 1)})


async def _plugged(qemu: Monitor) -> set[str]:
    return {child["name"] for child in await qemu.command("qom-list", {"path": "/machine/peripheral"})}


async def introduce(
    qemu: Monitor,
    inside: GuestAgent | None,
    start: VmStart,
    mounts: Sequence[Mount],
    *,
    network: bool,
    wall: Callable[[], float],
    entropy: Callable[[int], bytes] = os.urandom,
) -> None:
    """Make a running fork one of its own, and connect it. Goes on where it was interrupted; of a complete one nothing
    is changed.

    Raises:
        GuestAgentError: the guest's agent does not answer.
        TemplateError: the image's hook failed.
        MonitorError: qemu does not plug in what it should.
    """
    plugged = await _plugged(qemu)
    if _CLIPBOARD in plugged:
        return
    if start.os is not SILENT:
        if inside is None:
            raise TemplateError("the guest has no channel for an agent")
        await inside.command("guest-set-time", {"time": int(wall() * 1e9)})
        program, *arguments = HOOKS[start.os]
        code, complaint = await inside.run(program, arguments, _words(start, mounts, entropy(_ENTROPY)), HOOK_S)
        if code:
            raise TemplateError(f"the image's resume hook failed ({code}): {complaint}"[:400])
    if network and _CARD not in plugged:
        await qemu.command("device_add", {**build.card(start), "id": _CARD, "bus": build.PORT.format(0)})
    if start.os is not SILENT:
        await qemu.command("device_add", {**build.CLIPBOARD, "id": _CLIPBOARD})


def _words(start: VmStart, mounts: Sequence[Mount], entropy: bytes) -> str:
    """What the hook is told: a key and its value in each line."""
    lines = [f"hostname {build.hostname(start.sid)}", f"entropy {base64.b64encode(entropy).decode()}"]
    lines += [f"mount {line}" for line in told(mounts).splitlines()]
    return "\n".join([*lines, "end", ""])
