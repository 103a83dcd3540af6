"""Whether a guest's display answers."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path


async def greets(path: Path) -> bool:
    """Whether an RFB server greets on this socket: it speaks first, and says its version (RFC 6143, 7.1.1)."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    try:
        return (await reader.readexactly(12)).startswith(b"RFB ")
    except (asyncio.IncompleteReadError, OSError):
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until_it_greets(path: Path, ended: asyncio.Event, limit_s: float) -> bool:
    """Wait for the display; False when the guest has ended. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while not ended.is_set():
            if await greets(path):
                return True
            # The socket appears between two system calls of qemu; 2 ms of a 50 ms start is a fair grain.
            await asyncio.sleep(0.002)
    return False
