"""Is a GPU fit for its next guest? The look at it, the verdict, and the record of cards that are not.

A card that a guest has used may have fallen off its bus, hang, or hold what the guest left in it. It is looked at,
reset, and looked at again; one that fails is kept out of use by a file of its own below the agent's state, until an
administrator removes it (`deskfleet-agent gpu release`) or the host has been restarted, which resets its cards. Then
it is looked at anew before it is offered.

sysfs facts (kernel documentation, ABI/testing/sysfs-bus-pci): `config` begins with the vendor id, in which a card
that does not answer reads as 0xffff (PCI Local Bus Specification 3.0, 6.1).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deskfleet.agent.gpus import driver_of, resettable
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.host import Gpu
from deskfleet.schemas.messages import PCI_ADDRESS

_SILENT = 0xFFFF

#: The folder of the records, below the agent's state.
QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Function:
    """What one function of a GPU shows. `vendor` is what its configuration space says now, `id` what the kernel read
    when it found it; None where there is nothing to read. `node_uid` owns the device node of its group."""

    address: str
    present: bool
    driver: str = ""
    group: str = ""
    id: int | None = None
    vendor: int | None = None
    resettable: bool = False
    node_uid: int | None = None


def look(address: str, functions: Iterable[str], sysfs: Path, dev: Path) -> Function:
    """Read what a function of a GPU shows now; no error whatever is missing."""
    device = sysfs / "bus/pci/devices" / address
    if not device.is_dir():
        return Function(address, present=False)
    link = device / "iommu_group"
    group = link.readlink().name if link.is_symlink() else ""
    config = _bytes(device / "config")
    try:
        node_uid = (dev / "vfio" / group).stat().st_uid if group else None
    except OSError:
        node_uid = None
    written = _bytes(device / "vendor").decode(errors="replace").strip()
    return Function(
        address,
        present=True,
        driver=driver_of(device),
        group=group,
        id=int(written, 16) if re.fullmatch(r"0x[0-9a-f]{4}", written) else None,
        vendor=int.from_bytes(config[:2], "little") if len(config) >= 2 else None,
        resettable=resettable(device, functions),
        node_uid=node_uid,
    )


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)  # the header: more of `config` is for root with all capabilities
    except OSError:
        return b""


def fault(functions: Iterable[Function], group: int) -> str:
    """Why a GPU of these functions must not go to a guest, in words; empty when it may."""
    wrong = []
    for function in functions:
        problem = _fault(function, group)
        if problem:
            wrong.append(f"{function.address} {problem}")
    return ", ".join(wrong)


def _fault(function: Function, group: int) -> str:
    if not function.present:
        return "is gone from its bus"
    if function.driver != "vfio-pci":
        return f"is bound to {function.driver or 'no driver'} instead of vfio-pci"
    if function.group != str(group):
        return f"has moved to IOMMU group {function.group or '(none)'}"
    if function.vendor is None:
        return "has a configuration space that can't be read"
    if function.vendor == _SILENT or function.vendor != function.id:
        return "does not answer"
    if not function.resettable:
        return "can't be reset"
    if function.node_uid is None:
        return "has no device node"
    if function.node_uid != 0:
        return f"still belongs to user {function.node_uid}"
    return ""


# --- the record -----------------------------------------------------------------------------------------------


class NotKept(DeskfleetError):
    """Raised when there is no such GPU in quarantine; the text says what there is."""


@dataclass(frozen=True, slots=True)
class Record:
    """A GPU in quarantine: why, and in which boot of the host it came there."""

    gpu: Gpu
    problem: str
    boot_id: str

    @property
    def as_gpu(self) -> Gpu:
        """The GPU as the host reports it."""
        return replace(self.gpu, offered=False, problem=f"in quarantine: {self.problem}"[:400])


class Ward:
    """The records, one file a GPU by its address, so that an administrator's command and a running agent can work on
    them at one time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, record: Record) -> None:
        """Store a record durably. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"{record.gpu.address}.json"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load(self) -> dict[str, Record]:
        """Every record by address. One that can't be read still keeps its GPU out of use."""
        paths = sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []
        return {path.stem: _read(path) for path in paths if PCI_ADDRESS.fullmatch(path.stem)}

    def release(self, address: str) -> None:
        """Remove a record.

        Raises:
            NotKept: there is none.
            OSError: it can't be removed.
        """
        held = self.load()
        if address not in held:
            known = f"in quarantine: {', '.join(held)}" if held else "no GPU is in quarantine"
            raise NotKept(f"{address!r} is not in quarantine; {known}")
        (self._folder / f"{address}.json").unlink()


def _read(path: Path) -> Record:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        gpu = Gpu(**{**data["gpu"], "functions": tuple(data["gpu"]["functions"])})
        return Record(gpu, str(data["problem"]), str(data["boot_id"]))
    except (OSError, ValueError, KeyError, TypeError):
        gpu = Gpu(path.stem, "unknown", 0, (path.stem,), offered=False)
        return Record(gpu, f"its record {path} can't be read", "")
