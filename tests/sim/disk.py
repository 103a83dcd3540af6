"""The disk under an agent's journal: what was synced stays. It can be full or read-only for a while, a removal that was
not synced can be undone by a power cut, and the agent can die on both sides of each write."""

from __future__ import annotations

from collections.abc import Callable

from deskfleet.agent.journal import Entry, JournalError


class Disk:
    """A journal (agent/journal.py). `trouble` is "", "full" (nothing can be written, only removed) or "read-only"."""

    def __init__(self, point: Callable[[], None]) -> None:
        self.entries: dict[str, Entry] = {}
        self.generation: int | None = None
        self.trouble = ""
        #: Whether a write was refused since the agent started: then its memory may know more than the disk.
        self.refused = False
        self._unsynced: dict[str, Entry] = {}
        self._point = point

    @property
    def number(self) -> int:
        """The highest command number that the disk knows."""
        return max([self.generation or 0, *(entry.generation for entry in self.entries.values())])

    def load(self) -> tuple[dict[str, Entry], int | None]:
        self.refused = False
        return dict(self.entries), self.generation

    def put(self, entry: Entry) -> None:
        self._write(lambda: self.entries.__setitem__(entry.sid, entry))

    def set_generation(self, generation: int) -> None:
        self._write(lambda: setattr(self, "generation", generation))

    def forget(self, sid: str) -> None:
        if self.trouble == "read-only":
            self._refuse()
        self._point()
        entry = self.entries.pop(sid, None)
        if entry:
            self._unsynced[sid] = entry

    def _write(self, change: Callable[[], None]) -> None:
        if self.trouble:
            self._refuse()
        self._point()
        change()
        self._unsynced.clear()  # each write syncs the folder
        self._point()

    def _refuse(self) -> None:
        self.refused = True
        raise JournalError(f"the journal can't be written: {self.trouble}")

    def power_cut(self) -> None:
        """Removals that were not synced have not happened."""
        self.entries = self._unsynced | self.entries
        self._unsynced = {}

    def wipe(self) -> None:
        """A new disk."""
        self.entries, self.generation, self._unsynced = {}, None, {}
