"""python -m deskfleet.agent.vfio DEV GROUP FUNCTION...: reset the card of an IOMMU group through VFIO, as qemu does.

A program of its own, because a card that is broken can hold its caller in the kernel for a minute or for ever.

The `reset` file of sysfs is no way to do this: a card of two functions without function level reset has one, which then
fails (seen with Linux 6.1: the kernel decides when the first function is found whether it is alone on its bus). VFIO
resets the bus below the bridge, which takes every function on it, and a single function where there is no such bus.
Numbers and structures: kernel, include/uapi/linux/vfio.h; the group's use: driver-api/vfio.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

_BASE = ord(";") << 8 | 100  # _IO(VFIO_TYPE, VFIO_BASE)
_SET_IOMMU, _GROUP_STATUS, _SET_CONTAINER, _DEVICE_FD = _BASE + 2, _BASE + 3, _BASE + 4, _BASE + 6
_DEVICE_RESET, _HOT_RESET = _BASE + 11, _BASE + 13
_TYPE1 = 1
_VIABLE = 1


class ResetFailed(Exception):
    """Raised when a card can't be reset; the text ends a sentence that begins with the card."""


def reset_card(dev: Path, group: str, functions: Sequence[str]) -> None:
    """Reset all functions of a group.

    Raises:
        ResetFailed: VFIO does not let us have the group, or its functions, or refuses to reset them.
    """
    with contextlib.ExitStack() as ends:

        def held(fd: int) -> int:
            ends.callback(os.close, fd)
            return fd

        try:
            container = held(os.open(dev / "vfio/vfio", os.O_RDWR | os.O_CLOEXEC))
            card = held(os.open(dev / "vfio" / group, os.O_RDWR | os.O_CLOEXEC))
            if not struct.unpack("II", fcntl.ioctl(card, _GROUP_STATUS, struct.pack("II", 8, 0)))[1] & _VIABLE:
                raise ResetFailed("is not given by VFIO: a function of its group has another driver")
            fcntl.ioctl(card, _SET_CONTAINER, struct.pack("i", container))
            fcntl.ioctl(container, _SET_IOMMU, _TYPE1)
            devices = [held(fcntl.ioctl(card, _DEVICE_FD, bytearray(name.encode() + b"\0"))) for name in functions]
        except OSError as error:
            raise ResetFailed(f"is not given by VFIO: {error.strerror}") from error
        try:
            fcntl.ioctl(devices[0], _HOT_RESET, bytearray(struct.pack("IIIi", 16, 0, 1, card)))
        except OSError:
            _one_by_one(functions, devices)


def _one_by_one(functions: Sequence[str], devices: Sequence[int]) -> None:
    for name, device in zip(functions, devices, strict=True):
        try:
            fcntl.ioctl(device, _DEVICE_RESET)
        except OSError as error:
            raise ResetFailed(f"can't be reset: {name}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> int:
    """0 when the card was reset; else 1, with the reason as output."""
    dev, group, *functions = arguments
    try:
        reset_card(Path(dev), group, functions)
    except ResetFailed as failed:
        print(failed)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
