"""Folders of the host that guests see: which ones a launch gets, and where a person's own one is.

Two ways, of which each does what the other can't:
- 9p is part of qemu, which runs as a user that owns nothing and is another one at each launch. So it serves what
  everybody may read, and nothing can be written through it.
- virtiofs is served by a process of its own (share.py), in which the ids of the guest's users are OWNER, OWNER + 1, …
  of the host. They are the same at each launch and on each host, so a file that a desktop wrote is its user's in the
  next one, although that guest's own programs run as another user.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import string
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from deskfleet.schemas.errors import DeskfleetError

#: What stands for the user's folder, as the last part of a path.
USER = "{user}"
#: How many ids of the guest's users a file server knows, from 0 on.
IDS = 65_536
_PLAIN = frozenset((string.ascii_lowercase + string.digits + "_-.@+").encode())
#: A file name has at most 255 bytes.
_LONGEST = 200


class Kind(StrEnum):
    """How a folder gets into the guest."""

    NINE_P = "9p"
    VIRTIOFS = "virtiofs"


class VolumeError(DeskfleetError):
    """Raised when a folder can't be given to a guest; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder to give to guests as the file system `tag`, to be mounted at `target` there. `path` may end in
    /{user}. Empty `machines` or `users`: all of them. `owner` is the host's id of the guest's root (virtiofs)."""

    tag: str
    path: str
    kind: Kind
    read_only: bool
    target: str
    owner: int
    create: bool
    machines: tuple[str, ...] = ()
    users: tuple[str, ...] = ()

    def serves(self, machine: str, user: str) -> bool:
        """Whether this launch gets it."""
        return (not self.machines or machine in self.machines) and (not self.users or user in self.users)


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume as one guest gets it: the folder `entry` of `base`, or `base` itself when that is empty."""

    volume: Volume
    base: Path
    entry: str = ""

    @property
    def path(self) -> Path:
        """The folder."""
        return self.base / self.entry


def component(user: str) -> str:
    """A user's name as the name of one folder: no two names share one, and none leads anywhere.

    Lower-case letters, digits and _-.@+ stand for themselves, but no dot or dash in front; every other byte of the
    name in UTF-8 is %XX. Capitals too, for file systems to which Ann and ann are one. What gets too long is %- and the
    SHA-256 of the name, which nothing else makes.
    """
    data = user.encode("utf-8", "surrogatepass")
    if not data:
        raise VolumeError("a user without a name has no folder")
    safe = "".join(
        chr(byte) if byte in _PLAIN and (place or byte not in b".-") else f"%{byte:02X}"
        for place, byte in enumerate(data)
    )
    return safe if len(safe) <= _LONGEST else f"%-{hashlib.sha256(data).hexdigest()}"


def mounts(volumes: Iterable[Volume], machine: str, user: str) -> tuple[Mount, ...]:
    """What a launch gets, in the order of the settings."""
    return tuple(
        Mount(volume, Path(volume.path).parent, component(user))
        if volume.path.endswith(f"/{USER}")
        else Mount(volume, Path(volume.path))
        for volume in volumes
        if volume.serves(machine, user)
    )


def ready(mount: Mount) -> None:
    """See that the folder is there, and make a person's own one where that was asked for. A link in its place is
    refused: it may lead to what is another's.

    Raises:
        VolumeError: it is not there, not a folder, or a link.
    """
    volume = mount.volume
    try:
        base = os.open(mount.base, os.O_PATH | os.O_DIRECTORY)
        with contextlib.ExitStack() as ends:
            ends.callback(os.close, base)
            if mount.entry:
                if volume.create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(mount.entry, 0o700, dir_fd=base)
                folder = os.open(mount.entry, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=base)
                ends.callback(os.close, folder)
                # Still root's: just made, or by an agent that went no further.
                if volume.create and os.fstat(folder).st_uid == 0:
                    os.chown(mount.entry, volume.owner, volume.owner, dir_fd=base, follow_symlinks=False)
    except OSError as error:
        raise VolumeError(f"volume {volume.tag}: {mount.path}: {error.strerror}") from error


def shares_memory(mounts: Iterable[Mount]) -> bool:
    """Whether a file server reads and writes the memory of a guest that sees these: all of it must be shared then."""
    return any(mount.volume.kind is Kind.VIRTIOFS for mount in mounts)


def told(mounts: Iterable[Mount]) -> str:
    """What the guest is told, one line a volume: tag, kind, ro or rw, where to mount it."""
    return "".join(
        f"{volume.tag} {volume.kind} {'ro' if volume.read_only else 'rw'} {volume.target}\n"
        for volume in (mount.volume for mount in mounts)
    )
