"""Looking at a disk image that nobody has vouched for, without letting it look back.

Two readers must agree before an image is used: our own (schemas/image_formats.py), which goes first and reads a few
kilobytes of header, and qemu-img, which is what will follow the image's structures later. qemu-img runs as an
unprivileged user, in a network namespace of its own without any network, under limits of CPU seconds, memory, open
files, output and time, and gets the image as an open file: it can neither be led to another one by the name nor see
one that was put in its place meanwhile.

This lives below the services because two of them need it, and they never import each other: the command line when an
administrator imports an image, and the agent before it first builds on one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deskfleet.schemas.image_facts import Facts, Fault, ImageRefused
from deskfleet.schemas.image_formats import LARGEST, detect, inspect
from deskfleet.schemas.machine import Format

NOBODY = 65_534
"""The user and group that qemu-img runs as when we are root."""

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_WORDS = 500
_CHECKED = (Format.QCOW2, Format.VDI, Format.VMDK)
_LEAKS_ONLY = 3
_NOT_STARTED = 127


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of qemu-img may use. Seconds and bytes; `file_bytes` is the largest file that it may write, its
    printed output included. Address space serves as the limit of memory: qemu-img needs 64 MiB of it, and does not
    mind (other programs do)."""

    cpu_s: int = 10
    wall_s: float = 20.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    open_files: int = 64


