"""What an image's header says, why an image is refused, and the small tools that its readers share."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.machine import Format

#: Reads at most `length` bytes at `offset`; fewer at the end of the file.
Read = Callable[[int, int], bytes]

SECTOR = 512


class Fault(StrEnum):
    """Why an image is refused."""

    NAME = "name"
    SYMLINK = "symlink"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    CHANGING = "changing"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    MISMATCH = "mismatch"
    UNSUPPORTED = "unsupported"
    BACKING_FILE = "backing_file"
    DATA_FILE = "data_file"
    EXTENT = "extent"
    ENCRYPTED = "encrypted"
    TOO_LARGE = "too_large"
    SNAPSHOTS = "snapshots"
    OVER_LIMIT = "over_limit"
    UNCONFINED = "unconfined"
    NO_SPACE = "no_space"
    DISAGREE = "disagree"


class ImageRefused(DeskfleetError):
    """Raised when an image must not be used; `fault` is for programs, the text for people."""

    def __init__(self, fault: Fault, sentence: str) -> None:
        super().__init__(sentence)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Facts:
    """What a header says. `virtual_size` in bytes, as the guest sees the disk; names are bytes from the image, so
    they are only ever shown, never opened. `create_type` and `extents` are VMDK's."""

    format: Format
    virtual_size: int
    backing_file: str = ""
    data_file: str = ""
    encrypted: bool = False
    snapshots: int = 0
    create_type: str = ""
    extents: tuple[str, ...] = ()


def shown(name: bytes) -> str:
    """A name out of an image, fit for a log and a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in name[:120].decode("ascii", "replace"))
    return f"{text!r}" + ("…" if len(name) > 120 else "")


def damaged(what: str) -> ImageRefused:
    """The refusal of a header that contradicts itself."""
    return ImageRefused(Fault.DAMAGED, f"The header is damaged: {what}.")


def unsupported(what: str) -> ImageRefused:
    """The refusal of something rare that this code, or qemu, does not read."""
    return ImageRefused(Fault.UNSUPPORTED, f"It needs something that is not supported here: {what}.")


def inside(end: int, size: int, what: str) -> None:
    """Refuse a file of `size` bytes in which something would end at `end`."""
    if end > size:
        raise ImageRefused(Fault.TRUNCATED, f"The file ends before {what}: it has {size} bytes and should have {end}.")


def unpack(layout: str, data: bytes) -> tuple[int, ...]:
    """struct.unpack of the first bytes; too few of them are a refusal."""
    if len(data) < struct.calcsize(layout):
        raise ImageRefused(Fault.TRUNCATED, "The file ends within its header.")
    return struct.unpack_from(layout, data)
