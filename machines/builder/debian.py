"""The builder of Debian guests: packages, files and a script to a bootable qcow2.

Works as root, and as another user by a user namespace (newuidmap and a range in /etc/subuid).
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from machines.builder import disk, initrd
from machines.builder.recipe import Recipe, settings
from machines.builder.system import BuildError, Failure, System

KEYS = {
    "suite": str,
    "kernel": str,
    "kernel_options": str,
    "disk_mib": int,
    "packages": list,
    "exclude": list,
    "include": list,
    "modules": list,
    "boot_modules": list,
}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TOOLS = {"mmdebstrap": "mmdebstrap", "depmod": "kmod", KEYRING: "debian-archive-keyring", **disk.TOOLS}
SPACE_MIB = 2048
"""For the unpacked packages and the kernel; the disk comes on top, raw and packed."""

KERNEL_HOOK = """\
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
package=$(apt-cache depends {kernel} | sed -n 's/^ *Depends: \\(linux-image-[^ ]*\\)$/\\1/p' | head -n 1)
mkdir "$1/kernel.deb"
cd "$1/kernel.deb"
apt-get download -q "${{package:-{kernel}}}"
"""
"""Fetches the kernel's package without installing it: that would add 370 MB of modules and initramfs-tools."""


def _configured(suite: str, system: System) -> dict[str, str]:
    """Address by name (bookworm, bookworm-updates, ...) of the Debian mirrors that apt uses here."""
    wanted = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
    listed = system.run(["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"])
    found: dict[str, str] = {}
    for line in listed.splitlines():
        parts = line.split(" ")
        if len(parts) == 4 and parts[2:] == ["main", "Debian"] and parts[1].split("-")[0] == suite:
            found.setdefault(parts[1], parts[0])
    return found


def mirrors(suite: str, system: System) -> list[str]:
    """sources.list lines for the suite, its updates and security fixes, from the mirrors that this machine uses."""
    found = _configured(suite, system)
    if suite not in found:
        system.apt("update")  # apt knows names and origins only from lists that it has
        found = _configured(suite, system)
    if suite not in found:
        text = f"apt on this machine knows no Debian mirror for {suite}: add one below /etc/apt/sources.list.d."
        raise BuildError(Failure.MIRROR, text)
    return [f"deb [signed-by={KEYRING}] {uri} {name} main" for name, uri in sorted(found.items())]


def copy_files(source: Path, root: Path) -> None:
    """Copy the folder files/ over the tree: executable files become 0755, others 0644, whatever the umask was."""
    for path in sorted(source.rglob("*")):
        target = root / path.relative_to(source)
        if path.is_dir():
            if not target.is_dir():
                target.mkdir()
                target.chmod(0o755)
        else:
            shutil.copyfile(path, target)
            target.chmod(0o755 if path.stat().st_mode & 0o111 else 0o644)


def install_kernel(recipe: Recipe, root: Path, work: Path, values: dict[str, Any], system: System) -> None:
    """Unpack the kernel's package beside the tree; copy kernel, the named modules and a ramdisk into the tree."""
    unpacked = work / "kernel"
    packages = list((root / "kernel.deb").glob("*.deb"))
    system.run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)])
    shutil.rmtree(root / "kernel.deb")
    source = next((unpacked / "lib/modules").iterdir())
    system.run(["depmod", "-b", str(unpacked), source.name])
    target = root / "usr/lib/modules" / source.name
    for path in initrd.loading_order(source, [*values["boot_modules"], *values["modules"]]):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(source / name, target / name)
    system.run(["depmod", "-b", str(root), source.name])
    shutil.copyfile(unpacked / "boot" / f"vmlinuz-{source.name}", root / "boot/vmlinuz")
    order = initrd.loading_order(source, values["boot_modules"])
    initrd.write(root / "boot/initrd.img", recipe.sources / "init", root / "bin/busybox", source, order)


def bootstrap(values: dict[str, Any], root: Path, system: System) -> None:
    """Unpack and configure the packages in a new folder, and download the kernel's package into it."""
    command = ["mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase"]
    command += ['--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt=path-exclude={path}" for path in values["exclude"]]
    command += [f"--dpkgopt=path-include={path}" for path in values["include"]]
    command += [f"--include={','.join(values['packages'])}"]
    command += [f"--customize-hook={KERNEL_HOOK.format(kernel=values['kernel'])}"]
    command += [values["suite"], str(root), *mirrors(values["suite"], system)]
    system.run(command, as_root=True)


def build(recipe: Recipe, work: Path, system: System) -> Path:
    """Build the image in `work` and return its path."""
    values = settings(recipe, KEYS)
    system.need_space(work, SPACE_MIB + 2 * values["disk_mib"])
    system.need_tools(TOOLS)
    system.root_prefix()  # whether there is one should be known before the download
    root = work / "root"
    system.step("download and unpack packages (a minute or two)")
    bootstrap(values, root, system)
    system.step("settle the system in")
    copy_files(recipe.sources / "files", root)
    shutil.copyfile(recipe.sources / "customize", root / "customize")
    system.run(["chroot", str(root), "sh", "/customize"], as_root=True)
    (root / "customize").unlink()
    install_kernel(recipe, root, work, values, system)
    system.step("write the disk")
    return disk.write(root, work, values["disk_mib"], str(uuid.uuid4()), values["kernel_options"], system)
