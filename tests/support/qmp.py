"""A small synchronous QMP client (QEMU Machine Protocol) for tests: commands, events, keys, pointer, screenshots."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

WAIT = 120.0
"""Seconds that a wait may take before it counts as a failure: generous, for a loaded machine without KVM."""

T = TypeVar("T")

_NAMES = {
    " ": "spc",
    "\n": "ret",
    "\t": "tab",
    "-": "minus",
    "=": "equal",
    "[": "bracket_left",
    "]": "bracket_right",
    ";": "semicolon",
    "'": "apostrophe",
    "`": "grave_accent",
    "\\": "backslash",
    ",": "comma",
    ".": "dot",
    "/": "slash",
}
_UNSHIFTED = dict(zip('!@#$%^&*()_+{}:"~|<>?', "1234567890-=[];'`\\,./", strict=True))


class QmpError(Exception):
    """qemu refused a command, or the connection ended."""


def wait_for(condition: Callable[[], T | None], what: str, limit: float = WAIT, pause: float = 0.05) -> T:
    """Call `condition` until its answer is true and return that; AssertionError after `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {limit:.0f} s for {what}"
        time.sleep(pause)


def qcodes(character: str) -> list[str]:
    """The keys (QKeyCode) that write this character on a United States keyboard."""
    if character in _UNSHIFTED:
        return ["shift", *qcodes(_UNSHIFTED[character])]
    if character.isupper():
        return ["shift", character.lower()]
    return [_NAMES.get(character, character)]


class Qmp:
    """One connection to a QMP unix socket. A socket serves one client at a time: a second one waits until `limit`."""

    def __init__(self, path: Path, limit: float = WAIT) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(limit)
        try:
            self._socket.connect(str(path))
            self._file = self._socket.makefile("rwb")
            self._read()
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the guest runs on."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except OSError as error:
            raise QmpError(f"{self.path}: {error}") from error
        if not line:
            raise QmpError(f"{self.path}: qemu closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer; QmpError when qemu refuses. Events that come meanwhile are kept."""
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of this name, which is taken out of `events`; QmpError when none comes in time."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(index)
            self.events.append(self._read())

    def press(self, *keys: str) -> None:
        """Press these keys (QKeyCode names) together, such as ctrl, alt, delete."""
        self.execute("send-key", keys=[{"type": "qcode", "data": key} for key in keys], hold_time=20)

    def type(self, text: str) -> None:
        """Type a text, at a pace that a slow guest follows."""
        for character in text:
            self.press(*qcodes(character))
            time.sleep(0.06)

    def move(self, x: int, y: int, size: tuple[int, int]) -> None:
        """Point at pixel (x, y) of a screen of this size, with an absolute pointer."""
        axes = (("x", x, size[0]), ("y", y, size[1]))
        events = [
            {"type": "abs", "data": {"axis": axis, "value": (2 * at + 1) * 0x7FFF // (2 * whole)}}
            for axis, at, whole in axes
        ]
        self.execute("input-send-event", events=events)

    def click(self, x: int, y: int, size: tuple[int, int], button: str = "left") -> None:
        """Point at pixel (x, y) and click once."""
        self.move(x, y, size)
        for down in (True, False):
            time.sleep(0.06)
            event = {"type": "btn", "data": {"button": button, "down": down}}
            self.execute("input-send-event", events=[event])

    def screendump(self, path: Path | None = None) -> bytes:
        """The screen as a PNG file. qemu itself writes it: by default beside the socket, where qemu may write."""
        path = path or self.path.with_suffix(".screen.png")
        try:
            self.execute("screendump", filename=str(path), format="png")
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(argv: Sequence[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Qmp]]:
    """Run qemu with these arguments and a QMP socket in `folder`; what is still running at the end is killed."""
    path = folder / "qmp.sock"
    log = folder / "qemu.log"
    command = [*argv, "-qmp", f"unix:{path},server=on,wait=off"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:

        def listening() -> bool:
            assert process.poll() is None, f"qemu ended by itself: {log.read_text()}"
            return path.exists()

        wait_for(listening, "the QMP socket")
        with Qmp(path) as qmp:
            yield process, qmp
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)
