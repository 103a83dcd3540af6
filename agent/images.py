"""The images that a host holds, by digest, and the overlays on top of them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deskfleet.runtime.inspection import open_image, second_opinion
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.image_facts import Facts, ImageRefused
from deskfleet.schemas.machine import DIGEST, FILE, Format

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
#: The folder below the image folder that holds what the agent fetched, named by its digest.
FETCHED = "fetched"
_OWN = re.compile(rf"{FETCHED}/{DIGEST.pattern}\.({'|'.join(Format)})")
_INSPECTIONS = 4


class DiskError(DeskfleetError):
    """Raised when a guest's disk can't be made; `reason` says which kind of trouble it is."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Known:
    size: int
    mtime_ns: int
    inode: int
    sha256: str


class ImageIndex:
    """The files of the image folder by SHA-256.

    Only regular files with plain names count, of the folder and of FETCHED in it: no link leads out of them. Digests
    are remembered with size, time and inode, since hashing a 20 GB image takes a minute.
    """

    def __init__(self, folder: Path, memory: Path) -> None:
        self._folder = folder
        self._memory = memory
        self._known: dict[str, _Known] = {}
        self._vouched: dict[str, _Known] = {}
        self._unsaved = False
        try:
            self._known = {name: _Known(*row) for name, row in json.loads(memory.read_text()).items()}
        except (OSError, ValueError, TypeError):
            self._known = {}

    def digests(self) -> frozenset[str]:
        """The digests that are there."""
        return frozenset(known.sha256 for known in self._known.values())

    def path(self, sha256: str) -> Path:
        """The file with this digest.

        Raises:
            DiskError: there is none, or it changed since it was hashed.
        """
        for name, known in self._known.items():
            if known.sha256 == sha256:
                path = self._folder / name
                status = _regular(path)
                if status is None or _signature(status) != (known.size, known.mtime_ns, known.inode):
                    raise DiskError(Reason.IMAGE_MISSING, f"{name} has changed or gone; it is being read again")
                return path
        raise DiskError(Reason.IMAGE_MISSING, f"no image with digest {sha256[:12]}…")

    def refresh(self) -> None:
        """Look at the folder again and hash what is new. Slow: call it off the event loop."""
        found: dict[str, _Known] = {}
        for name in [*_names(self._folder), *(f"{FETCHED}/{name}" for name in _names(self._folder / FETCHED))]:
            known = self._look(name)
            if known:
                found[name] = known
        # What came while others were being hashed.
        found |= {name: known for name, known in list(self._vouched.items()) if self._look(name) == known}
        if found != self._known or self._unsaved:
            self._known, self._unsaved = found, False
            self._remember()

    def add(self, name: str) -> None:
        """Hash one file of the folder, and leave the others for a refresh. Slow as well."""
        known = self._look(name)
        if known:
            self._known[name] = known

    def vouch(self, name: str, sha256: str) -> None:
        """A file of the folder has this digest: whoever wrote it has just hashed it."""
        status = _regular(self._folder / name)
        if status:
            self._vouched[name] = self._known[name] = _Known(*_signature(status), sha256)
            self._unsaved = True

    def forget(self, name: str) -> None:
        """A file is about to be deleted: nothing starts on it any more."""
        self._vouched.pop(name, None)
        self._known.pop(name, None)

    def _look(self, name: str) -> _Known | None:
        """What a file is, hashed when it is new or has changed; None for what does not count."""
        path = self._folder / name
        plain = _OWN.fullmatch(name) if "/" in name else FILE.fullmatch(name)
        status = _regular(path) if plain else None
        if status is None:
            return None
        for old in (self._vouched.get(name), self._known.get(name)):
            if old and _signature(status) == (old.size, old.mtime_ns, old.inode):
                return old
        try:
            return _Known(*_signature(status), _sha256(path))
        except OSError as error:
            log.warning("image %s can't be read: %s", name, error.strerror)
            return None

    def _remember(self) -> None:
        rows = {name: [k.size, k.mtime_ns, k.inode, k.sha256] for name, k in self._known.items()}
        temporary = self._memory.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(rows))
            temporary.rename(self._memory)
        except OSError as error:
            log.warning("image digests can't be remembered: %s", error.strerror)


def _names(folder: Path) -> list[str]:
    try:
        return [] if folder.is_symlink() and folder.name == FETCHED else sorted(os.listdir(folder))
    except OSError:
        return []


