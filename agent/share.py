"""python -m deskfleet.agent.share SID FD OWNER ro|rw BASE ENTRY: becomes the file server of one volume of one guest.

virtiofsd acts for its guest's users by their ids, so it wants to be root. Here it is so in a user namespace only: ids 0
to 65535 in it are OWNER and up on the host, which own nothing but the volume. It has no network, sees no other root
than the volume, and when that is read-only then by its mounts, whatever the guest asks for.

The folder is found before, link by link, with root's eyes. virtiofsd ends with its guest: when qemu closes the socket.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

from deskfleet.agent.volumes import IDS, Mount

#: Where Debian has it: with qemu 7.2 (12), by itself (13 and Ubuntu).
PROGRAMS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")

_NEW = 0x20000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x40000000  # CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWNET
_OPEN_TREE, _MOUNT_SETATTR = 428, 442  # x86_64 and every other architecture
_CLONE, _EMPTY_PATH, _RECURSIVE = 1, 0x1000, 0x8000
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def name_of(sid: str) -> str:
    """What the server of a guest calls itself, so that it is found again."""
    return f"virtiofsd of {sid}"


def serves(sid: str, line: Sequence[str]) -> bool:
    """Whether this is the command line of a server of this guest, before or after it became virtiofsd."""
    return line[:1] == [name_of(sid)] or list(line[1:4]) == ["-m", "deskfleet.agent.share", sid]


def command(sid: str, socket: int, mount: Mount) -> list[str]:
    """The argument list that starts the server of a volume, for who connects to this listening socket."""
    mode = "ro" if mount.volume.read_only else "rw"
    module = [sys.executable, "-m", "deskfleet.agent.share"]
    return [*module, sid, str(socket), str(mount.volume.owner), mode, str(mount.base), mount.entry]


def program() -> str:
    """The virtiofsd of this machine; empty when there is none."""
    return next((path for path in PROGRAMS if os.access(path, os.X_OK)), "")


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _enter(owner: int) -> None:
    """Go into new namespaces. The ids' maps are written by a child that has stayed outside: only there is the right
    to give ids that are not one's own."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        if os.read(ready, 1) != b"x":
            os._exit(1)
        parent = os.getppid()
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{parent}/{name}", "w") as file:
                file.write(f"0 {owner} {IDS}")
        os._exit(0)
    _check(_libc.unshare(_NEW))
    os.write(go, b"x")
    if os.waitpid(child, 0)[1]:
        raise OSError(0, "the ids can't be mapped")


def _folder(base: str, entry: str, *, read_only: bool) -> int:
    """The volume as a mount of its own that hangs nowhere: where it is stays out of reach, '..' ends at it."""
    folder = os.open(base, os.O_PATH | os.O_DIRECTORY)
    if entry:
        folder = os.open(entry, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    tree = _check(_libc.syscall(_OPEN_TREE, folder, b"", _CLONE | _EMPTY_PATH | _RECURSIVE))
    # What is a device, or runs as another user, inside the guest must be nothing on the host.
    attributes = _MountAttr(attr_set=_NOSUID | _NODEV | _NOEXEC | (_RDONLY if read_only else 0))
    _check(
        _libc.syscall(
            _MOUNT_SETATTR, tree, b"", _EMPTY_PATH | _RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
        )
    )
    os.set_inheritable(tree, True)
    return tree


def main(arguments: Sequence[str]) -> None:
    """Does not return: it becomes virtiofsd. Raises OSError when something on the way is refused."""
    sid, socket, owner, mode, base, entry = arguments
    _enter(int(owner))
    tree = _folder(base, entry, read_only=mode == "ro")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Not cached: the same folder may be in use on another host.
    options = f"source=/proc/self/fd/{tree}/.,sandbox=chroot,cache=none"
    os.execv(program(), [name_of(sid), "-f", f"--fd={socket}", "-o", options])  # noqa: S606  no shell


if __name__ == "__main__":
    main(sys.argv[1:])
