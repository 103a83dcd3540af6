"""Small pictures of guests' screens: for the person's list of desktops, and as the last thing seen of one that failed.

qemu writes the whole screen as PPM into the guest's folder (QMP screendump); it is made small here. A guest decides
what is in that file, and one that has taken over its qemu decides all of it: the library is let loose on this one
simple format only, with a limit on what it may unpack.
"""

from __future__ import annotations

import asyncio
import io
import os
import stat
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.picture import HEIGHT, MOST_BYTES, WIDTH

#: A screen of 8192 × 4320 pixels, three bytes each, is the largest that is looked at.
_MOST_PIXELS = 8192 * 4320
_MOST_PPM = 3 * _MOST_PIXELS + 64
#: Nobody needs a newer one than this (seconds); however many ask, qemu is asked once.
FRESH_S = 2.0


class PictureError(DeskfleetError):
    """Raised when there is no picture to be had."""


def read_screen(path: Path) -> bytes:
    """The screen that qemu has written, as it is; the file is gone afterwards.

    Raises:
        PictureError: it is no plain file, or too large for a screen.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_PPM:
                raise PictureError("what lies there is no screen")
            screen = file.read(_MOST_PPM)
        path.unlink()
    except OSError as error:
        raise PictureError(f"the screen can't be read: {error.strerror}") from error
    return screen


def shrink(screen: bytes) -> bytes:
    """A PPM as a PNG that fits schemas/picture.py. Takes some 10 ms for a large screen.

    Raises:
        PictureError: it is no PPM, or too large.
    """
    try:
        with Image.open(io.BytesIO(screen), formats=("PPM",)) as image:
            if not screen.startswith(b"P6") or image.mode != "RGB" or image.width * image.height > _MOST_PIXELS:
                raise PictureError("not the picture of a screen")
            image.thumbnail((WIDTH, HEIGHT), Image.Resampling.BOX, reducing_gap=2.0)
            png = _png(image, 256)
            return png if len(png) <= MOST_BYTES else _png(image, 16)  # noise does not compress; half a byte a dot fits
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"not the picture of a screen: {type(error).__name__}") from error


def _png(image: Image.Image, colours: int) -> bytes:
    out = io.BytesIO()
    image.quantize(colours).save(out, "PNG")
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class _Taken:
    png: bytes
    at: float


class Pictures:
    """The newest picture of each guest, on the agent's loop. `dump` makes qemu write a screen and says where it is,
    or raises DeskfleetError; `now` are seconds of a clock that never goes back."""

    def __init__(self, dump: Callable[[str], Awaitable[Path]], now: Callable[[], float]) -> None:
        self._dump = dump
        self._now = now
        self._taken: dict[str, _Taken] = {}
        self._busy: dict[str, asyncio.Future[bytes]] = {}

    async def look(self, sid: str) -> bytes:
        """A picture of now, or nearly so. Raises DeskfleetError when there is none."""
        taken = self._taken.get(sid)
        if taken and self._now() - taken.at < FRESH_S:
            return taken.png
        if sid not in self._busy:
            work = self._busy[sid] = asyncio.ensure_future(self._take(sid))
            work.add_done_callback(lambda _: self._busy.pop(sid))
        return await asyncio.shield(self._busy[sid])

    async def sweep(self, running: Collection[str]) -> None:
        """A picture of each of these guests, one after the other, so that there is a last one whatever happens; what is
        kept of others goes. What fails is tried again at the next sweep."""
        for sid in set(self._taken) - set(running):
            del self._taken[sid]
        for sid in running:
            with suppress(DeskfleetError):
                await self.look(sid)

    async def _take(self, sid: str) -> bytes:
        path = await self._dump(sid)
        png = await asyncio.to_thread(lambda: shrink(read_screen(path)))
        self._taken[sid] = _Taken(png, self._now())
        return png

    def last(self, sid: str) -> bytes | None:
        """The last picture of a guest that has ended. Nothing of it is kept any longer."""
        taken = self._taken.pop(sid, None)
        return taken.png if taken else None
