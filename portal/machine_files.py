"""A machine's two files on this computer, its image and its catalogue entry: made, checked, copied, resized.

Nothing is ever overwritten: a file gets its name by a link, which fails when the name is taken. An image is copied
before qemu-img looks at it, so what was inspected is what is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deskfleet.runtime.inspection import NOBODY, ImageFile, check_structure, convert, open_image, second_opinion
from deskfleet.schemas.errors import DeskfleetError, MachineError
from deskfleet.schemas.image_facts import Facts, Fault, ImageRefused
from deskfleet.schemas.image_formats import LARGEST
from deskfleet.schemas.machine import NAME, Drivers, Firmware, Format, Machine, Os, Range, Video, parse_machine

_CHUNK = 1 << 20
_EMPTY = bytes(_CHUNK)
_FORMATS = {kind.value for kind in Format}


class MachineFilesError(DeskfleetError):
    """Raised when a machine's files can't be made or used; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What an administrator says of a machine that is imported. Sizes in MiB and GiB; no `disk_gib` means from the
    size of the image on."""

    name: str
    title: str
    text: str
    os: Os
    video: Video
    firmware: Firmware
    drivers: Drivers
    cpus: Range
    memory_mib: Range
    disk_gib: Range | None
    users: tuple[str, ...]
    groups: tuple[str, ...]


def gib(size: int) -> int:
    """Bytes as whole GiB, rounded up, at least 1."""
    return max(1, -(-size >> 30))


def entry(wish: Wish, file: str, kind: Format, digest: str, disk: Range) -> str:
    """The text of a catalogue entry."""
    tables: dict[str, dict[str, object]] = {
        "image": {"file": file, "format": kind, "sha256": digest},
        "display": {"video": wish.video},
        "devices": {"drivers": wish.drivers},
        "firmware": {"type": wish.firmware},
        "cpus": asdict(wish.cpus),
        "memory_mib": asdict(wish.memory_mib),
        "disk_gib": asdict(disk),
        "gpu": {"policy": "never"},
        "access": {"users": wish.users, "groups": wish.groups},
    }
    lines = [f"title = {_toml(wish.title)}", f"text = {_toml(wish.text)}", f"os = {_toml(wish.os)}"]
    for name, values in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    text = "\n".join(lines) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MachineFilesError("Title, text, users and groups must be UTF-8.") from None
    return text


def _toml(value: object) -> str:
    """JSON's numbers, strings and lists are TOML's, but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def with_disk_sizes(text: str, size: Range) -> str:
    """An entry with another [disk_gib]; all else stays as written, comments too."""
    values, table, lines = asdict(size), "", []
    for line in text.split("\n"):
        if header := re.fullmatch(r"\s*\[([^\[\]]+)\]\s*(#.*)?", line):
            table = header[1].strip()
        found = re.match(r"(\s*(min|default|max)\s*=\s*)[0-9_]+", line) if table == "disk_gib" else None
        lines.append(f"{found[1]}{values[found[2]]}{line[found.end() :]}" if found else line)
    after, wanted = "\n".join(lines), tomllib.loads(text)
    wanted["disk_gib"] = values
    if tomllib.loads(after) != wanted:
        raise MachineFilesError(
            "The entry's [disk_gib] is written in an unusual way; write min, default and max a line."
        )
    return after


