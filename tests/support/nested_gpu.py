"""A machine with an IOMMU and a graphics card, by emulation, in which our agent gives the card to a guest of its own.

The outer guest has q35 with an emulated VT-d and, behind a root port, a card of two functions, a display and a sound
device. Its kernel is Debian's; its files are packed from this machine into one ramdisk: Python with the modules that
the driver imports, qemu with its libraries, busybox. The nested guest that gets the card is nested/painter.c.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from py_compile import compile as compile_module
from typing import Any

from support.qmp import Qmp, running, wait_for

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from machines.builder.bare import COMPILE, PROGRAM_BYTES  # noqa: E402
from machines.builder.initrd import Cpio, loading_order, module_content  # noqa: E402

HERE = Path(__file__).parent / "nested"
CACHE = ROOT / "tests/out/nested"
PACKAGE = "linux-image-cloud-amd64"
MODULES = ("vfio-pci", "vfio_iommu_type1")
BUNDLED = "usr/lib/bundled"
LIBRARY = "usr/lib/python3.11"
_PATIENCE = 300.0

_ENTRY = """\
title = "Painter"
text = "Paints through the card that it is given."
os = "other"
cpus = {{ min = 1, default = 1, max = 1 }}
memory_mib = {{ min = 16, default = 32, max = 64 }}
disk_gib = {{ min = 1, default = 1, max = 1 }}
[image]
file = "painter.img"
format = "raw"
sha256 = "{sha256}"
[gpu]
policy = "required"
[access]
users = ["*"]
"""

_IMPORTED = """
import json, sys
import support.nested.driver, deskfleet.agent.vfio, encodings.idna, encodings.latin_1, encodings.ascii, _strptime
print(json.dumps({name: [module.__file__, hasattr(module, "__path__")] for name, module in sys.modules.items()
                  if getattr(module, "__file__", None)}))
"""


def kernel() -> Path:
    """The folder of Debian's kernel package, unpacked; downloaded when there is none yet, or a newer one."""
    package = _named()
    if not package:
        _run("apt-get", "update", "-q")
        package = _named()
    assert package, f"apt knows no {PACKAGE}"
    tree = CACHE / package[1]
    if not tree.is_dir():
        fresh = CACHE / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-q", package[1]], cwd=fresh, check=True, capture_output=True)
        (archive,) = fresh.glob("*.deb")
        _run("dpkg-deb", "-x", str(archive), str(fresh / "tree"))
        (modules,) = (fresh / "tree/lib/modules").iterdir()
        _run("depmod", "-b", str(fresh / "tree"), modules.name)
        (fresh / "tree").rename(tree)
    return tree


def _named() -> re.Match[str] | None:
    """The package that Debian's name for its newest kernel stands for."""
    listed = subprocess.run(["apt-cache", "depends", PACKAGE], check=False, capture_output=True, text=True).stdout
    return re.search(r"Depends: (linux-image-\S+)", listed)


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def paint_image(folder: Path) -> bytes:
    """The nested guest's disk."""
    tiny = ROOT / "machines/tiny"
    objects = []
    for source in (tiny / "boot.S", HERE / "painter.c"):
        objects.append(str(folder / f"{source.stem}.o"))
        _run(*COMPILE, "-I", str(tiny), "-o", objects[-1], str(source))
    elf, program = str(folder / "painter.elf"), folder / "painter.bin"
    link = ["ld", "-m", "elf_i386", "-z", "noexecstack", "--no-warn-rwx-segments", "-T", str(tiny / "link.ld")]
    _run(*link, "-o", elf, *objects)
    _run("objcopy", "-O", "binary", "-j", ".image", elf, str(program))
    content = program.read_bytes()
    assert len(content) <= PROGRAM_BYTES
    return content.ljust(1 << 20, b"\0")  # below one BIOS cylinder SeaBIOS does not start a disk


def pack(target: Path, tree: Path, folder: Path) -> None:
    """Write the outer guest's ramdisk."""
    cpio = Cpio()
    for name in ("bin", "dev", "proc", "sys", "tmp", "images"):
        cpio.folder(name)
    cpio.character_device("dev/console", 5, 1)
    cpio.file("init", (HERE / "init").read_bytes(), 0o755)
    cpio.file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    cpio.link("bin/sh", "busybox")
    (source,) = (tree / "lib/modules").iterdir()
    order = loading_order(source, MODULES)
    for number, path in enumerate(order):
        cpio.file(f"modules/{number}.ko", module_content(source / path))
    cpio.file("modules.order", "".join(f"/modules/{number}.ko\n" for number in range(len(order))).encode())
    image = paint_image(folder)
    cpio.file("images/painter.img", image)
    cpio.file("images/painter.toml", _ENTRY.format(sha256=hashlib.sha256(image).hexdigest()).encode())
    binaries = [(Path(sys.executable).resolve(), "usr/bin/python3"), *_qemu(), *_python(cpio, folder)]
    for path, name in binaries:
        cpio.file(name, path.read_bytes(), 0o755)
    for path in _libraries(path for path, _ in binaries):
        # Libraries that come within Python packages find each other by places that are not kept here.
        place = path if path.is_relative_to("/usr/lib") or path.parts[1].startswith("lib") else Path(BUNDLED, path.name)
        cpio.file(str(place).lstrip("/"), path.resolve().read_bytes(), 0o755)
    target.write_bytes(cpio.finish())