def _regular(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Disks:
    """Overlays, one a guest.

    qemu-img makes one empty overlay for each image and size; a launch copies that file (200 kB, well under a
    millisecond) where running qemu-img again would cost 15 ms. The image's header is read at every launch.
    """

    def __init__(self, folder: Path, templates: Path) -> None:
        self._folder = folder
        self._templates = templates
        # Threads of their own: an image that takes qemu-img to its limits must not hold up anything else.
        self._inspectors = ThreadPoolExecutor(_INSPECTIONS, "inspect")
        for unfinished in templates.glob("*.tmp"):
            unfinished.unlink()

    def path(self, sid: str) -> Path:
        """Where a guest's overlay is, or would be."""
        return self._folder / f"{sid}.qcow2"

    async def create(self, sid: str, image: Path, sha256: str, image_format: Format, gib: int) -> Path:
        """Make the overlay of a guest with a virtual size of `gib` GiB (or the image's, when that is larger).

        Raises:
            DiskError: no space, or an image that is not safe to use.
        """
        # The path is part of it: an image may be found in another place after it was fetched, or copied, anew.
        place = hashlib.sha256(bytes(image.resolve())).hexdigest()[:12]
        key = f"blank-{gib}" if image_format is Format.ISO else f"{sha256}-{image_format}-{gib}-{place}"
        template = self._templates / f"{key}.qcow2"
        disk = self.path(sid)
        try:
            facts = await asyncio.to_thread(_header, image, image_format)
            if not template.exists():
                await self._make(template, sid, image, facts, gib)
        except ImageRefused as refused:
            raise DiskError(Reason.IMAGE_BAD, f"{image.name}: {refused.fault}: {refused}") from None
        except OSError as error:
            raise _no_disk(error, disk) from error
        return self.copy(sid, template)

    def copy(self, sid: str, blank: Path) -> Path:
        """Make the overlay of a guest as a copy of an empty one.

        Raises:
            DiskError: no space.
        """
        disk = self.path(sid)
        try:
            return Path(shutil.copyfile(blank, disk))
        except OSError as error:
            disk.unlink(missing_ok=True)
            raise _no_disk(error, disk) from error

    async def layer(self, below: Path, overlay: Path, size: int) -> None:
        """Make an empty overlay of `size` bytes on top of another. Raises DiskError."""
        await _qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", str(below), "-F", "qcow2", str(overlay), str(size))

    async def _make(self, template: Path, sid: str, image: Path, facts: Facts, gib: int) -> None:
        # Two first launches of one image may be here at once: each makes its own, the later rename wins.
        temporary = self._templates / f"{sid}.tmp"
        backing: list[str] = []
        size = gib << 30
        if facts.format is not Format.ISO:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._inspectors, _opinion, image, facts)
            # -u: the image is not opened. All that could be learnt from it is known.
            backing = ["-u", "-b", str(image.resolve()), "-F", facts.format.value]
            size = max(size, facts.virtual_size)
        await _qemu_img("create", "-q", "-f", "qcow2", *backing, str(temporary), str(size))
        temporary.rename(template)

    def virtual_size(self, sid: str) -> int:
        """How large a guest's disk is for the guest, in bytes."""
        return _virtual_size(_head(self.path(sid)))

    def freeze(self, sid: str, image: Path, target: Path) -> int:
        """Make a guest's overlay a file of ours that is not written to any more; how large it is for a guest, in bytes.

        Raises:
            DiskError: it is not what was given to the guest's qemu: it names other files than its image.
            OSError: it can't be moved.
        """
        disk = self.path(sid)
        head = _head(disk)
        named, length = int.from_bytes(head[8:16]), int.from_bytes(head[16:20])
        with disk.open("rb") as file:
            file.seek(named)
            backing = file.read(min(length, 1024)) if named else bytes(image.resolve())
        # Version 3, no feature that must be understood: an external data file is one (QEMU, interop/qcow2).
        if head[:8] != b"QFI\xfb\0\0\0\3" or any(head[72:80]) or backing != bytes(image.resolve()):
            raise DiskError(Reason.IMAGE_BAD, "the disk is not what the guest was given")
        disk.rename(target)
        os.chown(target, os.geteuid(), os.getegid())
        target.chmod(0o444)
        return _virtual_size(head)

    def free(self) -> int:
        """Bytes that are free for disks."""
        found = os.statvfs(self._folder)
        return found.f_frsize * found.f_bavail

    def remove(self, sid: str) -> None:
        """Delete a guest's overlay; no error when there is none."""
        try:
            self.path(sid).unlink(missing_ok=True)
        except OSError as error:
            log.error("overlay of %s can't be removed: %s", sid, error.strerror)

    def forget(self, sha256: str) -> None:
        """An image is about to be deleted: the empty overlays on top of it go."""
        for template in self._templates.glob(f"{sha256}-*.qcow2"):
            template.unlink(missing_ok=True)

    def present(self) -> set[str]:
        """The sids that have an overlay."""
        return {path.stem for path in self._folder.glob("*.qcow2")}


def _head(disk: Path) -> bytes:
    with disk.open("rb") as file:
        return file.read(104)


def _virtual_size(head: bytes) -> int:
    """From a qcow2 header (QEMU, interop/qcow2: byte 24)."""
    return int.from_bytes(head[24:32])


def _no_disk(error: OSError, disk: Path) -> DiskError:
    reason = Reason.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.SPAWN_FAILED
    return DiskError(reason, f"the disk can't be made: {error.filename or disk.name}: {error.strerror}")


def _header(image: Path, claimed: Format) -> Facts:
    with open_image(image) as file:
        return file.facts(claimed)


def _opinion(image: Path, facts: Facts) -> None:
    with open_image(image) as file:
        second_opinion(file, facts)


async def _qemu_img(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "qemu-img",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        text = err.decode(errors="replace").strip()
        full = "No space left" in text or "Disk quota" in text
        raise DiskError(Reason.NO_SPACE if full else Reason.IMAGE_BAD, text[-500:])
    return out.decode()
