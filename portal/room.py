"""How many threads may wait for other machines, so that one that hangs leaves some for everybody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE_S = 0.5


class Room:
    """Lets `most` threads wait for other machines at a time. `now` are seconds that never go back.

    One thread more waits a moment for its turn, since a healthy server answers many in that time; but not when one of
    those inside has waited for longer than that: the server hangs, and a class that logs in would hold all threads.
    """

    def __init__(self, most: int, now: Callable[[], float]) -> None:
        self._most = most
        self._now = now
        self._left = threading.Condition()
        self._since: dict[object, float] = {}

    @contextmanager
    def place(self) -> Iterator[bool]:
        """A place inside while the block runs; False when there is none."""
        me = object()
        with self._left:
            found = self._left.wait_for(lambda: self._free() or self._hangs(), _PATIENCE_S) and self._free()
            if found:
                self._since[me] = self._now()
        try:
            yield found
        finally:
            if found:
                with self._left:
                    del self._since[me]
                    self._left.notify()

    def _free(self) -> bool:
        return len(self._since) < self._most

    def _hangs(self) -> bool:
        return self._now() - min(self._since.values()) > _PATIENCE_S
