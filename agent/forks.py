"""The hypervisor's way with templates: which launch gets one, how a fork comes to life, and what failed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from deskfleet.agent import fork
from deskfleet.agent.guest_agent import GuestAgent
from deskfleet.agent.images import Disks
from deskfleet.agent.qmp import Monitor, MonitorError, first_monitor, monitor
from deskfleet.agent.starter import Config, Starter
from deskfleet.agent.template_store import Template
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Birth

log = logging.getLogger(__name__)

#: What would stop a boot as well says nothing about a template.
_NOT_THE_TEMPLATE = (Reason.NO_SPACE, Reason.VOLUME_UNAVAILABLE, Reason.IMAGE_MISSING, Reason.NETWORK_FAILED)
#: How often a fork is tried to be made one of its own.
TRIES = 3
#: What is shown with one that could not.
NO_IDENTITY = (
    "No network: this desktop could not be given a name and keys of its own. Start a new one, which is booted."
)


class Lender(Protocol):
    """Who has templates (templates.py)."""

    def lend(self, start: VmStart) -> tuple[Template | None, Birth]: ...

    def worked(self, key: str) -> None: ...

    def failed(self, key: str, why: str) -> None: ...


class Forks:
    """Forks for one hypervisor. Without `templates` there are none."""

    def __init__(self, starter: Starter, disks: Disks, config: Config) -> None:
        self.templates: Lender | None = None
        self._starter = starter
        self._disks = disks
        self._config = config

    def lend(self, start: VmStart) -> tuple[Template | None, Birth]:
        """The template to fork, or why to boot."""
        return self.templates.lend(start) if self.templates else (None, Birth.BOOTED)

    def failed(self, start: VmStart, error: Exception) -> None:
        """A fork could not be started, and is booted."""
        if self.templates and getattr(error, "reason", None) not in _NOT_THE_TEMPLATE:
            self.templates.failed(start.template, str(error) or type(error).__name__)

    async def wake(self, start: VmStart, template: Template, ended: asyncio.Event) -> None:
        """Let a fork's qemu, which was just started, take up the template's state, and run it.

        Raises:
            MonitorError, OSError: it does not.
        """
        async with first_monitor(self._starter.paths(start.sid).qmp, ended, self._config.ready_s) as qemu:
            await fork.receive(qemu, template.files.state)
            mounts = self._starter.mounts(start)
            await fork.grow(qemu, template, start, mounts, self._disks.virtual_size(start.sid))
            await fork.plug_volumes(qemu, mounts)
            await qemu.command("cont")
        if self.templates:
            self.templates.worked(start.template)

    async def woke(self, start: VmStart) -> bool:
        """Whether a fork, of which a former agent did not say that it is ready, runs nevertheless."""
        try:
            async with monitor(self._starter.paths(start.sid).qmp) as qemu:
                return bool((await qemu.command("query-status"))["status"] == "running")
        except MonitorError:
            return False

    async def introduce(
        self,
        start: VmStart,
        qemu: Monitor,
        inside: GuestAgent | None,
        here: Callable[[], bool],
        says: Callable[[str, str], None],
    ) -> bool:
        """Make a running fork one of its own, and connect it; False when that did not work, and `says` tells of it.
        `here` is true for as long as the connection to its qemu lasts."""
        network = self._config.network != "none"
        for left in reversed(range(TRIES)):
            try:
                mounts = self._starter.mounts(start)
                await fork.introduce(qemu, inside, start, mounts, network=network, wall=time.time)
            except (DeskfleetError, OSError) as error:
                log.warning("%s has not become one of its own: %s", start.sid, error)
                if not here():
                    return False
                if not left:
                    self.failed(start, error)
                    says(start.sid, NO_IDENTITY)
                await asyncio.sleep(1.0)
            else:
                return True
        return False
