"""What a launch form offers and how it is filled in: the sizes by name, and what the person chose last time. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deskfleet.portal.languages import N_
from deskfleet.schemas.machine import GpuPolicy, Machine
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Resources

#: What a form sends for a GPU of whatever model.
ANY_GPU = "any"


@dataclass(frozen=True, slots=True)
class Preset:
    """A size with a name, which is translated where it is shown."""

    name: str
    resources: Resources


def presets(machine: Machine) -> list[Preset]:
    """Up to three sizes, from the smallest to the largest that the machine allows; those that are alike once."""
    ranges = (machine.cpus, machine.memory_mib, machine.disk_gib)
    gpus = 1 if machine.gpu is GpuPolicy.REQUIRED else 0
    found: list[Preset] = []
    for name, values in (
        (N_("Small"), [allowed.min for allowed in ranges]),
        (N_("Standard"), [allowed.default for allowed in ranges]),
        (N_("Large"), [allowed.max for allowed in ranges]),
    ):
        resources = Resources(values[0], values[1], values[2], gpus)
        if all(preset.resources != resources for preset in found):
            found.append(Preset(name, resources))
    return found if len(found) > 1 else []


def last(machine: Machine, launches: Iterable[LaunchRequested], longest_s: int) -> LaunchRequested | None:
    """The last launch of this machine, when it is still allowed as it was. `launches` are the person's, newest first;
    `longest_s` is how long a desktop may last at this site."""
    found = next((launch for launch in launches if launch.machine == machine.name), None)
    if found is None or machine.problems(found.resources) or not 60 <= found.lifetime_s <= longest_s:
        return None
    return found


def filled(launch: LaunchRequested, *, may_persist: bool) -> dict[str, str]:
    """The fields of a form that asks for the same again."""
    size = launch.resources
    return {
        "cpus": str(size.cpus),
        "memory_mib": str(size.memory_mib),
        "disk_gib": str(size.disk_gib),
        "gpu": (size.gpu_model or ANY_GPU) if size.gpus else "",
        "persistent": "yes" if launch.persistent and may_persist else "no",
        "lifetime_s": str(launch.lifetime_s),
    }