def _qemu() -> Iterator[tuple[Path, str]]:
    for name in ("qemu-system-x86_64", "qemu-img", "setpriv", "prlimit", "unshare"):
        yield Path("/usr/bin") / name, f"usr/bin/{name}"
    (tcg,) = Path("/usr/lib").glob("*/qemu/accel-tcg-x86_64.so")
    bios = [Path("/usr/share/seabios") / name for name in ("bios-256k.bin", "vgabios-stdvga.bin")]
    data = [Path("/usr/share/qemu") / name for name in ("kvmvapic.bin", "keymaps/en-us")]
    for path in (tcg, *data, *bios):
        yield path, str(path).lstrip("/")


def _python(cpio: Cpio, folder: Path) -> Iterator[tuple[Path, str]]:
    """Put all that the driver imports into the archive, compiled; yields what is machine code."""
    path = [str(ROOT / "tests"), str(ROOT / "deploy")]
    code = f"import sys; sys.path[:0] = {path!r}\n{_IMPORTED}"
    modules: dict[str, tuple[str, bool]] = json.loads(_run(sys.executable, "-c", code))
    for name, (file, is_package) in modules.items():
        source, place = Path(file), f"{LIBRARY}/{name.replace('.', '/')}"
        if name == "__main__":
            continue
        if source.suffix == ".py":
            cached = folder / "module.pyc"
            compile_module(str(source), str(cached), doraise=True)
            cpio.file(f"{place}/__init__.pyc" if is_package else f"{place}.pyc", cached.read_bytes())
        else:
            yield source, f"{place}{''.join(source.suffixes)}"


def _libraries(paths: Iterable[Path]) -> list[Path]:
    """The shared libraries that these programs and libraries load, and the loader itself (ldd(1))."""
    programs = [str(path) for path in paths if path.read_bytes()[:4] == b"\x7fELF"]
    listed = subprocess.run(["ldd", *programs], check=False, capture_output=True, text=True).stdout
    return sorted({Path(name) for name in re.findall(r"(/\S+) \(0x", listed)})


class OuterGuest:
    """The outer guest while it runs."""

    def __init__(self, qmp: Qmp, line: socket.socket, serial: Path, folder: Path) -> None:
        self.qmp = qmp
        self._line = line.makefile("rwb")
        self._serial = serial
        self._folder = folder
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        text = self._line.readline()
        assert text, f"the outer guest has ended: {self._serial.read_text(errors='replace')[-3000:]}"
        return json.loads(text)

    def order(self, **order: object) -> dict[str, Any]:
        """Tell the driver to do something; its answer."""
        self._line.write(json.dumps(order).encode() + b"\n")
        self._line.flush()
        answer: dict[str, Any] = self._answer()
        assert "said" in answer, f"{order}: {answer}; {self._serial.read_text(errors='replace')[-3000:]}"
        return answer

    def shell(self, script: str) -> str:
        """Run a shell script, which must succeed."""
        code, text = self.order(shell=script)["said"]
        assert code == 0, f"{script}: {text}"
        return str(text).strip()

    def screen(self, device: str) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Size of a display's picture, and the colour of the pixel in its middle."""
        path = self._folder / "screen.ppm"
        self.qmp.execute("screendump", filename=str(path), device=device)
        _, size, _, pixels = path.read_bytes().split(b"\n", 3)
        width, height = map(int, size.split())
        at = ((height // 2) * width + width // 2) * 3
        red, green, blue = pixels[at : at + 3]
        return (width, height), (red, green, blue)

    def until_painted(self, picture: object) -> None:
        """Wait until the card's display shows this."""
        wait_for(lambda: self.screen("gpu0") == picture, f"{picture} on the card's display", pause=0.2)


@contextlib.contextmanager
def outer_guest(folder: Path, *, iommu: bool = True) -> Iterator[OuterGuest]:
    """Start the outer guest and the agent in it."""
    tree = kernel()
    ramdisk, line, serial = folder / "outer.cpio", folder / "line.sock", folder / "serial.log"
    pack(ramdisk, tree, folder)
    (image,) = (tree / "boot").glob("vmlinuz-*")
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1536"]
    argv += ["-device", "intel-iommu,intremap=on,caching-mode=on"] if iommu else []
    argv += ["-device", "pcie-root-port,id=rp0,chassis=1"]
    argv += ["-device", "bochs-display,id=gpu0,bus=rp0,addr=0.0,multifunction=on"]
    argv += ["-device", "intel-hda,bus=rp0,addr=0.1"]
    argv += ["-kernel", str(image), "-initrd", str(ramdisk)]
    argv += ["-append", "console=ttyS0 quiet mitigations=off panic=-1 intel_iommu=on iommu=pt"]
    argv += ["-serial", f"file:{serial}", "-serial", f"unix:{line},server=on,wait=off"]
    with running(argv, folder) as (_, qmp), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PATIENCE)
        connection.connect(str(line))
        yield OuterGuest(qmp, connection, serial, folder)
