"""Small pictures of guests' screens, as they travel from a host to a portal."""

from __future__ import annotations

import struct

#: Pictures fit into this box (pixels), and into this many bytes.
WIDTH, HEIGHT = 320, 240
MOST_BYTES = 64 * 1024

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = struct.Struct(">I4sII")


def is_picture(data: bytes) -> bool:
    """Whether this begins as a PNG of our size does (PNG specification, 5.2 and 11.2.2: signature, then IHDR)."""
    if not len(_SIGNATURE) + _IHDR.size <= len(data) <= MOST_BYTES or not data.startswith(_SIGNATURE):
        return False
    length, kind, width, height = _IHDR.unpack_from(data, len(_SIGNATURE))
    return bool(length == 13 and kind == b"IHDR" and 1 <= width <= WIDTH and 1 <= height <= HEIGHT)
