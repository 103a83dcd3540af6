"""What an agent has fetched: images in a folder of their own, a mark beside each, and what is half there.

`<sha256>.<format>` is an image, `<sha256>.json` its mark; `.<sha256>.part` and `.<sha256>.json` are an image on its
way and what its source had. Only what has a mark is ever deleted, and only here: what an administrator put into the
image folder is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deskfleet.agent.images import FETCHED
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.machine import DIGEST, FILE, Format
from deskfleet.schemas.messages import CatalogueImage


class StoreError(DeskfleetError):
    """Raised when nothing can be fetched into this image folder; the text says why."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An image that the agent fetched: its name and format at the source, and for how many seconds in all, while an
    agent ran, the catalogue has not named it."""

    file: str
    format: Format
    unnamed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Begun:
    """A file on its way, open and locked. `validator` names what its source had, "" when that is not known."""

    path: Path
    fd: int
    size: int
    validator: str


def outdated(marks: Mapping[str, Mark], used: Collection[str], keep_s: float) -> list[str]:
    """The digests of what may go: no guest's disk is on top of it, and the catalogue has not named it for so long.
    Nothing goes when `keep_s` is 0."""
    if not keep_s:
        return []
    return sorted(sha256 for sha256, mark in marks.items() if mark.unnamed_s >= keep_s and sha256 not in used)


def aged(marks: Mapping[str, Mark], named: Collection[str], elapsed: float) -> dict[str, Mark]:
    """The marks that change when another `elapsed` seconds have gone by with these digests in the catalogue."""
    after = {k: replace(m, unnamed_s=0.0 if k in named else m.unnamed_s + elapsed) for k, m in marks.items()}
    return {sha256: mark for sha256, mark in after.items() if mark != marks[sha256]}


class Store:
    """The fetched images below one image folder."""

    def __init__(self, images: Path) -> None:
        self._folder = images / FETCHED
        self._lock = -1

    def open(self) -> None:
        """Take the folder; what a crash left is removed, but for what can be gone on with.

        Raises:
            StoreError: another agent has it, or it can't be written.
        """
        if self._lock >= 0:
            return
        try:
            self._folder.mkdir(mode=0o755, exist_ok=True)
            if self._folder.is_symlink():
                raise StoreError(f"{self._folder} is a link; images are fetched into a real folder only")
            lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"images can't be fetched into {self._folder}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StoreError(
                f"another agent fetches into {self._folder}: give each host an image folder of its own"
            ) from None
        self._lock = lock
        for path in [*self._folder.glob("*.tmp"), *self._folder.glob(".*.tmp")]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def room(self) -> int:
        """Bytes that are free."""
        found = os.statvfs(self._folder)
        return found.f_frsize * found.f_bavail

    # --- what is there --------------------------------------------------------------------------------------

    def marks(self) -> dict[str, Mark]:
        """The marks by digest. One that can't be read counts as none, so its image stays."""
        found = {}
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if DIGEST.fullmatch(path.stem):
                    row = json.loads(path.read_text())
                    found[path.stem] = Mark(str(row["file"]), Format(row["format"]), float(row["unnamed_s"]))
        return found

    def write(self, sha256: str, mark: Mark) -> None:
        """Store a mark."""
        _write_json(self._folder / f"{sha256}.json", asdict(mark))

    def delete(self, sha256: str, mark: Mark) -> None:
        """Delete an image and its mark. An image whose deletion was cut short keeps its mark."""
        (self._folder / f"{sha256}.{mark.format}").unlink(missing_ok=True)
        (self._folder / f"{sha256}.json").unlink(missing_ok=True)

    # --- what is on its way ---------------------------------------------------------------------------------

    def halves(self) -> set[str]:
        """The digests of which something is there."""
        return {path.name[1:65] for path in self._folder.glob(".*.part") if DIGEST.fullmatch(path.name[1:-5])}

    def begin(self, sha256: str, source: str) -> Begun:
        """Open a file on its way, new or half there. The lock goes with the descriptor to whoever fills it.

        Raises:
            BlockingIOError: a worker of a killed agent is still on it; it ends by itself.
            OSError: it can't be written.
        """
        path = self._part(sha256)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Begun(path, fd, os.fstat(fd).st_size, self._validator(sha256, source))
        except BaseException:
            os.close(fd)
            raise

    def _validator(self, sha256: str, source: str) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            row = json.loads(self._about(sha256).read_text())
            return str(row["validator"]) if row["source"] == source else ""
        return ""

    def describe(self, sha256: str, source: str, validator: str) -> None:
        """Remember what the source of a file on its way had."""
        _write_json(self._about(sha256), {"source": source, "validator": validator})

    def publish(self, image: CatalogueImage) -> None:
        """A file on its way is whole, right and safe: make it an image, with its mark, durably."""
        self.write(image.sha256, Mark(image.file, image.format))
        self._part(image.sha256).rename(self._folder / f"{image.sha256}.{image.format}")
        self._about(image.sha256).unlink(missing_ok=True)
        _sync(self._folder)

    def discard(self, sha256: str) -> None:
        """Throw a file on its way away; no error when there is none."""
        for path in (self._part(sha256), self._about(sha256)):
            with contextlib.suppress(OSError):
                path.unlink()

    def name(self, image: CatalogueImage) -> str:
        """The image's name as ImageIndex knows it."""
        return f"{FETCHED}/{image.sha256}.{image.format}"

    def _part(self, sha256: str) -> Path:
        return self._folder / f".{sha256}.part"

    def _about(self, sha256: str) -> Path:
        return self._folder / f".{sha256}.json"


def address(source: str, file: str) -> str:
    """Where the source has a file. File names are data: one that is none leads nowhere."""
    if not FILE.fullmatch(file):
        raise ValueError(f"not a file name: {file!r}")
    return f"{source.rstrip('/')}/{file}"


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
