"""What a viewer sends over RFB (RFC 6143), read on the way: which messages are input of a person.

Message types besides those of the RFC are in the community's list (rfbproto.rst): what noVNC may send is known here.
"""

from __future__ import annotations

import struct

# What a client says before its first message: version (12 bytes), security type, ClientInit (7.1.1, 7.1.2, 7.3.1).
# qemu's displays ask for no password, so there is nothing in between.
_OPENING = 12 + 1 + 1

_KEY, _POINTER, _CUT = 4, 5, 6
_QEMU, _QEMU_KEY, _QEMU_AUDIO = 255, 0, 1
_INPUT = frozenset({_KEY, _POINTER, _CUT})

#: Message type -> its whole length in bytes, or how many bytes tell it.
_FIXED = {0: 20, 3: 10, _KEY: 8, _POINTER: 6, 150: 10, 250: 4}
_HEADS = {2: 4, _CUT: 8, 248: 9, 251: 8, _QEMU: 2}


class Inputs:
    """Follows one connection. `feed` takes what the client sent, in pieces of any size."""

    def __init__(self) -> None:
        self._skip = _OPENING
        self._head = b""
        self._lost = False

    def feed(self, data: bytes) -> bool:
        """Whether a person did something: pressed a key, moved or pressed the pointer, or gave a clipboard.

        A client that says something unknown counts as a person from then on: a desktop must not end as idle because
        its viewer could not be understood.
        """
        found = self._lost
        position = 0
        while position < len(data) and not self._lost:
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            need = 1 if not self._head else _need(self._head)
            step = min(max(1, need - len(self._head)), len(data) - position)
            self._head += data[position : position + step]
            position += step
            if len(self._head) < _need(self._head):
                continue
            length = _length(self._head)
            if length is None:
                self._lost = found = True
                break
            found = found or _is_input(self._head)
            self._skip = length - len(self._head)
            self._head = b""
        return found


def _need(head: bytes) -> int:
    """How many bytes of a message tell its length."""
    if head[0] == _QEMU and len(head) >= 2:
        return 4 if head[1] == _QEMU_AUDIO else 2
    return _HEADS.get(head[0], 1)


def _length(head: bytes) -> int | None:
    """The length of a message from its head; None for one that is not known."""
    kind = head[0]
    if kind in _FIXED:
        return _FIXED[kind]
    if kind == 2:  # SetEncodings (7.5.2)
        return 4 + 4 * int(struct.unpack(">H", head[2:4])[0])
    if kind == _CUT:  # ClientCutText (7.5.6); a negative length is the extended clipboard's
        return 8 + abs(int(struct.unpack(">i", head[4:8])[0]))
    if kind == 248:  # ClientFence
        return 9 + head[8]
    if kind == 251:  # SetDesktopSize: 16 bytes a screen
        return 8 + 16 * head[6]
    if kind == _QEMU:
        return _qemu(head)
    return None


def _qemu(head: bytes) -> int | None:
    if head[1] == _QEMU_KEY:
        return 12
    if head[1] == _QEMU_AUDIO:
        return {0: 4, 1: 4, 2: 10}.get(int(struct.unpack(">H", head[2:4])[0]))
    return None


def _is_input(head: bytes) -> bool:
    return head[0] in _INPUT or (head[0] == _QEMU and head[1] == _QEMU_KEY)
