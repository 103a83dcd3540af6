"""The GPUs of a host between their guests: found, checked, offered, or kept in quarantine.

A GPU is offered only while it is known to be fit: its last check was passed, and no guest has had it since. So every
GPU is checked when an agent begins, when its guest has ended, and when it comes out of quarantine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path

from deskfleet.agent.argv import gpus_of
from deskfleet.agent.gpus import find_gpus
from deskfleet.agent.processes import arguments, pids
from deskfleet.agent.quarantine import Record, Ward, fault, look
from deskfleet.schemas.host import Gpu

log = logging.getLogger(__name__)

#: How long a card may take to reset. Most need a tenth of a second; the kernel itself gives up after a minute.
RESET_S = 15.0

Reset = Callable[[Gpu, Path], Awaitable[str]]


async def reset(gpu: Gpu, dev: Path) -> str:
    """Reset a card; what went wrong, empty when nothing did. A reset that hangs in the kernel holds up nobody."""
    words = [sys.executable, "-m", "deskfleet.agent.vfio", str(dev), str(gpu.group), *gpu.functions]
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*words, stdin=null, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    try:
        said, _ = await asyncio.wait_for(process.communicate(), RESET_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            process.kill()
            await asyncio.wait_for(process.wait(), 1.0)
        return f"does not come back from a reset within {RESET_S:g} s"
    return said.decode(errors="replace").strip()[-300:] or "can't be reset" if process.returncode else ""


def driven() -> set[str]:
    """The PCI functions on the command lines of all processes."""
    return {address for pid in pids() for address in gpus_of(arguments(pid))}


class GpuLending:
    """Which GPUs this host can give. `boot_id` names this boot of the host; `changed` hears of every check's end."""

    def __init__(
        self,
        folder: Path,
        boot_id: str,
        names: dict[str, str],
        *,
        sysfs: Path,
        dev: Path,
        changed: Callable[[], None],
        reset: Reset = reset,
        driven: Callable[[], Collection[str]] = driven,
    ) -> None:
        self._ward = Ward(folder)
        self._boot_id = boot_id
        self._names = names
        self._sysfs = sysfs
        self._dev = dev
        self._changed = changed
        self._reset = reset
        self._driven = driven
        self._found = find_gpus(sysfs, names)
        self._kept = self._ward.load()
        #: Addresses of those that the disk holds as well.
        self._stored = set(self._kept)
        #: Functions of the GPUs whose last check was passed.
        self._fit: set[tuple[str, ...]] = set()
        #: One check of a group at a time: VFIO gives it to one process only, and another would find it at fault.
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        #: What guests have, as it was when they got it: a card may vanish under its guest.
        self._out: list[Gpu] = []
        for address, record in list(self._kept.items()):
            if record.boot_id and record.boot_id != boot_id:
                log.warning("GPU %s comes out of quarantine: the host was restarted", address)
                self._ward.release(address)
                self._forget(address)

    def gpus(self, held: Collection[str]) -> tuple[Gpu, ...]:
        """The GPUs as the host reports them; `held` are the functions that guests have now."""
        shown = [self._shown(gpu, held) for gpu in self._found]
        here = {function for gpu in shown for function in gpu.functions}
        gone = [record.as_gpu for record in self._kept.values() if not here.intersection(record.gpu.functions)]
        return (*shown, *gone)

    def _shown(self, gpu: Gpu, held: Collection[str]) -> Gpu:
        if gpu.address in self._kept:
            return replace(gpu, offered=False, problem=self._kept[gpu.address].as_gpu.problem)
        if gpu.offered and gpu.functions not in self._fit and not set(gpu.functions) & set(held):
            return replace(gpu, offered=False, problem="it is being checked before its next use")
        return gpu

    @property
    def in_quarantine(self) -> int:
        """How many GPUs are kept out of use."""
        return len(self._kept)

    def lent(self, functions: Collection[str]) -> None:
        """A guest has, or gets, the GPU of these functions: it must be checked after that."""
        self._fit = {fit for fit in self._fit if not set(fit) & set(functions)}
        self._out += [gpu for gpu in self._found if set(gpu.functions) & set(functions)]

    async def returned(self, functions: Collection[str]) -> None:
        """Check the GPU that a guest had, now that the guest is gone."""
        back = [gpu for gpu in self._out if set(gpu.functions) & set(functions)]
        self._out = [gpu for gpu in self._out if gpu not in back]
        for gpu in back:
            await self._check(gpu)

    async def refresh(self, held: Callable[[], Collection[str]]) -> None:
        """Look again at which GPUs there are and which are in quarantine, and check those that are new, were released
        or have not been checked yet. `held` gives the functions that guests have."""
        self._found = await asyncio.to_thread(find_gpus, self._sysfs, self._names)
        self._fit &= {gpu.functions for gpu in self._found if gpu.offered}  # what was away may have been elsewhere
        stored = set(self._stored)  # what comes in while the disk is read is not released
        kept = await asyncio.to_thread(self._ward.load)
        for address in stored - set(kept):
            log.warning("GPU %s was released from quarantine", address)
            self._forget(address)
        self._kept |= kept
        self._stored |= set(kept)
        for gpu in self._found:
            if gpu.offered and not self._known(gpu) and not set(gpu.functions) & set(held()):
                await self._check(gpu)

    def _forget(self, address: str) -> None:
        del self._kept[address]
        self._stored.discard(address)

    def _known(self, gpu: Gpu) -> bool:
        return gpu.functions in self._fit or gpu.address in self._kept

    async def _check(self, gpu: Gpu) -> None:
        async with self._locks[gpu.group]:
            if self._known(gpu) or set(gpu.functions) & set(await asyncio.to_thread(self._driven)):
                return  # just checked; or driven by a stranger, or by a guest that is being killed: a later look sees
            problem = await self._look(gpu) or await self._reset(gpu, self._dev) or await self._look(gpu)
            if problem:
                await self._keep(Record(gpu, problem, self._boot_id))
            else:
                self._fit.add(gpu.functions)
        self._changed()

    async def _look(self, gpu: Gpu) -> str:
        return await asyncio.to_thread(
            lambda: fault([look(each, gpu.functions, self._sysfs, self._dev) for each in gpu.functions], gpu.group)
        )

    async def _keep(self, record: Record) -> None:
        log.error("GPU %s goes into quarantine: %s", record.gpu.address, record.problem)
        self._kept[record.gpu.address] = record
        try:
            await asyncio.to_thread(self._ward.put, record)
            self._stored.add(record.gpu.address)
        except OSError as error:
            # It stays out of use for this life of the agent, and the next one begins with a check.
            log.error("the quarantine of %s can't be stored: %s", record.gpu.address, error.strerror)
