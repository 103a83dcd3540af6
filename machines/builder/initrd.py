"""A small initial ramdisk: busybox, an init script and kernel modules, written as a newc cpio archive without root."""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from machines.builder.system import BuildError, Failure


class Cpio:
    """A newc archive, as the kernel unpacks it (its documentation: early-userspace/buffer-format)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0
        self._folders: set[str] = set()

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
        for part in (head, content):
            self._data += part + bytes(-len(part) % 4)

    def folder(self, name: str) -> None:
        """Add a folder and those above it."""
        for path in [*reversed(PurePosixPath(name).parents), PurePosixPath(name)]:
            if str(path) != "." and str(path) not in self._folders:
                self._folders.add(str(path))
                self._add(str(path), stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a file and the folders above it."""
        self.folder(str(PurePosixPath(name).parent))
        self._add(name, stat.S_IFREG | mode, content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self.folder(str(PurePosixPath(name).parent))
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a device node, which needs no root in an archive."""
        self.folder(str(PurePosixPath(name).parent))
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive."""
        self._add("TRAILER!!!", 0)
        return bytes(self._data)


def module_name(path: str) -> str:
    """A module's name by its file: 'kernel/drivers/block/virtio_blk.ko.xz' is 'virtio_blk'; '-' and '_' are one."""
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def loading_order(folder: Path, names: Iterable[str]) -> list[str]:
    """Paths of these modules and all they need, each after what it needs, from modules.dep of lib/modules/VERSION.

    What is built into the kernel is left out; BuildError names modules that the kernel does not have.
    """
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text(encoding="utf-8").splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    paths = {module_name(path): path for path in needs}
    builtin = {module_name(line) for line in (folder / "modules.builtin").read_text(encoding="utf-8").splitlines()}
    order: dict[str, None] = {}

    def visit(path: str) -> None:
        for needed in reversed(needs[path]):
            if needed not in order:
                visit(needed)
        order[path] = None

    missing = []
    for name in (name.replace("-", "_") for name in names):
        if name in paths:
            visit(paths[name])
        elif name not in builtin:
            missing.append(name)
    if missing:
        raise BuildError(Failure.RECIPE, f"kernel {folder.name} has no module {', '.join(missing)}.")
    return list(order)


def module_content(path: Path) -> bytes:
    """A module as the kernel takes it: Debian 13 packs them with xz, which busybox insmod does not unpack."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def write(target: Path, init: Path, busybox: Path, modules: Path, order: Sequence[str]) -> None:
    """Write the ramdisk. `init` finds the modules' paths in loading order in /modules.order."""
    cpio = Cpio()
    for name in ("bin", "dev", "proc", "sys", "root"):
        cpio.folder(name)
    cpio.character_device("dev/console", 5, 1)
    cpio.file("init", init.read_bytes(), 0o755)
    cpio.file("bin/busybox", busybox.read_bytes(), 0o755)
    cpio.link("bin/sh", "busybox")
    listed = []
    for path in order:
        name = f"modules/{module_name(path)}.ko"
        cpio.file(name, module_content(modules / path))
        listed.append(f"/{name}\n")
    cpio.file("modules.order", "".join(listed).encode())
    target.write_bytes(gzip.compress(cpio.finish(), 6, mtime=0))
