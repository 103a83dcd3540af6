"""Another machine beside this one, in a network namespace: it has addresses, and notes who comes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: Waits on a TCP and a UDP port of every address and writes a line for each visit: to which of its addresses.
_LISTEN = """
import selectors, socket, struct, sys
port, waiting = int(sys.argv[1]), selectors.DefaultSelector()
for family, any_ in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
    stream, datagram = socket.socket(family), socket.socket(family, socket.SOCK_DGRAM)
    for s in (stream, datagram):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        s.bind((any_, port))
        waiting.register(s, selectors.EVENT_READ)
    stream.listen(50)
print("ready", flush=True)
while True:
    for key, _ in waiting.select():
        if key.fileobj.type == socket.SOCK_STREAM:
            client = key.fileobj.accept()[0]
            print("tcp", client.getsockname()[0], client.getpeername()[0], flush=True)
            client.close()
        else:
            data, peer = key.fileobj.recvfrom(100)
            print("udp", data.decode(errors="replace").strip(), peer[0], flush=True)
"""


def sh(*commands: str) -> None:
    """Run commands of ip(8); all must succeed."""
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {command}: {done.stderr}"


class Listener:
    """A service on every address of this machine, or of a namespace."""

    def __init__(self, port: int, log: Path, namespace: str = "") -> None:
        self._log = log
        where = ["ip", "netns", "exec", namespace] if namespace else []
        with log.open("w") as output:
            self._process = subprocess.Popen([*where, sys.executable, "-c", _LISTEN, str(port)], stdout=output)
        deadline = time.monotonic() + 30
        while "ready" not in log.read_text():
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.02)

    def visits(self) -> list[str]:
        """A line for each that came: protocol, address or text, from where."""
        return self._log.read_text().splitlines()[1:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Neighbour:
    """A machine at the other end of a cable that is plugged into `device` here, with these addresses (CIDR)."""

    def __init__(self, name: str, device: str, addresses: Sequence[str]) -> None:
        self.name = name
        self._device = device
        self._addresses = addresses

    def __enter__(self) -> Neighbour:
        sh(
            f"netns add {self.name}",
            f"link add {self._device} type veth peer name eth0 netns {self.name}",
            f"link set {self._device} up",
            f"-n {self.name} link set lo up",
            f"-n {self.name} link set eth0 up",
            *(f"-n {self.name} address add {address} dev eth0{_nodad(address)}" for address in self._addresses),
        )
        return self

    def __exit__(self, *_: object) -> None:
        sh(f"netns delete {self.name}")
        subprocess.run(["ip", "link", "delete", self._device], check=False, capture_output=True)


def _nodad(address: str) -> str:
    return " nodad" if ":" in address else ""