class ImageFile:
    """A regular file held open for reading. Made by `open_image`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._seen = self._signature()
        self.size = self._seen[0]

    def _signature(self) -> tuple[int, int, int]:
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset`."""
        try:
            return os.pread(self.fd, length, offset)
        except OSError as error:
            raise ImageRefused(Fault.UNREADABLE, f"The file can't be read: {error.strerror}.") from None

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened."""
        if self._signature() != self._seen:
            raise ImageRefused(Fault.CHANGING, "The file changed while it was read; wait until it is whole.")

    def detect(self) -> str:
        """What the content is, see schemas/image_formats.py."""
        return detect(self.read, self.size)

    def facts(self, claimed: Format, largest: int = LARGEST) -> Facts:
        """What our own reader finds; ImageRefused when the image is not what is claimed, or not safe."""
        facts = inspect(self.read, self.size, claimed, largest)
        self.check_unchanged()
        return facts


@contextmanager
def open_image(path: Path) -> Iterator[ImageFile]:
    """Open an image that may be anything.

    Raises:
        ImageRefused: it is not a plain regular file, or can't be read.
    """
    if _PROTOCOL.match(path.name):
        raise ImageRefused(Fault.NAME, "The name looks like a protocol or an option; rename the file.")
    try:
        # Looked at first: opening a device may do things, and opening a pipe may wait for ever.
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            raise ImageRefused(Fault.SYMLINK, "It is a symbolic link; name the file itself.")
        if not stat.S_ISREG(kind):
            raise ImageRefused(Fault.NOT_A_FILE, "It is not a regular file.")
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageRefused(Fault.UNREADABLE, f"The file can't be opened: {why}.") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageRefused(Fault.NOT_A_FILE, "It is not a regular file.")
        yield ImageFile(path, fd)
    finally:
        os.close(fd)


# --- qemu-img ---------------------------------------------------------------------------------------------------


def confinement(limits: Limits, uid: int) -> list[str]:
    """The command line that confines what is appended to it; `uid` is ours.

    Without root the user stays, since there is no other one to become; the network goes nevertheless.
    """
    limit = [
        "prlimit",
        f"--cpu={limits.cpu_s}",
        f"--as={limits.memory_bytes}",
        f"--fsize={limits.file_bytes}",
        f"--nofile={limits.open_files}",
        "--core=0",
        "--",
    ]
    if uid:
        return ["unshare", "--user", "--map-current-user", "--net", "--", "setpriv", "--no-new-privs", "--", *limit]
    drop = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    return ["unshare", "--net", "--", "setpriv", *drop, "--no-new-privs", "--", *limit]


def qemu_img(arguments: Sequence[str], limits: Limits, fds: Sequence[int], allowed: Sequence[int] = (0,)) -> str:
    """Run qemu-img in confinement and return what it printed.

    Raises:
        ImageRefused: it failed, reached a limit, or can't be confined on this machine.
    """
    line = [*confinement(limits, os.geteuid()), "qemu-img", *arguments]
    # Files, not pipes: the limit of file sizes then holds for the output as well.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                line,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                pass_fds=tuple(fds),
                start_new_session=True,
                timeout=limits.wall_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ImageRefused(Fault.OVER_LIMIT, f"qemu-img took more than {limits.wall_s:g} s.") from None
        except OSError as error:
            raise ImageRefused(Fault.UNCONFINED, f"qemu-img can't be confined: {error}.") from None
        out.seek(0)
        err.seek(0)
        if done.returncode not in allowed:
            raise _refusal(done.returncode, err.read(_WORDS * 4).decode(errors="replace"))
        return out.read().decode(errors="replace")


def _refusal(code: int, words: str) -> ImageRefused:
    """What a failed run means."""
    said = "".join(c if c.isprintable() else " " for c in words).strip()[:_WORDS]
    said = re.sub(r"/proc/self/fd/[0-9]+", "the image", said)
    if said.startswith(("unshare:", "setpriv:", "prlimit:")):
        return ImageRefused(Fault.UNCONFINED, f"qemu-img can't be run safely on this machine: {said}.")
    if "No space left" in said or "Disk quota" in said:
        return ImageRefused(Fault.NO_SPACE, f"There is no space left: {said}.")
    if "Permission denied" in said:
        return ImageRefused(Fault.UNREADABLE, "It can't be read by others, and guests are others: chmod 644 it.")
    if code == _NOT_STARTED:
        return ImageRefused(Fault.OVER_LIMIT, f"qemu-img could not start within its limits: {said}.")
    if code < 0:
        name = signal.Signals(-code).name
        return ImageRefused(Fault.OVER_LIMIT, f"qemu-img reached a limit ({name}): {said or 'it said nothing'}.")
    if "File too large" in said or "allocate" in said:
        return ImageRefused(Fault.OVER_LIMIT, f"qemu-img reached a limit: {said}.")
    return ImageRefused(Fault.DAMAGED, f"qemu-img does not take it: {said}.")


def _driver(kind: Format) -> str:
    return "raw" if kind is Format.ISO else kind.value


def second_opinion(image: ImageFile, facts: Facts, limits: Limits = Limits()) -> None:
    """Let qemu-img look at an image that our reader has passed.

    Raises:
        ImageRefused: it fails, reaches a limit, or sees something else than our reader.
    """
    name, driver = f"/proc/self/fd/{image.fd}", _driver(facts.format)
    text = qemu_img(["info", "-U", "--output=json", "-f", driver, name], limits, [image.fd])
    try:
        seen: dict[str, Any] = json.loads(text)
        shape = seen["format"], seen["virtual-size"], len(seen.get("snapshots", []))
        special = seen.get("format-specific", {}).get("data", {})
        foreign: list[str] = [key for key in ("backing-filename", "full-backing-filename") if key in seen]
        foreign += ["data-file"] if "data-file" in special else []
        foreign += ["extents"] if [e for e in special.get("extents", []) if e["filename"] != name] else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageRefused(Fault.DISAGREE, f"qemu-img's answer makes no sense: {type(error).__name__}.") from None
    ours = driver, facts.virtual_size, facts.snapshots
    if shape != ours or foreign or seen.get("encrypted"):
        told = f"{shape[0]}, {shape[1]} bytes, {shape[2]} snapshots" + "".join(f", {key}" for key in foreign)
        text = f"Two readers see different things: {ours[0]}, {ours[1]} bytes, {ours[2]} snapshots; qemu-img: {told}."
        raise ImageRefused(Fault.DISAGREE, text)
    image.check_unchanged()


def check_structure(image: ImageFile, facts: Facts, limits: Limits = Limits(cpu_s=300, wall_s=600.0)) -> None:
    """Let qemu-img follow every table of an image, which finds what a header can't tell: that data are missing.

    Raises:
        ImageRefused: something is wrong, or it reaches a limit.
    """
    if facts.format in _CHECKED:
        arguments = ["check", "-U", "-q", "-f", _driver(facts.format), f"/proc/self/fd/{image.fd}"]
        qemu_img(arguments, limits, [image.fd], allowed=(0, _LEAKS_ONLY))
        image.check_unchanged()


def convert(image: ImageFile, facts: Facts, target: int, wall_s: float = 4 * 3600.0) -> None:
    """Write a compressed, standalone QCOW2 copy of an image to the file `target` (open for writing, and owned by
    whoever qemu-img runs as).

    Raises:
        ImageRefused: it fails or reaches a limit.
    """
    # A QCOW2 of incompressible data needs a little more than the data.
    largest = facts.virtual_size + facts.virtual_size // 16 + (64 << 20)
    limits = Limits(cpu_s=int(wall_s), wall_s=wall_s, memory_bytes=4 << 30, file_bytes=largest)
    arguments = ["convert", "-U", "-f", _driver(facts.format), "-O", "qcow2", "-c", "-o", "compression_type=zstd"]
    qemu_img([*arguments, f"/proc/self/fd/{image.fd}", f"/proc/self/fd/{target}"], limits, [image.fd, target])
    image.check_unchanged()
