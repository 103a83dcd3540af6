"""Look at a guest's screen: pictures by QMP, hashes of regions, and what the tiny guest says about itself."""

from __future__ import annotations

import hashlib
import io
from typing import TypeAlias

from PIL import Image
from support.qmp import Qmp

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom, as Pillow has it: the last two lie outside."""

# Positions on the tiny guest's screen, as machines/tiny/main.c draws it.
TINY_SIZE = (800, 600)
TINY_TEXT: Box = (92, 100, 708, 436)
TINY_CLOCK: Box = (584, 8, 648, 24)
TINY_POWER_OFF = (740, 16)
TINY_FREE: Box = (8, 200, 72, 400)
"""A piece of plain wallpaper, where nothing but a click and the pointer draws."""
TINY_STRIP = (144, 520)
TINY_BLOCK = 8
TINY_CLICK = (255, 90, 79)
"""Colour of the dot that a click leaves."""


def picture(png: bytes) -> Image.Image:
    """Decode a PNG or PPM file to RGB."""
    return Image.open(io.BytesIO(png)).convert("RGB")


def look(qmp: Qmp) -> Image.Image:
    """The guest's screen now."""
    return picture(qmp.screendump())


def region_hash(image: Image.Image, box: Box) -> str:
    """A digest of the pixels in the box, to see whether they changed."""
    return hashlib.sha256(image.crop(box).convert("RGB").tobytes()).hexdigest()


def colours(image: Image.Image, box: Box | None = None) -> int:
    """How many different colours the picture, or the box, has: 1 for a blank screen."""
    counted = (image.crop(box) if box else image).getcolors(1 << 24)
    assert counted is not None
    return len(counted)


def identity(session_id: str) -> bytes:
    """What `read_identity` finds on a tiny guest that was given this session id."""
    return session_id.encode()[:8].ljust(8, b"\0")


def read_identity(image: Image.Image) -> bytes | None:
    """The first 8 bytes of the session id that a tiny guest shows, or None when it shows none (or is not up).

    The picture may be scaled (a browser's canvas): the middles of the blocks are read.
    """
    bits = 0
    for index in range(64):
        x = (TINY_STRIP[0] + (index + 0.5) * TINY_BLOCK) * image.width / TINY_SIZE[0]
        y = (TINY_STRIP[1] + 0.5 * TINY_BLOCK) * image.height / TINY_SIZE[1]
        pixel = image.convert("RGB").crop((int(x), int(y), int(x) + 1, int(y) + 1)).tobytes()
        if max(pixel) > 60 and min(pixel) < 195:
            return None
        bits = bits << 1 | (min(pixel) >= 195)
    return bits.to_bytes(8, "big") if bits else None
