"""Which accelerator really runs guests on this host.

/dev/kvm opening proves nothing: a nested or paravirtual KVM opens, runs one instruction and then fails a guest in
its first exception. So a 64 KiB firmware (source: probe.S) is run under the very machine type and CPU model that
guests get. It walks real, protected and long mode, an exception through the IDT, ring 3 and back by interrupt and by
syscall, a timer interrupt that ends hlt, and a memory loop; it prints one letter a stage on the debug console and
ends with its own exit code. Abort, wrong code and time-out alike mean no.
"""

from __future__ import annotations

import base64
import os
import subprocess
import tempfile
from dataclasses import dataclass

from deskfleet.agent.argv import MACHINE_TYPE, SANDBOX
from deskfleet.agent.devices import kvm_groups

_CODE = base64.b64decode(
    "+rBS5umMyI7YZg8BFtACDyDADAEPIsBm6h8ADwAIAGa4EACO2I7AjtC8AAAIALBQ5unHBfAA4P7/AQAAxwVQA+D+AAcAAL8AEAAA"
    "McC5AAwAAPOrxwUAEAAAByAAAMcFACAAAAcwAADHBQAwAACHAAAADyDgg8ggDyLguAAQAAAPIti5gAAAwA8yDQEBAAAPMA8gwA0A"
    "AACADyLA6qMADwAYAGa4EACO2I7AjtCwTObpSI010AEAAL8AYAAAuUgAAADzpGbHBCUAYQAARwBIxwQlAmEAAABgAAAPARQlAGEA"
    "AL8AUAAAMcC5IAAAAPOrSMcEJQRQAAAA8AcAZrg4AA8A2L8AQAAAMcC5AAQAAPOrSI0FFQEAALkGAAAAso7oOgEAAEiNBSsBAAC5"
    "IAAAALKO6CcBAABIjQULAQAAuYAAAACy7ugUAQAAZscEJRBhAAD/D0jHBCUSYQAAAEAAAA8BHCUQYQAAMe0PC2oraADgBwBoAjAA"
    "AGozSI0FAwAAAFBIz7wA4AcAzYC5gQAAwDHAuhgAIwAPMLmCAADASI0FKQAAAEiJwkjB6iAPMLmEAADAuAACAAAx0g8wSI0NCQAA"
    "AEG7AjAAAEgPBw8FvADwBwCwU+bpsBHmILAg5iGwBOYhsAHmIbD+5iGwNOZDsKnmQLAE5kAx2/v0+oP7A3L4sFTm6blAQg8AMdJI"
    "AQwlAAABAEgDFCUAAAEA/8l17LBN5umwCubpsCrm9PSwWObp/8WD/QJyBLAB5vRIjQUp////SIkEJEjPsFXm6UiDxCjpNf/////D"
    "sCDmIEjPweEESI25AEAAAGaJB2bHRwIYAMZHBACIVwVIwegQZolHBsONtAAAjXQAAAAAAAAAAAD//wAAAJvPAP//AAAAk88A//8A"
    "AACbrwD//wAAAJPPAP//AAAA888A//8AAAD7rwBnAABQAIkAAAAAAAAAAAAARwCIAg8A"
)
_RESET = bytes.fromhex("ea000000f0")  # jmp f000:0000, where the code is
_FIRMWARE = (_CODE.ljust(0xFFF0, b"\xf4") + _RESET).ljust(0x10000, b"\xf4")
_STAGES = b"RPLXUSTM\n"
_EXIT = 85  # isa-debug-exit turns the firmware's 0x2a into 2n + 1
_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Accel:
    """The accelerator to use (kvm, tcg or none), and why not a better one."""

    name: str
    why: str


def probe(accel: str, cpu: str, binary: str = "qemu-system-x86_64", uid: int | None = None) -> str:
    """Run the firmware; empty when all stages were reached, else what went wrong.

    With `uid` it runs as a guest does, as that user with KVM's group: that root may open KVM says nothing about guests.
    """
    user = {} if uid is None else {"user": uid, "group": uid, "extra_groups": list(kvm_groups())}
    with tempfile.NamedTemporaryFile(suffix=".bin") as firmware:
        firmware.write(_FIRMWARE)
        firmware.flush()
        # By its descriptor: the folder of temporary files may be closed to a guest's user, the file is not.
        os.fchmod(firmware.fileno(), 0o644)
        argv = [
            binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", MACHINE_TYPE, "-m", "4", "-accel", accel, "-cpu", cpu,
            "-bios", f"/proc/self/fd/{firmware.fileno()}", "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
            "-debugcon", "stdio", "-sandbox", SANDBOX,
        ]  # fmt: skip
        try:
            done = subprocess.run(  # type: ignore[call-overload]
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_LIMIT_S,
                check=False,
                pass_fds=(firmware.fileno(),),
                **user,
            )
        except subprocess.TimeoutExpired as late:
            return f"no end after {_LIMIT_S:g} s, stages {(late.stdout or b'')[:9].decode(errors='replace')!r}"
        except OSError as error:
            return f"{binary}: {error.strerror}"
    if done.returncode == _EXIT and done.stdout == _STAGES:
        return ""
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if "warning" not in line]
    stages = done.stdout[:9].decode(errors="replace")
    return f"exit {done.returncode}, stages {stages!r}" + (f": {lines[0][:200]}" if lines else "")


def choose(uid: int | None = None) -> Accel:
    """KVM where it works for guests (as user `uid`), else emulation, else none."""
    no_kvm = probe("kvm", "host", uid=uid)
    if not no_kvm:
        return Accel("kvm", "")
    no_tcg = probe("tcg", "max", uid=uid)
    if not no_tcg:
        return Accel("tcg", f"KVM does not work here: {no_kvm}")
    return Accel("none", f"qemu does not work here: {no_tcg}")