class MachineFiles:
    """The machines of one catalogue folder and one image folder. `say` gets what is being done, for whoever waits."""

    def __init__(self, catalogue: Path, images: Path, say: Callable[[str], None]) -> None:
        self._catalogue = catalogue
        self._images = images
        self._say = say

    def _entry_path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise MachineFilesError(
                f"{name!r} is not a machine's name: lower-case letters, digits, dashes, at most 48."
            )
        return self._catalogue / f"{name}.toml"

    def machine(self, name: str) -> Machine:
        """A machine by its entry; MachineError or MachineFilesError when it has none that is valid."""
        try:
            return parse_machine(name, self._entry_path(name).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise MachineFilesError(f"The entry of {name} can't be read: {why}.") from None

    def names(self) -> list[str]:
        """Every entry's name, valid or not."""
        return sorted(path.stem for path in self._catalogue.glob("*.toml"))

    def add(self, source: Path, wish: Wish, claimed: Format | None, *, converted: bool, largest: int) -> Machine:
        """Import an image: inspect, copy, convert if asked, write the entry. ImageRefused when it is not safe."""
        path = self._entry_path(wish.name)
        if path.exists():
            raise MachineFilesError(f"There is a machine {wish.name} already; choose another name.")
        with _written(self._images) as copy:
            with open_image(source) as file:
                facts = file.facts(claimed or _recognised(file), largest)
                disk = _disk(wish, facts)
                if converted and facts.format is Format.ISO:
                    raise MachineFilesError("A CD image starts as a CD; it is not converted to a disk.")
                self._say(f"{facts.format}, {facts.virtual_size} bytes: copying")
                digest = _copy(file, copy)
            with open_image(copy) as file:
                self._look_closely(file, facts, largest)
                if converted:
                    self._say("converting")
                    facts = _convert(file, facts, copy)
                    with open_image(copy) as result:
                        digest = _digest(result)
            name = f"{wish.name}.{facts.format}"
            text = entry(wish, name, facts.format, digest, disk)
            machine = parse_machine(wish.name, text)
            with _published(copy, self._images / name):
                _write_new(path, text)
        return machine

    def _look_closely(self, file: ImageFile, facts: Facts, largest: int) -> None:
        self._say("inspecting")
        if file.facts(facts.format, largest) != facts:
            raise ImageRefused(Fault.CHANGING, "The file changed while it was copied; wait until it is whole.")
        second_opinion(file, facts)
        check_structure(file, facts)

    def problems(self, name: str) -> list[str]:
        """What is wrong with a machine's files, in words; empty when they are fit to launch."""
        try:
            machine = self.machine(name)
        except MachineError as error:
            return error.problems
        except MachineFilesError as error:
            return [str(error)]
        path = self._images / machine.file
        try:
            with open_image(path) as file:
                second_opinion(file, file.facts(machine.format))
                digest = _digest(file)
                return [] if digest == machine.sha256 else [f"{machine.file} has another SHA-256: {digest}"]
        except ImageRefused as refused:
            return [f"{machine.file}: {refused.fault}: {refused}"]
        except OSError as error:
            return [f"{machine.file}: {error.strerror}"]

    def size(self, machine: Machine) -> int | None:
        """Bytes of a machine's image file; None when it is not here."""
        try:
            return (self._images / machine.file).lstat().st_size
        except OSError:
            return None

    def trial(self, name: str) -> list[str]:
        """The command line that starts a machine once on this computer."""
        program = [sys.executable, "-m", "deskfleet.agent.trial"]
        return [*program, "--entry", str(self._entry_path(name).absolute()), "--images", str(self._images)]

    def export(self, name: str, target: Path) -> None:
        """Write a standalone QCOW2 copy of a machine's disk."""
        machine = self.machine(name)
        if machine.format is Format.ISO:
            raise MachineFilesError(f"{name} starts from a CD; copy {self._images / machine.file} as it is.")
        if target.exists() or target.is_symlink():
            raise MachineFilesError(f"{target} exists already.")
        with open_image(self._images / machine.file) as file, _written(target.parent) as copy:
            facts = file.facts(machine.format)
            second_opinion(file, facts)
            self._say("converting")
            _convert(file, facts, copy)
            with _published(copy, target):
                pass

    def resize(self, name: str, size: int) -> Machine:
        """Change the disk (GiB) that a machine's sessions get by default; min and max move where they must."""
        machine, path = self.machine(name), self._entry_path(name)
        with open_image(self._images / machine.file) as file:
            least = 1 if machine.format is Format.ISO else gib(file.facts(machine.format).virtual_size)
        if size < least:
            raise MachineFilesError(f"The image's disk has {least} GiB; a session's can't be smaller.")
        old = machine.disk_gib
        text = with_disk_sizes(path.read_text("utf-8"), Range(min(old.min, size), size, max(old.max, size)))
        changed = parse_machine(name, text)
        with _written(path.parent) as draft:
            draft.write_text(text, "utf-8")
            _sync(draft)
            draft.replace(path)
            _sync(path.parent)
        return changed


def _recognised(file: ImageFile) -> Format:
    seen = file.detect()
    if seen in _FORMATS:
        return Format(seen)
    if seen:
        file.facts(Format.RAW)  # it is refused by its right name
    if file.size:
        raise MachineFilesError("The format is not recognised. If it is a raw disk, say --format raw.")
    raise ImageRefused(Fault.EMPTY, "The file is empty.")


def _disk(wish: Wish, facts: Facts) -> Range:
    """The sizes of a session's disk."""
    if facts.format is Format.ISO:
        return wish.disk_gib or Range(1, 20, 200)
    least = gib(facts.virtual_size)
    if wish.disk_gib and wish.disk_gib.min < least:
        raise MachineFilesError(f"The image's disk has {least} GiB; a session's can't be smaller.")
    return wish.disk_gib or Range(least, least, max(64, 4 * least))


def _copy(file: ImageFile, target: Path) -> str:
    """Copy an image, leaving holes where it is zero, and return its SHA-256."""
    digest, offset = hashlib.sha256(), 0
    with target.open("r+b") as out:
        while chunk := file.read(offset, _CHUNK):
            digest.update(chunk)
            if chunk != _EMPTY:
                out.seek(offset)
                out.write(chunk)
            offset += len(chunk)
        out.truncate(offset)
    file.check_unchanged()
    return digest.hexdigest()


def _convert(file: ImageFile, facts: Facts, path: Path) -> Facts:
    """Replace the file at `path` by a QCOW2 of the image, and return what that one says."""
    with _written(path.parent) as target:
        with target.open("r+b") as out:
            mine = os.fstat(out.fileno())
            if os.geteuid() == 0:
                os.fchown(out.fileno(), NOBODY, NOBODY)
            try:
                convert(file, facts, out.fileno())
            finally:
                if os.geteuid() == 0:
                    os.fchown(out.fileno(), mine.st_uid, mine.st_gid)
        with open_image(target) as made:
            seen = made.facts(Format.QCOW2, max(facts.virtual_size, LARGEST))
        if seen != replace(facts, format=Format.QCOW2, snapshots=0, create_type="", extents=()):
            raise ImageRefused(Fault.DISAGREE, "The converted image is not the same disk.")
        target.replace(path)
    return seen


def _digest(file: ImageFile) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := file.read(offset, _CHUNK):
        digest.update(chunk)
        offset += len(chunk)
    file.check_unchanged()
    return digest.hexdigest()


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """An empty file in a folder that is gone afterwards, unless it was renamed. Its name begins with a dot, so no
    agent takes it for an image."""
    descriptor, name = tempfile.mkstemp(prefix=".machine-", dir=folder)
    path = Path(name)
    try:
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _published(path: Path, target: Path) -> Iterator[None]:
    """Give a finished file its name, durably; take the name back when what follows fails."""
    _sync(path)
    try:
        target.hardlink_to(path)
    except FileExistsError:
        raise MachineFilesError(f"{target} exists already.") from None
    try:
        _sync(target.parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            target.unlink()
        raise


def _write_new(path: Path, text: str) -> None:
    with _written(path.parent) as draft:
        draft.write_text(text, "utf-8")
        with _published(draft, path):
            pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
