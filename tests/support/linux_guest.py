"""A small Linux that runs one shell script and tells what it said: Debian's kernel, busybox, nothing else.

It is started by the agent in the place of a machine's own disk, so everything around it is what every guest has.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import image_builds  # noqa: F401  makes machines.builder importable

from deskfleet.agent.processes import Spawn, spawn
from machines.builder import initrd

_MODULES = (
    "virtio_pci", "virtio_net", "virtio_blk", "qemu_fw_cfg", "9p", "9pnet_virtio", "virtiofs", "af_packet",
)  # fmt: skip
_INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mkdir -p /tmp /mnt /etc
while read -r module; do insmod "$module"; done </modules.order
cat /sys/firmware/qemu_fw_cfg/by_name/opt/test/script/raw >/script
sh /script >/dev/ttyS0 2>&1
echo "== end" >/dev/ttyS0
poweroff -f
"""
_LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router" dev "$interface"
echo "$router" >/etc/router
"""


def build(folder: Path) -> Path:
    """Put kernel and ramdisk into a folder."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-amd64"], check=True, capture_output=True, text=True
    ).stdout
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    assert package, depends
    subprocess.run(["apt-get", "download", "-q", package[1]], cwd=folder, check=True, capture_output=True, timeout=300)
    (deb,) = folder.glob("*.deb")
    tree = folder / "kernel"
    subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    deb.unlink()
    (source,) = (tree / "lib/modules").iterdir()
    subprocess.run(["depmod", "-b", tree, source.name], check=True)
    (tree / f"boot/vmlinuz-{source.name}").rename(folder / "vmlinuz")
    init = folder / "init"
    init.write_text(_INIT)
    order = initrd.loading_order(source, _MODULES)
    initrd.write(folder / "initrd", init, Path("/bin/busybox"), source, order)
    for name in ("vmlinuz", "initrd"):
        (folder / name).chmod(0o644)
    subprocess.run(["rm", "-rf", tree], check=True)
    return folder


def options(linux: Path, script: str, output: Path) -> list[str]:
    """qemu's options for a machine that runs this script; what it says comes into `output`."""
    file = output.with_suffix(".sh")
    lease = "cat >/lease <<'EOF'\n" + _LEASE + "EOF\nchmod 755 /lease\n"
    file.write_text(lease + script)
    file.chmod(0o644)
    output.touch()
    output.chmod(0o666)
    return [
        "-kernel", str(linux / "vmlinuz"), "-initrd", str(linux / "initrd"), "-append", "console=ttyS1 quiet",
        "-fw_cfg", f"name=opt/test/script,file={file}", "-serial", f"file:{output}", "-no-reboot",
    ]  # fmt: skip


def running(linux: Path, script: str, output: Path) -> Spawn:
    """A spawner whose guests run this script."""
    more = options(linux, script, output)

    def wrapped(argv: Sequence[str], **how: Any) -> int:
        return spawn([*argv, *more] if "qemu-system" in argv[0] else argv, **how)

    return wrapped


def said(output: Path) -> list[str]:
    """The lines that a guest has said."""
    return output.read_text(errors="replace").replace("\r", "").splitlines()


assert os.access("/bin/busybox", os.X_OK), "package busybox-static is missing"
