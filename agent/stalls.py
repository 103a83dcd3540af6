"""Guests that qemu has paused because this host's disk is full: told of, and going on when there is room again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from deskfleet.agent.qmp import Monitor

#: What is shown with the desktop.
FULL = "Paused: the host's disk is full. It goes on by itself when there is room."
#: With less, it would be paused again at once.
ROOM = 64 << 20
_LOOK_S = 1.0


async def watch(qemu: Monitor, free: Callable[[], int], tell: Callable[[str], None]) -> None:
    """See a pause through: `tell` says what people should know, and "" when the guest runs. Returns at once when it is
    not paused for want of room (run state io-error of QMP query-status).

    Raises:
        MonitorError: qemu does not answer.
    """
    told = False
    while (await qemu.command("query-status"))["status"] == "io-error":
        if not told:
            told = True
            tell(FULL)
        if free() >= ROOM:
            await qemu.command("cont")
        await asyncio.sleep(_LOOK_S)
    tell("")
